"""How often is a latency verdict wrong, and how many samples does a right one take? Simulated latency processes, the sampler's own looks.

    python benchmarks/verdicts.py                     simulate; print a table and write results/verdicts.json
    python benchmarks/verdicts.py --plot              the power curve of that, docs/power.svg
    python benchmarks/verdicts.py --known 20          the sampler at work on this machine: requests of known percentiles, each verdict in a fresh process
    python benchmarks/verdicts.py --real BUNDLE [--processes 20] [--kept FILE]      on this machine: series of fresh processes; run it again for more
    python benchmarks/verdicts.py --real BUNDLE --disturbed 2                       beside neighbours who come and go, or stay

A process gives latencies whose 50th, 90th, 95th or 99th percentile is 1 exactly. At a limit of 1 every PASS and every FAIL is wrong; at another limit the
share of PASS is the power.

A known percentile is that of requests which wait for a drawn time, on the clock: the machine's speed has no part in it, its disturbances do. Each process
judges one limit, 10 % above or below, as `compile` does: with the reference kernel, windows, looks and caps of `runtimes.collect`.

On a real machine each fresh process gives a series of requests, for as long as `compile` measures at the most. Its percentile is the true one (of these
seconds: the machine's speed wanders from minute to minute), and the series is judged at limits 10 % above and below it, by the sampler's own looks in its own
order; most end early in it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compiler.judge import MEASURE_SECONDS
from runtimes.bundle import open_bundle
from runtimes.collect import SLOW_SPELL, Budget, Call, Limit, Question, collect
from runtimes.metrics import CONFIDENCE, FAIL, INCONCLUSIVE, PASS, look_confidence, min_samples, spell_effect
from targets.machine import usable_cores
from targets.profile import load_profile
from targets.spin import Spin

RESULTS = Path(__file__).parent / "results" / "verdicts.json"
PLOT = Path(__file__).parent.parent / "docs" / "power.svg"
WAIT_MS = 5.0  # a request of known length, where its percentile is 1
SERIES = {"decoder": "tpot_ms", "encoder": "encode_ms"}
SHORT: dict[str, Any] = {"prompt_tokens": 32, "new_tokens": 16, "length": 32}
MOST = 2000  # requests; BenchOptions.most is larger, for short ones
SPREAD = 0.1  # of the logarithm of a latency, unless a process says otherwise
Rng = np.random.Generator
Process = Callable[[Rng, int, float], NDArray[np.float64]]  # (generator, requests, percentile) -> latencies with that percentile at 1


def quantile(percentile: float) -> float:
    return NormalDist().inv_cdf(percentile / 100)


def iid(rng: Rng, count: int, percentile: float) -> NDArray[np.float64]:
    """Independent, log-normal."""
    return np.exp(SPREAD * (rng.standard_normal(count) - quantile(percentile)))


def correlated(phi: float) -> Process:
    """Log-normal, each request like the one before it: AR(1) of correlation `phi`."""

    def draw(rng: Rng, count: int, percentile: float) -> NDArray[np.float64]:
        noise = rng.standard_normal(count) * math.sqrt(1 - phi**2)
        state, values = rng.standard_normal(), np.empty(count)
        for at in range(count):
            state = phi * state + noise[at]
            values[at] = state
        return np.exp(SPREAD * (values - quantile(percentile)))

    return draw


def bimodal(stay: float) -> Process:
    """A fast and a slow mode, as with two kinds of core or a cache that is lost now and then. The slow one, in which just 1 - p of the requests lie beyond the
    limit, is kept with probability `stay`."""

    def draw(rng: Rng, count: int, percentile: float) -> NDArray[np.float64]:
        share = min(2 * (1 - percentile / 100), 0.6)  # of the slow mode; half of it (at p50, five of six) is over the limit
        enter = (1 - stay) * share / (1 - share)
        slow, spells, filled = bool(rng.random() < share), list[NDArray[np.bool_]](), 0
        while filled < count:  # spells are geometric, so the one that the series begins in has the same length to come
            spells.append(np.full(int(rng.geometric(1 - stay if slow else enter)), slow))
            slow, filled = not slow, filled + len(spells[-1])
        modes = np.concatenate(spells)[:count]
        over = (1 - percentile / 100) / share
        centre = -0.02 * NormalDist().inv_cdf(1 - over)
        return np.exp(np.where(modes, centre, -0.5) + 0.02 * rng.standard_normal(count))

    return draw


def drifting(rise: float) -> Process:
    """Slower and slower (heat): the middle rises by the share `rise` over MOST requests (see `drift_rates`)."""

    def draw(rng: Rng, count: int, percentile: float) -> NDArray[np.float64]:
        return np.exp(SPREAD * rng.standard_normal(count) + np.log1p(rise * np.arange(count) / MOST))

    return draw


PROCESSES: dict[str, Process] = {
    "independent": iid,
    "AR(1) 0.3": correlated(0.3),
    "AR(1) 0.6": correlated(0.6),
    "AR(1) 0.9": correlated(0.9),
    "bimodal, stays 0.5": bimodal(0.5),
    "bimodal, stays 0.9": bimodal(0.9),
    "the same, told": bimodal(0.9),
}
SPELLS = {"the same, told": 10.0}  # what `slow_spell` says of them


def judged(values: Sequence[float], percentile: float, limit: float, slow_spell: float = SLOW_SPELL) -> tuple[str, int]:
    """(outcome, samples) of the sampler's looks at one series of latencies."""
    question = Question(Limit("x", percentile, limit), CONFIDENCE, slow_spell)
    at, count = question.next_look, len(values)
    while question.result is None and at < count:
        question.look(values[:at])
        at = question.next_look
    if question.result is None:
        question.look(values, last=True)
    assert question.result is not None
    return question.result.outcome, question.result.samples


