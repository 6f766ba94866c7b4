"""What every layer shares: how long each row is, where the rope angles stand, which token is the last.

The rope tables are not stored. inv_freq is (a few hundred bytes), and Mul, Cos and Sin make the tables [max_length, rotary_dim / 2] from it; all
their inputs are constant, so onnxruntime folds them once when it loads. For a small model that is 2 % of the file.

longrope (phi3): the short and the long table stand one below the other, and a row's `position_ids` point into the long one as soon as that row is
longer than `original_max_position_embeddings`, which is when transformers switches for a batch of one. Keys already in the cache keep the angles they
were written with, there and here. GroupQueryAttention reads only the first position of the first row of a prompt, so these rows are rotated by
RotaryEmbedding in front of it. A context within `original_max_position_embeddings` needs none of this.

Widths that are no multiple of 16 are rotated in front of it too: GroupQueryAttention's own rotation refuses them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compiler.graph.nodes import MICROSOFT, GraphBuilder
from compiler.graph.spec import DecoderSpec

KEPT_POSITIONS = "kept_positions"  # how many of the last positions have logits; runtimes.decode feeds it
FUSED_STEP = 16  # widths that GroupQueryAttention rotates itself are multiples of this


@dataclass(frozen=True)
class Positions:
    """seqlens int32 [batch]: valid tokens - 1. total int32 [1]. last_index int64 [batch]: of the last valid token among those given.

    ropes: (cos, sin, position_ids or None) for each rope of the spec.
    """

    seqlens: ir.Value
    total: ir.Value
    last_index: tuple[ir.Value, ir.Value, ir.Value]
    ropes: tuple[tuple[ir.Value, ir.Value, ir.Value | None], ...]

    def inside(self, rope: int | None) -> list[ir.Value]:
        """cos and sin for GroupQueryAttention to rotate with; nothing for a layer without rope or with explicit positions."""
        return [] if rope is None or self.explicit(rope) else list(self.ropes[rope][:2])

    def explicit(self, rope: int | None) -> bool:
        """Rotation stands in nodes of its own."""
        return rope is not None and self.ropes[rope][2] is not None

    def rotate(self, graph: GraphBuilder, node: str, x: ir.Value, rope: int, shape: tuple[int, int]) -> ir.Value:
        """x [batch, sequence, heads * head_size], shape (heads, rotary_dim) -> the same, rotated by explicit positions."""
        cos, sin, ids = self.ropes[rope]
        return graph.op(node, "RotaryEmbedding", [x, ids, cos, sin], MICROSOFT, num_heads=shape[0], rotary_embedding_dim=shape[1])

    def last_token(self, graph: GraphBuilder) -> ir.Value:
        """GatherND indices int64 [batch, kept, 1]: max(valid - 1 - past, 0), which is at most sequence - 1, and the kept - 1 positions before it.

        It is negative for a short row of a ragged batch that decodes: then the only token given is the last. `kept_positions` is 1 unless it is fed:
        checking a draft of tokens (runtimes.lookup) takes the logits after each of them.
        """
        last, total, sequence = self.last_index
        here = graph.op("/last_token/here", "Sub", [last, graph.op("/last_token/past", "Sub", [total, sequence])])
        index = graph.op("/last_token/index", "Max", [here, graph.integers(0)])
        one = graph.constant("int64_scalar_1", np.array(1, np.int64))
        start = graph.op("/last_token/start", "Sub", [one, graph.default_input(KEPT_POSITIONS, np.array(1, np.int64))])
        steps = graph.op("/last_token/steps", "Range", [start, one, one])
        kept = graph.op("/last_token/kept", "Add", [graph.op("/last_token/column", "Unsqueeze", [index, graph.integers(1)]), steps])
        return graph.op("/last_token/indices", "Unsqueeze", [kept, graph.integers(2)])


def prologue(graph: GraphBuilder, spec: DecoderSpec, ids: ir.Value, mask: ir.Value, length: int) -> Positions:
    """The nodes before the first layer, from input_ids [batch, sequence] and attention_mask [batch, total]."""
    valid = graph.op("/positions/valid", "ReduceSum", [mask, graph.integers(1)], keepdims=0)
    last = graph.op("/positions/last", "Sub", [valid, graph.integers(1)])
    seqlens = graph.op("/positions/seqlens", "Cast", [last], to=int(ir.DataType.INT32))
    total64 = graph.op("/positions/total64", "Shape", [mask], start=1, end=2)
    total = graph.op("/positions/total", "Cast", [total64], to=int(ir.DataType.INT32))
    sequence = graph.op("/positions/sequence", "Shape", [ids], start=1, end=2)
    ropes = []
    for index, rope in enumerate(spec.ropes):
        node = f"/rope.{index}"
        switched = rope.switch_length is not None and length > rope.switch_length
        segments = [(rope.inv_freq, length)]
        if switched:
            segments = [(rope.inv_freq, rope.switch_length or 0), (rope.long_inv_freq or (), length)]
        cos, sin = tables(graph, node, segments, rope.attention_factor)
        explicit = switched or bool(rope.rotary_dim % FUSED_STEP or spec.head_size % FUSED_STEP)
        ids_value = positions_into(graph, node, rope.switch_length if switched else None, (last, sequence)) if explicit else None
        ropes.append((cos, sin, ids_value))
    return Positions(seqlens, total, (last, total64, sequence), tuple(ropes))


def tables(graph: GraphBuilder, node: str, segments: list[tuple[tuple[float, ...], int]], factor: float) -> tuple[ir.Value, ir.Value]:
    """cos and sin float32 [rows, rotary_dim / 2]; each segment of (inv_freq, rows) counts its positions from 0."""
    angles = []
    for part, (frequencies, rows) in enumerate(segments):
        bounds = [graph.constant(f"float_{value}", np.array(value, np.float32)) for value in (0, rows, 1)]
        counted = graph.op(f"{node}/positions_{part}", "Range", bounds)
        column = graph.op(f"{node}/column_{part}", "Unsqueeze", [counted, graph.integers(1)])
        inv_freq = graph.constant(f"{node}/inv_freq_{part}", np.array([frequencies], np.float32))
        angles.append(graph.op(f"{node}/angles_{part}", "Mul", [column, inv_freq]))
    angle = angles[0] if len(angles) == 1 else graph.op(f"{node}/angles", "Concat", angles, axis=0)
    both = []
    for function in ("Cos", "Sin"):
        table = graph.op(f"{node}/{function.lower()}", function, [angle])
        if factor != 1.0:
            scale = graph.constant(f"{node}/attention_factor", np.array(factor, np.float32))
            table = graph.op(f"{node}/{function.lower()}_scaled", "Mul", [table, scale])
        both.append(table)
    return both[0], both[1]


def positions_into(graph: GraphBuilder, node: str, switch_length: int | None, lengths: tuple[ir.Value, ir.Value]) -> ir.Value:
    """position_ids int64 [batch, sequence]; with a switch_length into longrope's stacked tables: plus switch_length once total > switch_length."""
    last, sequence = lengths
    zero, one = graph.constant("int64_scalar_0", np.array(0, np.int64)), graph.constant("int64_scalar_1", np.array(1, np.int64))
    steps = graph.op(f"{node}/steps", "Range", [zero, graph.op(f"{node}/count", "Squeeze", [sequence]), one])
    valid = graph.op(f"{node}/valid", "Add", [last, graph.integers(1)])
    start = graph.op(f"{node}/start", "Sub", [valid, sequence])
    start = graph.op(f"{node}/start_clipped", "Max", [start, graph.integers(0)])  # a padded prompt starts at 0
    if switch_length is not None:
        switch = graph.integers(switch_length)
        beyond = graph.op(f"{node}/beyond", "Cast", [graph.op(f"{node}/longer", "Greater", [valid, switch])], to=int(ir.DataType.INT64))
        start = graph.op(f"{node}/offset", "Add", [start, graph.op(f"{node}/shift", "Mul", [beyond, switch])])
    return graph.op(f"{node}/position_ids", "Add", [graph.op(f"{node}/start_column", "Unsqueeze", [start, graph.integers(1)]), steps])
