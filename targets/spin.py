"""A reference kernel of fixed work: when it takes longer than usual, someone else is using the machine, and what was measured beside it is worth nothing.

The kernel hashes a buffer on every thread at once (hashlib releases the interpreter lock), touches little memory, and takes about a millisecond. It says
nothing about the samples themselves, so dropping by it does not favour fast ones.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

BUFFER = bytes(1 << 18)
ROUNDS = 3  # hashes per thread
REPEATS = 3  # the best of these counts: a single wake-up of the system is no disturbance, a busy core is
SETTLE_S = 0.01  # onnxruntime's workers spin on after a run; without this pause readings fall into two groups (0.7 and 1.1 ms here)
TOLERANCE = 1.35
CALIBRATIONS = 15


@dataclass(frozen=True)
class SpinReading:
    """What the kernel took (ms) and whether that is within tolerance of the baseline."""

    ms: float
    quiet: bool


class Spin:
    """The kernel with its threads and its baseline. Use as a context manager; `calibrate` first."""

    def __init__(self, threads: int, tolerance: float = TOLERANCE) -> None:
        self.threads, self.tolerance, self.baseline_ms = threads, tolerance, 0.0
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Spin:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def time_ms(self) -> float:
        """Milliseconds until every thread has done its share, best of three, once other threads of this process have settled."""
        time.sleep(SETTLE_S)
        return min(self.once_ms() for _ in range(REPEATS))

    def calibrate(self, between: Callable[[], object] | None = None, count: int = CALIBRATIONS) -> float:
        """Set the baseline: the median of `count` readings, each after `between()`, the work that will stand between readings later."""
        readings = []
        for _ in range(count):
            if between is not None:
                between()
            readings.append(self.time_ms())
        self.baseline_ms = median(readings)
        return self.baseline_ms

    def read(self) -> SpinReading:
        """Time the kernel against the baseline."""
        ms = self.time_ms()
        return SpinReading(ms, ms <= self.tolerance * self.baseline_ms)

    def once_ms(self) -> float:
        """Milliseconds of one round."""
        started = time.perf_counter()
        for done in [self._pool.submit(_work) for _ in range(self.threads)]:
            done.result()
        return (time.perf_counter() - started) * 1e3


def _work() -> None:
    for _ in range(ROUNDS):
        hashlib.sha256(BUFFER).digest()
