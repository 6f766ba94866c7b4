"""Chains of whole layers: they are what bundles are made of, and what they say of operators beside each other is read as the table's rule 7 says."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from targets import passes
from targets.kernels import MATRICES, Case, CaseRun, Point, case_model, open_model
from targets.layers import DECODER, ENCODER, LAYERS_LEAST, Step, depth, layer_bytes, layer_model, open_layers, parts
from targets.passes import PASSES, STEP, ChainPasses, Samples, Timing
from targets.predict import Operator, Workload, predict
from targets.profile import KernelTime, here
from targets.spin import Spin
from targets.table import KernelTable

SMALL = [Case(DECODER, 4, 32, 256, 96), Case(DECODER, 8, 64, 256, 128, symmetric=False), Case(DECODER, 32, 0, 256, 96), Case(ENCODER, 32, 0, 64, 96)]
MATRIX_KINDS = (("MatMulNBits", 4, 32), ("MatMul", 32, 0), ("FusedMatMul", 32, 0), ("DynamicQuantizeMatMul", 8, 0))
EVERY = [layer for layer, _, _ in passes.CHAINS]


@pytest.mark.parametrize("layer", SMALL, ids=str)
def test_onnx_accepts_the_chains_and_they_run(layer: Case) -> None:
    import onnx

    model = layer_model(layer, 2)
    onnx.checker.check_model(onnx.load_from_string(model))
    run = CaseRun(layer, 2, open_model(model, 1))
    for point in (Point(3), Point(1, 5)) if layer.op == DECODER else (Point(3),):
        run.bind(point)()


@pytest.mark.parametrize(
    "model", [*(layer_model(layer, 2) for layer in SMALL), *(case_model(Case(op, bits, block, 64, 32), 3) for op, bits, block in MATRIX_KINDS)]
)
def test_no_two_matrices_are_equal(model: bytes) -> None:
    """onnxruntime runs many equal ones as fast as one that stays in the cache."""
    import onnx
    from onnx.numpy_helper import to_array

    tables = [to_array(one).tobytes() for one in onnx.load_from_string(model).graph.initializer if len(one.dims) > 1 and one.name not in ("cos", "sin")]
    assert len(set(tables)) == len(tables) > 1


@pytest.mark.parametrize("layer", SMALL, ids=str)
def test_parts_are_the_operators_of_a_layer(layer: Case) -> None:
    """By the graph itself: node types of the second layer less those of a single one."""
    import onnx

    def types(count: int) -> Counter[str]:
        return Counter(node.op_type for node in onnx.load_from_string(layer_model(layer, count)).graph.node)

    one = types(2) - types(1)
    told = Counter({case.op: 0 for case, _ in parts(layer)})
    for case, count in parts(layer):
        told[case.op] += count
    renamed = {"Gemm": "MatMul", "Gelu": "BiasGelu"}  # a matrix with its bias; the activation without one
    assert Counter({renamed.get(op, op): count for op, count in one.items() if op not in ("Reshape", "Add")}) == told


def test_a_decoder_layer_is_what_the_compiler_builds(tiny_llama: Path, tmp_path: Path) -> None:
    import onnx
    import onnx_ir as ir

    from compiler.checkpoints.resolve import open_checkpoint
    from compiler.graph.decoder import export_decoder
    from compiler.scheme import Schemes, parse_scheme

    export_decoder(open_checkpoint(str(tiny_llama)), Schemes(parse_scheme("int4-g32")), tmp_path)
    built = [node.op_type for node in ir.load(tmp_path / "model.onnx").graph if node.name and node.name.startswith("/layers.1/")]
    chain = [node.op_type for node in onnx.load_from_string(layer_model(SMALL[0], 1)).graph.node]
    assert chain == built


@pytest.mark.parametrize("layer", EVERY, ids=str)
def test_chains_fill_the_bytes_that_are_asked_for(layer: Case) -> None:
    for size in (1 << 20, 64 << 20, 256 << 20):
        count = depth(layer, size)
        assert count * layer_bytes(layer) >= size and (count == LAYERS_LEAST or (count - 1) * layer_bytes(layer) < size)
    matrices = sum(case.k * case.n for case, _ in parts(layer) if case.op in MATRICES)
    assert layer_bytes(layer) >= matrices * layer.bits / 8


def test_a_step_does_what_generation_does() -> None:
    step = Step(1, 7)
    assert step() == int(step.logits.argmax())
    assert [array.reshape(-1).tolist() for array in step.results] == [[8], [7], [0]]  # tokens in all, before the last, place of the last of one


def test_samples_beside_a_slow_reference_kernel_do_not_count() -> None:
    samples = Samples([1.0, 1.1, 1.2, 1.3, 2.0, 2.1, 2.2, 2.3], [0.6, 0.6, 0.6, 0.6, 1.1, 1.1, 1.1, 1.1])
    timing = samples.timing()
    assert timing.samples == 4 and 1.0 <= timing.seconds <= 1.1
    fast_by_luck = Samples([0.5, 1.0, 1.0, 1.0], [1.1, 0.6, 0.6, 1.2])  # dropping looks at the kernel, never at the sample
    assert fast_by_luck.timing().seconds == 1.0
    assert Timing.of([3.0]).samples == 1


class Clockwork(Spin):
    def __init__(self) -> None:
        super().__init__(1)

    def time_ms(self) -> float:
        return 1.0


def test_passes_leave_a_row_for_each_point(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ((SMALL[0], 1, (STEP, Point(4))), (SMALL[3], 1, (Point(4),)))
    monkeypatch.setattr(passes, "CHAINS", small)
    with Clockwork() as spin:
        chains = ChainPasses(1, 1 << 33, spin)
        assert chains.step() is None and chains.rows() == []
        chains.run(0.0)
        assert chains.rows() == []  # no time, no chain
        passed = 0
        while passed < 20 and (len(chains.rows()) < 3 or min(len(kept.seconds) for kept in chains.samples.values()) < PASSES):
            chains.run(0.1)  # a busy machine needs more passes
            passed += 1
        rows = chains.rows()
    assert [(row.op, row.m, row.context, row.layers) for row in rows] == [
        (DECODER, 1, 128, LAYERS_LEAST),
        (DECODER, 4, 0, LAYERS_LEAST),
        (ENCODER, 4, 0, LAYERS_LEAST),
    ]
    step = chains.step()
    assert all(row.us > 0 for row in rows) and step is not None and step[0] > 0 and all(len(kept.seconds) >= PASSES for kept in chains.samples.values())
    # one before each point of a pass and one after each sample
    assert sum(len(kept.seconds) for kept in chains.samples.values()) + 3 <= len(chains.readings)


def test_each_pass_opens_the_chains_anew_and_one_is_open_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[CaseRun]] = []

    def note(layer: Case, threads: int, stream_bytes: int) -> CaseRun:
        assert all(chain() is None for chain in opened)
        run = open_layers(layer, threads, stream_bytes)
        opened.append(weakref.ref(run))
        return run

    monkeypatch.setattr(passes, "open_layers", note)
    monkeypatch.setattr(passes, "CHAINS", ((SMALL[0], 1, (Point(4),)), (SMALL[3], 1, (Point(4),))))
    with Clockwork() as spin:
        chains = ChainPasses(1, 1 << 33, spin)
        for _ in range(2):
            chains.run(2.0)
    assert len(opened) == 2 * 2 and all(chain() is None for chain in opened)


def test_chains_take_no_more_of_the_memory_than_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def note(layer: Case, threads: int, stream_bytes: int) -> CaseRun:
        asked.append(stream_bytes)
        return open_layers(SMALL[0], threads, 1)

    monkeypatch.setattr(passes, "open_layers", note)
    monkeypatch.setattr(passes, "CHAINS", tuple((SMALL[0], size, (Point(4),)) for _, size, _ in passes.CHAINS))
    with Clockwork() as spin:
        chains = ChainPasses(1, 2 << 30, spin)
        for _ in range(5):  # a pass whose time is over begins at the front again: it must be long enough for all
            if len(asked) < len(passes.CHAINS):
                chains.run(3.0)
    assert len(asked) == len(passes.CHAINS) and max(asked) == 64 << 20


def alone() -> Iterator[KernelTime]:
    """Operators that take 10 us each at one token, 100 at 128, whatever their size."""
    for op, bits, block in (
        ("MatMulNBits", 4, 64),
        ("GroupQueryAttention", 32, 64),
        *((op, 32, 0) for op in ("RMSNormalization", "Split", "QuickGelu", "Mul")),
    ):
        for m, us in ((1, 10.0), (128, 100.0)):
            yield KernelTime(op, bits, block, 512, 128, m, 2, us)
            yield KernelTime(op, bits, block, 1024, 128, m, 2, us)


CHAIN = Case(DECODER, 4, 64, 512, 1536)
CHAIN_ROW = {"op": DECODER, "bits": 4, "block": 64, "k": 512, "n": 1536, "threads": 2}


def chain_row(m: int, us: float, layers: int = 36, **changes: int) -> KernelTime:
    return KernelTime(**{**CHAIN_ROW, "m": m, "us": us, "layers": layers, **changes})  # type: ignore[arg-type]


def test_together_is_the_chain_over_its_operators() -> None:
    table = KernelTable((*alone(), chain_row(1, 150.0), chain_row(128, 800.0)))
    nodes = sum(count for _, count in parts(CHAIN))
    streamed = 36 * layer_bytes(CHAIN)
    sums = {m: sum(count * table.us(case, Point(m)) for case, count in parts(CHAIN)) for m in (1, 128)}
    assert sums[1] == pytest.approx(10 * nodes) and sums[128] == pytest.approx(100 * nodes)
    assert table.together(CHAIN, Point(1), streamed) == pytest.approx(150 / sums[1], rel=1e-4)
    assert table.together(CHAIN, Point(128), streamed) == pytest.approx(800 / sums[128], rel=1e-4)
    between = table.together(CHAIN, Point(16), streamed)
    assert min(150 / sums[1], 800 / sums[128]) < between < max(150 / sums[1], 800 / sums[128])
    assert KernelTable(tuple(alone())).together(CHAIN, Point(1), streamed) == 1.0


def test_a_model_that_streams_more_is_read_from_the_longer_chain() -> None:
    table = KernelTable((*alone(), chain_row(1, 120.0), chain_row(1, 240.0, layers=144)))
    near, far = (table.together(CHAIN, Point(1), layers * layer_bytes(CHAIN)) for layers in (36, 144))
    assert far == pytest.approx(2 * near, rel=1e-4)
    many = [table.together(CHAIN, Point(64), layers * layer_bytes(CHAIN)) for layers in (36, 144)]
    assert many[0] == many[1]  # many tokens do arithmetic


def test_chains_of_the_nearest_block_count() -> None:
    table = KernelTable((*alone(), chain_row(1, 120.0), chain_row(1, 360.0, block=128)))
    factors = [table.together(Case(DECODER, 4, block, 512, 1536), Point(1), 1 << 26) for block in (32, 64, 128)]
    assert factors[0] == factors[1] == pytest.approx(factors[2] / 3)
    assert table.together(Case(DECODER, 8, 32, 512, 1536), Point(1), 1 << 26) == factors[0]  # no chain of 8 bits: the nearest of any


def test_a_chain_whose_operators_were_not_timed_says_nothing() -> None:
    rows = tuple(row for row in alone() if row.op != "Split")
    assert KernelTable((*rows, chain_row(1, 150.0))).together(CHAIN, Point(1), 1 << 26) == 1.0


def test_a_model_that_is_a_chain_takes_what_the_chain_took() -> None:
    """30 layers of the chain's own shape: the operators alone say 36 x 10 us, the chain 150 us a layer."""
    operators = tuple(Operator(case, 30 * count) for case, count in parts(CHAIN))
    work = Workload("decoder", operators, 0, 0)
    profile = here()
    rows = (*alone(), chain_row(1, 150.0, layers=30, context=144), chain_row(128, 800.0, layers=30))
    told = predict(work, replace(profile, kernels=rows, run_us=50.0, step_us=300.0)).figures
    assert told["tpot_ms"].value == pytest.approx((50 + 300 + 30 * 150) / 1e3, rel=1e-3)
    assert told["ttft_ms"].value == pytest.approx((50 + 300 + 30 * 800) / 1e3, rel=1e-3)
    assert np.isfinite(told["tpot_ms"].high)
