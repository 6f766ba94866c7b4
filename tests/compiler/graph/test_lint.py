"""Each fault that makes MatMulNBits dequantize on every call is found by name, and so are 8-bit products that can saturate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from compiler.errors import BundleError
from compiler.graph.encoder_quantize import PAIR_BOUND, bounded, worst_pair
from compiler.graph.lint import lint, require_clean
from compiler.graph.nodes import MICROSOFT, GraphBuilder, save_model
from targets.machine import this_machine

GOOD: dict[str, Any] = {"K": 32, "N": 4, "bits": 4, "block_size": 32, "accuracy_level": 4}


def graph(zero_points: np.ndarray | None = None, g_idx: bool = False, **changes: Any) -> ir.Model:
    build = GraphBuilder()
    x = build.input("x", ir.DataType.FLOAT, ["n", 32])
    inputs = [x, build.constant("codes", np.zeros((4, 1, 16), np.uint8)), build.constant("scales", np.ones((4, 1), np.float32))]
    inputs.append(None if zero_points is None else build.constant("zero_points", zero_points))
    inputs.append(build.constant("g_idx", np.zeros(32, np.int32)) if g_idx else None)
    attributes = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    build.output(build.op("mm", "MatMulNBits", inputs, MICROSOFT, **attributes), "y", ir.DataType.FLOAT, ["n", 4])
    return build.model()


def integer_graph(weights: str, activations: ir.DataType) -> ir.Model:
    build = GraphBuilder()
    x = build.input("x", activations, ["n", 32])
    stored = build.constant("w", np.zeros((32, 4), np.int8)) if weights == "stored" else build.input("w", ir.DataType.INT8, [32, 4])
    build.output(build.op("mm", "MatMulInteger", [x, stored]), "y", ir.DataType.INT32, ["n", 4])
    return build.model()


def half_graph() -> ir.Model:
    build = GraphBuilder()
    x = build.input("x", ir.DataType.FLOAT16, ["n", 32])
    build.output(build.op("mm", "MatMul", [x, build.constant("w", np.zeros((32, 4), np.float16))]), "y", ir.DataType.FLOAT16, ["n", 4])
    return build.model()


def fed_graph() -> ir.Model:
    build = GraphBuilder()
    x, codes = build.input("x", ir.DataType.FLOAT, ["n", 32]), build.input("codes", ir.DataType.UINT8, [4, 1, 16])
    inputs = [x, codes, build.constant("scales", np.ones((4, 1), np.float32))]
    build.output(build.op("mm", "MatMulNBits", inputs, MICROSOFT, **GOOD), "y", ir.DataType.FLOAT, ["n", 4])
    return build.model()


def test_a_clean_graph() -> None:
    assert lint(graph()) == []
    assert lint(graph(np.zeros((4, 1), np.uint8))) == []
    assert lint(integer_graph("stored", ir.DataType.UINT8)) == []


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (graph(np.zeros((4, 1), np.float32)), "zero points of type FLOAT"),
        (graph(g_idx=True), "g_idx is set"),
        (graph(accuracy_level=0), "accuracy_level 0"),
        (graph(accuracy_level=None), "accuracy_level 0"),
        (graph(block_size=8), "block_size 8"),
        (graph(bits=5), "bits 5"),
        (fed_graph(), "codes is not an initializer"),
        (integer_graph("fed", ir.DataType.UINT8), "w is not an initializer"),
        (integer_graph("stored", ir.DataType.INT8), "int8 activations"),
        (half_graph(), "a float16 operand"),
    ],
)
def test_faults_are_named(model: ir.Model, words: str, tmp_path: Path) -> None:
    (fault,) = lint(model)
    assert fault.startswith("mm: ")
    assert words in fault
    save_model(model, tmp_path / "model.onnx")
    with pytest.raises(BundleError, match="keep their weights packed"):
        require_clean(tmp_path / "model.onnx")


def integer_product(codes: np.ndarray) -> ir.Model:
    """MatMulInteger of uint8 [n, in] and these int8 codes [in, out]."""
    build = GraphBuilder()
    x = build.input("x", ir.DataType.UINT8, ["n", len(codes)])
    build.output(build.op("mm", "MatMulInteger", [x, build.constant("codes", codes)]), "y", ir.DataType.INT32, ["n", codes.shape[1]])
    return build.model()


def product(codes: np.ndarray, x: np.ndarray) -> np.ndarray:
    content = ir.to_proto(integer_product(codes)).SerializeToString()
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


class TestSaturation:
    """Codes [64, 32], activations 255: the largest sums there are."""

    full = np.full((64, 32), 127, np.int8)
    largest = np.full((8, 64), 255, np.uint8)

    def test_the_lint_tells_what_saturates_on_this_machine(self) -> None:
        if not any(feature in this_machine().isa for feature in ("avx_vnni", "avx512_vnni")) and "avx2" in this_machine().isa:
            assert np.any(product(self.full, self.largest) != 255 * 127 * 64), "this processor saturates no sum of two products"
        (fault,) = lint(integer_product(self.full))
        assert "neighbouring codes of 254" in fault

    @pytest.mark.parametrize("sign", [1, -1])
    def test_codes_within_the_bound_are_exact(self, sign: int) -> None:
        codes = (sign * bounded(np.random.default_rng(0).integers(-127, 128, (32, 64)).astype(np.float32)).T).astype(np.int8)
        codes[:2], codes[2:4] = 64 * sign, [[127 * sign], [1 * sign]]
        assert worst_pair(codes) == PAIR_BOUND
        assert lint(integer_product(codes)) == []
        assert np.array_equal(product(codes, self.largest), self.largest.astype(np.int64) @ codes.astype(np.int64))

    def test_the_bound_is_for_pairs_that_the_kernel_adds(self) -> None:
        """Codes 1 and 2 are no pair."""
        codes = np.tile(np.array([[1], [127], [127], [1]], np.int8), (16, 32))
        assert lint(integer_product(codes)) == []
        assert np.array_equal(product(codes, self.largest), self.largest.astype(np.int64) @ codes.astype(np.int64))
