"""Results as text: one line per system, one column per metric, and the ratios below. Plain, so that a pipe can read it; the same in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def figure(value: float) -> str:
    """Four figures at most. 1234.5 -> 1234, 12.345 -> 12.3, 0.04567 -> 0.0457; near 1, where cosines live, four decimals: 0.99909 -> 0.9991"""
    if 0.99 <= value < 1:
        return f"{value:.4f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def cell(row: Mapping[str, Any] | None, key: str = "value") -> str:
    """`131 [128, 133]`, or `131` where there is no interval."""
    if row is None:
        return "-"
    spread = f" [{figure(row['low'])}, {figure(row['high'])}]" if row["low"] is not None and row["low"] != row["high"] else ""
    return figure(row[key]) + spread


def grid(rows: Sequence[Mapping[str, Any]], name: str, key: str) -> list[list[str]]:
    """A header and one line per system (or per peer). Columns in the order of the rows."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    found = {(row[name], row["metric"]): row for row in rows}
    systems = list(dict.fromkeys(row[name] for row in rows))
    return [["", *metrics], *[[system, *(cell(found.get((system, metric)), key) for metric in metrics)] for system in systems]]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def as_text(results: Mapping[str, Any]) -> str:
    """The table, then how many times better than each peer. Metrics stand in rows here: a terminal is narrow."""
    return "\n\n".join("\n".join([*([title] if title else []), aligned(lines)]) for title, lines in _tables(results))


def as_markdown(results: Mapping[str, Any]) -> str:
    """The same as Markdown, with what it was measured on."""
    conditions = results["conditions"]
    head = f"{conditions['threads']} threads, {conditions['date']}; machine {conditions['machine'][:12]}. Median of rounds [95 % interval]."
    parts = [head, *("\n\n".join([*([title] if title else []), markdown(lines)]) for title, lines in _tables(results))]
    return "\n\n".join(parts) + "\n"


def _tables(results: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """(title, lines) of the table and of the ratios, whichever has rows."""
    tables = []
    if results["rows"]:
        tables.append(("", _turned(grid(results["rows"], "system", "value"))))
    if results["ratios"]:
        title = "Times better than the peer, within each round (above 1: trimtab is ahead):"
        tables.append((title, _turned(grid(results["ratios"], "against", "ratio"))))
    if results.get("roofline"):
        columns = ("phase", "megabytes", "gop", "bound_ms", "bound_by", "measured_ms", "share")
        lines = [[text if isinstance(text := row[name], str) else figure(text) for name in columns] for row in results["roofline"]]
        tables.append(
            ("Roofline of trimtab: bytes over measured bandwidth, operations over measured rates; share = bound / measured:", [list(columns), *lines])
        )
    return tables


def _turned(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    return [list(column) for column in zip(*lines, strict=True)]
