"""Small tools to look at and change an onnx_ir graph, and the passes that clean one before anything is fused.

Every pass takes the model, changes it in place and returns how often it did. `tidy` may run at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

MICROSOFT = "com.microsoft"
SMALL = 64  # elements: only such constants are folded, so that no weight is ever read here

FOLDS: Mapping[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Sqrt": np.sqrt,
    "Log": np.log,
    "Neg": np.negative,
    "Unsqueeze": lambda x, axes: np.expand_dims(x, tuple(axes.tolist())),
    "Expand": lambda x, shape: x * np.ones(shape, x.dtype),
    "Reshape": lambda x, shape: x.reshape(shape),
    "CastLike": lambda x, like: x.astype(like.dtype),
}


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes `value`, if it is one of `op_types`."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """A small constant's array; None for anything else, weights included (their pages must stay untouched)."""
    if value is None or value.const_value is None or value.const_value.size > SMALL:
        return None
    return value.const_value.numpy()


def is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def users(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]


def nodes(model: ir.Model, *op_types: str) -> list[ir.Node]:
    """Nodes of these types in graph order, listed up front so that a pass may edit."""
    return [node for node in model.graph if node.op_type in op_types]


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def permutation(node: ir.Node | None) -> list[int]:
    return list(attribute(node, "perm", [])) if node is not None else []


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new small initializer, `name` made unique by a count."""
    unique, count = name, 0
    while unique in graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    value = ir.Value(
        name=unique, const_value=ir.tensor(array, name=unique), shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype))
    )
    graph.register_initializer(value)
    return value


def insert(before: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], *, domain: str = "", outputs: int = 1, **attributes: Any) -> ir.Node:
    """A node placed before another one; trailing None inputs are dropped. Raises ValueError when `before` is in no graph."""
    given = list(inputs)
    while given and given[-1] is None:
        given.pop()
    node = ir.node(op_type, given, attributes=attributes, domain=domain, num_outputs=outputs)
    if before.graph is None:
        raise ValueError(f"{before.name} is in no graph")
    before.graph.insert_before(before, node)
    return node


def replace(old: ir.Value, new: ir.Value) -> None:
    """Every user of `old`, the graph's outputs included, reads `new`, which takes over type and shape, and an output's name."""
    new.shape, new.type = old.shape, old.type
    name = old.name if old.is_graph_output() else None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if name is not None:
        old.name, new.name = f"{name}_replaced", name


def tidy(model: ir.Model) -> ir.Model:
    """Constants to initializers, no Identity, no dead node, equal computations once."""
    for step in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ):
        step(model)
    return model


def fold_small_constants(model: ir.Model) -> int:
    """Nodes whose inputs are all small constants become constants."""
    count = 0
    for node in list(model.graph):
        values = [constant(value) for value in node.inputs]
        if len(node.outputs) != 1 or not values or any(value is None for value in values) or node.outputs[0].is_graph_output():
            continue
        if node.op_type == "Cast":
            result = values[0].astype(ir.DataType(attribute(node, "to")).numpy())  # type: ignore[union-attr]
        elif node.op_type == "Concat":
            result = np.concatenate(values, axis=attribute(node, "axis"))  # type: ignore[arg-type]
        elif node.op_type in FOLDS:
            result = np.asarray(FOLDS[node.op_type](*values))
        else:
            continue
        if result.size <= SMALL:
            replace(node.outputs[0], add_constant(model.graph, f"const_{node.outputs[0].name}", result))
            count += 1
    return count
