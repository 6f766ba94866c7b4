"""Eager attention -> one MultiHeadAttention (com.microsoft) with packed q/k/v projections.

What is matched, with heads n of size d:

    q, k, v   Transpose(Reshape(Linear(x, W, b), [.., .., n, d]), [0, 2, 1, 3])
    scores    MatMul(q, Transpose(k)) * scale [/ sqrt(d)] + bias + mask,  [batch, n, query, key]
    out       Reshape(Transpose(MatMul(Softmax(scores), v), [0, 2, 1, 3]), [.., .., n * d])

An additive term is the padding mask when it is proven to be one: its subgraph is run on real masks and must be 0 where the key is attended
and at most -1e4 elsewhere, for every query. Then the kernel takes attention_mask itself (int32 [batch, key]) and the whole mask subgraph dies.
Any other term (relative positions, sliding windows) becomes `attention_bias`, a leading batch axis of Expand left to the kernel's broadcasting.

q, k and v of one input become one Linear of 3 * hidden rows (`joined`), split by one Split: one read of x, and in 8 bits one quantization of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime

from compiler.graph.encoder_rewrite import MICROSOFT, constant, insert, is_weight, nodes, permutation, producer, replace, users

MASKED = -1e4  # a mask's value counts as "not attended" from here down


@dataclass(frozen=True)
class Attention:
    """One match. scale None: the kernel's own 1 / sqrt(d)."""

    softmax: ir.Node
    query: ir.Value  # [batch, sequence, heads * size], as are key and value
    key: ir.Value
    value: ir.Value
    heads: int
    scale: float
    terms: tuple[ir.Value, ...]
    output: ir.Value


def fuse_attention(model: ir.Model) -> int:
    """Every match fused; how many. A Softmax that does not match stays as it is and is counted by `encoder_fusions.fuse`."""
    matches = [match for match in (match_attention(node) for node in nodes(model, "Softmax")) if match is not None]
    proven: dict[str, bool] = {}
    mask: ir.Value | None = None
    for match in matches:
        biases = []
        for term in match.terms:
            name = str(term.name)
            if name not in proven:
                proven[name] = is_padding_mask(model, term)
            if not proven[name]:
                biases.append(term)
        if len(biases) < len(match.terms) and mask is None:
            mask = mask_input(model)
        emit(model, match, biases, mask if len(biases) < len(match.terms) else None)
    return len(matches)


def match_attention(softmax: ir.Node) -> Attention | None:
    """The pattern of the module around one Softmax, or None."""
    follow = users(softmax.outputs[0])
    if len(follow) != 1 or follow[0].op_type != "MatMul" or follow[0].inputs[0] is not softmax.outputs[0]:
        return None
    value, value_heads = split_heads(follow[0].inputs[1])
    merged = merge_heads(follow[0].outputs[0])
    scores = scores_of(softmax.inputs[0])
    if value is None or merged is None or scores is None:
        return None
    product, scale, terms = scores
    query, heads = split_heads(product.inputs[0])
    turned = producer(product.inputs[1], "Transpose")
    key, key_heads = split_heads(turned.inputs[0]) if turned is not None and permutation(turned) == [0, 1, 3, 2] else (None, 0)
    if query is None or key is None or not heads == key_heads == value_heads:
        return None
    return Attention(softmax, query, key, value, heads, scale, terms, merged)


def split_heads(value: ir.Value | None) -> tuple[ir.Value | None, int]:
    """([batch, sequence, n * d], n) of Transpose(Reshape(x, [.., .., n, d]), [0, 2, 1, 3])."""
    turned = producer(value, "Transpose")
    shaped = producer(turned.inputs[0], "Reshape") if turned is not None and permutation(turned) == [0, 2, 1, 3] else None
    if shaped is None or shaped.outputs[0].shape is None or shaped.outputs[0].shape.rank() != 4:
        return None, 0
    source, heads = shaped.inputs[0], shaped.outputs[0].shape[2]
    if source is None or source.shape is None or source.shape.rank() != 3 or not isinstance(heads, int):
        return None, 0
    return source, heads


