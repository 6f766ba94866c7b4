"""Sections of the HTML report about robustness, side effects, position among builds, and cost and return: each function shapes one for the template."""

from __future__ import annotations

from typing import Any

from compiler.report import plots, words
from compiler.report.document import Report


def robustness(report: Report) -> list[dict[str, Any]]:
    """A line for each noise and metric: full model and bundle, clean and noisy, and what noise costs the bundle more."""
    lines = []
    for row in report.robustness:
        clear = row.low is not None and row.low > 0
        word = "more than the full model" if clear else "as much as the full model, as far as this shows"
        if row.high is not None and row.high < 0:
            word = "less than the full model"
        excess = f"{row.excess:+.3g}" + (f" ({words.number(row.low)} to {words.number(row.high)})" if row.low is not None and row.high is not None else "")
        moved = [f"{words.number(before)} → {words.number(after)}" for before, after in ((row.reference_clean, row.reference), (row.bundle_clean, row.bundle))]
        lines.append({"row": row, "label": words.label(row.metric), "reference": moved[0], "bundle": moved[1], "excess": excess, "word": word})
    return lines


def side_effects(report: Report) -> list[dict[str, Any]]:
    """A line for each metric of the control set: base, merged, bundle, and the change with its interval."""
    lines = []
    for row in report.side_effects:
        ratio = row.metric.startswith("perplexity")
        change = f"{words.number(row.change)} times" if ratio else f"{row.change:+.3g}"
        if row.low is not None and row.high is not None:
            change += f" ({words.number(row.low)} to {words.number(row.high)})"
        neutral = 1.0 if ratio else 0.0
        shown = row.low is not None and row.high is not None and not row.low <= neutral <= row.high
        whose = {"merge": "the deltas", None: "compiling"}.get(row.stage, row.stage) if shown else ""
        values = [words.number(value) for value in (row.base, row.merged, row.bundle)]
        lines.append({"row": row, "label": words.label(row.metric), "values": values, "change": change, "whose": whose})
    return lines


def position(report: Report) -> dict[str, Any] | None:
    """The drawing of all builds of this model, and their table, the front first."""
    if report.position is None or len(report.position.builds) < 2:
        return None
    builds = report.position.builds
    this = next((one for one in builds if one.this), None)
    beaten = sum(this is not None and one.size_mb <= this.size_mb and one.loss < this.loss for one in builds)
    sentence = "No build of these models on these data is smaller and loses less." if this is not None and this.front else ""
    if this is not None and not this.front:
        others = f"{beaten} other builds are no larger and lose" if beaten != 1 else "1 other build is no larger and loses"
        sentence = f"{others} less: this scheme is not the best at its size."
    rows = sorted(builds, key=lambda one: (one.size_mb, one.loss))
    name = "mean KL, nats" if report.position.metric == "kl_mean" else "1 - mean cosine"
    return {"plot": plots.builds(builds, name), "rows": rows, "loss": name, "sentence": sentence}


def student(report: Report) -> dict[str, Any] | None:
    """Sizes, what training changed, the course of it as a drawing, and the layers that went."""
    told = report.distil
    if told is None:
        return None
    sizes = [told.parameters.get(name, 0) for name in ("teacher", "student")]
    settings = told.settings
    objectives = " + ".join(f"{weight:g} {name}" for name, weight in dict(settings.get("objectives") or {}).items())
    if not told.steps:
        sentence = "It was not trained."
    elif not told.best_step:
        sentence = "Training brought nothing better: the student is as it was cut."
    else:
        sentence = f"Best after step {told.best_step} of {told.steps} ({told.tokens:,} tokens, {objectives}, {settings.get('train')})."
    data = dict(settings.get("data") or {})
    return {
        "row": told,
        "sizes": [words.number(size / 1e6) + " M" for size in sizes],
        "share": words.percent(sizes[1] / sizes[0]) if sizes[0] else "–",
        "sentence": sentence,
        "data": f"{data.get('origin', '?')} ({data.get('rows', '?')} rows, sha256 {str(data.get('sha256', ''))[:12]})",
        "dropped": ", ".join(f"{row.layer} ({words.number(row.influence)})" for row in told.dropped),
        "plot": plots.course([(check.step, check.held) for check in told.checks], told.measure),
    }


def costs(report: Report) -> list[dict[str, Any]]:
    """A line for each stage: time with its bar, processor time, memory, bytes, energy."""
    economics = report.economics
    told = {row.stage: row for row in economics.stages} if economics else {}
    longest = max((record.seconds or 0 for record in report.records), default=0)
    lines = []
    for record in report.records:
        share = (record.seconds or 0) / longest if longest else 0
        cost = told.get(record.stage)
        lines.append({"record": record, "bar": plots.share_bar(share, words.seconds(record.seconds)), "energy": cost.energy_wh if cost else None})
    return lines


def savings(report: Report) -> list[dict[str, Any]]:
    """A line for each stated alternative: both figures, the difference, the ratio."""
    rows = report.economics.savings if report.economics else ()
    return [
        {
            "row": row,
            "alternative": words.figure(row.alternative, row.unit),
            "bundle": words.figure(row.bundle, row.unit),
            "saved": words.figure(row.alternative - row.bundle, row.unit),
            "times": f"{words.number(row.alternative / row.bundle, digits=2)} ×" if row.bundle > 0 else "–",
        }
        for row in rows
    ]
