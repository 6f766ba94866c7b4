"""Faults of a graph that run without an error and ruin its speed: found before it ships.

MatMulNBits (contrib operator spec, com.microsoft 1; the conditions under which onnxruntime's CPU kernel prepacks its weights):
1. `accuracy_level` 4: with any other, 8-bit weights are dequantized on every call and 4-bit ones take the fp32 path
2. zero points are uint8: float ones dequantize the whole matrix on every call
3. no `g_idx` (GPTQ's act-order): the same
4. block size 16, 32, 64, 128 or 256: the same
5. weights, scales and zero points are initializers: they cannot be prepacked otherwise

Integer products of uint8 activations and int8 weights (U8S8), a fault of results:
6. |w[k]| + |w[k + 1]| <= 128 for even k: on x86 without VNNI the kernel adds two products in 16 bits (vpmaddubsw), and 255 * 129 does not fit.
   Codes of 7 bits always hold it; uint8 weights need no bound, their kernel widens first. It is proven from the codes in the file, for any activation,
   and asked of every file, since a file says nothing of the machines it will be copied to.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from compiler.errors import BundleError
from compiler.graph.encoder_quantize import PAIR_BOUND, worst_pair

BLOCK_SIZES = (16, 32, 64, 128, 256)
INTEGER_WEIGHTS = {
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "QAttention": 1,
    "QLinearMatMul": 3,
}  # operator -> its weight's input


def lint(model: ir.Model) -> list[str]:
    """Every fault of the model as one line `node: fault`; an empty list is a clean graph."""
    rules = {"MatMulNBits": nbits_faults, **dict.fromkeys(INTEGER_WEIGHTS, pair_faults)}
    return [f"{node.name}: {fault}" for node in model.graph.all_nodes() if node.op_type in rules for fault in rules[node.op_type](node)]


def nbits_faults(node: ir.Node) -> Iterator[str]:
    """Rules 1-5 for one MatMulNBits."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    inputs = [*node.inputs, *[None] * 6][:6]
    if attributes.get("accuracy_level", 0) != 4:
        yield f"accuracy_level {attributes.get('accuracy_level', 0)}, not 4: weights are dequantized on every call"
    if inputs[3] is not None and inputs[3].dtype != ir.DataType.UINT8:
        yield f"zero points of type {inputs[3].dtype}, not UINT8: the matrix is dequantized on every call"
    if inputs[4] is not None:
        yield "g_idx is set: the matrix is dequantized on every call"
    if attributes.get("block_size") not in BLOCK_SIZES:
        yield f"block_size {attributes.get('block_size')}, not one of {BLOCK_SIZES}: the matrix is dequantized on every call"
    for value in inputs[1:4]:
        if value is not None and not value.is_initializer():
            yield f"{value.name} is not an initializer: nothing can be prepacked"


def pair_faults(node: ir.Node) -> Iterator[str]:
    """Rule 6 for one integer product; weights [in, out]."""
    weight = node.inputs[INTEGER_WEIGHTS[node.op_type]]
    if weight is None or weight.dtype != ir.DataType.INT8:
        return
    if weight.const_value is None:
        yield f"{weight.name} is not an initializer: whether its products saturate cannot be told"
    elif (worst := worst_pair(weight.const_value.numpy())) > PAIR_BOUND:
        yield f"{weight.name} has neighbouring codes of {worst} together, more than {PAIR_BOUND}: 16-bit sums saturate on processors without VNNI"


def require_clean(model_path: Path) -> None:
    """Raises BundleError listing all faults of the graph at `model_path`."""
    faults = lint(ir.load(model_path))
    if faults:
        raise BundleError(
            str(model_path),
            expected="kernels that keep their weights packed and sums that cannot saturate",
            found="; ".join(faults),
            remedy="export again with this compiler",
        )
