"""One-node ONNX models, written by hand in protobuf's wire format.

The probe times onnxruntime's own kernels, and a device has onnxruntime but not the `onnx` package. A model with one node needs eight message types and two
kinds of field: varints and length-delimited bytes. Field numbers are those of onnx.proto3 (onnx/onnx.proto3 in the ONNX repository); a test has onnx.checker
accept the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FLOAT, UINT8, INT8 = 1, 2, 3  # TensorProto.DataType
_TYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.uint8): UINT8, np.dtype(np.int8): INT8}
_ATTRIBUTE_INT = 2  # AttributeProto.AttributeType
MICROSOFT = "com.microsoft"
IR_VERSION, OPSET = 10, 21


@dataclass(frozen=True)
class OneNode:
    """y [m, n] = op(x [m, k], *constants): m is free. attributes are integers, all that the probed kernels have."""

    op: str
    k: int
    n: int
    constants: Mapping[str, NDArray[np.generic]]
    attributes: Mapping[str, int]
    domain: str = ""


def model_bytes(node: OneNode) -> bytes:
    """The serialised ModelProto. Raises KeyError for a constant whose type the probe does not use."""
    inputs = ["x", *node.constants]
    body = b"".join(_text(1, name) for name in inputs) + _text(2, "y") + _text(4, node.op)
    body += b"".join(_message(5, _attribute(name, value)) for name, value in node.attributes.items()) + _text(7, node.domain)
    graph = _message(1, body) + _text(2, "probe")
    graph += b"".join(_message(5, _tensor(name, value)) for name, value in node.constants.items())
    graph += _message(11, _value_info("x", ("m", node.k))) + _message(12, _value_info("y", ("m", node.n)))
    opsets = _message(8, _varint(2, OPSET)) + _message(8, _text(1, MICROSOFT) + _varint(2, 1))
    return _varint(1, IR_VERSION) + _text(2, "trimtab") + _message(7, graph) + opsets


def _attribute(name: str, value: int) -> bytes:
    return _text(1, name) + _varint(3, value) + _varint(20, _ATTRIBUTE_INT)


def _tensor(name: str, value: NDArray[np.generic]) -> bytes:
    dims = b"".join(_varint(1, size) for size in value.shape)
    return dims + _varint(2, _TYPES[value.dtype]) + _text(8, name) + _message(9, np.ascontiguousarray(value).tobytes())


def _value_info(name: str, shape: Sequence[int | str]) -> bytes:
    dims = b"".join(_message(1, _text(2, size) if isinstance(size, str) else _varint(1, size)) for size in shape)
    return _text(1, name) + _message(2, _message(1, _varint(1, FLOAT) + _message(2, dims)))


def _number(value: int) -> bytes:
    """A base-128 varint, lowest seven bits first: 300 -> AC 02."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(value)


def _message(field: int, body: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(body)) + body


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())
