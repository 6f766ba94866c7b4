"""Chains of layers timed in several passes over the whole probe, beside the reference kernel.

A machine that others use too is slow for seconds on end. So no chain is timed at one time only, every sample stands between two readings of the reference
kernel (`targets.spin`), of which the slower counts, and the figure is the lower quartile of that half of the samples beside which the kernel was quickest: what
the machine does when it is ours. Where a session's weights come to lie in memory can make it slower for as long as it is open (by hand: 1.33 times, at one
token and at 128 alike), so each pass opens its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from targets.kernels import STREAM_BYTES, Case, Point
from targets.layers import DECODER, ENCODER, Step, depth, open_layers
from targets.profile import KernelTime
from targets.spin import Spin

PASSES = 3
BLOCK_S = 0.03  # a sample is the mean of runs that take so long together: like the tokens of an answer, hiccups included
LARGE_BYTES, LARGE_SHARE = 256 << 20, 1 / 32  # of weights, and of the machine's memory at most
STEP, LATE, PROMPT, SHORT = Point(1, 128), Point(1, 1024), Point(128), Point(32)
CHAINS = (  # the most telling first: what does not fit the budget is left out from the end
    (Case(DECODER, 4, 64, 512, 1536), STREAM_BYTES, (STEP, PROMPT, LATE, SHORT)),
    (Case(DECODER, 32, 0, 512, 1536), LARGE_BYTES, (STEP, PROMPT)),
    (Case(DECODER, 8, 32, 512, 1536), LARGE_BYTES, (STEP,)),
    (Case(ENCODER, 32, 0, 384, 1536), STREAM_BYTES, (PROMPT, SHORT)),
    (Case(DECODER, 8, 32, 512, 1536), STREAM_BYTES, (STEP, PROMPT)),
    (Case(DECODER, 4, 64, 1536, 4096), LARGE_BYTES, (STEP, SHORT)),
    (Case(ENCODER, 32, 0, 768, 3072), STREAM_BYTES, (PROMPT,)),
    (Case(DECODER, 32, 0, 512, 1536), STREAM_BYTES, (STEP,)),
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
    """Seconds, and the slower reading of the reference kernel beside each."""

    seconds: list[float] = field(default_factory=list)
    spins: list[float] = field(default_factory=list)

    def timing(self) -> Timing:
        return Timing.of(self.seconds, self.spins)

    def spin_ms(self) -> float:
        """The middle of the readings beside the samples that count."""
        return float(np.median(sorted(self.spins)[: -(-len(self.spins) // 2)]))


class ChainPasses:
    """Samples of CHAINS. Use `run` PASSES times, then `rows` and `step`."""

    def __init__(self, threads: int, memory_bytes: int, spin: Spin) -> None:
        self.threads, self.spin, self.most_bytes = threads, spin, int(memory_bytes * LARGE_SHARE)
        self.samples: dict[tuple[int, Point], Samples] = {}
        self.steps = Samples()
        self.readings: list[float] = []  # of the reference kernel, all of them
        self._step = Step(threads, STEP.context)

    def run(self, seconds: float) -> None:
        """One pass, in about `seconds`. A chain whose share has gone before it is opened waits for the next pass."""
        deadline = time.perf_counter() + seconds
        for place in range(len(CHAINS)):
            left = deadline - time.perf_counter()
            if left <= 0:
                break
            self.time(place, left / (len(CHAINS) - place))

    def time(self, place: int, seconds: float) -> None:
        """One chain, opened and closed, in about `seconds`; at least one more sample of each point."""
        deadline = time.perf_counter() + seconds
        layer, stream_bytes, points = CHAINS[place]
        chain = open_layers(layer, self.threads, self._bytes(stream_bytes))
        for done, point in enumerate(points):
            share = (deadline - time.perf_counter()) / (len(points) - done)
            self._point(chain.bind(point), point, self.samples.setdefault((place, point), Samples()), share)

    def _bytes(self, stream_bytes: int) -> int:
        return min(stream_bytes, self.most_bytes)

    def _point(self, run: Callable[[], object], point: Point, kept: Samples, seconds: float) -> None:
        deadline = time.perf_counter() + seconds
        run()
        before = self._read()
        while True:
            taken, stepped = self._block(run, point.m == 1)
            after = self._read()
            spin_ms, before = max(before, after), after
            kept.seconds.append(taken)
            kept.spins.append(spin_ms)
            if stepped:
                self.steps.seconds.append(stepped)
                self.steps.spins.append(spin_ms)
            if time.perf_counter() >= deadline:
                break

    def _read(self) -> float:
        self.readings.append(self.spin.time_ms())
        return self.readings[-1]

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
        for (place, point), samples in self.samples.items():
            layer, stream_bytes, _ = CHAINS[place]
            count = depth(layer, self._bytes(stream_bytes))
            us = round(samples.timing().seconds * 1e6 / count, 2)
            found.append(KernelTime(layer.op, layer.bits, layer.block, layer.k, layer.n, point.m, self.threads, us, layer.symmetric, point.context, count))
        return found

    def slowness(self) -> dict[int, float]:
        """Place of each chain -> the slowest of its points' readings of the reference kernel, beside the samples that count."""
        found: dict[int, float] = {}
        for (place, _), samples in self.samples.items():
            found[place] = max(found.get(place, 0.0), samples.spin_ms())
        return found

    def step(self) -> tuple[float, Timing] | None:
        """Microseconds of a step's other work; None when no chain was run."""
        if not self.steps.seconds:
            return None
        timing = self.steps.timing()
        return timing.seconds * 1e6, timing
