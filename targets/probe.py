"""Measure this machine: memory bandwidth, arithmetic, and the table of onnxruntime's own matrix kernels.

What is measured is what will run: the kernels are onnxruntime's, in one-node models (`targets.wire`), with as many threads as a bundle would use.
Every figure is the lower quartile of repeats: the question is what the machine can do, and company only ever adds time. Their number and spread stand
beside it, so that a noisy machine shows.

The budget bounds the whole. Measurements stand in the order of their worth; what does not fit is left out, and the profile's description says so.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from targets.errors import TargetError
from targets.profile import KernelTime, Profile, Provenance, here, with_measured
from targets.spin import Spin
from targets.wire import MICROSOFT, OneNode, model_bytes

Report = Callable[[str, int, int], None]  # what comes next, done, of

BANDWIDTH_BYTES = 256 << 20  # several times the largest cache of the machines we know
STORAGE_BYTES = 64 << 20
SHAPES = ((576, 1536), (2048, 2048), (2048, 8192))  # (K, N): fits a cache core by core, fits the shared one, fits none
TOKENS = (1, 32, 512)
GEMM = (1024, 1024, 512)  # K, N, M of the two headline figures
RUNS_LEAST = 3
DEFAULT_SECONDS = 60.0


@dataclass(frozen=True)
class Timing:
    """Lower quartile of the seconds of `samples` runs; spread = (90th - 10th percentile) / median."""

    seconds: float
    samples: int
    spread: float


@dataclass(frozen=True)
class KernelCase:
    """One kernel of the table. block 0: fp32, or one scale per column."""

    op: str
    bits: int
    block: int
    k: int
    n: int


def probe(seconds: float = DEFAULT_SECONDS, report: Report | None = None, *, threads: int = 0, folder: Path | None = None) -> Profile:
    """A profile of this machine with measured speeds.

    seconds  budget for all; every measurement gets a share, and runs at least three times
    threads  as many as a bundle will use; 0 = all cores of this process
    folder   where the storage is measured; the system's temporary folder when None
    Raises TargetError when the budget is not a positive number or onnxruntime is missing.
    """
    if not (seconds > 0 and np.isfinite(seconds)):
        raise TargetError("probe", expected="a positive number of seconds", found=str(seconds), remedy="30 to 120 seconds are usual")
    profile = here()
    threads = threads or profile.cores
    cases = list(kernel_cases())
    total = 6 + len(cases)
    tell = report or (lambda what, done, of: None)
    started = time.perf_counter()
    deadline = started + seconds
    share = seconds / (total + 4)
    measured: dict[str, tuple[Any, Provenance]] = {}
    headline: list[tuple[str, str, Callable[[], tuple[float, Timing]]]] = [
        ("read_gb_s", f"maximum over {BANDWIDTH_BYTES >> 20} MiB, {threads} threads", lambda: _bandwidth(threads, share)),
        ("read_1_gb_s", f"maximum over {BANDWIDTH_BYTES >> 20} MiB, 1 thread", lambda: _bandwidth(1, share)),
        ("spin_ms", "reference kernel of targets.spin", lambda: _spin(threads, share)),
        ("fp32_gflop_s", f"onnxruntime MatMul 512 x 1024 x 1024, {threads} threads", lambda: _gemm("MatMul", 32, threads, share)),
        ("int8_gop_s", f"onnxruntime DynamicQuantizeMatMul 512 x 1024 x 1024, {threads} threads", lambda: _gemm("DynamicQuantizeMatMul", 8, threads, share)),
        ("storage_read_mb_s", "64 MiB in the temporary folder, read after its pages were dropped from the cache", lambda: _storage(folder, share)),
    ]
    for done, (name, note, measure) in enumerate(headline):
        tell(note, done, total)
        value, timing = measure()
        measured[name] = (round(value, 4), _source(note, timing))
    rows: list[KernelTime] = []
    skipped = 0
    for done, case in enumerate(cases, len(headline)):
        if time.perf_counter() > deadline:
            skipped = len(cases) - (done - len(headline))
            break
        tell(f"{case.op} {case.bits} bit, block {case.block}, {case.k} x {case.n}", done, total)
        rows += _kernel_rows(case, threads, share)
    tell("done", total, total)
    note = f"onnxruntime kernels, {threads} threads, {time.perf_counter() - started:.0f} s" + (
        f"; {skipped} kernels left out for lack of time" if skipped else ""
    )
    return replace(with_measured(profile, measured), description=f"measured here: {note}", kernels=tuple(rows))


def kernel_cases() -> Iterator[KernelCase]:
    """The table's rows, the most telling first: per shape MatMulNBits by bits and block, then whole int8, then fp32."""
    for k, n in SHAPES:
        for bits, block in ((4, 64), (4, 32), (8, 32), (4, 128), (8, 128), (8, 64)):
            yield KernelCase("MatMulNBits", bits, block, k, n)
        yield KernelCase("DynamicQuantizeMatMul", 8, 0, k, n)
        yield KernelCase("MatMul", 32, 0, k, n)


