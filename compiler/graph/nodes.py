"""A thin hand over onnx_ir: nodes in the order they are written, names that say where they stand, nothing random."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from compiler.errors import OutputError

OPSET = 23  # the first with RMSNormalization, so that the standard checker accepts the graph
IR_VERSION = 11
MICROSOFT = "com.microsoft"


class GraphBuilder:
    """Collects inputs, nodes, initializers and outputs, and saves the model.

    The bytes depend on the calls alone: no date, path, doc string or producer version is written.
    """

    def __init__(self) -> None:
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Name `value` as an output of the model."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.outputs.append(value)

    def initializer(self, tensor: Any) -> ir.Value:
        """A stored tensor as a value; one value for one name."""
        if tensor.name not in self.initializers:
            self.initializers[tensor.name] = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        return self.initializers[tensor.name]

    def constant(self, name: str, value: np.ndarray) -> ir.Value:
        """A few numbers kept in the graph itself."""
        return self.initializer(ir.tensor(value, name=name))

    def default_input(self, name: str, value: np.ndarray) -> ir.Value:
        """An input that need not be given: an initializer that a caller may override. onnxruntime does not list it among the inputs."""
        self.inputs.append(self.constant(name, value))
        return self.inputs[-1]

    def integers(self, *values: int) -> ir.Value:
        """int64 [n], shared by all nodes that need the same."""
        return self.constant("int64_" + "_".join(str(value) for value in values), np.array(values, np.int64))

    def op(self, name: str, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """One node. Returns its output value, or a tuple of them when `outputs` > 1."""
        made = [ir.Value(name=f"{name}/output_{index}") for index in range(outputs)]
        attrs = ir.convenience.convert_attributes({key: value for key, value in sorted(attributes.items()) if value is not None})
        self.nodes.append(ir.Node(domain, op_type, inputs, attrs, outputs=made, name=name))
        return made[0] if outputs == 1 else tuple(made)

    def model(self) -> ir.Model:
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET, MICROSOFT: 1},
            name="decoder",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="trimtab")


def save_model(model: ir.Model, path: Path) -> int:
    """Write model.onnx beside its external data, which stays where it is. Returns its size in bytes.

    Raises OutputError when the file cannot be written.
    """
    content = ir.to_proto(model).SerializeToString(deterministic=True)
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OutputError(
            str(path), expected="a file that can be written", found=error.strerror or type(error).__name__, remedy="check space and permissions"
        ) from error
    return len(content)
