"""What a model will take on a machine: time to first token, time per token, memory, load time. A prediction is never a verdict.

A `Workload` is the operators of one run in the columns of the kernel table (`targets.kernels`), so what is added up is what runs:

1. One run over m tokens with c in the cache takes the sum over its operators of their time at (m, c), plus the run's own cost. Operators on the last token
   alone (a decoder's head) count with m = 1.
2. An operator's time is the profile's kernel table's. Where the profile has none (or none of this kernel), it is the roofline's:
   max(bytes / bandwidth, operations / rate), plus one parallel region. Rates are the profile's; MatMulNBits reaches NBITS_SHARE of the int8 rate.
3. Operators of layers cost more (or less) beside each other than alone: their sum is multiplied by what the table's chains of layers took over the sum of
   their own operators (`KernelTable.together`), each matrix by chains of its kind, the rest by the mean over the matrices.
4. TTFT is the prompt's runs, chunk after chunk. TPOT is a run of one token at the middle of the answer. Each run of a decoder has `step_us` of other work.
5. Every figure has an interval, as wide as its evidence: TABLE_HERE for a table measured on this machine, TABLE for another machine's or a class's, ROOFLINE
   otherwise, MEMORY for memory. They are set by what `benchmarks/predict.py` found; docs/prediction.md has its table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from targets.errors import TargetError
from targets.kernels import ATTENTION, MATRICES, Case, Point, weight_bytes
from targets.layers import DECODER, ENCODER
from targets.profile import Profile
from targets.table import KernelTable

TABLE_HERE, TABLE, ROOFLINE, MEMORY = 0.3, 0.8, 1.0, 0.2  # relative half-widths
NBITS_SHARE = 0.45  # of the int8 GEMM rate; measured 0.34-0.48 on Zen 4 with AVX512-VNNI at 512 tokens
ATTENTION_SHARE = 0.3  # of the fp32 GEMM rate
REGION_US = 5.0  # a parallel region, where none was measured
RUNTIME_BYTES = 120e6  # a process with onnxruntime, numpy, a tokenizer and a first cache, before any weights; measured 119-133 MB
OPEN_MB_S = 400.0  # where none was measured
NORMS, ACTIVATIONS = ("RMSNormalization", "SkipLayerNormalization"), ("QuickGelu", "BiasGelu")
REMEDY = "measure the machine: `trimtab targets probe --out machine.yaml`, or add the figure with its source to the profile"


@dataclass(frozen=True)
class Operator:
    """`count` nodes of one case. last: they see the last token of a prompt only."""

    case: Case
    count: int = 1
    last: bool = False


@dataclass(frozen=True)
class Workload:
    """A model as the operators of one run. kind: decoder or encoder. cache_bytes: of one token in all layers' caches."""

    kind: str
    operators: tuple[Operator, ...]
    stored_bytes: int
    resident_bytes: int
    cache_bytes: int = 0
    activation_bytes: int = 0  # of one token, the widest moment of a layer
    context: int = 0
    prompt_operators: tuple[Operator, ...] = ()  # of a second graph that reads prompts; none: `operators`

    @property
    def streamed_bytes(self) -> int:
        """Weights that one token streams."""
        return max(1, sum(operator.count * weight_bytes(operator.case) for operator in self.operators))

    def layer(self, matrix: Case) -> Case:
        """The layer of this width with matrices of that kind, as chains of layers have it in the table."""
        widths = {operator.case.op: operator.case.k for operator in self.operators}
        width = next((widths[op] for op in NORMS if op in widths), matrix.k)
        inner = next((widths[op] for op in ACTIVATIONS if op in widths), matrix.n)
        return Case(DECODER if self.kind == "decoder" else ENCODER, matrix.bits, matrix.block, width, inner, matrix.symmetric)


@dataclass(frozen=True)
class Conditions:
    """As `runtimes.bench` measures: one request of random tokens. batch and length are an encoder's, the rest a decoder's."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    prefill_chunk: int = 256
    batch: int = 1
    length: int = 128


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval."""

    value: float
    low: float
    high: float
    unit: str


@dataclass(frozen=True)
class Prediction:
    """basis: kernel table, or roofline, or both. figures by the names that limits have (without percentile: a prediction is of the usual request)."""

    basis: str
    figures: Mapping[str, Estimate]

    def as_dict(self) -> dict[str, Any]:
        return {"basis": self.basis, "figures": {name: asdict(estimate) for name, estimate in self.figures.items()}}


