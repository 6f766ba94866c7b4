"""What `trimtab compare` found, as lines, Markdown and one self-contained HTML file.

A row says for each bundle its value, and for each bundle after the first how it differs: a ratio (speed, size), a difference (scores) or a distance (KL).
"Differs" is said where the 95 % interval leaves out "no difference", and only there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compiler.report import words
from compiler.report.document import cleaned, worded
from compiler.report.markdown import code, escaped, folded, table

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SAME, OPEN = "no difference shown", "no interval"


def letter(place: int) -> str:
    """0 -> "A"; beyond Z a number."""
    return LETTERS[place] if place < len(LETTERS) else str(place + 1)


def finding(other: Mapping[str, Any]) -> str:
    """What the numbers of one bundle against the first mean: "1.24 times (1.18 to 1.31)", "-0.02 (-0.05 to 0.01), no difference shown"."""
    low, high = other.get("low"), other.get("high")
    if "ratio" in other:
        text, neutral = f"{words.number(other['ratio'])} times", 1.0
    elif "difference" in other:
        text, neutral = f"{other['difference']:+.3g}", 0.0
    else:
        text, neutral = words.number(other.get("value")), math.nan
    if low is not None and high is not None:
        text += f" ({words.number(low)} to {words.number(high)})"
        if math.isfinite(neutral):
            text += "" if not low <= neutral <= high else f", {SAME}"
    if "lost" in other:
        text += f", {other['lost']} lost, {other['won']} won"
    p = other.get("p")
    return text + (f", p {words.number(p, digits=2)}" if p is not None and math.isfinite(p) else "")


def named(metric: str) -> str:
    """A metric in plain words; what a report measures against the full model is here against the first bundle."""
    return words.label(metric).replace("the full model", "A")


def shown(value: float, unit: str) -> str:
    return "–" if not math.isfinite(value) else words.figure(value, unit)


def cells(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the one table."""
    names = [letter(place) for place in range(len(document["bundles"]))]
    heads = ["what", *names, *(f"{name} against A" for name in names[1:]), "samples"]
    rows = []
    for row in document["rows"]:
        values = [shown(value, row["unit"]) for value in row["values"]]
        rows.append([row["metric"], *values, *(finding(other) for other in row["against_first"]), f"{row['samples']:,}"])
    return heads, rows


def identity_lines(document: Mapping[str, Any]) -> list[str]:
    """ "A  support-assistant for here, int4-g32-asym, digest 1f0c..., out/support-assistant-here"."""
    return [
        f"{letter(place)}  {one['name']} for {one['target']}, {one['scheme']}, digest {one['digest'][:12]}, {one['folder']}"
        for place, one in enumerate(document["bundles"])
    ]


def as_lines(document: Mapping[str, Any]) -> list[str]:
    """Plain text in equal columns."""
    document = cleaned_document(document)
    heads, rows = cells(document)
    widths = [max(len(line[column]) for line in (heads, *rows)) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in (heads, *rows)]
    return [*identity_lines(document), "", *lines]


def render_markdown(document: Mapping[str, Any]) -> str:
    """For a pull request."""
    document = cleaned_document(document)
    heads, rows = cells(document)
    parts = ["## Bundles compared", "\n".join(f"* {escaped(line)}" for line in identity_lines(document))]
    parts.append(table(heads, [[code(row[0]), *(escaped(cell) for cell in row[1:])] for row in rows]))
    if document["samples"]:
        names = [letter(place) for place in range(len(document["bundles"]))]
        lines = [[escaped(words.one_line(text, 200)) for text in (one["prompt"], one["expected"] or "–", *one["answers"])] for one in document["samples"]]
        parts.append(folded("Answers that differ", table(["prompt", "expected", *names], lines)))
    return "\n\n".join(parts) + "\n"


def render_html(document: Mapping[str, Any]) -> str:
    """One file that loads nothing, in the style of the report."""
    from compiler.report import plots
    from compiler.report.html import template_environment

    document = cleaned_document(document)
    rows = []
    for row in document["rows"]:
        others = [{"text": finding(one), "bar": plots.ratio_bar(*ratio_of(one)) if "ratio" in one else ""} for one in row["against_first"]]
        values = [shown(value, row["unit"]) for value in row["values"]]
        rows.append({"row": row, "label": named(row["metric"]), "values": values, "others": others})
    names = [letter(place) for place in range(len(document["bundles"]))]
    return template_environment().get_template("compare.html.j2").render(document=document, rows=rows, names=names, sentences=sentences(document)) + "\n"


def ratio_of(one: Mapping[str, Any]) -> tuple[float, float | None, float | None]:
    return one["ratio"], one.get("low"), one.get("high")


def sentences(document: Mapping[str, Any]) -> list[str]:
    """What a reader of one line needs: for each other bundle, what is clearly different."""
    said = []
    for place, bundle in enumerate(document["bundles"][1:]):
        clear = []
        for row in document["rows"]:
            one = row["against_first"][place]
            neutral = 1.0 if "ratio" in one else 0.0
            known = one.get("low") is not None and one.get("high") is not None
            if row["metric"] == "size_mb" or ("value" not in one and known and not one["low"] <= neutral <= one["high"]):
                clear.append(f"{words.in_sentence(named(row['metric']))} {finding(one).split(' (')[0]}")
        said.append(f"{letter(place + 1)} ({bundle['name']}, {bundle['scheme']}) against A: {'; '.join(clear) or SAME}.")
    return said


def write_comparison(document: Mapping[str, Any], folder: Path) -> None:
    """compare.json, compare.html, compare.md. Raises OutputError."""
    from compiler.store import writing

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"compare.json": json.dumps(worded(document), indent=1, allow_nan=False) + "\n"}
        texts |= {"compare.html": render_html(document), "compare.md": render_markdown(document)}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def cleaned_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with unsafe characters of names and answers replaced (rule 4 of `compiler.report.document`)."""
    made: dict[str, Any] = cleaned(document)
    return made
