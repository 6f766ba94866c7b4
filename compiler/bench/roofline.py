"""How close each phase comes to what the machine can do: bytes over measured read bandwidth, operations over measured rates.

    bound_ms = max(bytes / read_gb_s, sum over operators of 2 * multiplications / rate)      share = bound_ms / measured ms

1. Bytes of one run: every weight matrix once as its kernel holds it (`targets.kernels.weight_bytes`), and for attention the keys and values in the cache,
   float32. A long prompt counts as one run: chunks read the weights again, which is the runtime's choice and not the machine's limit.
2. Rates: `int8_gop_s` for kernels with integer arithmetic, `fp32_gflop_s` for the rest; both of onnxruntime's own matrix kernels, `read_gb_s` beside them, as
   `trimtab targets probe` measured them on this machine.
3. Norms and activations cost nothing here: a bound is what could not be beaten, not what is likely (see `targets.predict` for that).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compiler.bench.questions import NEW
from compiler.bench.rows import OURS, Row
from compiler.workload import exported_workload
from targets.kernels import ATTENTION, MATRICES, Case, Point, weight_bytes
from targets.predict import Workload
from targets.profile import Profile, measured_here

INTEGER = ("MatMulNBits", "DynamicQuantizeMatMul")


@dataclass(frozen=True)
class Phase:
    """One phase of one bundle. bound_by: "bytes" or "operations"; ms are of one token (decode), of the prompt (prefill) or of the batch (encode)."""

    phase: str
    megabytes: float
    gop: float
    bound_ms: float
    bound_by: str
    measured_ms: float
    share: float


def roofline(bundle: Path, rows: Sequence[Row], profile: Profile | None = None) -> list[dict[str, Any]]:
    """Phases of our first bundle that `rows` measured. [] when this machine was never probed or the bundle does not list its matrices."""
    profile = profile or measured_here()
    listed = any((bundle / name).is_file() for name in ("export.json", "report.json"))
    if profile is None or not listed or not (profile.read_gb_s and profile.fp32_gflop_s and profile.int8_gop_s):
        return []
    work = exported_workload(bundle)
    measured = {row["metric"]: row["value"] for row in rows if row["system"] == OURS}
    return [asdict(phase) for phase in _phases(work, profile, measured)]


def _phases(work: Workload, profile: Profile, measured: dict[str, float]) -> Iterator[Phase]:
    for metric, value in measured.items():
        name, _, condition = metric.partition("@")
        if name == "decode_tok_s":
            yield bound(work, profile, metric.replace("_tok_s", ""), Point(1, int(condition) + NEW // 2), 1e3 / value)
        elif name == "ttft_ms":
            yield bound(work, profile, f"prefill@{condition}", Point(int(condition)), value)
        elif name == "encode_ms":
            batch, length = map(int, condition.split("x"))
            yield bound(work, profile, metric.replace("_ms", ""), Point(length), value, batch)


def bound(work: Workload, profile: Profile, phase: str, point: Point, measured_ms: float, batch: int = 1) -> Phase:
    """The bound of one phase. A 1 x 1 decode step of one 1000 x 1000 float matrix at 4 GB/s: 4 MB, 1 ms, by bytes."""
    assert profile.read_gb_s and profile.fp32_gflop_s and profile.int8_gop_s
    moved = gop = arithmetic_ms = 0.0
    for operator in work.operators:
        at = Point(1, point.context) if operator.last else point
        moved += operator.count * (weight_bytes(operator.case) + batch * _cache_bytes(operator.case, at))
        operations = operator.count * batch * _operations(operator.case, at)
        rate = profile.int8_gop_s if operator.case.op in INTEGER else profile.fp32_gflop_s
        gop += operations / 1e9
        arithmetic_ms += operations / rate / 1e6
    bytes_ms = moved / profile.read_gb_s / 1e6
    limit = max(bytes_ms, arithmetic_ms)
    return Phase(phase, moved / 1e6, gop, limit, "bytes" if bytes_ms >= arithmetic_ms else "operations", measured_ms, limit / measured_ms)


def _operations(case: Case, point: Point) -> float:
    """Two per multiplication. Attention: scores and sums over the pairs that the mask leaves."""
    if case.op in MATRICES:
        return 2.0 * point.m * case.k * case.n
    if case.op in ATTENTION:
        pairs = point.m * (point.context + point.m / 2) if case.op == "GroupQueryAttention" else point.m**2
        return 4.0 * pairs * case.k
    return 0.0


def _cache_bytes(case: Case, point: Point) -> float:
    """Keys and values that a decoder reads, float32."""
    return 8.0 * (point.context + point.m) * case.n if case.op == "GroupQueryAttention" else 0.0
