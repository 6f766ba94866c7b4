"""Validate: measurements against limits. Each check carries its evidence; a missing measurement never passes.

Rules:
1. Exact quantities (sizes) are compared as they are.
2. Accuracy metrics are estimates on the evaluation data: PASS when the 95 % bound on the bad side keeps the limit, FAIL
   when the bound on the good side misses it, INCONCLUSIVE between. A metric without bounds is compared as it is. Only
   exact intervals state a false-pass probability: a bootstrap's coverage is approximate, and the check says so.
3. Latency percentiles follow the exact binomial rule at 99 % (design section 7, `runtimes.metrics.percentile_test`); so do throughputs, by the median over
   requests. The sampler has judged them (`runtimes.collect`), and knows how far they depend on each other.
4. Peak memory, load time and cold start take the worst of several fresh processes.
5. Where a bundle serves unmerged adapters, an accuracy limit must hold for each of them: one check per adapter, `kl_mean@NAME`. A limit `noise.X` must hold
   for every kind of noise that was evaluated: `typos.X`, `casing.X` ...
6. Time beside company (`runtimes.collect`, rule 4) passes limits as it is, and fails them only where it would if it were CROWDED times shorter.
7. A latency, memory or load limit of a machine that is not this one is INCONCLUSIVE: a number measured here says nothing there, and a smaller machine
   that was emulated here is still another machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from compiler.limits import BY_NAME, PERCENTILE, SCENE_PERCENTILE, Quantity, bare, covers, plain, quantity
from compiler.report.verdict import FAIL, INCONCLUSIVE, INFO, PASS, Check
from runtimes.collect import CROWDED, SLOW_SPELL
from runtimes.metrics import design_effect, percentile_test, spell_effect

ACCURACY_CONFIDENCE = 0.95
PERCENTILES = (50, 90, 95, 99)
FAITHFUL = "export_faithful"  # the name of what `compiler.evaluation.faithful` checks


@dataclass(frozen=True)
class Measured:
    """What was found out about a bundle on this machine.

    size_mb    bytes a device needs, /1e6
    accuracy   name -> {value, low, high, samples}, from evaluation
    series     name -> raw samples in ms: ttft, tpot, encode (one per request)
    scalars    name -> values of fresh processes: peak_rss_mb, load_s
    medians    name -> per-request throughputs: prefill_tok_s, decode_tok_s
    tests      limit name -> the test that the sampler decided while sampling (its confidence pays for every look)
    dropped    samples of disturbed windows that were left out, by scenario: single, batch, server
    here       whether the machine that was measured is the target
    built_in   checks that no recipe asks for: behaviours, and whether the graph is the model
    blamed     the stage that an accuracy loss against the merged model is due to (`compiler.evaluation.attribution`)
    merged     name -> value of the merged fp32 model itself, for limits that it misses already
    conditions one sentence a scenario: threads, prompt and output lengths, how requests came
    emulated   what was imposed to make this machine as small as the target; "" for nothing
    crowded    why everything timed may be slower than this machine is, "" where nobody else was seen on it
    """

    size_mb: float
    accuracy: Mapping[str, Mapping[str, Any]]
    series: Mapping[str, Sequence[float]]
    scalars: Mapping[str, Sequence[float]]
    medians: Mapping[str, Sequence[float]]
    tests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    here: bool = True
    built_in: Sequence[Check] = ()
    blamed: str = "quantize + export"
    merged: Mapping[str, float] = field(default_factory=dict)
    conditions: Mapping[str, str] = field(default_factory=dict)
    emulated: str = ""
    crowded: str = ""


def checks(limits: Mapping[str, float], measured: Measured) -> list[Check]:
    """One check per limit (rule 5: or per adapter), the built-in checks, then INFO rows for what was measured besides."""
    made = []
    for name, limit in limits.items():
        what = quantity(name, f"limits.{name}")
        each = [found for found in measured.accuracy if covers(name, found)] or [name]
        made += [_check(replace(what, name=one), limit, measured) for one in each]
    decided = {check.name for check in made}
    return made + list(measured.built_in) + [row for row in _info(measured) if row.name not in decided]


def _check(what: Quantity, limit: float, measured: Measured) -> Check:
    if what.name == "size_mb":
        return Check(what.name, measured.size_mb, what.unit, limit, PASS if measured.size_mb <= limit else FAIL, note="exact")
    if what.name in measured.accuracy:
        return _accuracy(what, limit, measured.accuracy[what.name], _stage(what, limit, measured))
    if match := PERCENTILE.fullmatch(what.name) or SCENE_PERCENTILE.fullmatch(what.name):
        found = _percentile(what, limit, float(match["percentile"]), measured.series.get(match["series"], ()), measured)
    elif what.name in measured.scalars:
        found = _worst(what, limit, measured.scalars[what.name])
    elif what.name in measured.medians:
        found = _median(what, limit, measured.medians[what.name], measured)
    else:
        return Check(what.name, float("nan"), what.unit, limit, INCONCLUSIVE, 0, note="not measured for this kind of model or data")
    if measured.crowded and found.outcome == FAIL and what.name in ("load_s", "cold_start_ms"):  # requests were judged so while sampling
        found = found if found.measured / CROWDED > limit else replace(found, outcome=INCONCLUSIVE, note=f"{found.note}; {measured.crowded}")
    if not measured.here and found.outcome != INFO:
        note = "measured on another machine than the target: never a verdict about it"
        note = f"emulation on another machine ({measured.emulated}): never a verdict about the target" if measured.emulated else note
        return Check(**{**vars(found), "outcome": INCONCLUSIVE, "note": note})
    return found


def built_in(name: str, measured: float, limit: float, note: str, tried: bool = True) -> Check:
    """A behaviour as a check: PASS when `measured` is at most `limit`, INFO when it could not be tried."""
    outcome = INFO if not tried else PASS if measured <= limit else FAIL  # NaN is at most nothing: FAIL
    return Check(name, measured, "", limit, outcome, note=note, kind="behaviour")


def _stage(what: Quantity, limit: float, measured: Measured) -> str:
    """Whose doing a value is: "merge" where the merged fp32 model itself misses the limit, else the stage that cost most."""
    told = measured.accuracy[what.name].get("stage")
    if told:
        return str(told)
    own = measured.merged.get(what.name)
    if own is not None and not (own <= limit if what.at_most else own >= limit):
        return "merge"
    return measured.blamed


def _accuracy(what: Quantity, limit: float, metric: Mapping[str, Any], stage: str) -> Check:
    """Rule 2. `at_most` limits worry about the upper bound, others about the lower."""
    value, low, high = metric["value"], metric["low"], metric["high"]
    worst, best = (high, low) if what.at_most else (low, high)
    worst, best = (value if worst is None else worst), (value if best is None else best)
    keeps = (lambda bound: bound <= limit) if what.at_most else (lambda bound: bound >= limit)
    outcome = PASS if keeps(worst) else INCONCLUSIVE if keeps(best) else FAIL  # NaN keeps nothing: FAIL
    confidence = None if low is None else ACCURACY_CONFIDENCE
    exact = bool(metric.get("exact", metric.get("false_pass") is not None))
    false_pass = (1 - ACCURACY_CONFIDENCE) / 2 if exact and low is not None else None
    note = "exact interval" if exact else "bootstrap interval: its confidence is approximate" if low is not None else ""
    return Check(what.name, value, what.unit, limit, outcome, metric["samples"], low, high, confidence, false_pass, stage, note)


def _percentile(what: Quantity, limit: float | None, percentile: float, samples: Sequence[float], measured: Measured) -> Check:
    scene = scene_of(what.name)
    dropped = measured.dropped.get(scene, 0)
    told = [
        measured.conditions.get(scene, ""),
        "" if len(samples) else "no undisturbed sample",
        f"{dropped} disturbed samples left out" if dropped else "",
        "emulation" if measured.emulated else "",
        measured.crowded,
    ]
    note = "; ".join(part for part in told if part)
    if not len(samples):
        return Check(what.name, float("nan"), what.unit, limit, INCONCLUSIVE, 0, note=note)
    effect = max(spell_effect(SLOW_SPELL), design_effect(samples, percentile))
    test = measured.tests.get(what.name) or asdict(percentile_test(samples, limit, percentile, effect=effect))
    return Check(
        what.name,
        float("nan") if test["estimate"] is None else test["estimate"],
        what.unit,
        limit,
        INFO if limit is None else test["outcome"],
        test["samples"],
        test["lower"],
        test["upper"],
        test["confidence"],
        None if limit is None else test["false_pass"],
        note=note,
    )


def scene_of(name: str) -> str:
    """The scenario that a series or a limit belongs to: `server.latency_p99_ms` -> "server", `ttft` -> "single"."""
    scene, dot, _ = name.partition(".")
    return scene if dot else "single"


def _worst(what: Quantity, limit: float, values: Sequence[float]) -> Check:
    worst = max(values)
    return Check(what.name, worst, what.unit, limit, PASS if worst <= limit else FAIL, len(values), min(values), worst, note="worst of fresh processes")


def _median(what: Quantity, limit: float, values: Sequence[float], measured: Measured) -> Check:
    """As the sampler judged it. A limit that is not positive needs no sampler: every rate is above it."""
    note = "; ".join(part for part in ("median over requests", measured.crowded) if part)
    if limit <= 0:
        return Check(what.name, float(np.median(values)), what.unit, limit, PASS, len(values), note=note)
    test = measured.tests[what.name]
    middle = float("nan") if test["estimate"] is None else test["estimate"]
    evidence = (test["samples"], test["lower"], test["upper"], test["confidence"], test["false_pass"])
    return Check(what.name, middle, what.unit, limit, test["outcome"], *evidence, note=note)


def _info(measured: Measured) -> list[Check]:
    rows = [Check("size_mb", measured.size_mb, "MB", note="exact")]
    for name, metric in measured.accuracy.items():
        rows.append(Check(name, metric["value"], _unit(name), None, INFO, metric["samples"], metric["low"], metric["high"]))
    for series, samples in measured.series.items():
        for percentile in PERCENTILES:
            if len(samples):
                what = quantity(f"{series}_p{percentile}_ms", series)
                rows.append(_percentile(what, None, float(percentile), samples, measured))
    for name, values in measured.scalars.items():
        rows.append(Check(name, max(values), _unit(name), None, INFO, len(values), min(values), max(values), note="worst of fresh processes"))
    for name, values in measured.medians.items():
        rows.append(Check(name, float(np.median(values)), _unit(name), None, INFO, len(values), note="median over requests"))
    return rows


def _unit(name: str) -> str:
    """The unit of a measurement; "" for those that nobody can limit."""
    return next((BY_NAME[known].unit for known in (plain(name), bare(name)) if known in BY_NAME), "")
