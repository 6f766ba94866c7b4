"""The hand-written models are ONNX, their kernels compute what they say, and a probe fits its budget."""

from __future__ import annotations

import os
import threading
import time
from itertools import count
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from targets.errors import TargetError
from targets.kernels import COPIES_MOST, STREAM_BYTES, Case, Point, case_model, cases, copies, open_case, weight_bytes
from targets.passes import CHAINS
from targets.probe import probe, repeat
from targets.profile import KernelTime, dump_profile, load_profile
from targets.spin import Spin, apart
from targets.sweep import Sweep, Timed, time_case
from targets.wire import Graph, Node, Value, _number, model_bytes

CASES = [
    Case("MatMulNBits", 4, 32, 64, 48),
    Case("MatMulNBits", 8, 64, 96, 32, symmetric=False),
    Case("DynamicQuantizeMatMul", 8, 0, 64, 48),
    Case("MatMul", 32, 0, 64, 48),
    Case("FusedMatMul", 32, 0, 64, 48),
    Case("GroupQueryAttention", 32, 16, 64, 32),
    Case("Attention", 32, 16, 64, 64),
    Case("RMSNormalization", 32, 0, 64, 1),
    Case("SkipLayerNormalization", 32, 0, 64, 1),
    Case("QuickGelu", 32, 0, 64, 1),
    Case("BiasGelu", 32, 0, 64, 1),
    Case("Mul", 32, 0, 64, 1),
    Case("Split", 32, 0, 64, 1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.bits}")
def test_onnx_itself_accepts_the_models(case: Case) -> None:
    import onnx

    model = onnx.load_from_string(case_model(case, 2))
    onnx.checker.check_model(model, full_check=case.op in ("MatMul", "Mul", "Split"))  # shapes of com.microsoft operators are not onnx's to know
    assert model.SerializeToString() == case_model(case, 2)  # byte for byte what protobuf would write
    assert [node.op_type for node in model.graph.node if node.op_type != "Add"] == [case.op] * 2  # a norm comes with its Add


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.bits}")
def test_every_operator_of_the_table_runs(case: Case) -> None:
    run = open_case(case, Point(3, 5), 1)
    run.bind(Point(3, 5))()
    run.bind(Point(1, 5))()  # the same session, other sizes


def test_the_table_covers_what_bundles_are_made_of() -> None:
    rows = list(cases())
    assert {case.op for case, _ in rows} == {case.op for case in CASES}
    assert len({case for case, _ in rows}) == len(rows) and rows[0][0].bits == 4
    assert {(case.bits, case.block, case.symmetric) for case, _ in rows if case.op == "MatMulNBits"} == {
        (bits, block, symmetric) for bits, blocks in ((4, (32, 64, 128)), (8, (16, 32, 64, 128))) for block in blocks for symmetric in (True, False)
    }
    for case, points in rows:
        assert len(set(points)) == len(points)
        if case.op == "MatMulNBits":  # decode streams: all copies together are larger than a cache, or as many as there may be
            count = copies(case, Point(1))
            assert count * weight_bytes(case) >= STREAM_BYTES or count == COPIES_MOST


