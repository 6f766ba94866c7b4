"""Collect samples of a latency until its limits are decided, and drop those that someone else disturbed.

1. A window is one or more calls between two readings of the reference kernel (`targets.spin`). When either reading is off, its samples are dropped and counted.
2. After each doubling of the samples the limits are looked at. Look k may be wrong with probability (1-c) / 2^k, so all looks together keep c
   (`runtimes.metrics.look_confidence`). PASS and FAIL have a budget each: failing needs few samples, passing what the percentile needs. Both take slow spells
   to last as long as the budget says, however few have come (`runtimes.metrics.spell_effect`).
3. The end is a decision on every limit, or the cap on calls or seconds: what is undecided then stays INCONCLUSIVE. Calls and time of dropped windows do
   not count, until they are twice what the caps allow: a busy machine measures longer, but not for ever. Short calls reach
   a small cap within one window, which may be a disturbed one: FEWEST_WINDOWS are tried before calls end it.
4. Company that is there all the time shows in no window (`Spin.crowded`). It only ever adds time, so a PASS beside it stands; a FAIL stands when the limit
   is missed even by latencies CROWDED times shorter, else it becomes INCONCLUSIVE.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtimes.metrics import (
    CONFIDENCE,
    FAIL,
    INCONCLUSIVE,
    LEAST_WORTH,
    PASS,
    PercentileTest,
    design_effect,
    look_confidence,
    min_samples,
    percentile_test,
    spell_effect,
)
from targets.errors import TrimtabError
from targets.spin import Spin

LIMIT_NAME = re.compile(r"((?:server|batch)\.(?:latency|ttft)|ttft|tpot|encode)_p(\d{1,2}(?:\.\d+)?)_ms")
RATES = ("prefill_tok_s", "decode_tok_s", "batch.tok_s", "batch.texts_s")  # a limit on one is on its median, from below
FIRST_LOOK = 32  # fewer samples cannot show how much they depend on each other
SLOW_SPELL = 1.25  # requests that slow spells last on average, if nobody says otherwise: now and then two or three, where none has come yet
CALIBRATIONS = 9
CROWDED = 8.0  # two threads that share two processors with three others and wait for each other lose less
BUSY_FACTOR = 3  # times the caps, dropped windows included
FEWEST_WINDOWS = 24
WARMUP_MOST = 8
WARMUP_SETTLED = 0.95  # warm once a call is no longer 5 % faster than the best before it

Call = Callable[[], Mapping[str, float]]  # one measured request: series -> value, e.g. {"ttft_ms": 31.0, "tpot_ms": 6.2}
Report = Callable[[int, int, float], None]  # samples, cap, seconds


@dataclass(frozen=True)
class Limit:
    """ "The `percentile`-th percentile of `series` is at most `limit`": Limit("ttft_ms", 95, 400.0).

    at_least  "the median of `series` is at least `limit`", of a rate: judged as the time that it is the inverse of
    """

    series: str
    percentile: float
    limit: float
    at_least: bool = False


def named_limit(name: str, value: float) -> Limit:
    """A limit by its name in a recipe: a percentile in ms (`ttft_p95_ms`, `server.latency_p99_ms`), or one of RATES. Raises TrimtabError."""
    match = LIMIT_NAME.fullmatch(name)
    if not (match or name in RATES) or not 0 < value < float("inf"):
        expected = f"ttft, tpot or encode, as in `ttft_p95_ms`, or {', '.join(RATES)}, and a positive number"
        raise TrimtabError(f"limit {name}", expected=expected, found=repr(value), remedy="change the limit")
    return Limit(f"{match[1]}_ms", float(match[2]), value) if match else Limit(name, 50.0, value, at_least=True)


@dataclass(frozen=True)
class Budget:
    """When to stop. Without limits, `least` samples are taken; with them, sampling goes on to a decision or to `most` calls or `seconds`."""

    least: int = 20
    most: int = 10_000
    seconds: float = 120.0
    window_ms: float = 40.0
    confidence: float = CONFIDENCE
    max_seconds: float = 0.0  # the hard end, dropped windows included; 0: BUSY_FACTOR times `seconds`
    slow_spell: float = SLOW_SPELL

    def __post_init__(self) -> None:
        if not (1 <= self.least <= self.most and self.seconds > 0):
            found = f"{self.least} to {self.most} requests in {self.seconds} s"
            raise TrimtabError("measuring budget", expected="1 <= least <= most and a positive time", found=found, remedy="change the options")


@dataclass(frozen=True)
class Samples:
    """What was measured. values: series -> one value per kept request, in order. Latencies are in ms.

    dropped       requests in windows that the reference kernel called disturbed
    windows       windows in all; disturbed: how many of them were dropped
    spin_ms       baseline of the reference kernel
    looks         most looks that one limit had at a PASS: whoever judges the samples again does so at look_confidence(looks); 0 without limits
    tests         one per limit, at the confidence that its last look had
    crowded       why a FAIL was not believed (rule 4), "" where no company was seen
    """

    values: Mapping[str, tuple[float, ...]]
    dropped: int
    windows: int
    disturbed: int
    spin_ms: float
    seconds: float
    looks: int
    tests: tuple[tuple[Limit, PercentileTest], ...]
    crowded: str = ""


class Question:
    """One limit and the looks taken at it: `result` is None until it is decided."""

    def __init__(self, limit: Limit, confidence: float, slow_spell: float = SLOW_SPELL) -> None:
        self.limit, self._confidence, self._least_effect = limit, confidence, spell_effect(slow_spell)
        self.looks = 0
        self._fail_look = 1
        fewest = min_samples(limit.percentile, 0, look_confidence(1, confidence))
        self._next_fail = max(FIRST_LOOK, math.ceil(self._least_effect * LEAST_WORTH))
        self._next_pass = max(self._next_fail, math.ceil(self._least_effect * fewest))
        self.result: PercentileTest | None = None

    @property
    def next_look(self) -> int:
        """Samples at which looking is worth while again."""
        return min(self._next_fail, self._next_pass)

    def look(self, values: Sequence[float], last: bool = False) -> None:
        """Look when it is time to, or for the last time; keeps the result once it is decided, and when it is the last."""
        if self.result is not None:
            return
        if len(values) >= self._next_fail or last:
            test = self.test(values, self._fail_look, FAIL)
            self._fail_look, self._next_fail = self._fail_look + 1, 2 * self._next_fail
            self.result = test if test.outcome == FAIL else None
        if self.result is None and (len(values) >= self._next_pass or last):
            test = self.test(values, self.looks + 1, PASS)
            self.looks, self._next_pass = self.looks + 1, 2 * self._next_pass
            self.result = test if test.outcome == PASS or last else None

    def beside(self, crowded: str, values: Sequence[float]) -> PercentileTest:
        """The result by rule 4, once all looks are taken."""
        assert self.result is not None  # `look` with last=True leaves one
        if not crowded or self.result.outcome != FAIL:
            return self.result
        quicker = self.test(values, self._fail_look, FAIL, CROWDED)
        return self.result if quicker.outcome == FAIL else replace(self.result, outcome=INCONCLUSIVE)

    def test(self, values: Sequence[float], look: int, wanted: str, quicker: float = 1.0) -> PercentileTest:
        """`wanted` (PASS or FAIL) or INCONCLUSIVE, at the confidence of a look; `quicker`: as if every request took so many times less."""
        times, percentile = np.asarray(values, np.float64), self.limit.percentile
        times, limit = (1 / times, 1 / self.limit.limit) if self.limit.at_least else (times, self.limit.limit)
        times = times / quicker
        # Latencies under half of the limit are alike here, and those over twice of it: how they vary says nothing about crossing it.
        near = np.clip(times, limit / 2, limit * 2)
        effect = max(self._least_effect, design_effect(near, percentile))
        if wanted == FAIL:  # it may be told after few samples, and few do not show how the tail depends: all ranks count
            effect = max(effect, design_effect(near))
        test = percentile_test(times, limit, percentile, look_confidence(look, self._confidence), effect)
        test = test.inverse() if self.limit.at_least else test
        return test if test.outcome == wanted else replace(test, outcome=INCONCLUSIVE)


def collect(call: Call, limits: Sequence[Limit], budget: Budget, spin: Spin, report: Report | None = None) -> Samples:
    """Measure `call` as the head of this file says. Raises TrimtabError when a limit names a series that the call does not give."""
    first = warm_up(call)
    unknown = sorted({limit.series for limit in limits} - set(first))
    if unknown:
        raise TrimtabError(
            "limits", expected=f"series among {', '.join(first)}", found=", ".join(unknown), remedy="choose another limit for this kind of bundle"
        )
    spin.calibrate(call, count=min(CALIBRATIONS, max(3, budget.least)))  # who wants three requests for their memory waits for no more
    spin.crowded()  # from here on
    questions = [Question(limit, budget.confidence, budget.slow_spell) for limit in limits]
    values: dict[str, list[float]] = {name: [] for name in first}
    kept = dropped = windows = disturbed = 0
    lost = 0.0  # seconds of dropped windows
    started, before = time.perf_counter(), spin.read()
    while True:
        opened = time.perf_counter()
        window = _window(call, budget.window_ms)
        after = spin.read()
        windows += 1
        if before.quiet and after.quiet:
            for sample in window:
                for name, value in sample.items():
                    values[name].append(value)
            kept += len(window)
        else:
            dropped, disturbed, lost = dropped + len(window), disturbed + 1, lost + time.perf_counter() - opened
        before = after
        for question in questions:
            question.look(values[question.limit.series])
        seconds = time.perf_counter() - started
        if report is not None:
            report(kept, budget.most, seconds)
        decided = kept >= budget.least and all(question.result is not None for question in questions)
        spent = kept >= budget.most or seconds - lost >= budget.seconds
        enough = windows >= FEWEST_WINDOWS and kept + dropped >= BUSY_FACTOR * budget.most
        if decided or spent or enough or seconds >= (budget.max_seconds or BUSY_FACTOR * budget.seconds):
            break
    for question in questions:
        question.look(values[question.limit.series], last=True)
    crowded = spin.crowded()
    tests = tuple((question.limit, question.beside(crowded, values[question.limit.series])) for question in questions)
    looks = max((question.looks for question in questions), default=0)
    return Samples({name: tuple(row) for name, row in values.items()}, dropped, windows, disturbed, spin.baseline_ms, seconds, looks, tests, crowded)


def warm_up(call: Call) -> Mapping[str, float]:
    """Call until a call is no longer clearly faster than the best before it, at most eight times; returns the last sample."""
    best = float("inf")
    for _ in range(WARMUP_MOST):
        started = time.perf_counter()
        sample = call()
        seconds = time.perf_counter() - started
        if seconds >= WARMUP_SETTLED * best:
            break
        best = min(best, seconds)
    return sample


def _window(call: Call, window_ms: float) -> list[Mapping[str, float]]:
    """Calls for about `window_ms`, at least one."""
    samples: list[Mapping[str, float]] = []
    started = time.perf_counter()
    while not samples or (time.perf_counter() - started) * 1e3 < window_ms:
        samples.append(call())
    return samples
