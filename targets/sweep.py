"""The kernel table measured case by case, each run beside the reference kernel, and again what a slow stretch of the machine fell on.

A machine that others use too is slow for seconds on end, which is as long as a case has. So every few runs have a reading of the reference kernel beside them
(`targets.spin`), of a point's runs that half counts beside which it was quickest, and what the budget still holds goes to chains and cases with the slowest
readings.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from targets.kernels import Case, CaseRun, Point, copies, open_case
from targets.passes import CHAINS, PASSES, ChainPasses, Samples
from targets.profile import KernelTime
from targets.spin import TOLERANCE, Spin

RUNS_LEAST = 3
CHAIN_SHARE, AGAIN_SHARE = 0.4, 0.15  # of the seconds: for the chains, and for second looks
CHAIN_LOOK = 3  # times what a case gets: a chain takes a second to open
BLOCK_S = 0.05  # of runs, between two readings
QUIET = 0.1  # of the readings


@dataclass(frozen=True)
class Timed:
    """Rows of one case, and the slowest of its points' readings of the reference kernel: what stood beside the samples that count."""

    rows: tuple[KernelTime, ...]
    spin_ms: float


@dataclass
class Sweep:
    """The kernel table until `deadline`, with the passes of the chains spread over it, and second looks at what a slow stretch of the machine fell on."""

    cases: Sequence[tuple[Case, tuple[Point, ...]]]
    chains: ChainPasses
    deadline: float
    tell: Callable[[str, int], None]
    timed: dict[int, Timed] = field(default_factory=dict)

    def run(self) -> list[KernelTime]:
        count, seconds = len(self.cases), self.deadline - time.perf_counter()
        a_pass, again = CHAIN_SHARE * seconds / PASSES, AGAIN_SHARE * seconds
        starts = {round(number * count / (PASSES - 1)): number for number in range(PASSES)}
        for done in range(count + 1):
            if done == count:
                self._again(self.deadline - a_pass, (seconds * (1 - CHAIN_SHARE) - again) / count)
            left = self.deadline - time.perf_counter()
            if done in starts and left > 0:
                self.tell(f"layers in a row, pass {starts[done] + 1} of {PASSES}", done)
                self.chains.run(left if done == count else min(a_pass, left))
                left = self.deadline - time.perf_counter()
            to_come = again + a_pass * sum(start > done for start in starts)
            if done < count and (left > to_come or not self.timed):  # one at least, however late it is
                self.tell(str(self.cases[done][0]), done)
                self.timed[done] = self._time(done, max(0.0, left - to_come) / (count - done))
        return [row for place in sorted(self.timed) for row in self.timed[place].rows] + self.chains.rows()

    def _time(self, place: int, seconds: float) -> Timed:
        case, points = self.cases[place]
        return time_case(case, points, self.chains.spin, seconds)

    def _again(self, until: float, seconds: float) -> None:
        """Times again, until then, what was timed beside slow readings: chains first, which all predictions rest on, and the slowest of each first.

        Of a case that counts which was timed beside the quicker readings; a chain has more samples.
        """
        looks: Counter[tuple[bool, int]] = Counter()
        while time.perf_counter() + seconds < until:
            quiet_ms = float(np.quantile([*self.chains.readings, *(timed.spin_ms for timed in self.timed.values())], QUIET))
            beside = {(False, place): ms for place, ms in self.chains.slowness().items()} | {(True, place): row.spin_ms for place, row in self.timed.items()}
            slow = [one for one, ms in beside.items() if ms > TOLERANCE * quiet_ms]
            if not slow:
                break
            which = min(slow, key=lambda one: (looks[one], one[0], -beside[one]))
            looks[which] += 1
            alone, place = which
            self.tell(f"{self.cases[place][0] if alone else CHAINS[place][0]}, again", len(self.cases))
            if alone:
                self.timed[place] = min(self.timed[place], self._time(place, seconds), key=lambda timed: timed.spin_ms)
            else:
                self.chains.time(place, CHAIN_LOOK * seconds)


def time_case(case: Case, points: Sequence[Point], spin: Spin, seconds: float) -> Timed:
    """Rows of the table: a case at its points, in about `seconds` (at least three runs a point, and the time that sessions take to open).

    Of a point's runs that half counts beside which the reference kernel was quickest.
    """
    rows: list[KernelTime] = []
    runs: dict[int, CaseRun] = {}
    slowest, deadline = 0.0, time.perf_counter() + seconds
    for done, point in enumerate(points):
        count = copies(case, point)
        if count not in runs:
            runs.clear()  # one session's weights in memory at a time
            runs[count] = open_case(case, point, spin.threads)
        kept = _beside(spin, runs[count].bind(point), (deadline - time.perf_counter()) / (len(points) - done))
        slowest = max(slowest, kept.spin_ms())
        us = round(kept.timing().seconds * 1e6 / count, 2)
        rows.append(KernelTime(case.op, case.bits, case.block, case.k, case.n, point.m, spin.threads, us, case.symmetric, point.context))
    return Timed(tuple(rows), slowest)


def _beside(spin: Spin, work: Callable[[], object], seconds: float) -> Samples:
    """Runs of `work` for about `seconds`, after one to warm up, at least three, with a reading of the reference kernel after every BLOCK_S of them."""
    work()
    kept, deadline, before = Samples(), time.perf_counter() + seconds, spin.time_ms()
    while len(kept.seconds) < RUNS_LEAST or time.perf_counter() < deadline:
        block: list[float] = []
        while sum(block) < BLOCK_S and not (len(block) >= RUNS_LEAST and time.perf_counter() > deadline):
            started = time.perf_counter()
            work()
            block.append(time.perf_counter() - started)
        kept.seconds += block
        after = spin.time_ms()
        kept.spins += [max(before, after)] * len(block)
        before = after
    return kept