def merge_heads(value: ir.Value) -> ir.Value | None:
    """The [batch, sequence, n * d] that `value` [batch, n, sequence, d] is turned and reshaped into, where nothing else reads it."""
    turned = users(value)
    if len(turned) != 1 or turned[0].op_type != "Transpose" or permutation(turned[0]) != [0, 2, 1, 3]:
        return None
    shaped = users(turned[0].outputs[0])
    if len(shaped) != 1 or shaped[0].op_type != "Reshape" or shaped[0].outputs[0].shape is None or shaped[0].outputs[0].shape.rank() != 3:
        return None
    return shaped[0].outputs[0]


def scores_of(value: ir.Value | None) -> tuple[ir.Node, float, tuple[ir.Value, ...]] | None:
    """(q k^T node, scale, added terms) behind a Softmax: additions first, then one Mul or Div by a constant."""
    terms: list[ir.Value] = []
    while (added := producer(value, "Add")) is not None:
        one, two = added.inputs
        if one is None or two is None:
            return None
        if not reaches_product(one):
            one, two = two, one
        terms.append(two)
        value = one
    scale = 1.0
    scaled = producer(value, "Mul", "Div")
    if scaled is not None:
        factor = constant(scaled.inputs[1])
        if factor is None or factor.size != 1:
            return None
        number = float(factor.reshape(-1)[0])
        scale = number if scaled.op_type == "Mul" else 1.0 / number
        value = scaled.inputs[0]
    product = producer(value, "MatMul")
    return (product, scale, tuple(terms)) if product is not None else None


def reaches_product(value: ir.Value | None) -> bool:
    """Whether `value` is (a sum of) scaled products, and not a mask or bias."""
    node = producer(value, "Add", "Mul", "Div", "MatMul")
    if node is None or node.op_type == "MatMul":
        return node is not None
    return any(reaches_product(item) for item in node.inputs)


def is_padding_mask(model: ir.Model, term: ir.Value) -> bool:
    """Runs the subgraph behind `term` on random masks and compares it with 0 / at most -1e4 by key alone.

    Long enough (160) to see a sliding window of 128; a term that needs anything but integer inputs is no mask.
    """
    inputs = [value for value in model.graph.inputs if value.dtype == ir.DataType.INT64]
    part = subgraph(term, inputs)
    if part is None:
        return False
    session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    rng = np.random.default_rng(0)
    for batch, length in ((2, 160), (3, 5)):
        attended = rng.integers(0, 2, (batch, length))
        attended[:, 0] = 1
        feeds = {str(value.name): attended if value.name == "attention_mask" else np.ones((batch, length), np.int64) for value in inputs}
        got = session.run(None, {name: array for name, array in feeds.items() if name in wanted})[0]
        if got.ndim != 4:
            return False
        got = np.broadcast_to(got, (batch, got.shape[1], length, length))
        keys = np.broadcast_to(attended[:, None, None, :].astype(bool), got.shape)
        if not (np.all(got[keys] == 0) and np.all(got[~keys] <= MASKED)):
            return False
    return True


def subgraph(target: ir.Value, inputs: list[ir.Value]) -> bytes | None:
    """A model of its own that computes `target` from the graph's inputs; None where it needs a float weight."""
    needed: list[ir.Node] = []
    seen: set[int] = set()
    stack = [target]
    weights: dict[str, ir.Value] = {}
    while stack:
        value = stack.pop()
        if is_weight(value):
            if value.const_value is None or (value.const_value.size > 1 and value.const_value.dtype == ir.DataType.FLOAT):
                return None
            weights[str(value.name)] = value
        node = value.producer()
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            needed.append(node)
            stack.extend(item for item in node.inputs if item is not None)
    if target.graph is None:
        return None
    ordered = [node for node in target.graph if id(node) in seen]
    return serialized(ordered, inputs, weights, target)


