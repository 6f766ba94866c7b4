"""A reference kernel of fixed work: when it takes longer than usual, someone else is using the machine, and what was measured beside it is worth nothing.

The kernel takes exponentials on every thread at once (numpy releases the interpreter lock): fused multiply-adds on vectors from the second cache, as matrix
kernels do, and half a millisecond of them. So it is as slow as they are where a neighbour shares the core's units by its other hardware thread, which nobody
counts as time (measured: it sees four times as many slow requests as hashing does). It says nothing about the samples themselves, so dropping by it does not
favour fast ones.

Whoever is there from the first reading to the last is part of the baseline and shows in no reading: `Company` counts the processor time that others took, and
`Spin.crowded` compares the baseline with what the kernel takes on this machine when it is quiet, where that is known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VALUES = np.linspace(-4, 4, 1 << 15, dtype=np.float32)
ROUNDS = 24  # over VALUES, per thread
REPEATS = 3  # the best of these counts: a single wake-up of the system is no disturbance, a busy core is
SETTLE_S = 0.01  # onnxruntime's workers spin on after a run
TOLERANCE = 1.2  # at 1.35 slow stretches of a second got through on a busy host, and with them wrong verdicts (by hand)
STRANGE = 1.35  # times what the kernel takes on this machine when it is quiet
CALIBRATIONS = 15
COMPANY = 0.25  # processors; what a quiet Linux does beside us takes some 0.05


@dataclass(frozen=True)
class SpinReading:
    """What the kernel took (ms) and whether that is within tolerance of the baseline."""

    ms: float
    quiet: bool


class Company:
    """Processor time that other processes take, of the processors that this one may use; time stolen by a hypervisor counts."""

    def __init__(self, threads: int) -> None:
        self._threads, self._allowed = threads, _allowed()
        self._wall, self._others = time.perf_counter(), self._used()

    def excess(self) -> float:
        """Processors' worth of time that others took since the last call (at first since the start), beyond what our threads leave free."""
        before, self._wall = self._wall, time.perf_counter()
        used, self._others = self._others, self._used()
        return max(0.0, (self._others - used) / max(self._wall - before, 1e-9) - (len(self._allowed) - self._threads))

    def _used(self) -> float:
        import psutil

        each = psutil.cpu_times(percpu=True)
        busy = sum(sum(row[:8]) - row.idle - getattr(row, "iowait", 0.0) for place, row in enumerate(each) if place in self._allowed)
        return float(busy - time.process_time())


def _allowed() -> set[int]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


class Spin:
    """The kernel with its threads and its baseline. Use as a context manager; `calibrate` first.

    known_ms  what the kernel takes on this machine when it is quiet (a probed profile's `spin_ms`); 0 where that is not known
    """

    def __init__(self, threads: int, tolerance: float = TOLERANCE, known_ms: float = 0.0) -> None:
        self.threads, self.tolerance, self.baseline_ms, self.known_ms = threads, tolerance, 0.0, known_ms
        self._pool = ThreadPoolExecutor(threads, initializer=_place, initargs=(iter(apart(_allowed(), threads)),))
        self._results = [np.empty_like(VALUES) for _ in range(threads)]
        self._company = Company(threads)

    def crowded(self) -> str:
        """Why all that was measured since the last call may be slower than this machine is: "" when nothing says so."""
        excess = self._company.excess()
        if excess > COMPANY:
            return f"other processes took the time of {excess:.1f} processors"
        if self.known_ms and self.baseline_ms > STRANGE * self.known_ms:
            return f"the reference kernel took {self.baseline_ms:.2f} ms, {self.known_ms:.2f} ms when this machine was probed"
        return ""

    def __enter__(self) -> Spin:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def time_ms(self) -> float:
        """Milliseconds until every thread has done its share, best of three, once other threads of this process have settled."""
        time.sleep(SETTLE_S)
        return min(self.once_ms() for _ in range(REPEATS))

    def calibrate(self, between: Callable[[], object] | None = None, count: int = CALIBRATIONS) -> float:
        """Set the baseline: the lower quartile of `count` readings, each after `between()`, the work that will stand between readings later.

        Readings of a slow minute would make that minute the measure. So `known_ms` is the baseline where it is less and this machine still comes near it:
        one of the readings is within tolerance. Where none is, `crowded` has the last word.
        """
        readings = []
        for _ in range(count):
            if between is not None:
                between()
            readings.append(self.time_ms())
        quartile = float(np.quantile(readings, 0.25))
        self.baseline_ms = min(quartile, self.known_ms) if min(readings) <= self.tolerance * self.known_ms else quartile
        return self.baseline_ms

    def read(self) -> SpinReading:
        """Time the kernel against the baseline."""
        ms = self.time_ms()
        return SpinReading(ms, ms <= self.tolerance * self.baseline_ms)

    def once_ms(self) -> float:
        """Milliseconds of one round."""
        started = time.perf_counter()
        for done in [self._pool.submit(_work, result) for result in self._results]:
            done.result()
        return (time.perf_counter() - started) * 1e3


def apart(processors: set[int], threads: int) -> list[set[int]]:
    """A share of the processors for each thread; all for those that find none left. {0, 1, 2}, 2 -> [{0, 2}, {1}]

    A system that wakes two threads on one processor makes a reading twice as long as when it wakes them on two: 0.9 and 0.55 ms here, for a whole process.
    """
    return [set(sorted(processors)[at::threads]) or processors for at in range(threads)]


def _place(places: Iterator[set[int]]) -> None:
    """Keeps the thread that calls on the next of `places`."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, next(places))


def _work(result: NDArray[np.float32]) -> None:
    for _ in range(ROUNDS):
        np.exp(VALUES, out=result)
