"""The walk over external data: every place a tensor can stand in, every way a reference can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from runtimes.external import check_graph
from targets.errors import BundleError


def tensor(name: str = "w", **told: str) -> TensorProto:
    made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "model.onnx.data", **told}.items():
        made.external_data.add(key=key, value=value)
    return made


def sparse(inner: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=inner, indices=helper.make_tensor("i", TensorProto.INT64, [1], [0]), dims=[2])


def graph(*nodes: Any, **more: Any) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])], **more)


def holding(attribute: str, value: Any) -> onnx.NodeProto:
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.append(helper.make_attribute(attribute, value))
    return node


PLACES: dict[str, Callable[[TensorProto], onnx.ModelProto]] = {
    "initializer": lambda t: helper.make_model(graph(initializer=[t])),
    "sparse initializer": lambda t: helper.make_model(graph(sparse_initializer=[sparse(t)])),
    "value": lambda t: helper.make_model(graph(holding("value", t))),
    "sparse value": lambda t: helper.make_model(graph(holding("sparse_value", sparse(t)))),
    "tensors": lambda t: helper.make_model(graph(holding("values", [t, t]))),
    "subgraph": lambda t: helper.make_model(graph(holding("then_branch", graph(holding("else_branch", graph(initializer=[t])))))),
    "subgraphs": lambda t: helper.make_model(graph(holding("branches", [graph(initializer=[t])]))),
    "function": lambda t: helper.make_model(
        graph(), functions=[helper.make_function("own", "f", [], ["y"], [holding("value", t)], [helper.make_opsetid("", 21)])]
    ),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[onnx.ModelProto | bytes], Path]:
    (tmp_path / "model.onnx.data").write_bytes(bytes(64))

    def write(model: onnx.ModelProto | bytes) -> Path:
        (tmp_path / "model.onnx").write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        return tmp_path / "model.onnx"

    return write


def code_of(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        check_graph(path)
    assert "\n" not in str(caught.value)
    return caught.value.code


@pytest.mark.parametrize("place", PLACES)
def test_every_place_is_reached(place: str, write: Callable[..., Path]) -> None:
    check_graph(write(PLACES[place](tensor(offset="0", length="8"))))
    assert code_of(write(PLACES[place](tensor(location="../outside")))) == "ONNX_EXTERNAL_PATH"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        *(
            ("ONNX_EXTERNAL_PATH", {"location": place})
            for place in ("../x", "a/../../x", "/etc/passwd", "C:\\x", "", "*/_ORT_MEM_ADDR_/*", "none", ".", "link")
        ),
        *(
            ("ONNX_EXTERNAL_RANGE", told)
            for told in ({"offset": "-1"}, {"length": "65"}, {"offset": "60", "length": "8"}, {"length": str(2**62)}, {"offset": "x"})
        ),
        ("ONNX_EXTERNAL_KEY", {"basepath": "/etc"}),
    ],
)
def test_wrong_references(code: str, told: dict[str, str], write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "model.onnx.data")
    assert code_of(write(PLACES["initializer"](tensor(**told)))) == code


def test_a_key_twice(write: Callable[..., Path]) -> None:
    twice = tensor()
    twice.external_data.add(key="location", value="../x")
    assert code_of(write(PLACES["initializer"](twice))) == "ONNX_EXTERNAL_KEY"


def test_operators_of_other_domains(write: Callable[..., Path]) -> None:
    assert code_of(write(helper.make_model(graph(helper.make_node("Steal", [], ["y"], domain="evil"))))) == "ONNX_OP"


def test_graphs_within_graphs_within_graphs(write: Callable[..., Path]) -> None:
    """Written by hand: protobuf itself refuses to make them."""

    def inside(number: int, content: bytes) -> bytes:
        length, size = bytearray(), len(content)
        while size >= 0x80:
            length.append(size & 0x7F | 0x80)
            size >>= 7
        return bytes([number << 3 | 2, *length, size]) + content

    inner = graph(initializer=[tensor()]).SerializeToString()
    for _ in range(80):
        inner = inside(1, inside(5, inside(6, inner)))  # graph.node.attribute.g
    assert code_of(write(inside(7, inner))) == "ONNX_GRAPH"


def test_half_a_file(write: Callable[..., Path]) -> None:
    whole = PLACES["subgraph"](tensor()).SerializeToString()
    assert code_of(write(whole[:-5])) == "ONNX_PARSE"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60), at=st.integers(0, 200), whole=st.booleans())
def test_fuzz(data: bytes, at: int, whole: bool, write: Callable[..., Path]) -> None:
    """Random bytes, and a good file with random bytes written into it: the walk ends, with a BundleError or without."""
    good = PLACES["subgraph"](tensor(offset="0", length="8")).SerializeToString()
    path = write(data if whole else good[:at] + data + good[at + len(data) :])
    try:
        check_graph(path)
    except BundleError as error:
        assert error.code.startswith("ONNX_")
