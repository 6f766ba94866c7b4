"""Chains of layers timed in several passes over the whole probe, beside the reference kernel.

A machine that others use too is slow for seconds on end. So no chain is timed at one time only, every sample has a reading of the reference kernel beside it
(`targets.spin`), and the figure is the lower quartile of that half of the samples beside which the kernel was quickest: what the machine does when it is ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from targets.kernels import Case, CaseRun, Point
from targets.layers import DECODER, ENCODER, Step, open_layers
from targets.profile import KernelTime
from targets.spin import Spin

PASSES = 3
BLOCK_S = 0.03  # a sample is the mean of runs that take so long together: like the tokens of an answer, hiccups included
DECODER_POINTS = (Point(1, 128), Point(128), Point(1, 1024), Point(32))
ENCODER_POINTS = (Point(128), Point(32))
CHAINS = (  # the most telling first: what does not fit the budget is left out from the end
    (Case(DECODER, 4, 64, 512, 1536), DECODER_POINTS),
    (Case(DECODER, 8, 32, 512, 1536), DECODER_POINTS),
    (Case(DECODER, 32, 0, 512, 1536), DECODER_POINTS),
    (Case(ENCODER, 32, 0, 512, 2048), ENCODER_POINTS),
    (Case(DECODER, 4, 64, 1536, 4096), DECODER_POINTS),
)


@dataclass(frozen=True)
class Timing:
    """The lower quartile of the seconds of `samples` runs; spread = (90th - 10th percentile) / median."""

    seconds: float
    samples: int
    spread: float

    @staticmethod
    def of(samples: list[float], spins: list[float] | None = None) -> Timing:
        """spins: readings beside the samples; then the half with the least counts."""
        values = np.array(samples)
        if spins is not None:
            values = values[np.argsort(spins, kind="stable")[: -(-len(samples) // 2)]]
        low, quartile, middle, high = np.quantile(values, [0.1, 0.25, 0.5, 0.9])
        return Timing(float(quartile), len(values), float((high - low) / middle))


@dataclass
class Samples:
    """Seconds, and the reading of the reference kernel beside each."""

    seconds: list[float] = field(default_factory=list)
    spins: list[float] = field(default_factory=list)

    def timing(self) -> Timing:
        return Timing.of(self.seconds, self.spins)


class ChainPasses:
    """Sessions of CHAINS, which stay open between passes (some 100 MB each). Use `run` PASSES times, then `rows` and `step`."""

    def __init__(self, threads: int, spin: Spin) -> None:
        self.threads, self.spin = threads, spin
        self.open: dict[Case, CaseRun] = {}
        self.samples: dict[tuple[Case, Point], Samples] = {}
        self.steps = Samples()
        self._step = Step(threads, DECODER_POINTS[0].context)

    def run(self, seconds: float) -> None:
        """One pass, in about `seconds`. A chain whose share has gone before it is opened waits for the next pass."""
        deadline = time.perf_counter() + seconds
        for done, (chain, points) in enumerate(CHAINS):
            if deadline <= time.perf_counter():
                break
            if chain not in self.open:
                self.open[chain] = open_layers(chain, self.threads)
            share = (deadline - time.perf_counter()) / (len(CHAINS) - done) / len(points)
            for point in points:
                self._point(chain, point, share)

    def _point(self, chain: Case, point: Point, seconds: float) -> None:
        run, deadline = self.open[chain].bind(point), time.perf_counter() + seconds
        run()
        kept = self.samples.setdefault((chain, point), Samples())
        while True:
            taken, stepped = self._block(run, point.m == 1)
            spin_ms = self.spin.time_ms()
            kept.seconds.append(taken)
            kept.spins.append(spin_ms)
            if stepped:
                self.steps.seconds.append(stepped)
                self.steps.spins.append(spin_ms)
            if time.perf_counter() >= deadline:
                break

    def _block(self, run: Callable[[], object], steps: bool) -> tuple[float, float]:
        """Mean seconds of a run, and of a step's other work after each where there are `steps`."""
        count, taken, stepped = 0, 0.0, 0.0
        while count == 0 or taken + stepped < BLOCK_S:
            started = time.perf_counter()
            run()
            between = time.perf_counter()
            if steps:
                self._step()
                stepped += time.perf_counter() - between
            taken, count = taken + between - started, count + 1
        return taken / count, stepped / count

    def rows(self) -> list[KernelTime]:
        """Microseconds of one layer."""
        found = []
        for (chain, point), samples in self.samples.items():
            us = round(samples.timing().seconds * 1e6 / self.open[chain].count, 2)
            found.append(KernelTime(chain.op, chain.bits, chain.block, chain.k, chain.n, point.m, self.threads, us, chain.symmetric, point.context))
        return found

    def step(self) -> tuple[float, Timing] | None:
        """Microseconds of a step's other work; None when no chain was run."""
        if not self.steps.seconds:
            return None
        timing = self.steps.timing()
        return timing.seconds * 1e6, timing
