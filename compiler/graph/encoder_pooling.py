"""Pooling and normalisation inside the graph: token vectors [batch, sequence, hidden] -> `sentence_embedding` [batch, hidden].

The modes are sentence-transformers' (its Pooling module); the mask is attention_mask, so padding never counts:
    mean       sum of attended / number of attended (at least 1e-9), as one [1, sequence] x [sequence, hidden] product a row
    cls        the first token
    max        the largest over attended tokens
    lasttoken  the last attended token, whichever side is padded
Normalisation is x / max(|x|_2, tiny).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from compiler.checkpoints.view import Checkpoint
from compiler.errors import ArchitectureError, CheckpointError
from compiler.graph.encoder_rewrite import add_constant

POOLINGS = ("mean", "cls", "max", "lasttoken")
MODES = {f"pooling_mode_{name}": mode for name, mode in (("cls_token", "cls"), ("mean_tokens", "mean"), ("max_tokens", "max"), ("lasttoken", "lasttoken"))}
NEVER = -1e9  # sentence-transformers' value for a masked token under max


def configured_pooling(checkpoint: Checkpoint) -> tuple[str | None, bool]:
    """(pooling, normalize) of sentence-transformers' modules.json, or (None, False) without one.

    Raises ArchitectureError for a module or mode that the graph would leave out, CheckpointError for unreadable JSON.
    """
    modules = read_json(checkpoint, "modules.json")
    if modules is None:
        return None, False
    pooling, normalize = None, False
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling = pooling_mode(read_json(checkpoint, f"{module.get('path', '1_Pooling')}/config.json") or {}, checkpoint.origin)
        elif kind == "Normalize":
            normalize = True
        elif kind not in ("Transformer", "Dropout"):
            place = f"{checkpoint.origin}: modules.json"
            raise ArchitectureError(
                place,
                expected="Transformer, Pooling and Normalize",
                found=kind,
                remedy="export without it is not the same model; name pooling yourself to go on",
            )
    return pooling, normalize


def pooling_mode(config: Mapping[str, Any], origin: str) -> str:
    """`{"pooling_mode_mean_tokens": true}` or `{"pooling_mode": "mean"}` -> "mean"."""
    named = config.get("pooling_mode")
    chosen = [str(named)] if named else [mode for key, mode in MODES.items() if config.get(key)]
    other = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True and key not in MODES]
    if len(chosen) != 1 or other or chosen[0] not in POOLINGS:
        found = ", ".join([*chosen, *other]) or "none"
        raise ArchitectureError(f"{origin}: 1_Pooling/config.json", expected=f"one of {', '.join(POOLINGS)}", found=found, remedy="name the pooling yourself")
    return chosen[0]


def read_json(checkpoint: Checkpoint, name: str) -> Any:
    """A small JSON file of the checkpoint, None when it has none."""
    content = checkpoint.assets.get(name)
    if content is None:
        return None
    try:
        return json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.origin}: {name}", expected="JSON", found=str(error), remedy="restore the file") from error


def add_pooling(model: ir.Model, pooling: str, normalize: bool) -> None:
    """Replaces the graph's only output, last_hidden_state, by `sentence_embedding`."""
    graph = model.graph
    tokens = graph.outputs[0]
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    pooled = {"mean": mean, "cls": first, "max": largest, "lasttoken": last}[pooling](graph, tokens, mask)
    if normalize:
        pooled = op(graph, "LpNormalization", [pooled], axis=-1, p=2)
    pooled.name, tokens.name = "sentence_embedding", "token_embeddings"
    pooled.type = ir.TensorType(ir.DataType.FLOAT)
    pooled.shape = ir.Shape(["batch", (tokens.shape or [None])[-1]])
    graph.outputs[0] = pooled


def op(graph: ir.Graph, op_type: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
    node = ir.node(op_type, inputs, attributes=attributes)
    graph.append(node)
    return node.outputs[0]


def ints(graph: ir.Graph, name: str, *values: int) -> ir.Value:
    return add_constant(graph, name, np.array(values, np.int64))


def mean(graph: ir.Graph, tokens: ir.Value, mask: ir.Value) -> ir.Value:
    weights = op(graph, "Cast", [mask], to=ir.DataType.FLOAT.value)  # [batch, sequence]
    middle = ints(graph, "pooling_axis", 1)
    summed = op(graph, "MatMul", [op(graph, "Unsqueeze", [weights, middle]), tokens])  # [batch, 1, hidden]
    count = op(graph, "ReduceSum", [weights, middle], keepdims=1)
    least = add_constant(graph, "pooling_least", np.array(1e-9, np.float32))
    return op(graph, "Div", [op(graph, "Squeeze", [summed, middle]), op(graph, "Max", [count, least])])


def first(graph: ir.Graph, tokens: ir.Value, mask: ir.Value) -> ir.Value:
    del mask
    return op(graph, "Gather", [tokens, add_constant(graph, "pooling_first", np.array(0, np.int64))], axis=1)


def largest(graph: ir.Graph, tokens: ir.Value, mask: ir.Value) -> ir.Value:
    attended = op(graph, "Cast", [op(graph, "Unsqueeze", [mask, ints(graph, "pooling_axis", -1)])], to=ir.DataType.BOOL.value)
    kept = op(graph, "Where", [attended, tokens, add_constant(graph, "pooling_never", np.array(NEVER, np.float32))])
    return op(graph, "ReduceMax", [kept, ints(graph, "pooling_axis", 1)], keepdims=0)


def last(graph: ir.Graph, tokens: ir.Value, mask: ir.Value) -> ir.Value:
    index = op(graph, "ArgMax", [mask], axis=1, keepdims=1, select_last_index=1)  # [batch, 1]
    return op(graph, "GatherND", [tokens, index], batch_dims=1)
