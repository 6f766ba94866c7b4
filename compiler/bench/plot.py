"""Results as a picture: one panel per metric, one bar per system with its interval, ours in another colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compiler.bench.questions import higher_is_better
from compiler.bench.rows import OURS
from compiler.bench.text import figure

SHOWN = ("decode_tok_s", "prefill_tok_s", "ttft_ms", "encode_ms", "peak_rss_mb", "file_mb", "load_s", "kl_mean", "cosine_min")
MINE, THEIRS = "#0b6e4f", "#9aa5b1"
COLUMNS = 3


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Write an SVG (or what the suffix says). Nothing is written when there is no row to show."""
    import matplotlib as mpl

    rows = [row for row in results["rows"] if row["metric"].startswith(SHOWN)]
    metrics = sorted({row["metric"] for row in rows}, key=_place)
    if not metrics:
        return
    with mpl.rc_context({"svg.hashsalt": "trimtab", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        from matplotlib.figure import Figure

        lines = -(-len(metrics) // COLUMNS)
        systems = list(dict.fromkeys(row["system"] for row in rows))
        image = Figure(figsize=(4.2 * COLUMNS, lines * (0.7 + 0.24 * len(systems))), layout="constrained")
        panels = image.subplots(lines, COLUMNS, squeeze=False).flatten()
        for panel in panels[len(metrics) :]:
            panel.set_visible(False)
        for panel, metric in zip(panels, metrics, strict=False):
            _panel(panel, metric, [row for row in rows if row["metric"] == metric])
        image.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(panel: Any, metric: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bars, the best on top."""
    ranked = sorted(rows, key=lambda row: row["value"], reverse=not higher_is_better(metric))
    for at, row in enumerate(ranked):
        low, high = (row["value"] if row[end] is None else row[end] for end in ("low", "high"))
        spread = [[max(0.0, row["value"] - low)], [max(0.0, high - row["value"])]]
        panel.barh(at, row["value"], color=MINE if row["system"].startswith(OURS) else THEIRS, xerr=spread, error_kw={"lw": 0.8})
        panel.text(max(row["value"], high), at, f" {figure(row['value'])}", va="center")
    panel.set_yticks(range(len(ranked)), [row["system"] for row in ranked])
    panel.set_title(f"{metric} ({rows[0]['unit']}, {'more' if higher_is_better(metric) else 'less'} is better)", x=-0.3)
    panel.margins(x=0.15)


def _place(metric: str) -> tuple[int, int, str]:
    """As in SHOWN, then by context or size."""
    name, _, condition = metric.partition("@")
    sizes = [int(part) for part in condition.split("x")] if condition else [0]
    total = 1
    for size in sizes:
        total *= size
    return next(at for at, shown in enumerate(SHOWN) if name.startswith(shown)), total, metric
