"""The hand-written models are ONNX, their kernels compute what they say, and a probe fits its budget."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from targets.errors import TargetError
from targets.probe import KernelCase, kernel_cases, kernel_model, probe, repeat, time_kernel
from targets.profile import dump_profile, load_profile
from targets.spin import Spin
from targets.wire import OneNode, _number, model_bytes

CASES = [
    KernelCase("MatMulNBits", 4, 32, 64, 48),
    KernelCase("MatMulNBits", 8, 64, 96, 32),
    KernelCase("DynamicQuantizeMatMul", 8, 0, 64, 48),
    KernelCase("MatMul", 32, 0, 64, 48),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.bits}")
def test_onnx_itself_accepts_the_models(case: KernelCase) -> None:
    import onnx

    model = onnx.load_from_string(kernel_model(case))
    onnx.checker.check_model(model, full_check=case.op == "MatMul")  # shapes of com.microsoft operators are not onnx's to know
    assert model.SerializeToString() == kernel_model(case)  # byte for byte what protobuf would write
    assert [value.name for value in model.graph.input] == ["x"] and model.graph.node[0].op_type == case.op


@pytest.mark.parametrize(("value", "wire"), [(0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02"), (2**32, "8080808010")])
def test_varints(value: int, wire: str) -> None:
    assert _number(value).hex() == wire


def test_a_model_computes_what_its_constants_say() -> None:
    weights = np.random.default_rng(0).standard_normal((6, 4), np.float32)
    session = onnxruntime.InferenceSession(model_bytes(OneNode("MatMul", 6, 4, {"weights": weights}, {})))
    x = np.random.default_rng(1).standard_normal((3, 6), np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weights, rtol=1e-5)


def test_the_nbits_model_is_the_kernel_it_names() -> None:
    session = onnxruntime.InferenceSession(kernel_model(CASES[0]))
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (48, 2, 16), np.uint8)
    scales = rng.random((48, 2), np.float32) * 0.01
    values = np.stack([codes & 15, codes >> 4], -1).reshape(48, 2, 32).astype(np.float32) - 8
    weights = (values * scales[:, :, None]).reshape(48, 64)
    x = np.random.default_rng(1).standard_normal((5, 64), np.float32)
    got = session.run(None, {"x": x})[0]
    assert np.abs(got - x @ weights.T).max() < 0.03 * np.abs(got).max()  # activations go through int8


def test_times_are_positive_and_cases_are_distinct() -> None:
    assert time_kernel(CASES[0], 4, 1, 0.01).samples >= 3
    cases = list(kernel_cases())
    assert len(set(cases)) == len(cases) and cases[0].bits == 4


def test_repeat_counts_and_orders() -> None:
    timing = repeat(lambda: time.sleep(0.002), 0.03)
    assert 0.002 <= timing.seconds < 0.05 and timing.samples >= 3 and timing.spread >= 0


def test_a_short_probe_is_a_profile(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    started = time.perf_counter()
    profile = probe(2.0, lambda *step: told.append(step), threads=1, folder=tmp_path)
    assert time.perf_counter() - started < 40
    for name in ("read_gb_s", "read_1_gb_s", "fp32_gflop_s", "int8_gop_s", "storage_read_mb_s", "spin_ms"):
        assert getattr(profile, name) > 0
        source = profile.provenance[name]
        assert source.source == "measured" and source.samples >= 3 and source.spread is not None and source.date.startswith("20")
    assert profile.is_here and told[-1][0] == "done" and told[-1][1] == told[-1][2]
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert len(profile.kernels) % 3 == 0
    if len(profile.kernels) < 3 * len(list(kernel_cases())):
        assert "left out for lack of time" in profile.description
    path = tmp_path / "here.yaml"
    path.write_text(dump_profile(profile))
    assert load_profile(path) == profile
    assert list(tmp_path.iterdir()) == [path]  # the file that storage was measured with is gone


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_budgets_that_are_none(seconds: float) -> None:
    with pytest.raises(TargetError, match="expected a positive number of seconds"):
        probe(seconds)


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