def rates(process: Process, percentile: float, limit: float, trials: int, slow_spell: float = SLOW_SPELL) -> dict[str, float]:
    """Shares of PASS and FAIL and the median of samples, over `trials` machines. Up to MOST requests, or twice what the first look takes."""
    rng, first = np.random.default_rng(0), min_samples(percentile, 0, look_confidence(1))
    most = max(MOST, 2 * math.ceil(spell_effect(slow_spell) * first))
    found = [judged(process(rng, most, percentile), percentile, limit, slow_spell) for _ in range(trials)]
    outcomes = [outcome for outcome, _ in found]
    return {
        "trials": trials,
        "pass": outcomes.count(PASS) / trials,
        "fail": outcomes.count(FAIL) / trials,
        "samples": float(np.median([samples for _, samples in found])),
    }


def drift_rates(rise: float, percentile: float, trials: int, seed: int = 0) -> dict[str, float]:
    """Under drift the claim is about the requests that were measured: one look at `count` of them, the limit at the percentile of their mixture."""
    rng, outcomes, normal = np.random.default_rng(seed), [], NormalDist()
    for count in (130, 260, 520, 1040):
        middle = np.log1p(rise * np.arange(count) / MOST)
        low, high = -1.0, 2.0
        for _ in range(40):
            centre = (low + high) / 2
            over = np.mean([1 - normal.cdf(x) for x in (centre - middle) / SPREAD])
            low, high = (centre, high) if over > 1 - percentile / 100 else (low, centre)
        question = Question(Limit("x", percentile, float(np.exp((low + high) / 2))), CONFIDENCE)
        for _ in range(trials):
            values = drifting(rise)(rng, count, percentile).tolist()
            told = (question.test(values, 1, FAIL).outcome, question.test(values, 1, PASS).outcome)
            outcomes.append(next((one for one in told if one != INCONCLUSIVE), INCONCLUSIVE))
    return {"trials": len(outcomes), "pass": outcomes.count(PASS) / len(outcomes), "fail": outcomes.count(FAIL) / len(outcomes)}


