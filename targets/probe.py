"""Measure this machine: memory bandwidth, arithmetic, storage, and the table of onnxruntime's own kernels.

What is measured is what will run: the kernels are onnxruntime's, in small models (`targets.kernels`), with as many threads as a bundle would use.
Every figure is the lower quartile of repeats (`spin_ms` their lowest tenth): the question is what the machine can do, and company only ever adds time. Their
number and spread stand beside it, so that a noisy machine shows.

The budget bounds the whole. Measurements stand in the order of their worth; what does not fit is left out, and the profile's description says so. Chains of
whole layers take CHAIN_SHARE of it, in passes before, amid and after the table (`targets.passes`, `targets.sweep`).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from targets.errors import TargetError
from targets.gpu import has_gpu, probe_gpu
from targets.kernels import Case, CaseRun, Point, case_model, cases, open_case, open_model
from targets.passes import CHAINS, ChainPasses, Timing
from targets.profile import Profile, Provenance, here, with_measured
from targets.spin import Spin
from targets.sweep import CHAIN_SHARE, QUIET, RUNS_LEAST, Sweep

Report = Callable[[str, int, int], None]  # what comes next, done, of

BANDWIDTH_BYTES = 256 << 20  # several times the largest cache of the machines we know
STORAGE_BYTES = 64 << 20
GEMM = (1024, 1024, 512)  # K, N, M of the two headline figures
DEFAULT_SECONDS = 75.0
GPU_SHARE = 0.1


Measure = Callable[[], tuple[float, Timing]]


def probe(seconds: float = DEFAULT_SECONDS, report: Report | None = None, *, threads: int = 0, folder: Path | None = None, gpu: bool | None = None) -> Profile:
    """A profile of this machine with measured speeds.

    seconds  budget for all; every measurement gets a share, and runs at least three times
    threads  as many as a bundle will use; 0 = all cores of this process
    folder   where the storage is measured; the system's temporary folder when None
    gpu      measure the GPU too (GPU_SHARE of the budget); None: where this build of onnxruntime runs on one
    Raises TargetError when the budget is not a positive number, onnxruntime is missing, or a GPU is asked for and onnxruntime cannot run on it.
    """
    if not (seconds > 0 and np.isfinite(seconds)):
        raise TargetError("probe", expected="a positive number of seconds", found=str(seconds), remedy="30 to 120 seconds are usual")
    profile = here()
    threads = threads or profile.cores
    rows = list(cases())
    headline = _headline(threads, (1 - CHAIN_SHARE) * seconds / (len(rows) + 16), folder)
    total = len(headline) + len(rows)
    tell = report or (lambda what, done, of: None)
    started = time.perf_counter()
    measured: dict[str, tuple[Any, Provenance]] = {}
    if gpu or (gpu is None and has_gpu()):
        tell("the GPU", 0, total)
        measured |= probe_gpu(GPU_SHARE * seconds, repeat)
    for done, (name, note, measure) in enumerate(headline):
        tell(note, done, total)
        value, timing = measure()
        measured[name] = (round(value, 4), _source(note, timing))
    with Spin(threads) as spin:
        chains = ChainPasses(threads, profile.memory_bytes, spin)
        kernels = Sweep(rows, chains, started + seconds, lambda what, done: tell(what, done + len(headline), total)).run()
        readings = chains.readings or [spin.time_ms() for _ in range(RUNS_LEAST)]
    note = "reference kernel of targets.spin, the lowest tenth of readings over the whole probe"
    measured["spin_ms"] = (round(float(np.quantile(readings, QUIET)), 4), _source(note, Timing.of(readings)))
    step = chains.step()
    if step is not None:
        note = "a mask, small operators and the largest of 32768 logits, between runs of a chain of layers"
        measured["step_us"] = (round(step[0], 2), _source(note, step[1]))
    tell("done", total, total)
    skipped = len(rows) + len(CHAINS) - len({(row.op, row.bits, row.block, row.k, row.n, row.symmetric, row.layers) for row in kernels})
    note = f"onnxruntime kernels, {threads} threads, {time.perf_counter() - started:.0f} s" + (
        f"; {skipped} of {len(rows) + len(CHAINS)} kernels left out for lack of time" if skipped else ""
    )
    return replace(with_measured(profile, measured), description=f"measured here: {note}", kernels=tuple(kernels))


def _headline(threads: int, share: float, folder: Path | None) -> list[tuple[str, str, Measure]]:
    """The figures beside the table: field, what was done, how."""
    return [
        ("read_gb_s", f"maximum over {BANDWIDTH_BYTES >> 20} MiB, {threads} threads", lambda: _bandwidth(threads, share)),
        ("read_1_gb_s", f"maximum over {BANDWIDTH_BYTES >> 20} MiB, 1 thread", lambda: _bandwidth(1, share)),
        ("fp32_gflop_s", f"onnxruntime MatMul 512 x 1024 x 1024, {threads} threads", lambda: _gemm("MatMul", 32, threads, share)),
        ("int8_gop_s", f"onnxruntime DynamicQuantizeMatMul 512 x 1024 x 1024, {threads} threads", lambda: _gemm("DynamicQuantizeMatMul", 8, threads, share)),
        ("storage_read_mb_s", "64 MiB in the temporary folder, read after its pages were dropped from the cache", lambda: _storage(folder, share)),
        ("open_mb_s", "a session of MatMulNBits, 4 bits, from memory", lambda: _open(threads, share)),
        ("run_us", "a run of one small operator", lambda: _small(1, threads, share)),
        ("parallel_us", f"a norm of {threads} short rows less a norm of one", lambda: _parallel(threads, share)),
    ]


def _gemm(op: str, bits: int, threads: int, seconds: float) -> tuple[float, Timing]:
    k, n, m = GEMM
    run = open_case(Case(op, bits, 0, k, n), Point(m), threads)
    timing = repeat(run.bind(Point(m)), seconds)
    return 2e-9 * k * n * m * run.count / timing.seconds, timing


def _small(rows: int, threads: int, seconds: float) -> tuple[float, Timing]:
    """Microseconds of a run of one norm over `rows` short rows."""
    case = Case("SkipLayerNormalization", 32, 0, 16, 1)
    run = CaseRun(case, 1, open_model(case_model(case), threads))
    timing = repeat(run.bind(Point(rows)), seconds / 4)
    return timing.seconds * 1e6, timing


def _parallel(threads: int, seconds: float) -> tuple[float, Timing]:
    """The norm hands each row to a thread; of one row it makes no parallel region."""
    many, timing = _small(threads, threads, seconds)
    return max(many - _small(1, threads, seconds)[0], 0.01), timing


def _open(threads: int, seconds: float) -> tuple[float, Timing]:
    case = Case("MatMulNBits", 4, 64, 2048, 2048)
    model = case_model(case, 8)
    timing = repeat(lambda: open_model(model, threads), seconds)
    return len(model) / timing.seconds / 1e6, timing


def _bandwidth(threads: int, seconds: float) -> tuple[float, Timing]:
    """GB/s of reading: the largest element of a big array, in one piece per thread. (numpy's maximum is vectorised and releases the interpreter lock.)"""
    data = np.zeros(BANDWIDTH_BYTES // 4, np.float32)
    data.fill(1.0)  # touched: untouched pages all map to one page of zeros
    pieces = np.array_split(data, threads)
    with ThreadPoolExecutor(threads) as pool:
        timing = repeat(lambda: list(pool.map(np.max, pieces)), seconds)
    return data.nbytes / timing.seconds / 1e9, timing


def _storage(folder: Path | None, seconds: float) -> tuple[float, Timing]:
    """MB/s of reading a fresh file. The system drops its pages before each read where it can; elsewhere the figure is that of the page cache."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(np.random.default_rng(2).bytes(STORAGE_BYTES))
        file.flush()
        os.fsync(file.fileno())

        def read() -> None:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            while file.read(1 << 20):
                pass

        timing = repeat(read, seconds)
    return STORAGE_BYTES / timing.seconds / 1e6, timing


def repeat(work: Callable[[], object], seconds: float) -> Timing:
    """Run `work` once to warm up, then for about `seconds`, at least three times."""
    work()
    samples: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(samples) < RUNS_LEAST or time.perf_counter() < deadline:
        started = time.perf_counter()
        work()
        samples.append(time.perf_counter() - started)
    return Timing.of(samples)


def _source(note: str, timing: Timing) -> Provenance:
    return Provenance("measured", note, datetime.now(UTC).date().isoformat(), timing.samples, round(timing.spread, 3))
