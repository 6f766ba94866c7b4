"""`render_html`: one self-contained page that a manager reads in a minute and an engineer digs into.

The page loads nothing: style and drawings are inline, there is no script, and a Content-Security-Policy forbids any
request. All text goes through jinja2's autoescape. No time stamp, no random id: the same document gives the same bytes.
Each function below shapes one section; the template only places them, and leaves out what is empty.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from compiler.report import plots, words
from compiler.report import sections as extra
from compiler.report.document import CheckRow, LayerRow, Report, TaskRow, read_document
from compiler.report.verdict import INFO

UNITS = {"gb_s": "GB/s", "mb_s": "MB/s", "tok_s": "tokens/s", "gflops": "GFLOP/s", "gops": "GOP/s", "mb": "MB", "gb": "GB", "kb": "kB", "ms": "ms", "us": "µs"}
NORM, EMBEDDING, ATTENTION, FEED_FORWARD, HEAD, OTHER = "Norms", "Embedding and output head", "Attention", "Feed-forward", "Classifier", "Other"
LAYER_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (  # the first match wins
    (NORM, re.compile(r"norm|ln_", re.I)),
    (EMBEDDING, re.compile(r"embed|lm_head|\bwte\b|\bwpe\b", re.I)),
    (HEAD, re.compile(r"classifier|pooler|score", re.I)),
    (ATTENTION, re.compile(r"attn|attention|[qkvo]_proj|qkv", re.I)),
    (FEED_FORWARD, re.compile(r"mlp|ffn|feed_?forward|intermediate|output\.dense|gate|up_proj|down_proj|fc\d|lin\d", re.I)),
)


def render_html(document: Mapping[str, Any] | Report) -> str:
    """The whole report as one HTML file. Raises BundleError for a document that is not a report."""
    return template_environment().get_template("report.html.j2").render(**sections(read_document(document))) + "\n"


def template_environment() -> Environment:
    """Templates of this package, everything escaped."""
    environment = Environment(
        loader=PackageLoader("compiler.report", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=words.number, size=words.size, seconds=words.seconds, percent=words.percent, line=words.one_line, short=short_digest)
    return environment


def sections(report: Report) -> dict[str, Any]:
    """Everything the template places, section by section; an empty section is falsy."""
    return {
        "report": report,
        "headline": words.headline(report),
        "mark": words.MARKS,
        "subtitle": subtitle(report),
        "emulation": words.emulation(report).removeprefix("Emulation: "),
        "tiles": tiles(report),
        "limits": [limit_row(check) for check in report.verdict.told if check.outcome != INFO] if report.verdict else [],
        "behaviours": [limit_row(check) for check in report.verdict.behaviours if check not in report.verdict.told] if report.verdict else [],
        "infos": [limit_row(check) for check in report.verdict.notes] if report.verdict else [],
        "latency": [series_row(report, name, samples) for name, samples in report.series.items()],
        "tasks": task_tables(report.task),
        "adapters": task_tables(report.adapters),
        "student": extra.student(report),
        "kinds": size_by_kind(report.layers),
        "stages": stage_tables(report),
        "robustness": extra.robustness(report),
        "effects": extra.side_effects(report),
        "position": extra.position(report),
        "savings": extra.savings(report),
        "build": build_rows(report),
        "layers": layer_rows(report.layers),
        "frontier": plots.frontier(*frontier_points(report)),
        "kl_strip": plots.strip([(layer.name, layer.kl) for layer in report.layers if layer.kl is not None and math.isfinite(layer.kl)], " nats"),
        "layer_strip": plots.strip([(layer.name, layer.error) for layer in report.layers if layer.error is not None and math.isfinite(layer.error)]),
        "samples": [{"row": row, "same": same_text(row.reference, row.bundle), "right": same_text(row.expected, row.bundle)} for row in report.samples],
        "recipe": json.dumps(report.lineage.recipe, indent=2, ensure_ascii=False, default=str) if report.lineage.recipe else "",
        "machine": facts(report.target.model_dump()),
        "files_total": sum(file.bytes or 0 for file in report.files),
        "glossary": glossary(report),
    }


def subtitle(report: Report) -> str:
    """One line of what was compiled: "llama decoder · 134.5 M parameters · 1 delta · 2 cores, avx512_vnni"."""
    model, target, deltas = report.model, report.target, report.lineage.deltas
    parts = [" ".join(part for part in (model.family, model.kind) if part)]
    if model.task:
        parts.append(words.one_line(model.task, 60))
    if model.parameters:
        scale, unit = (1e9, "billion") if model.parameters >= 1e9 else (1e6, "million")
        parts.append(f"{words.number(model.parameters / scale)} {unit} parameters")
    if deltas:
        parts.append(f"{len(deltas)} delta{'s' if len(deltas) > 1 else ''} merged in")
    machine = [f"{target.cores} cores" if target.cores else "", words.one_line(plain(target.isa), 60) if target.isa else ""]
    parts.append("for " + ", ".join(part for part in machine if part) if any(machine) else "")
    return " · ".join(part for part in parts if part)


def tile(name: str, value: str, note: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def tiles(report: Report) -> list[dict[str, str]]:
    """The few figures a manager asks for, each only when the document holds it."""
    return [*size_tile(report), *speed_tiles(report), *memory_tile(report), *task_tile(report), *build_tile(report)]


def check_of(report: Report, name: str) -> CheckRow | None:
    return next((check for check in report.verdict.checks if check.name == name), None) if report.verdict else None


def size_tile(report: Report) -> list[dict[str, str]]:
    check, total = check_of(report, "size_mb"), sum(file.bytes or 0 for file in report.files)
    count = check.measured * 1e6 if check and math.isfinite(check.measured) else total
    if not count:
        return []
    full = 4 * (report.model.parameters or 0)
    note = f"{words.number(full / count, digits=2)}× smaller than its weights in fp32" if full > count else ""
    return [tile("Size on disk", words.size(round(count)), note)]


def speed_tiles(report: Report) -> list[dict[str, str]]:
    """Median first token, tokens a second, and time to encode, from the raw samples."""
    found = []
    for name, samples in report.series.items():
        median, base = plots.percentile(sorted(samples), 50), name.split("@")[0]
        shape = f", {name.partition('@')[2]}" if "@" in name else ""
        if base == "ttft_ms":
            found.append(tile("First word after", words.figure(median, "ms"), f"median of {len(samples):,} requests{shape}"))
        elif base == "tpot_ms" and median > 0:
            found.append(tile("Writing speed", f"{words.number(1000 / median)} tokens/s", f"{words.figure(median, 'ms')} a token, median{shape}"))
        elif base == "encode_ms":
            found.append(tile("Time to encode", words.figure(median, "ms"), f"median of {len(samples):,} requests{shape}"))
    return found[:3]


def memory_tile(report: Report) -> list[dict[str, str]]:
    check = check_of(report, "peak_rss_mb")
    return [tile("Peak memory", words.figure(check.measured, check.unit or "MB"), "while answering")] if check else []


def task_tile(report: Report) -> list[dict[str, str]]:
    """The bundle's first task figure against the base model's."""
    last = next((row for row in report.task if row.system == "bundle"), None)
    if last is None:
        return []
    base = next((row for row in report.task if row.system == "base" and row.metric == last.metric), None)
    return [tile(words.label(last.metric), words.number(last.value), f"base model: {words.number(base.value)}" if base else "")]


def build_tile(report: Report) -> list[dict[str, str]]:
    """Seconds of the build; validation is named apart, because it takes what the limits ask for."""
    spent = {"build": 0.0, "validate": 0.0}
    for record in report.records:
        spent["validate" if record.stage.startswith("validate") else "build"] += record.seconds or 0.0
    if not any(spent.values()):
        return []
    note = f"and measured in {words.seconds(spent['validate'])}" if spent["validate"] else ""
    return [tile("Built in", words.seconds(spent["build"]), note)]


def limit_row(check: CheckRow) -> dict[str, Any]:
    """One line of the limits table, in words."""
    return {
        "check": check,
        "label": words.label(check.name),
        "measured": words.figure(check.measured, check.unit, against=check.limit),
        "limit": f"{words.limit_sign(check)} {words.figure(check.limit, check.unit, against=check.measured)}" if check.limit is not None else "",
        "bar": plots.limit_bar(check),
        "interval": words.interval(check),
        "result": words.RESULTS.get(check.outcome, ""),
        "mark": words.MARKS.get(check.outcome, ""),
        "false_pass": "none" if check.false_pass == 0 else words.percent(check.false_pass),
    }


def series_limits(report: Report, series: str) -> list[plots.Limit]:
    """Percentile limits of one latency series: `ttft_p95_ms` belongs to `ttft_ms`, `encode_p95_ms@1x32` to `encode_ms@1x32`.

    A limit without a shape belongs to a shaped series when it is the only one of its base.
    """
    base, _, shape = series.partition("@")
    alone = sum(name.split("@")[0] == base for name in report.series) == 1
    found = []
    for check in report.verdict.checks if report.verdict else ():
        match = words.PERCENTILE.fullmatch(check.name)
        if match is None or check.limit is None or check.outcome == INFO or not math.isfinite(check.limit):
            continue
        of_base = f"{match['base']}_{match['unit']}" == base
        if of_base and ((match["shape"] or "").lstrip("@") == shape or (not match["shape"] and alone)):
            found.append(plots.Limit(float(match["percentile"]), check.limit, check.outcome))
    return found


def series_row(report: Report, name: str, samples: Sequence[float]) -> dict[str, Any]:
    """Both drawings of one latency series and the figures under them."""
    ordered, limits, title = sorted(samples), series_limits(report, name), words.label(name)
    axis = plots.axis_for(ordered, limits)
    return {
        "name": name,
        "title": title,
        "histogram": plots.histogram(ordered, limits, title),
        "cumulative": plots.cumulative(ordered, limits, title),
        "count": len(ordered),
        "dropped": report.dropped(name),
        "beyond": sum(value > axis.high for value in ordered),
        "lowest": ordered[0],
        "highest": ordered[-1],
        "percentiles": [(f"p{p:g}", plots.percentile(ordered, p) if plots.enough(len(ordered), p) else None) for p in plots.PERCENTILES],
    }


def task_tables(rows: Sequence[TaskRow]) -> list[dict[str, Any]]:
    """One table per metric: each system with its bar on a common scale, and what it means in a sentence."""
    tables = []
    for metric in dict.fromkeys(row.metric for row in rows):
        group = [row for row in rows if row.metric == metric]
        known = [value for row in group for value in (row.value, row.high) if value is not None and math.isfinite(value)]
        top = 1.0 if max(known, default=0) <= 1 else max(known) * 1.05
        lines = [{"row": row, "bar": plots.interval_bar(row.value, row.low, row.high, top)} for row in group]
        tables.append({"metric": metric, "label": words.label(metric), "lines": lines, "sentence": task_sentence(group)})
    return tables


def task_sentence(group: Sequence[TaskRow]) -> str:
    """ "From 0.31 with the base model to 0.86 in the bundle; compiling moved it by -0.02." """
    value = {row.system: row.value for row in group}
    merged = value.get("base+delta fp32")
    if "bundle" not in value:
        return ""
    parts = []
    if "base" in value:
        parts.append(f"from {words.number(value['base'])} with the base model to {words.number(value['bundle'])} in the bundle")
    if merged is not None:
        moved = value["bundle"] - merged
        parts.append(f"compiling moved it by {moved:+.3g}" if moved else "compiling did not move it")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "." if text else ""


def layer_kind(name: str) -> str:
    return next((kind for kind, pattern in LAYER_KINDS if pattern.search(name)), OTHER)


def size_by_kind(layers: Sequence[LayerRow]) -> list[dict[str, Any]]:
    """Bytes, share and bits per weight of each kind of layer, the largest first."""
    total = sum(layer.bytes or 0 for layer in layers)
    groups: dict[str, list[LayerRow]] = {}
    for layer in layers:
        groups.setdefault(layer_kind(layer.name), []).append(layer)
    rows = []
    for kind, group in groups.items():
        stored, weights = sum(layer.bytes or 0 for layer in group), sum(math.prod(layer.shape) for layer in group if layer.shape)
        share = stored / total if total else 0.0
        schemes = ", ".join(dict.fromkeys(layer.scheme for layer in group if layer.scheme))
        bar = plots.share_bar(share, f"{kind}: {words.percent(share)} of the weights")
        rows.append(
            {
                "kind": kind,
                "count": len(group),
                "bytes": stored,
                "share": share,
                "bits": 8 * stored / weights if weights else None,
                "schemes": schemes,
                "bar": bar,
            }
        )
    return sorted(rows, key=lambda row: -row["bytes"]) if total else []


def stage_tables(report: Report) -> list[dict[str, Any]]:
    """One table per metric: its value after each stage, and what that stage changed."""
    tables = []
    for metric in dict.fromkeys(row.metric for row in report.stages):
        group = [row for row in report.stages if row.metric == metric]
        top = max((abs(row.value) for row in group if math.isfinite(row.value)), default=0.0)
        lines = []
        for place, row in enumerate(group):
            change = row.value - group[place - 1].value if place else None
            bar = plots.share_bar(abs(row.value) / top if top else 0.0, f"{row.stage}: {words.number(row.value)}")
            lines.append({"row": row, "change": f"{change:+.3g}" if change is not None else "–", "bar": bar})
        tables.append({"metric": metric, "label": words.label(metric), "lines": lines})
    return tables


def build_rows(report: Report) -> list[dict[str, Any]]:
    """What each stage cost and what it said about itself."""
    return [{**line, "measured": facts(line["record"].measured)} for line in extra.costs(report)]


def frontier_points(report: Report) -> tuple[list[tuple[float, float, str]], tuple[float, float] | None, tuple[float, float] | None]:
    """The curve of `auto` as (MB, nats, what stands there), the point it expected, and what was measured; empty without auto."""
    if report.allocation is None:
        return [], None, None
    chosen = report.allocation.expected
    curve = [
        (point.size_mb, point.kl_mean, "" if point.tpot_ms is None else f", {words.number(point.tpot_ms)} ms a token") for point in report.allocation.curve
    ]
    measured = {check.name: check.measured for check in report.verdict.checks} if report.verdict else {}
    found = (measured["size_mb"], measured["kl_mean"]) if {"size_mb", "kl_mean"} <= set(measured) else None
    return curve, (chosen.size_mb, chosen.kl_mean), found


def layer_rows(layers: Sequence[LayerRow]) -> list[dict[str, Any]]:
    """The per-layer table, in model order."""
    top = max((layer.error for layer in layers if layer.error is not None and math.isfinite(layer.error)), default=0.0)
    return [
        {
            "layer": layer,
            "shape": " × ".join(str(side) for side in layer.shape),
            "bar": plots.share_bar(layer.error / top, words.number(layer.error)) if layer.error is not None and top > 0 else Markup(""),
        }
        for layer in layers
    ]


def same_text(left: str | None, right: str | None) -> bool | None:
    """Whether two outputs are equal but for white space at their ends; None when one is missing."""
    return None if left is None or right is None else left.strip() == right.strip()


def facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A mapping as (name, text) pairs: `read_gb_s: 32.1` -> ("read (GB/s)", "32.1"); nested values joined, empty ones left out."""
    return [(spoken(name), plain(value)) for name, value in values.items() if value not in (None, "", [], (), {})]


def spoken(name: str) -> str:
    """A key in words, its unit in brackets: `memory_mb` -> "memory (MB)"."""
    for suffix, unit in UNITS.items():
        if name.endswith(f"_{suffix}"):
            return f"{name[: -len(suffix) - 1].replace('_', ' ')} ({unit})"
    return name.replace("_", " ")


def plain(value: Any) -> str:
    """Any JSON value as readable text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return words.number(value, digits=4)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value)
    return str(value)


def short_digest(digest: str) -> str:
    """The first 12 hex digits, with its algorithm dropped; the full one stands in the title."""
    return digest.rpartition(":")[2][:12]


def glossary(report: Report) -> list[tuple[str, str]]:
    """The metrics that this report names, each with its sentence."""
    names = [check.name for check in report.verdict.checks] if report.verdict else []
    names += [*report.series, *(row.metric for row in report.task), *(row.metric for row in report.stages)]
    rows = [metric for metric in (words.metric_of(name) for name in names) if metric]
    return list(dict.fromkeys((metric.label, metric.meaning) for metric in rows))