def simulate(trials: int) -> dict[str, Any]:
    """Error rates at the limit, and the power curve."""
    errors, power = [], []
    for name, process in PROCESSES.items():
        for percentile in (50, 90, 95, 99):
            spell = SPELLS.get(name, SLOW_SPELL)
            row = {"process": name, "percentile": percentile, "slow_spell": spell, **rates(process, percentile, 1.0, trials, spell)}
            errors.append(row)
            print(f"{name:22s} p{percentile}: false PASS {row['pass']:.2%}, false FAIL {row['fail']:.2%}", flush=True)
    for percentile in (50, 90, 95):
        for headroom in (0.9, 0.95, 0.98, 1.02, 1.05, 1.1, 1.2):
            for name in ("independent", "AR(1) 0.6", *SPELLS):
                spell = SPELLS.get(name, SLOW_SPELL)
                row = {"process": name, "percentile": percentile, "limit": headroom, **rates(PROCESSES[name], percentile, headroom, trials // 5, spell)}
                power.append(row)
                print(f"{name:22s} p{percentile} limit {headroom}: PASS {row['pass']:.1%}, FAIL {row['fail']:.1%}, {row['samples']:.0f} samples", flush=True)
    for rise in (0.2, 0.5, 1.0):
        row = {"process": f"drift {rise:.0%}", "percentile": 95, **drift_rates(rise, 95, max(20, trials // 4))}
        errors.append(row)
        print(f"{row['process']:22s} p95: false PASS {row['pass']:.2%}, false FAIL {row['fail']:.2%}", flush=True)
    return {"errors": errors, "power": power}


def waiting(process: Process, percentile: float, seed: int) -> Call:
    """A request that takes WAIT_MS times the next value of the process, on the clock."""
    drawn = iter(process(np.random.default_rng(seed), 100_000, percentile).tolist())

    def request() -> dict[str, float]:
        started = time.perf_counter()
        end = started + WAIT_MS / 1e3 * next(drawn)
        time.sleep(max(0.0, end - time.perf_counter() - 1e-3))
        while time.perf_counter() < end:
            pass
        return {"wait_ms": (time.perf_counter() - started) * 1e3}

    return request


def live(job: tuple[str, float, float, int]) -> dict[str, Any]:
    """One verdict at `factor` times the percentile of a process of PROCESSES; as where nobody probed, for a slow machine cannot lengthen these requests."""
    name, percentile, factor, seed = job
    with Spin(usable_cores()) as spin:
        limit, budget = Limit("wait_ms", percentile, factor * WAIT_MS), Budget(least=1, seconds=MEASURE_SECONDS)
        samples = collect(waiting(PROCESSES[name], percentile, seed), [limit], budget, spin)
    (_, test), *_ = samples.tests
    told = {"outcome": test.outcome, "samples": test.samples, "dropped": samples.dropped, "crowded": samples.crowded}
    return {"process": name, "percentile": percentile, "limit": factor, **told}


def known_percentiles(repeats: int) -> list[dict[str, Any]]:
    """`repeats` fresh processes, one after another, for each of two processes, percentiles and limits."""
    import multiprocessing

    rows = []
    for name in ("independent", "AR(1) 0.6"):
        for percentile in (50.0, 95.0):
            for factor in (1.1, 0.9):
                with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                    found = pool.map(live, [(name, percentile, factor, seed) for seed in range(repeats)], chunksize=1)
                rows += found
                outcomes = [row["outcome"] for row in found]
                told = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in (PASS, FAIL, INCONCLUSIVE))
                middle, dropped = np.median([row["samples"] for row in found]), sum(row["dropped"] for row in found)
                print(f"{name:12s} p{percentile:.0f} limit {factor}: {told}; {middle:.0f} samples, {dropped} dropped in all", flush=True)
    return rows


def collected(bundle: Path, processes: int, kept: Path, known_ms: float) -> None:
    """One piece: fresh processes, MEASURE_SECONDS each, without limits. Appends their series to `kept`."""
    from runtimes.bench import BenchOptions, measure_in_child

    rows = json.loads(kept.read_text()) if kept.exists() else []
    for _ in range(processes):
        result = measure_in_child(bundle, BenchOptions(least=10_000, most=10_000, seconds=MEASURE_SECONDS, spin_ms=known_ms, **SHORT))
        rows.append({"kind": result.kind, "values": list(result.series[SERIES[result.kind]]), "dropped": result.dropped, "spin_ms": result.spin_ms})
        kept.write_text(json.dumps(rows))


def decided(kept: Path) -> dict[str, Any]:
    """Verdicts of the sampler's looks over each process's requests, for limits 10 % above and below their percentile."""
    rows = [row for row in json.loads(kept.read_text()) if row["values"]]
    found: dict[str, Any] = {"processes": len(rows), "series": SERIES[rows[0]["kind"]], "dropped": [row["dropped"] for row in rows]}
    for percentile in (50, 90):
        truths = [float(np.quantile(row["values"], percentile / 100)) for row in rows]
        told = found[f"p{percentile}"] = {"true_ms": float(np.median(truths)), "least_ms": min(truths), "most_ms": max(truths)}
        for side, factor in (("above", 1.1), ("below", 0.9)):
            judgements = [judged(row["values"], percentile, truth * factor) for row, truth in zip(rows, truths, strict=True)]
            outcomes = [outcome for outcome, _ in judgements]
            told[side] = {name: outcomes.count(name) for name in (PASS, FAIL, INCONCLUSIVE)} | {"samples": float(np.median([n for _, n in judgements]))}
        print(f"p{percentile} {told}")
    return found


def neighbour(on_s: float, off_s: float, until: float) -> None:
    """A process that keeps a processor busy, and sleeps for a while, and so on."""
    while time.time() < until:
        stop = time.time() + on_s
        while time.time() < stop:
            pass
        time.sleep(off_s)


def disturbed(bundle: Path, real: Mapping[str, Any], repeats: int, known_ms: float) -> list[dict[str, Any]]:
    """Limits 10 % above and below the p90 of `real` judged live, beside neighbours who come and go, or stay: (on, off) in seconds, and how many."""
    import multiprocessing

    from runtimes.bench import BenchOptions, measure_in_child

    rows = []
    for on_s, off_s, count in ((0.7, 0.7, 2), (1.0, 0.0, 1), (1.0, 0.0, 3)):
        for side, factor in (("above", 1.1), ("below", 0.9)):
            for _ in range(repeats):
                others = [multiprocessing.Process(target=neighbour, args=(on_s, off_s, time.time() + 60.0), daemon=True) for _ in range(count)]
                for other in others:
                    other.start()
                try:
                    options = BenchOptions(seconds=4.0, max_seconds=6.0, spin_ms=known_ms, **SHORT)
                    name = real["series"].replace("_ms", "_p90_ms")
                    result = measure_in_child(bundle, replace(options, limits={name: real["p90"]["true_ms"] * factor}))
                finally:
                    for other in others:
                        other.terminate()
                        other.join()
                outcome = result.tests[0]["outcome"]
                wrong = outcome == (FAIL if side == "above" else PASS)
                rows.append({"neighbours": count, "on_s": on_s, "off_s": off_s, "side": side, "outcome": outcome, "wrong": wrong, "crowded": result.crowded})
                print(rows[-1], flush=True)
    return rows


def plotted(power: Sequence[Mapping[str, Any]], file: Path) -> None:
    """The power curve: share of PASS and of FAIL over the limit's distance from the true percentile."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "trimtab", "svg.fonttype": "none", "font.size": 9}
    import matplotlib.pyplot as plt

    figure, panes = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True, layout="constrained")
    for pane, percentile in zip(panes, (50, 90, 95), strict=True):
        for process, style in (("independent", "-"), ("AR(1) 0.6", "--")):
            rows = sorted((row["limit"], row["pass"], row["fail"]) for row in power if (row["process"], row["percentile"]) == (process, percentile))
            limits = [100 * (row[0] - 1) for row in rows]
            for place, (name, colour) in enumerate(((PASS, "tab:green"), (FAIL, "tab:red")), 1):
                pane.plot(limits, [100 * row[place] for row in rows], style, color=colour, marker=".", label=f"{name}, {process}")
        pane.set_title(f"p{percentile}")
        pane.set_xlabel("limit over true percentile, %")
        pane.grid(alpha=0.3)
    panes[0].set_ylabel("verdicts, %")
    panes[2].legend(fontsize=7, loc="center right")
    figure.savefig(file, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--known", type=int, default=0, metavar="REPEATS", help="live verdicts on requests of known percentiles, this many of each kind")
    parser.add_argument("--real", type=Path, metavar="BUNDLE")
    parser.add_argument("--processes", type=int, default=20, help="of this piece")
    parser.add_argument("--kept", type=Path, default=Path("verdicts-series.json"), help="where pieces add their series")
    parser.add_argument("--disturbed", type=int, default=0, metavar="REPEATS", help="with --real: neighbours beside, this many times each")
    parser.add_argument("--spin-ms", type=float, help="reference kernel of a quiet machine; from `targets probe` if not given")
    parser.add_argument("--plot", action="store_true", help=f"draw {PLOT.name} from the results")
    given = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if given.plot:
        plotted(known["simulated"]["power"], PLOT)
        return 0
    known_ms = load_profile("here").spin_ms or 0.0 if given.spin_ms is None else given.spin_ms
    if given.known:
        found: dict[str, Any] = {"known": known_percentiles(given.known)}
    elif given.real and given.disturbed:
        series = SERIES[open_bundle(given.real).kind]
        if series not in known.get("real", {}):
            parser.error(f"--disturbed: expected {series} of undisturbed processes in {RESULTS.name}, found none; run --real BUNDLE alone first")
        rows = disturbed(given.real, known["real"][series], given.disturbed, known_ms)
        found = {"disturbed": {**known.get("disturbed", {}), series: rows}}
    elif given.real:
        if given.processes:
            collected(given.real, given.processes, given.kept, known_ms)
        told = decided(given.kept)
        found = {"real": {**known.get("real", {}), told["series"]: told}}
    else:
        found = {"simulated": simulate(given.trials)}
    RESULTS.write_text(json.dumps({**known, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
