"""How often is a latency verdict wrong, and how many samples does a right one take? Simulated latency processes, the sampler's own looks.

    python benchmarks/verdicts.py                     simulate; print a table and write results/verdicts.json
    python benchmarks/verdicts.py --real BUNDLE       limits 10 % above and 10 % below the true percentile, on this machine, and a disturbed machine

A process gives latencies whose 50th, 90th, 95th or 99th percentile is 1 exactly. At a limit of 1 every PASS and every FAIL is wrong; at another limit the
share of PASS is the power.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.collect import FIRST_FAIL_LOOK, Limit, Question
from runtimes.metrics import CONFIDENCE, FAIL, PASS

RESULTS = Path(__file__).parent / "results" / "verdicts.json"
MOST = 2000  # requests, as BenchOptions.most
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
        share = 2 * (1 - percentile / 100)  # of the slow mode; half of it is over the limit
        share = min(share, 0.6)
        enter = (1 - stay) * share / (1 - share)
        slow, modes, chances = rng.random() < share, np.empty(count, bool), rng.random(count)
        for at in range(count):
            slow = chances[at] < (stay if slow else enter)
            modes[at] = slow
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
}


def judged(values: Sequence[float], percentile: float, limit: float, confidence: float = CONFIDENCE) -> tuple[str, int]:
    """(outcome, samples) of the sampler's looks at one series of latencies."""
    question = Question(Limit("x", percentile, limit), confidence)
    at, count = FIRST_FAIL_LOOK, len(values)
    while question.result is None and at < count:
        question.look(values[:at])
        at = question.next_look
    if question.result is None:
        question.look(values, last=True)
    assert question.result is not None
    return question.result.outcome, question.result.samples


def rates(process: Process, percentile: float, limit: float, trials: int, seed: int = 0, most: int = MOST) -> dict[str, float]:
    """Shares of PASS and FAIL and the median of samples, over `trials` machines."""
    rng = np.random.default_rng(seed)
    found = [judged(process(rng, most, percentile), percentile, limit) for _ in range(trials)]
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
        outcomes += [question._test(drifting(rise)(rng, count, percentile).tolist(), 1).outcome for _ in range(trials)]
    return {"trials": len(outcomes), "pass": outcomes.count(PASS) / len(outcomes), "fail": outcomes.count(FAIL) / len(outcomes)}


def simulate(trials: int) -> dict[str, Any]:
    """Error rates at the limit, and the power curve."""
    errors, power = [], []
    for name, process in PROCESSES.items():
        for percentile in (50, 90, 95, 99):
            row = {"process": name, "percentile": percentile, **rates(process, percentile, 1.0, trials)}
            errors.append(row)
            print(f"{name:22s} p{percentile}: false PASS {row['pass']:.2%}, false FAIL {row['fail']:.2%}", flush=True)
    for percentile in (50, 90, 95):
        for headroom in (0.9, 0.95, 0.98, 1.02, 1.05, 1.1, 1.2):
            for name in ("independent", "AR(1) 0.6"):
                row = {"process": name, "percentile": percentile, "limit": headroom, **rates(PROCESSES[name], percentile, headroom, trials // 5)}
                power.append(row)
                print(f"{name:22s} p{percentile} limit {headroom}: PASS {row['pass']:.1%}, FAIL {row['fail']:.1%}, {row['samples']:.0f} samples", flush=True)
    for rise in (0.2, 0.5):
        row = {"process": f"drift {rise:.0%}", "percentile": 95, **drift_rates(rise, 95, max(20, trials // 4))}
        errors.append(row)
        print(f"{row['process']:22s} p95: false PASS {row['pass']:.2%}, false FAIL {row['fail']:.2%}", flush=True)
    return {"errors": errors, "power": power}


def real(bundle: Path, repeats: int, seconds: float) -> dict[str, Any]:
    """Limits 10 % above and below the percentile of a long run, and a machine with a neighbour who comes and goes."""
    from runtimes.bench import BenchOptions, measure_in_child

    started = time.perf_counter()
    common: dict[str, Any] = {"prompt_tokens": 32, "new_tokens": 8, "length": 32, "seconds": seconds}
    long = measure_in_child(bundle, BenchOptions(least=400, most=400, **{**common, "seconds": 60.0}))
    series = "tpot" if long.kind == "decoder" else "encode"
    truth = float(np.percentile(long.series[f"{series}_ms"], 90))
    rows: dict[str, Any] = {"true_p90_ms": truth, "series": series, "above": [], "below": []}
    for side, factor in (("above", 1.1), ("below", 0.9)):
        for _ in range(repeats):
            result = measure_in_child(bundle, BenchOptions(limits={f"{series}_p90_ms": truth * factor}, **common))
            test = result.tests[0]
            rows[side].append({"outcome": test["outcome"], "samples": test["samples"], "dropped": result.dropped})
    rows["wall_s"] = time.perf_counter() - started
    print(json.dumps({key: value for key, value in rows.items() if key not in ("above", "below")}))
    for side in ("above", "below"):
        print(side, [row["outcome"] for row in rows[side]])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = {"real": real(given.real, given.repeats, given.seconds)} if given.real else {"simulated": simulate(given.trials)}
    RESULTS.write_text(json.dumps({**known, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