@pytest.mark.parametrize(("value", "wire"), [(0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02"), (2**32, "8080808010")])
def test_varints(value: int, wire: str) -> None:
    assert _number(value).hex() == wire


def test_a_model_computes_what_its_constants_say() -> None:
    weights = np.random.default_rng(0).standard_normal((6, 4), np.float32)
    graph = Graph([Node("MatMul", ["x", "w"], ["y"])], [Value("x", ("m", 6))], [Value("y", ("m", 4))], {"w": weights})
    session = onnxruntime.InferenceSession(model_bytes(graph))
    x = np.random.default_rng(1).standard_normal((3, 6), np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weights, rtol=1e-5)


def test_float_attributes_arrive() -> None:
    graph = Graph([Node("LeakyRelu", ["x"], ["y"], {"alpha": 0.25})], [Value("x", ("m",))], [Value("y", ("m",))])
    assert onnxruntime.InferenceSession(model_bytes(graph)).run(None, {"x": np.float32([-4, 2])})[0].tolist() == [-1, 2]


def test_the_nbits_model_is_the_kernel_it_names() -> None:
    import onnx
    from onnx.numpy_helper import to_array

    model = case_model(CASES[0])
    session = onnxruntime.InferenceSession(model)
    codes, scales = (to_array(one) for one in onnx.load_from_string(model).graph.initializer)
    assert codes.shape == (48, 2, 16) and scales.shape == (48, 2)
    values = np.stack([codes & 15, codes >> 4], -1).reshape(48, 2, 32).astype(np.float32) - 8
    weights = (values * scales[:, :, None]).reshape(48, 64)
    x = np.random.default_rng(1).standard_normal((5, 64), np.float32)
    got = session.run(None, {"x": x})[0]
    assert np.abs(got - x @ weights.T).max() < 0.03 * np.abs(got).max()  # activations go through int8


def test_times_are_positive_and_stand_in_the_columns() -> None:
    with Spin(1) as spin:
        timed = time_case(CASES[5], (Point(1, 8), Point(4)), spin, 0.02)
    rows = timed.rows
    assert timed.spin_ms > 0
    assert [(row.m, row.context, row.k, row.n, row.block) for row in rows] == [(1, 8, 64, 32, 16), (4, 0, 64, 32, 16)]
    assert all(row.us > 0 for row in rows)


class ScriptedChains:
    """Passes without chains; beside those of `slow` the reference kernel was slow, until each was timed so many times more."""

    def __init__(self, spin: Spin, slow: dict[int, int] | None = None) -> None:
        self.spin, self.passes, self.slow = spin, 0, slow or {}
        self.readings = [1.0] * 20

    def time(self, place: int, seconds: float) -> None:
        time.sleep(0.001)
        self.slow[place] -= 1

    def slowness(self) -> dict[int, float]:
        return {place: 2.0 if looks > 0 else 1.0 for place, looks in self.slow.items()}

    def run(self, seconds: float) -> None:
        self.passes += 1

    def rows(self) -> list[KernelTime]:
        return []


def test_what_a_slow_stretch_fell_on_is_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second case is timed beside slow readings twice, then beside a quick one, which is kept; the third never is, and its least slow one is kept."""
    told = {"Mul": iter([1.0]), "Split": iter([1.5, 1.6, 1.1]), "QuickGelu": iter([3.0, 2.0, 2.5, *[2.6] * 1000])}
    times = count(10.0)

    def fake(case: Case, points: object, spin: Spin, seconds: float) -> Timed:
        time.sleep(0.001)
        return Timed((KernelTime(case.op, 32, 0, case.k, 1, 1, 1, next(times)),), next(told[case.op]))

    monkeypatch.setattr("targets.sweep.time_case", fake)
    rows = [(Case(op, 32, 0, 64, 1), (Point(1),)) for op in told]
    with Spin(1) as spin:
        chains = ScriptedChains(spin)
        seen: list[str] = []
        found = Sweep(rows, chains, time.perf_counter() + 0.5, lambda what, done: seen.append(what)).run()  # type: ignore[arg-type]
    assert [row.op for row in found] == list(told) and chains.passes == 3
    assert not any(what.startswith("Mul") and "again" in what for what in seen) and sum("Split" in what for what in seen) == 3
    # 10, 11, 12 at first; then the slowest: 13 (2.0 beside it, kept), 14 of Split; 15 of QuickGelu, 16 of Split (1.1 beside it, kept)
    assert [row.us for row in found] == [10.0, 16.0, 13.0]


def test_chains_are_timed_again_before_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([9.0, 1.0])
    monkeypatch.setattr("targets.sweep.time_case", lambda case, points, spin, seconds: Timed((), next(readings)))
    seen: list[str] = []
    with Spin(1) as spin:
        chains = ScriptedChains(spin, {0: 0, 2: 2, 3: 1})
        row = (Case("Mul", 32, 0, 64, 1), (Point(1),))
        Sweep([row], chains, time.perf_counter() + 0.5, lambda what, done: seen.append(what)).run()  # type: ignore[arg-type]
    assert chains.slow == {0: 0, 2: 0, 3: 0}
    again = [what.removesuffix(", again") for what in seen if what.endswith(", again")]
    assert again == [str(CHAINS[2][0]), str(CHAINS[3][0]), str(row[0]), str(CHAINS[2][0])]  # each slow one once before any of them twice


def test_repeat_counts_and_orders() -> None:
    timing = repeat(lambda: time.sleep(0.002), 0.03)
    assert 0.002 <= timing.seconds < 0.05 and timing.samples >= 3 and timing.spread >= 0


def test_a_short_probe_is_a_profile(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    profile = probe(2.0, lambda *step: told.append(step), threads=1, folder=tmp_path)
    for name in ("read_gb_s", "read_1_gb_s", "fp32_gflop_s", "int8_gop_s", "storage_read_mb_s", "open_mb_s", "run_us", "parallel_us", "spin_ms"):
        assert getattr(profile, name) > 0
        source = profile.provenance[name]
        assert source.source == "measured" and source.samples >= 3 and source.spread is not None and source.date.startswith("20")
    assert profile.is_here and told[-1][0] == "done" and told[-1][1] == told[-1][2]
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    timed = {(row.op, row.bits, row.block, row.k, row.n, row.symmetric) for row in profile.kernels}
    if len(timed) < len(list(cases())):
        assert "left out for lack of time" in profile.description
    path = tmp_path / "here.yaml"
    path.write_text(dump_profile(profile))
    assert load_profile(path) == profile
    assert list(tmp_path.iterdir()) == [path]  # the file that storage was measured with is gone


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_budgets_that_are_none(seconds: float) -> None:
    with pytest.raises(TargetError, match="expected a positive number of seconds"):
        probe(seconds)


def test_threads_of_the_reference_kernel_stay_apart() -> None:
    assert apart({0, 1, 2}, 2) == [{0, 2}, {1}] and apart({5}, 2) == [{5}, {5}]
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor")
    meet = threading.Barrier(2)

    def where() -> set[int]:
        meet.wait(10)
        return os.sched_getaffinity(0)

    with Spin(2) as spin:
        first, second = (done.result() for done in [spin._pool.submit(where) for _ in range(2)])
    assert first and second and not first & second
    assert os.sched_getaffinity(0) == first | second  # the rest of the process stays where it was


def test_spin_knows_a_disturbed_machine_from_a_quiet_one() -> None:
    with Spin(1) as spin:
        assert spin.calibrate(count=5) > 0
        spin.baseline_ms *= 1000
        assert spin.read().quiet
        spin.baseline_ms /= 1_000_000
        assert not spin.read().quiet
        calls: list[int] = []
        spin.calibrate(lambda: calls.append(1), count=3)
        assert len(calls) == 3


@pytest.mark.parametrize(("known", "baseline"), [(0.0, 1.1), (0.9, 0.9), (1.05, 1.05), (2.0, 1.1), (0.5, 1.1)])
def test_a_slow_minute_does_not_become_the_baseline(known: float, baseline: float) -> None:
    readings = iter([1.0, 1.1, 1.2, 1.3, 1.4])
    with Spin(1, tolerance=1.2, known_ms=known) as spin:
        spin.time_ms = lambda: next(readings)  # type: ignore[method-assign]
        assert spin.calibrate(count=5) == pytest.approx(baseline)  # 0.5: this machine no longer comes near it