def kernel_model(case: KernelCase, seed: int = 0) -> bytes:
    """The one-node model of a case with random weights. Raises KeyError for an operator that the table does not hold."""
    rng = np.random.default_rng(seed)
    k, n = case.k, case.n
    constants: dict[str, NDArray[Any]]
    if case.op == "MatMulNBits":
        blocks = -(-k // case.block)
        codes = rng.integers(0, 256, (n, blocks, case.block * case.bits // 8), np.uint8)
        constants = {"codes": codes, "scales": rng.random((n, blocks), np.float32) * 0.01}
        attributes = {"K": k, "N": n, "bits": case.bits, "block_size": case.block, "accuracy_level": 4}
        return model_bytes(OneNode(case.op, k, n, constants, attributes, MICROSOFT))
    if case.op == "DynamicQuantizeMatMul":
        constants = {"codes": rng.integers(-127, 128, (k, n), np.int8), "scales": np.full(n, 0.01, np.float32)}
        return model_bytes(OneNode(case.op, k, n, constants, {}, MICROSOFT))
    return model_bytes(OneNode({"MatMul": "MatMul"}[case.op], k, n, {"weights": rng.standard_normal((k, n), np.float32)}, {}))


def time_kernel(case: KernelCase, tokens: int, threads: int, seconds: float) -> Timing:
    """Time [tokens, k] x [k, n] in onnxruntime."""
    return _time_session(_session(case, threads), case.k, tokens, seconds)


def _kernel_rows(case: KernelCase, threads: int, seconds: float) -> list[KernelTime]:
    session = _session(case, threads)
    timings = [(tokens, _time_session(session, case.k, tokens, seconds / len(TOKENS))) for tokens in TOKENS]
    return [KernelTime(case.op, case.bits, case.block, case.k, case.n, tokens, threads, round(timing.seconds * 1e6, 2)) for tokens, timing in timings]


def _gemm(op: str, bits: int, threads: int, seconds: float) -> tuple[float, Timing]:
    k, n, m = GEMM
    timing = time_kernel(KernelCase(op, bits, 0, k, n), m, threads, seconds)
    return 2e-9 * k * n * m / timing.seconds, timing


def _session(case: KernelCase, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise TargetError("probe", expected="onnxruntime", found="none", remedy="install onnxruntime") from error
    if hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(kernel_model(case), options, providers=["CPUExecutionProvider"])


def _time_session(session: Any, k: int, tokens: int, seconds: float) -> Timing:
    x = np.random.default_rng(1).standard_normal((tokens, k), np.float32)
    y = np.empty((tokens, session.get_outputs()[0].shape[1]), np.float32)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, list(x.shape), x.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, list(y.shape), y.ctypes.data)
    return repeat(lambda: session.run_with_iobinding(binding), seconds)


def _bandwidth(threads: int, seconds: float) -> tuple[float, Timing]:
    """GB/s of reading: the largest element of a big array, in one piece per thread. (numpy's maximum is vectorised and releases the interpreter lock.)"""
    data = np.zeros(BANDWIDTH_BYTES // 4, np.float32)
    data.fill(1.0)  # touched: untouched pages all map to one page of zeros
    pieces = np.array_split(data, threads)
    with ThreadPoolExecutor(threads) as pool:
        timing = repeat(lambda: list(pool.map(np.max, pieces)), seconds)
    return data.nbytes / timing.seconds / 1e9, timing


def _spin(threads: int, seconds: float) -> tuple[float, Timing]:
    with Spin(threads) as spin:
        timing = repeat(spin.once_ms, seconds / 4)
    return timing.seconds * 1e3, timing


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
    low, quartile, middle, high = np.quantile(samples, [0.1, 0.25, 0.5, 0.9])
    return Timing(float(quartile), len(samples), float((high - low) / middle))


def _source(note: str, timing: Timing) -> Provenance:
    return Provenance("measured", note, datetime.now(UTC).date().isoformat(), timing.samples, round(timing.spread, 3))
