"""The server scenario: an open loop. Requests arrive by a Poisson process whether or not earlier ones are done, and wait for one of `concurrency` slots.

1. Intended arrivals are drawn before an episode begins: exponential gaps of mean 1 / rate, seeded. What the server does cannot move them, so there is no
   coordinated omission (Tene; MLPerf LoadGen times from the scheduled arrival too): latency and time to first token count from the intended arrival.
2. An episode begins with an empty queue. Its first arrivals bring the queue to its usual length and do not count.
3. The reference kernel is read between episodes: one that was disturbed is dropped as a whole.
4. An episode ends at DEADLINE times its intended length. Who was not served by then has waited at least so long, and counts as that.
5. utilisation = rate x mean service time / concurrency, of quiet episodes where there are any. At 1 or more the queue grows for as long as one
   measures: then no percentile is a PASS.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtimes.collect import BUSY_FACTOR, Budget, Limit, Question, Report, Samples, warm_up
from runtimes.metrics import FAIL, INCONCLUSIVE, PASS, PercentileTest
from targets.errors import TrimtabError
from targets.spin import Spin

EPISODE_SECONDS, EPISODE_LEAST = 8.0, 24  # arrivals of an episode: those of so many seconds (or a quarter of the budget, if less), at least so many
DEADLINE = 3.0
LEAD_SHARE = 0.15  # of an episode's arrivals fill the queue
SERIES = ("server.latency_ms", "server.ttft_ms")
Serve = Callable[[], Mapping[str, float]]  # one request: {"latency_ms": ..., "ttft_ms": ...} since it was handed over; called from several threads


@dataclass(frozen=True)
class Load:
    """Arrivals a second, requests that may run at once, and the seed of the arrivals."""

    rate_per_s: float
    concurrency: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate_per_s < float("inf") or self.concurrency < 1:
            found = f"{self.rate_per_s} requests a second, {self.concurrency} at once"
            raise TrimtabError("server load", expected="a positive rate and at least one request at once", found=found, remedy="change the scenario")


@dataclass(frozen=True)
class Served:
    """One request, in seconds since its episode began."""

    intended: float
    begun: float
    first: float
    done: float


def arrivals(load: Load, count: int, episode: int) -> list[float]:
    """Intended arrivals of an episode, seconds since its beginning: the same for the same load and number."""
    gaps = np.random.default_rng([load.seed, episode]).exponential(1.0 / load.rate_per_s, count)
    return np.cumsum(gaps).tolist()


def episode(serve: Serve, intended: Sequence[float], concurrency: int) -> tuple[list[Served], int]:
    """Let requests arrive as intended; those that find no free slot wait in order. One row each, and how many of them (the first) were served (rule 4).

    Raises what `serve` raises.
    """
    end = DEADLINE * intended[-1] + 1.0
    waiting, lock = iter(enumerate(intended)), threading.Lock()
    served: list[Served | None] = [None] * len(intended)
    failed: list[BaseException] = []
    started = time.perf_counter() + 0.005

    def work() -> None:
        while not failed:
            with lock:
                number, arrival = next(waiting, (-1, 0.0))
            if number < 0 or time.perf_counter() - started > end:
                return
            ahead = started + arrival - time.perf_counter()
            if ahead > 0:
                time.sleep(ahead)
            begun = time.perf_counter() - started
            try:
                took = serve()
            except BaseException as error:  # told to the caller's thread, which raises it again
                failed.append(error)
                return
            done = time.perf_counter() - started
            served[number] = Served(arrival, begun, begun + took.get("ttft_ms", took["latency_ms"]) / 1e3, done)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    whole = sum(one is not None for one in served)
    return [one or Served(arrival, end, end, end) for arrival, one in zip(intended, served, strict=True)], whole


def open_loop(serve: Serve, load: Load, limits: Sequence[Limit], budget: Budget, spin: Spin, report: Report | None = None) -> tuple[Samples, float]:
    """Samples of `SERIES` until the limits are decided or the budget is spent, and the utilisation. Raises TrimtabError for a limit on another series."""
    first = warm_up(serve)
    known = [name for name in SERIES if name.removeprefix("server.") in first]
    unknown = sorted({limit.series for limit in limits} - set(known))
    if unknown:
        raise TrimtabError("limits", expected=f"series among {', '.join(known)}", found=", ".join(unknown), remedy="choose another limit for this scenario")
    spin.calibrate(serve, count=9)
    spin.crowded()  # from here on
    count = max(EPISODE_LEAST, round(min(EPISODE_SECONDS, budget.seconds / 4) * load.rate_per_s))
    lead = max(load.concurrency, round(LEAD_SHARE * count))
    questions = [Question(limit, budget.confidence, budget.slow_spell) for limit in limits]
    values: dict[str, list[float]] = {name: [] for name in known}
    service: list[float] = []  # of quiet episodes
    disturbed_service: list[float] = []
    dropped = episodes = disturbed = 0
    lost, started, before = 0.0, time.perf_counter(), spin.read()
    while True:
        opened = time.perf_counter()
        every, whole = episode(serve, arrivals(load, count + lead, episodes), load.concurrency)
        served = every[lead:]
        after = spin.read()
        episodes += 1
        quiet = before.quiet and after.quiet
        (service if quiet else disturbed_service).extend(one.done - one.begun for one in every[:whole])
        if quiet:
            values["server.latency_ms"] += [1e3 * (one.done - one.intended) for one in served]
            if "server.ttft_ms" in values:
                values["server.ttft_ms"] += [1e3 * (one.first - one.intended) for one in served]
        else:
            dropped, disturbed, lost = dropped + len(served), disturbed + 1, lost + time.perf_counter() - opened
        before, kept = after, len(values[known[0]])
        for question in questions:
            question.look(values[question.limit.series])
        seconds, took = time.perf_counter() - started, time.perf_counter() - opened
        if report is not None:
            report(kept, budget.most, seconds)
        decided = kept >= budget.least and all(question.result is not None for question in questions)
        spent = kept >= budget.most or seconds - lost + took > budget.seconds
        if decided or spent or seconds + took > (budget.max_seconds or BUSY_FACTOR * budget.seconds):
            break
    for question in questions:
        question.look(values[question.limit.series], last=True)
    utilisation = load.rate_per_s * float(np.mean(service or disturbed_service or [seconds])) / load.concurrency
    crowded = spin.crowded()
    tests = tuple((one.limit, _sustained(one.result, utilisation, crowded)) for one in questions if one.result is not None)
    looks = max((question.looks for question in questions), default=0)
    kept_values = {name: tuple(row) for name, row in values.items()}
    return Samples(kept_values, dropped, episodes, disturbed, spin.baseline_ms, time.perf_counter() - started, looks, tests, crowded), utilisation


def _sustained(test: PercentileTest, utilisation: float, crowded: str) -> PercentileTest:
    """Rule 5: no PASS where the queue only grows; and no FAIL where others took part of the machine, for a queue makes any delay of a slow server."""
    wrong = (test.outcome == PASS and not utilisation < 1) or (test.outcome == FAIL and crowded)
    return replace(test, outcome=INCONCLUSIVE) if wrong else test