def serialized(ordered: list[ir.Node], inputs: list[ir.Value], weights: dict[str, ir.Value], target: ir.Value) -> bytes:
    """The nodes as an ONNX file in memory."""
    import onnx

    make = onnx.helper.make_tensor_value_info
    heads = [make(str(value.name), onnx.TensorProto.INT64, ["batch", "sequence"]) for value in inputs]
    tail = [onnx.ValueInfoProto(name=str(target.name))]
    tensors = [
        onnx.numpy_helper.from_array(np.ascontiguousarray(value.const_value.numpy()), name) for name, value in weights.items() if value.const_value is not None
    ]
    graph = onnx.helper.make_graph([ir.to_proto(node) for node in ordered], "mask", heads, tail, tensors)
    return bytes(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10).SerializeToString())


def mask_input(model: ir.Model) -> ir.Value:
    """attention_mask as int32 [batch, sequence], cast once at the head of the graph."""
    attended = next(value for value in model.graph.inputs if value.name == "attention_mask")
    cast = insert(model.graph[0], "Cast", [attended], to=ir.DataType.INT32.value)
    cast.outputs[0].name = "attention_mask_int32"
    return cast.outputs[0]


def emit(model: ir.Model, match: Attention, biases: list[ir.Value], mask: ir.Value | None) -> None:
    """The fused nodes in place of the match."""
    last = match.output.producer()
    if last is None:
        raise ValueError("a matched output has no producer")
    bias = None
    for term in biases:
        term = unexpanded(term)
        bias = term if bias is None else insert(last, "Add", [bias, term]).outputs[0]
    packed = pack(model, match, last)
    query, key, value, offsets = packed if packed is not None else (match.query, match.key, match.value, None)
    fused = insert(
        last,
        "MultiHeadAttention",
        [query, key, value, offsets, mask, bias],
        domain=MICROSOFT,
        num_heads=match.heads,
        scale=match.scale,
        mask_filter_value=float(np.finfo(np.float32).min),
    )
    replace(match.output, fused.outputs[0])


def unexpanded(term: ir.Value) -> ir.Value:
    """x [1, n, query, key] of Expand(x, [batch, n, query, key]): the kernel broadcasts the batch."""
    node = producer(term, "Expand")
    source = node.inputs[0] if node is not None else None
    if source is None or source.shape is None or term.shape is None or source.shape.rank() != 4:
        return term
    same = all(str(one) == str(two) for one, two in zip(list(source.shape)[1:], list(term.shape)[1:], strict=True))
    return source if same and source.shape[0] == 1 else term


def pack(model: ir.Model, match: Attention, before: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value | None] | None:
    """Three Linears of one input -> Linear, Split and the joined bias for the kernel; None where they do not fit."""
    linears = [producer(value, "Linear") for value in (match.query, match.key, match.value)]
    if any(node is None or len(node.outputs[0].uses()) != 1 or node.inputs[0] is not linears[0].inputs[0] for node in linears):  # type: ignore[union-attr]
        return None
    found = [node for node in linears if node is not None]
    biased = [len(node.inputs) > 2 and node.inputs[2] is not None for node in found]
    if (any(biased) and not all(biased)) or len({rows(node.inputs[1]) for node in found}) != 1:
        return None
    weight = joined(model, [node.inputs[1] for node in found])
    offsets = joined(model, [node.inputs[2] for node in found]) if all(biased) else None
    linear = insert(before, "Linear", [found[0].inputs[0], weight], domain=found[0].domain)
    parts = insert(before, "Split", [linear.outputs[0]], outputs=3, axis=-1, num_outputs=3)
    return parts.outputs[0], parts.outputs[1], parts.outputs[2], offsets


def rows(value: ir.Value | None) -> int:
    """Output features of a weight [out, in]."""
    return int(value.shape[0]) if value is not None and value.shape is not None else 0


def joined(model: ir.Model, values: list[ir.Value | None]) -> ir.Value:
    """A placeholder for the rows of several weights on top of each other; `meta["parts"]` names them."""
    given = [value for value in values if value is not None]
    names = [str(value.name) for value in given]
    shape = list(given[0].shape or [])
    shape[0] = sum(rows(value) for value in given)
    name = "+".join(names)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=given[0].const_value)
    value.meta["parts"] = names
    model.graph.register_initializer(value)
    return value