@dataclass(frozen=True)
class Clock:
    """Times of operators on one profile."""

    profile: Profile
    table: KernelTable

    def tabled(self, case: Case) -> bool:
        return self.table.knows(case.op, case.bits)

    def us(self, case: Case, point: Point) -> float:
        """Rule 2. Raises TargetError where the profile has neither rows nor the rates that a roofline needs."""
        return self.table.us(case, point) if self.tabled(case) else self._roofline(case, point)

    def _roofline(self, case: Case, point: Point) -> float:
        bandwidth = _known(self.profile, "read_gb_s") * 1e3  # bytes a microsecond
        region = self.profile.parallel_us or REGION_US
        if case.op in MATRICES:
            scales = 8 * case.n * -(-case.k // case.block) if case.block else 0  # a scale and a sum of a block, float32 each, as the kernel packs them
            moved = case.k * case.n * case.bits / 8 + scales + 4 * point.m * (case.k + case.n)
            rate = _known(self.profile, "fp32_gflop_s") if case.bits == 32 else _known(self.profile, "int8_gop_s")
            share = NBITS_SHARE if case.op == "MatMulNBits" else 1.0
            return region + max(moved / bandwidth, 2e-3 * point.m * case.k * case.n / (rate * share))
        if case.op in ATTENTION:
            seen = point.context + point.m
            pairs = point.m * (point.context + point.m / 2) if case.op == "GroupQueryAttention" else point.m**2
            return region + max(8 * seen * case.n / bandwidth, 4e-3 * pairs * case.k / (_known(self.profile, "fp32_gflop_s") * ATTENTION_SHARE))
        return region + 12 * point.m * case.k / bandwidth

    def run_us(self, work: Workload, point: Point) -> float:
        """Rules 1 and 3."""
        beside = self.profile.step_us or 0.0 if work.kind == "decoder" else 0.0
        return (
            (self.profile.run_us or 0.0)
            + beside
            + self.sum_us(work, [(operator, Point(1, point.context) if operator.last else point) for operator in work.operators])
        )

    def matrix_us(self, work: Workload, case: Case, point: Point) -> float:
        """A matrix among the others of `work`: rule 3, where the table has its kernel."""
        alone = self.us(case, point)
        return alone * self.table.together(work.layer(case), point, work.streamed_bytes) if self.tabled(case) else alone

    def sum_us(self, work: Workload, placed: Sequence[tuple[Operator, Point]]) -> float:
        """Rule 3 over operators, each at its own sizes."""
        total = plain = weight = weighted = 0.0
        for operator, point in placed:
            us = operator.count * self.us(operator.case, point)
            if operator.case.op in MATRICES and self.tabled(operator.case):
                among = operator.count * self.matrix_us(work, operator.case, point)
                total, weight, weighted = total + among, weight + us, weighted + among
            else:
                plain += us
        return total + plain * (weighted / weight if weight else 1.0)


def predict(work: Workload, profile: Profile, conditions: Conditions | None = None) -> Prediction:
    """TTFT, TPOT and rates of a decoder, encode time of an encoder, and memory and load time of both.

    Raises TargetError when the profile has neither a kernel table nor the rates that a roofline needs.
    """
    conditions = conditions or Conditions()
    clock = Clock(profile, KernelTable(profile.kernels))
    weighty = [operator.case for operator in (*work.operators, *work.prompt_operators) if operator.case.op in (*MATRICES, *ATTENTION)]
    tabled = [clock.tabled(case) for case in weighty]
    basis = "kernel table" if all(tabled) else "kernel table and roofline" if any(tabled) else "roofline"
    width = ROOFLINE if not all(tabled) else TABLE_HERE if profile.is_here else TABLE
    ms = _decoder_ms(clock, work, conditions) if work.kind == "decoder" else _encoder_ms(clock, work, conditions)
    figures = {name: _around(value, width, "ms") for name, value in ms.items()}
    if work.kind == "decoder":
        figures["prefill_tok_s"] = _inverse(figures["ttft_ms"], 1e3 * conditions.prompt_tokens)
        figures["decode_tok_s"] = _inverse(figures["tpot_ms"], 1e3)
    figures["peak_rss_mb"] = _around(_peak_bytes(work, conditions) / 1e6, MEMORY, "MB")
    figures["load_s"] = _around(_load_s(work, profile), ROOFLINE, "s")
    return Prediction(basis, figures)


def _decoder_ms(clock: Clock, work: Workload, conditions: Conditions) -> dict[str, float]:
    prompt, chunk = conditions.prompt_tokens, conditions.prefill_chunk or conditions.prompt_tokens
    reads = replace(work, operators=work.prompt_operators or work.operators)
    ttft = sum(clock.run_us(reads, Point(min(chunk, prompt - at), at)) for at in range(0, prompt, chunk))
    tpot = clock.run_us(work, Point(1, prompt + conditions.new_tokens // 2))
    return {"ttft_ms": ttft / 1e3, "tpot_ms": tpot / 1e3}


def _encoder_ms(clock: Clock, work: Workload, conditions: Conditions) -> dict[str, float]:
    """Matrices see all tokens of the batch at once, attention each row by itself."""
    placed = []
    for operator in work.operators:
        rows = conditions.batch if operator.case.op in ATTENTION else 1
        tokens = conditions.length if operator.case.op in ATTENTION else conditions.batch * (1 if operator.last else conditions.length)
        placed.append((replace(operator, count=rows * operator.count), Point(tokens)))
    return {"encode_ms": ((clock.profile.run_us or 0.0) + clock.sum_us(work, placed)) / 1e3}


def _peak_bytes(work: Workload, conditions: Conditions) -> float:
    tokens = min(conditions.prefill_chunk or conditions.prompt_tokens, conditions.prompt_tokens)
    if work.kind == "encoder":
        tokens = conditions.batch * conditions.length
    cache = work.cache_bytes * (conditions.prompt_tokens + conditions.new_tokens)
    return RUNTIME_BYTES + work.resident_bytes + cache + work.activation_bytes * tokens


def _load_s(work: Workload, profile: Profile) -> float:
    """Files from the system's cache, as `runtimes.bench` opens them: reading is then no part of it."""
    return 0.2 + work.stored_bytes / 1e6 / (profile.open_mb_s or OPEN_MB_S)


def _around(value: float, width: float, unit: str) -> Estimate:
    """[v / (1 + w), v * (1 + w)]: as far below as above, by ratio."""
    return Estimate(value, value / (1 + width), value * (1 + width), unit)


def _inverse(estimate: Estimate, tokens_ms: float) -> Estimate:
    return Estimate(tokens_ms / estimate.value, tokens_ms / estimate.high, tokens_ms / estimate.low, "tok/s")


def _known(profile: Profile, name: str) -> float:
    value = getattr(profile, name)
    if value is None:
        raise TargetError(f"profile {profile.id}: {name}", expected="a figure to predict from", found="none", remedy=REMEDY)
    return float(value)
