"""Small ONNX models, written by hand in protobuf's wire format.

The probe times onnxruntime's own kernels, and a device has onnxruntime but not the `onnx` package. A model of a few nodes needs eight message types and
three kinds of field: varints, length-delimited bytes, 32-bit floats. Field numbers are those of onnx.proto3 (onnx/onnx.proto3 in the ONNX repository); a test
has onnx.checker accept the result.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

FLOAT, UINT8, INT8, INT32, INT64, FLOAT16 = 1, 2, 3, 6, 7, 10  # TensorProto.DataType
TYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.uint8): UINT8, np.dtype(np.int8): INT8, np.dtype(np.int32): INT32, np.dtype(np.int64): INT64}
_ATTRIBUTE_FLOAT, _ATTRIBUTE_INT = 1, 2  # AttributeProto.AttributeType
MICROSOFT = "com.microsoft"
IR_VERSION, OPSET = 10, 23


@dataclass(frozen=True)
class Node:
    """outputs = op(inputs). An empty name is an input that is left out. attributes: whole numbers or floats."""

    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, int | float] = field(default_factory=dict)
    domain: str = ""


@dataclass(frozen=True)
class Value:
    """An input or output of the model. dims: a number, or the name of a free one."""

    name: str
    dims: Sequence[int | str]
    kind: int = FLOAT


@dataclass(frozen=True)
class Graph:
    """A model: nodes in the order they run, constants by name."""

    nodes: Sequence[Node]
    inputs: Sequence[Value]
    outputs: Sequence[Value]
    constants: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)


def model_bytes(graph: Graph) -> bytes:
    """The serialised ModelProto. Raises KeyError for a constant whose type the probe does not use."""
    parts: list[bytes | memoryview] = [*(_message(1, _node(node)) for node in graph.nodes), _text(2, "probe")]
    for name, value in graph.constants.items():
        parts += _constant(name, value)
    parts += [_message(11, _value_info(value)) for value in graph.inputs] + [_message(12, _value_info(value)) for value in graph.outputs]
    opsets = _message(8, _varint(2, OPSET)) + _message(8, _text(1, MICROSOFT) + _varint(2, 1))
    begin = _varint(1, IR_VERSION) + _text(2, "trimtab") + _number(7 << 3 | 2) + _number(sum(map(len, parts)))
    return b"".join([begin, *parts, opsets])


def _node(node: Node) -> bytes:
    names = b"".join(_text(1, name) for name in node.inputs) + b"".join(_text(2, name) for name in node.outputs)
    return names + _text(4, node.op) + b"".join(_message(5, _attribute(*item)) for item in node.attributes.items()) + _text(7, node.domain)


def _attribute(name: str, value: int | float) -> bytes:
    if isinstance(value, float):
        return _text(1, name) + _number(2 << 3 | 5) + struct.pack("<f", value) + _varint(20, _ATTRIBUTE_FLOAT)
    return _text(1, name) + _varint(3, value) + _varint(20, _ATTRIBUTE_INT)


def _constant(name: str, value: NDArray[np.generic]) -> list[bytes | memoryview]:
    """An initializer of the graph in two pieces, the second its content: hundreds of megabytes are copied once, by who joins all pieces."""
    content = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
    dims = b"".join(_varint(1, size) for size in value.shape)
    head = dims + _varint(2, TYPES[value.dtype]) + _text(8, name) + _number(9 << 3 | 2) + _number(len(content))
    return [_number(5 << 3 | 2) + _number(len(head) + len(content)) + head, content]


def _value_info(value: Value) -> bytes:
    dims = b"".join(_message(1, _text(2, size) if isinstance(size, str) else _varint(1, size)) for size in value.dims)
    return _text(1, value.name) + _message(2, _message(1, _varint(1, value.kind) + _message(2, dims)))


def _number(value: int) -> bytes:
    """A base-128 varint, lowest seven bits first: 300 -> AC 02."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _varint(field_number: int, value: int) -> bytes:
    return _number(field_number << 3) + _number(value)


def _message(field_number: int, body: bytes) -> bytes:
    return _number(field_number << 3 | 2) + _number(len(body)) + body


def _text(field_number: int, value: str) -> bytes:
    return _message(field_number, value.encode())
