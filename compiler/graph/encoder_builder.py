"""Builds an encoder graph of a known family: onnx_ir, names and shapes alone; no torch, no transformers, no weight read.

Tokens are rows: between the attentions every tensor is [batch * sequence, hidden], so a Linear is one Gemm with its bias inside, and
`Add` and `LayerNormalization` stay two operators. onnxruntime would fuse them over [batch, sequence, hidden] into SkipLayerNormalization, whose CPU
kernel takes 6 ns an element where the two together take 0.95 (1024 x 384, one thread, AVX2, onnxruntime 1.31): 24 of 382 ms of all-MiniLM-L6-v2 at 8x128.

Attention is ONNX's own operator, with the padding mask as what is added to the scores, [batch, 1, sequence, sequence], made once for all layers:
MultiHeadAttention (com.microsoft) with the mask [batch, sequence] transposes queries, keys and values first and takes 2.5, 1.5, 1.3 and 1.1 times as long
at 1x32, 1x128, 8x128 and 32x256 (12 heads of 32, AVX512). It stays where relative positions are added too: their sum with the mask would be
[batch, heads, sequence, sequence], and it needs none.

A Linear is a placeholder over HF's weight [out, in], lowered by scheme in `encoder_weights`; weights are names here, and `tensors` binds them to views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.errors import CheckpointError
from compiler.graph.encoder_families import ACTIVATIONS, EncoderPlan
from compiler.graph.encoder_rewrite import MICROSOFT, add_constant
from compiler.reference import COMPUTED, canonical, shown

PLACEHOLDER = "trimtab.placeholder"  # domain of Linear until it is lowered
OPSET = 23  # the first with Attention
MASKED = float(np.finfo(np.float32).min)
FARTHEST = 128  # relative positions beyond it share a bucket (transformers' MPNetEncoder)


def build_encoder(plan: EncoderPlan, checkpoint: Checkpoint) -> tuple[ir.Model, dict[str, TensorView]]:
    """(graph with placeholders, name -> tensor). Output `last_hidden_state` [batch, sequence, hidden] or `logits`.

    Raises CheckpointError for a tensor that is missing, of another shape, or of no use.
    """
    builder = Builder(plan, checkpoint)
    builder.build()
    builder.refuse_left_over()
    return ir.Model(builder.graph, ir_version=10), builder.tensors


class Builder:
    """One graph under construction."""

    def __init__(self, plan: EncoderPlan, checkpoint: Checkpoint) -> None:
        self.plan, self.origin = plan, checkpoint.origin
        self.found: dict[str, TensorView] = {}
        for name, view in checkpoint.tensors.items():
            key = canonical(name, plan.family.prefix)
            if key in self.found:
                raise self.wrong(name, "one tensor for each parameter", "two that match", "remove the duplicate")
            self.found[key] = view
        self.tensors: dict[str, TensorView] = {}
        names = ["input_ids", "attention_mask", *(["token_type_ids"] if plan.kinds > 1 else [])]
        self.inputs = {name: ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "sequence"])) for name in names}
        self.graph = ir.Graph(list(self.inputs.values()), [], nodes=[], opset_imports={"": OPSET, MICROSOFT: 1})

    def build(self) -> None:
        plan = self.plan
        ids = self.inputs["input_ids"]
        shape = self.op("Shape", [ids])  # [batch, sequence]
        self.width = {size: self.op("Concat", [shape, self.integers(size)], axis=0) for size in (plan.hidden, 3 * plan.hidden)}
        length = self.op("Shape", [ids], start=1, end=2)
        self.mask = self.padding(length)
        bias = self.relative_bias(length) if plan.buckets else None
        x = self.embed(ids, length)
        for index in range(plan.layers):
            x = self.layer(x, plan.family.layer.format(index), bias)
        x = self.op("Reshape", [x, self.width[plan.hidden]])
        name, dims = "last_hidden_state", ["batch", "sequence", plan.hidden]
        if plan.task != "feature-extraction":
            name, dims = "logits", [*dims[: 1 if plan.task == "text-classification" else 2], plan.labels]
            x = self.head(x)
        x.name, x.type, x.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(dims)
        self.graph.outputs.append(x)

    def embed(self, ids: ir.Value, length: ir.Value) -> ir.Value:
        """[batch * sequence, hidden] of the first norm."""
        plan = self.plan
        x = self.op("Gather", [self.weight("embeddings.word_embeddings.weight", plan.vocabulary, plan.embedding), ids])
        if plan.kinds:
            kinds = self.weight("embeddings.token_type_embeddings.weight", plan.kinds, plan.embedding)
            x = self.op("Add", [x, self.op("Gather", [kinds, self.inputs["token_type_ids"]]) if plan.kinds > 1 else kinds])
        table = self.weight("embeddings.position_embeddings.weight", plan.positions, plan.embedding)
        if plan.family.positions == "counted":
            zero = self.integers(0)
            rows = self.op("Slice", [table, zero, length, zero])
        else:
            real = self.op("Cast", [self.op("Not", [self.op("Equal", [ids, self.integers(plan.pad)])])], to=ir.DataType.INT64.value)
            counted = self.op("Mul", [self.op("CumSum", [real, self.constant("axis_1", np.array(1, np.int64))]), real])
            rows = self.op("Gather", [table, self.op("Add", [counted, self.integers(plan.pad)])])
        x = self.op("Reshape", [self.op("Add", [x, rows]), self.integers(-1, plan.embedding)])
        x = self.norm(x, "embeddings.LayerNorm", plan.embedding)
        return x if plan.embedding == plan.hidden else self.linear(x, ["embeddings_project"], plan.hidden, plan.embedding)

    def layer(self, x: ir.Value, place: str, bias: ir.Value | None) -> ir.Value:
        plan, family = self.plan, self.plan.family
        hidden = plan.hidden
        packed = self.linear(x, [place + name for name in family.projections[:3]], hidden, hidden, normed=True)
        parts = self.op("Split", [self.op("Reshape", [packed, self.width[3 * hidden]])], outputs=3, axis=-1, num_outputs=3)
        if bias is None:
            attended = self.op("Attention", [*parts, self.mask], q_num_heads=plan.heads, kv_num_heads=plan.heads)
        else:
            attended = self.op("MultiHeadAttention", [*parts, None, self.mask, bias], domain=MICROSOFT, num_heads=plan.heads, mask_filter_value=MASKED)
        attended = self.op("Reshape", [attended, self.integers(-1, hidden)])
        attended = self.linear(attended, [place + family.projections[3]], hidden, hidden, even=True)
        x = self.norm(self.op("Add", [x, attended]), place + family.attention_norm, hidden)
        kind, settings = ACTIVATIONS[plan.activation]
        inner = self.op(kind, [self.linear(x, [place + family.up], plan.inner, hidden, normed=True)], **settings)
        down = self.linear(inner, [place + family.down], hidden, plan.inner)
        return self.norm(self.op("Add", [x, down]), place + family.norm, hidden)

    def padding(self, length: ir.Value) -> ir.Value:
        """What the attentions are given of `attention_mask`: 0 or MASKED for every query and key; beside relative positions the mask itself, int32."""
        given = self.inputs["attention_mask"]
        if self.plan.buckets:
            return self.op("Cast", [given], to=ir.DataType.INT32.value)
        absent = self.op("Sub", [self.constant("one_float", np.array(1, np.float32)), self.op("Cast", [given], to=ir.DataType.FLOAT.value)])
        added = self.op("Unsqueeze", [self.op("Mul", [absent, self.constant("masked", np.array(MASKED, np.float32))]), self.integers(1, 2)])
        ends = [self.op("Shape", [given], start=0, end=1), self.integers(1), length, length]
        return self.op("Expand", [added, self.op("Concat", ends, axis=0)])

    def relative_bias(self, length: ir.Value) -> ir.Value:
        """[1, heads, sequence, sequence]: the table's row for the bucket of key - query (T5's buckets, both directions)."""
        plan = self.plan
        buckets = self.constant("buckets", buckets_of(plan.positions, plan.buckets))
        counted = self.op("Range", [self.constant("zero", np.array(0, np.int64)), self.op("Squeeze", [length]), self.constant("one", np.array(1, np.int64))])
        apart = self.op("Sub", [self.op("Unsqueeze", [counted, self.integers(0)]), self.op("Unsqueeze", [counted, self.integers(1)])])
        rows = self.op("Gather", [buckets, self.op("Add", [apart, self.integers(plan.positions - 1)])])
        table = self.weight("encoder.relative_attention_bias.weight", plan.buckets, plan.heads)
        return self.op("Unsqueeze", [self.op("Transpose", [self.op("Gather", [table, rows])], perm=[2, 0, 1]), self.integers(0)])

    def head(self, x: ir.Value) -> ir.Value:
        """Class scores: of every token, or of the text by its first one."""
        plan = self.plan
        if plan.task == "token-classification":
            return self.linear(x, ["classifier"], plan.labels, plan.hidden, tokens=False)
        before, activation, last = plan.family.head
        first = self.op("Gather", [x, self.constant("first", np.array(0, np.int64))], axis=1)
        inner = self.op(activation, [self.linear(first, [before], plan.hidden, plan.hidden, tokens=False)])
        return self.linear(inner, [last], plan.labels, plan.hidden, tokens=False)

    def linear(self, x: ir.Value, names: Sequence[str], out: int, width: int, **facts: bool) -> ir.Value:
        """A placeholder for the matrices `names` [out, width] on top of each other and their biases.

        facts for `encoder_weights`: tokens (True): over every token, so it takes the scheme; normed (False): x comes from a norm; even (False):
        no channel of x is far larger than others
        """
        weights = [self.weight(f"{name}.weight", out, width) for name in names]
        biases = [self.weight(f"{name}.bias", out) for name in names]
        y = self.op("Linear", [x, self.joined(weights, out * len(names), width), self.joined(biases, out * len(names))], domain=PLACEHOLDER)
        y.producer().meta.update({"tokens": True, "normed": False, "even": False} | facts)
        return y

    def norm(self, x: ir.Value, name: str, width: int) -> ir.Value:
        return self.op("LayerNormalization", [x, self.weight(f"{name}.weight", width), self.weight(f"{name}.bias", width)], axis=-1, epsilon=self.plan.epsilon)

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], *, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """One node at the end; its value, or all of them."""
        given = list(inputs)
        while given[-1] is None:
            given.pop()
        node = ir.node(op_type, given, attributes=attributes, domain=domain, num_outputs=outputs)
        self.graph.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def weight(self, name: str, *shape: int) -> ir.Value:
        """A parameter by its name without the prefix. Raises CheckpointError."""
        if name not in self.tensors:
            view = self.found.get(name)
            if view is None:
                raise self.wrong(name, "a tensor for every parameter", "none", "check the architecture and the task, or add the delta that brings it")
            if view.shape != shape:
                raise self.wrong(view.name, f"shape {list(shape)} by config.json", str(list(view.shape)), "config and weights are of different models")
            self.tensors[name] = view
        return self.placeholder(name, shape)

    def joined(self, values: Sequence[ir.Value], *shape: int) -> ir.Value:
        """One value for several on top of each other; `meta["parts"]` names them."""
        if len(values) == 1:
            return values[0]
        names = [str(value.name) for value in values]
        for name in names:
            self.graph.initializers.pop(name)
        value = self.placeholder("+".join(names), shape)
        value.meta["parts"] = names
        return value

    def placeholder(self, name: str, shape: Sequence[int]) -> ir.Value:
        """An initializer whose numbers nobody may ask for: they are streamed in later."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = ir.LazyTensor(lambda: unread(name), dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        self.graph.register_initializer(value)
        return value

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        return self.graph.initializers[name] if name in self.graph.initializers else add_constant(self.graph, name, array)

    def integers(self, *numbers: int) -> ir.Value:
        return self.constant("int64_" + "_".join(map(str, numbers)), np.array(numbers, np.int64))

    def refuse_left_over(self) -> None:
        """Tensors that no part of the graph reads: computed buffers, poolers, and another task's head over a bare model are none."""
        prefix = self.plan.family.prefix + "."
        bare = self.plan.task == "feature-extraction" and any(view.name.startswith(prefix) for view in self.found.values())
        extra = [
            view.name
            for key, view in self.found.items()
            if key not in self.tensors and not key.endswith(COMPUTED) and "pooler." not in key and not (bare and not view.name.startswith(prefix))
        ]
        if extra:
            remedy = "check the architecture and the task; a delta may belong to another base"
            raise CheckpointError(self.origin, expected="only tensors of this model", found=f"unused {shown(extra)}", remedy=remedy)

    def wrong(self, name: str, expected: str, found: str, remedy: str) -> CheckpointError:
        return CheckpointError(f"{self.origin}: {name}", expected=expected, found=found, remedy=remedy)


def unread(name: str) -> ir.Tensor:
    raise ValueError(f"{name} is a placeholder: its numbers are streamed, never read here")


def buckets_of(positions: int, count: int) -> np.ndarray:
    """int64 [2 * positions - 1]: the bucket of key - query = 1 - positions, ..., positions - 1.

    Half of the buckets for each direction; in each, half exact and half spaced by logarithm up to FARTHEST (Raffel et al., 2020, T5).
    """
    apart = np.arange(1 - positions, positions)
    half = count // 2
    exact = half // 2
    distance = np.abs(apart)
    spread = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(FARTHEST / exact)) * np.float32(half - exact)
    far = np.minimum(exact + spread.astype(np.int64), half - 1)
    return np.where(apart > 0, half, 0) + np.where(distance < exact, distance, far)
