"""Passes from the exporter's raw eager graph to onnxruntime's fused operators (the contrib operator spec, domain com.microsoft).

Order, each with what it ensures:
1. `fuse_linears`     MatMul(x, Transpose(W)) and Gemm          -> Linear(x, W[, b]), a placeholder that `encoder_weights` lowers by scheme
2. `slice_positions`  Gather(P, Slice(0, 1, 2, ...))            -> Slice(P); a table of one row -> the row itself
3. `encoder_attention.fuse_attention`                            -> MultiHeadAttention with packed projections
4. `fuse_skip_norms`  LayerNormalization(a + b)                 -> SkipLayerNormalization, a projection's bias inside
5. `fuse_gelus`       Gelu(Linear)                              -> BiasGelu
A placeholder has HF's weight layout [out, in] and keeps weights as names, so no pass reads a weight.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compiler.graph.encoder_attention import fuse_attention
from compiler.graph.encoder_builder import PLACEHOLDER
from compiler.graph.encoder_rewrite import (
    MICROSOFT,
    add_constant,
    attribute,
    constant,
    fold_small_constants,
    insert,
    is_weight,
    nodes,
    permutation,
    producer,
    replace,
    tidy,
    users,
)


def fuse(model: ir.Model) -> dict[str, int]:
    """All passes in order; how often each one fired."""
    tidy(model)
    fold_small_constants(model)
    counts = {"linear": fuse_linears(model), "positions": slice_positions(model)}
    tidy(model)
    counts["attention"] = fuse_attention(model)
    tidy(model)
    counts["skip_norm"] = fuse_skip_norms(model)
    counts["gelu"] = fuse_gelus(model)
    fold_small_constants(model)
    tidy(model)
    counts["unfused_softmax"] = len(nodes(model, "Softmax"))
    return counts


def fuse_linears(model: ir.Model) -> int:
    """Rule 1. The bias stays an input of the placeholder: [out]."""
    count = 0
    for node in nodes(model, "MatMul", "Gemm"):
        if node.op_type == "Gemm":
            plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0 and attribute(node, "transB", 0) and not attribute(node, "transA", 0)
            weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
            if not plain or not is_weight(weight):
                continue
            linear, last = insert(node, "Linear", [node.inputs[0], weight, bias], domain=PLACEHOLDER), node
        else:
            turned = producer(node.inputs[1], "Transpose")
            if turned is None or permutation(turned) != [1, 0] or not is_weight(turned.inputs[0]):
                continue
            weight, bias, last = turned.inputs[0], None, node
            follow = users(node.outputs[0])
            if len(follow) == 1 and follow[0].op_type == "Add":
                other = next(value for value in follow[0].inputs if value is not node.outputs[0])
                if is_weight(other) and other.shape is not None and other.shape.rank() == 1:
                    bias, last = other, follow[0]
            linear = insert(last, "Linear", [node.inputs[0], weight, bias], domain=PLACEHOLDER)
        replace(last.outputs[0], linear.outputs[0])
        count += 1
    return count


def slice_positions(model: ir.Model) -> int:
    """Rule 2. Position ids 0, 1, 2, ... need no lookup: their rows are a slice [sequence, hidden] of the table."""
    count = 0
    for node in nodes(model, "Gather"):
        table, ids = node.inputs[0], node.inputs[1]
        if not is_weight(table) or table.shape is None or attribute(node, "axis", 0) != 0:
            continue
        if table.shape.rank() == 2 and table.shape[0] == 1:
            replace(node.outputs[0], table)
            count += 1
            continue
        cut = producer(ids, "Slice")
        if cut is None or not counts_up(cut.inputs[0]) or scalar(cut.inputs[1]) != 0 or scalar(cut.inputs[3]) not in (1, -1):
            continue
        source = model.graph.inputs[0]
        length = insert(node, "Shape", [source], start=1, end=2)
        zero = add_constant(model.graph, "axis_0", np.array([0], np.int64))
        rows = insert(node, "Slice", [table, zero, length.outputs[0], zero])
        replace(node.outputs[0], rows.outputs[0])
        rows.outputs[0].shape = None
        count += 1
    return count


def counts_up(value: ir.Value | None) -> bool:
    """Whether a constant is [[0, 1, 2, ...]]. Reads it: it is a computed buffer, not a weight."""
    if value is None or value.const_value is None or value.const_value.dtype != ir.DataType.INT64:
        return False
    ids = value.const_value.numpy()
    return ids.ndim == 2 and ids.shape[0] == 1 and bool(np.array_equal(ids[0], np.arange(ids.shape[1])))


def scalar(value: ir.Value | None) -> int | None:
    array = constant(value)
    return int(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def take_bias(value: ir.Value) -> ir.Value | None:
    """The bias of the Linear that makes `value`, taken out of it where this is its only user."""
    node = producer(value, "Linear")
    if node is None or len(node.inputs) < 3 or len(value.uses()) != 1 or value.is_graph_output():
        return None
    bias = node.inputs[2]
    node.replace_input_with(2, None)
    return bias


def fuse_skip_norms(model: ir.Model) -> int:
    """Rule 4. The sum itself stays available as the fourth output where a later node reads it (pre-norm models)."""
    count = 0
    for norm in nodes(model, "LayerNormalization"):
        added = producer(norm.inputs[0], "Add")
        if added is None or len(norm.inputs) < 3 or any(len(set(shape_of(value))) == 0 for value in added.inputs):
            continue
        one, two = added.inputs[0], added.inputs[1]
        if two is not None and producer(two, "Linear") is not None and producer(one, "Linear") is None:
            one, two = two, one
        if one is None or two is None or shape_of(one) != shape_of(two) or is_weight(one) or is_weight(two):
            continue
        bias = take_bias(one)
        keep_sum = len(added.outputs[0].uses()) > 1
        inputs = [one, two, norm.inputs[1], norm.inputs[2], bias]
        fused = insert(norm, "SkipLayerNormalization", inputs, domain=MICROSOFT, outputs=4 if keep_sum else 1, epsilon=attribute(norm, "epsilon"))
        replace(norm.outputs[0], fused.outputs[0])
        if keep_sum:
            replace(added.outputs[0], fused.outputs[3])
        model.graph.remove(norm, safe=True)
        count += 1
    return count


def shape_of(value: ir.Value | None) -> tuple[str, ...]:
    return tuple(str(dim) for dim in value.shape) if value is not None and value.shape is not None else ()


def fuse_gelus(model: ir.Model) -> int:
    """Rule 5. Only the exact (erf) form: onnxruntime's BiasGelu has no tanh form."""
    count = 0
    for node in nodes(model, "Gelu"):
        bias = take_bias(node.inputs[0]) if attribute(node, "approximate", "none") == "none" and node.inputs[0] is not None else None
        if bias is None:
            continue
        fused = insert(node, "BiasGelu", [node.inputs[0], bias], domain=MICROSOFT)
        replace(node.outputs[0], fused.outputs[0])
        count += 1
    return count
