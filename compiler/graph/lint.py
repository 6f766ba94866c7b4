"""Faults of a graph that run without an error and ruin its speed: found before it ships.

MatMulNBits (contrib operator spec, com.microsoft 1; the conditions under which onnxruntime's CPU kernel prepacks its weights):
1. `accuracy_level` 4: with any other, 8-bit weights are dequantized on every call and 4-bit ones take the fp32 path
2. zero points are uint8: float ones dequantize the whole matrix on every call
3. no `g_idx` (GPTQ's act-order): the same
4. block size 16, 32, 64, 128 or 256: the same
5. weights, scales and zero points are initializers, or nodes make them of initializers alone and onnxruntime folds those before it prepacks
6. 2, 4 or 8 bits: no other width has a kernel

MatMulInteger, MatMulIntegerToFloat, DynamicQuantizeMatMul:
7. weights as in rule 5
8. activations are uint8: signed ones have no kernel on x86 (576 x 3072, one core of a Zen 3: 19 GOP/s against 165)

Every operator that multiplies matrices:
9. no float16 operand on the CPU: it is cast to float32 on every call; stored float16 is widened by a Cast of the initializer, which is folded

Integer products of uint8 activations and int8 weights (U8S8), a fault of results:
10. |w[k]| + |w[k + 1]| <= 128 for even k: on x86 without VNNI the kernel adds two products in 16 bits (vpmaddubsw), and 255 * 129 does not fit.
   Codes of 7 bits always hold it; uint8 weights need no bound, their kernel widens first. It is proven from the codes in the file, for any activation,
   and asked of every file but those of a scheme that is for processors with wider sums alone (`Scheme.full_range`): their manifest says so, and
   `runtimes.encode` asks the processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from compiler.errors import BundleError
from compiler.graph.encoder_quantize import PAIR_BOUND, worst_pair

BLOCK_SIZES = (16, 32, 64, 128, 256)
WIDTHS = (2, 4, 8)
INTEGER = {"MatMulInteger": 1, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1, "QAttention": 1}  # operator -> input that holds the weights
FLOAT = ("MatMul", "FusedMatMul", "Gemm")


def lint(model: ir.Model, *, full_range: bool = False) -> list[str]:
    """Every fault of the model as one line `node: fault`; an empty list is a clean graph. full_range: rule 10 is not asked."""
    return [f"{node.name}: {fault}" for node in model.graph.all_nodes() for fault in node_faults(node, full_range)]


def node_faults(node: ir.Node, full_range: bool) -> Iterator[str]:
    """The rules that apply to a node."""
    if node.op_type == "MatMulNBits":
        yield from nbits_faults(node)
    if node.op_type in INTEGER:
        yield from integer_faults(node, full_range)
    if node.op_type in FLOAT and any(value is not None and value.dtype == ir.DataType.FLOAT16 for value in node.inputs):
        yield "a float16 operand: it is cast to float32 on every call"


def integer_faults(node: ir.Node, full_range: bool) -> Iterator[str]:
    """Rules 7, 8 and 10 for one product of integers."""
    activations, weights = node.inputs[0], node.inputs[INTEGER[node.op_type]]
    if weights is not None and not constant(weights):
        yield f"{weights.name} is not an initializer: nothing can be prepacked"
    elif weights is not None and weights.dtype == ir.DataType.INT8 and not full_range:
        yield from pair_faults(weights)
    if activations is not None and activations.dtype == ir.DataType.INT8:
        yield "int8 activations: no kernel of x86 takes them"


def nbits_faults(node: ir.Node) -> Iterator[str]:
    """Rules 1-6 for one MatMulNBits."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    inputs = [*node.inputs, *[None] * 6][:6]
    if attributes.get("accuracy_level", 0) != 4:
        yield f"accuracy_level {attributes.get('accuracy_level', 0)}, not 4: weights are dequantized on every call"
    if attributes.get("bits") not in WIDTHS:
        yield f"bits {attributes.get('bits')}, not one of {WIDTHS}: there is no kernel"
    if inputs[3] is not None and inputs[3].dtype != ir.DataType.UINT8:
        yield f"zero points of type {inputs[3].dtype}, not UINT8: the matrix is dequantized on every call"
    if inputs[4] is not None:
        yield "g_idx is set: the matrix is dequantized on every call"
    if attributes.get("block_size") not in BLOCK_SIZES:
        yield f"block_size {attributes.get('block_size')}, not one of {BLOCK_SIZES}: the matrix is dequantized on every call"
    for value in inputs[1:4]:
        if value is not None and not constant(value):
            yield f"{value.name} is not an initializer: nothing can be prepacked"


def pair_faults(weights: ir.Value) -> Iterator[str]:
    """Rule 10 for int8 [in, out]."""
    if weights.const_value is None:
        yield f"{weights.name} is computed: whether its products saturate cannot be told"
    elif (worst := worst_pair(weights.const_value.numpy())) > PAIR_BOUND:
        yield f"{weights.name} has neighbouring codes of {worst} together, more than {PAIR_BOUND}: 16-bit sums saturate on processors without VNNI"


def constant(value: ir.Value) -> bool:
    """Whether a value depends on initializers alone."""
    if value.is_initializer():
        return True
    node = value.producer()
    return node is not None and all(constant(one) for one in node.inputs if one is not None)


def require_clean(model_path: Path, *, full_range: bool = False) -> None:
    """Raises BundleError listing all faults of the graph at `model_path`."""
    faults = lint(ir.load(model_path), full_range=full_range)
    if faults:
        raise BundleError(
            str(model_path),
            expected="kernels that keep their weights packed and sums that cannot saturate",
            found="; ".join(faults),
            remedy="export again with this compiler",
        )
