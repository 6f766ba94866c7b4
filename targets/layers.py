"""Whole layers in a row, as small models that can be timed: what operators cost beside each other, which the same operators alone do not show.

A row of the kernel table with one of these operators is one layer of a chain; its columns say

    op             bits, block            k       n              m        context                      layers
    DecoderLayer   of its matrices        width   intermediate   tokens   tokens in the cache before   of the chain
    EncoderLayer   of its matrices        width   intermediate   tokens   -                            of the chain

1. The layers are those of `compiler.graph.decoder` and `compiler.graph.encoder_builder`, operator by operator; `parts` lists them in the table's columns.
2. A decoder's attention has heads of HEAD, and a GROUP of them shares keys and values; an encoder's has heads of ENCODER_HEAD.
3. A chain is as long as it takes to fill so many bytes of weights, at least LAYERS_LEAST: one token streams them from memory, as a model's step does. Weights
   of twice the last cache still find a good part of themselves in it, those of eight times hardly any: rows say how many layers they rest on.
4. Every layer has weights and a cache of its own; what a layer gives the next one takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from targets.errors import TargetError
from targets.kernels import MATRICES, OPERATORS, ROPE_POSITIONS, Case, CaseRun, open_model, weight_bytes
from targets.wire import INT32, INT64, MICROSOFT, Graph, Node, Value, model_bytes

DECODER, ENCODER = "DecoderLayer", "EncoderLayer"
LAYERS = (DECODER, ENCODER)
HEAD, GROUP, ENCODER_HEAD = 64, 4, 32
LAYERS_LEAST = 3
VOCABULARY = 1 << 15

Parts = tuple[tuple[Case, int], ...]  # operators of one layer: the case and how many of it


def matrix_case(layer: Case, k: int, n: int) -> Case:
    """A matrix [n, k] of the layer, as its bits and block have it."""
    op = "MatMulNBits" if layer.block else {32: "FusedMatMul" if layer.op == DECODER else "MatMul"}[layer.bits]
    return Case(op, layer.bits, layer.block, k, n, layer.symmetric)


def parts(layer: Case) -> Parts:
    """Rule 1. Raises KeyError for bits that no layer here has."""
    width, inner = layer.k, layer.n
    if layer.op == ENCODER:
        matrices = ((width, 3 * width), (width, width), (width, inner), (inner, width))
        return (
            *((matrix_case(layer, k, n), 1) for k, n in matrices),
            (Case("Attention", 32, ENCODER_HEAD, width, width), 1),
            (Case("SkipLayerNormalization", 32, 0, width, 1), 2),
            (Case("Split", 32, 0, 3 * width, 1), 1),
            (Case("BiasGelu", 32, 0, inner, 1), 1),
        )
    matrices = ((width, width + 2 * kv_width(layer)), (width, width), (width, 2 * inner), (inner, width))
    return (
        *((matrix_case(layer, k, n), 1) for k, n in matrices),
        (Case("GroupQueryAttention", 32, HEAD, width, kv_width(layer)), 1),
        (Case("RMSNormalization", 32, 0, width, 1), 2),
        (Case("Split", 32, 0, 2 * inner, 1), 1),
        (Case("QuickGelu", 32, 0, inner, 1), 1),
        (Case("Mul", 32, 0, inner, 1), 1),
    )


def kv_width(layer: Case) -> int:
    """Rule 2."""
    return max(1, layer.k // HEAD // GROUP) * HEAD


def layer_bytes(layer: Case) -> int:
    """Weights that one layer streams per token."""
    return sum(count * weight_bytes(case) for case, count in parts(layer) if case.op in MATRICES)


def depth(layer: Case, stream_bytes: int) -> int:
    """Rule 3."""
    return max(LAYERS_LEAST, -(-stream_bytes // layer_bytes(layer)))


class Chain:
    """A graph under construction: nodes and constants. Values do not matter, but no two matrices have the same (see the head of `targets.kernels`)."""

    def __init__(self, layer: Case) -> None:
        self.layer = layer
        self.nodes: list[Node] = []
        self.constants: dict[str, NDArray[Any]] = {}
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []

    def matrix(self, x: str, k: int, n: int, name: str) -> str:
        """y = matrix(x), the matrix [n, k] as the table's case of it has it."""
        case = matrix_case(self.layer, k, n)
        (node,), constants, _, _ = OPERATORS[case.op](case, len(self.nodes))
        names = {old: f"{name}.{old}" for old in constants}
        self.constants |= {names[old]: array for old, array in constants.items()}
        return self.node(node.op, [x, *(names[old] for old in constants)], name, node.attributes, node.domain)

    def node(self, op: str, inputs: list[str], name: str, attributes: Mapping[str, int | float] | None = None, domain: str = "", outputs: int = 1) -> str:
        names = [name, *(f"{name}.{place}" for place in range(1, outputs))]
        self.nodes.append(Node(op, inputs, names, attributes or {}, domain))
        return name

    def vector(self, name: str, width: int) -> str:
        self.constants[name] = np.ones(width, np.float32)
        return name


def decoder_layer(chain: Chain, index: int, total: str, branch: str) -> tuple[str, str]:
    """(residual stream, branch that waits for the next norm) -> the same after the layer."""
    layer, name = chain.layer, f"layer{index}"
    width, inner, kv = layer.k, layer.n, kv_width(layer)

    def norm(place: str, total: str, branch: str) -> tuple[str, str]:
        out, added = f"{name}.{place}", f"{name}.{place}.sum"
        chain.node("Add", [total, branch], added)
        return chain.node("RMSNormalization", [added, chain.vector(f"{out}.gamma", width)], out, {"epsilon": 1e-5}), added

    x, total = norm("norm_0", total, branch)
    x = chain.matrix(x, width, width + 2 * kv, f"{name}.qkv")
    shape = (1, kv // HEAD, "capacity", HEAD)
    past, present = ([Value(f"{when}{index}.{part}", shape) for part in ("key", "value")] for when in ("past", "present"))
    chain.inputs += past
    chain.outputs += present
    given = [x, "", "", *(value.name for value in past), "seqlens", "total", "cos", "sin"]
    attributes = {"num_heads": width // HEAD, "kv_num_heads": kv // HEAD, "do_rotary": 1}
    chain.nodes.append(Node("GroupQueryAttention", given, [f"{name}.attn", *(value.name for value in present)], attributes, MICROSOFT))
    x, total = norm("norm_1", total, chain.matrix(f"{name}.attn", width, width, f"{name}.out"))
    x = chain.node("Split", [chain.matrix(x, width, 2 * inner, f"{name}.gate_up")], f"{name}.half", {"axis": 2, "num_outputs": 2}, outputs=2)
    active = chain.node("QuickGelu", [x], f"{name}.act", {"alpha": 1.0}, MICROSOFT)
    x = chain.node("Mul", [active, f"{x}.1"], f"{name}.mul")
    return total, chain.matrix(x, inner, width, f"{name}.down")


def encoder_layer(chain: Chain, index: int, x: str) -> str:
    """x [m, width] -> the same, behind the second norm. Matrices are Gemm with its bias; attention sees one text of m tokens."""
    width, inner, name = chain.layer.k, chain.layer.n, f"layer{index}"

    def biased(x: str, k: int, n: int, part: str) -> str:
        y = chain.matrix(x, k, n, f"{name}.{part}")
        if chain.layer.bits == 32:
            product = chain.nodes.pop()
            return chain.node("Gemm", [*product.inputs, chain.vector(f"{y}.bias", n)], y)
        return chain.node("Add", [y, chain.vector(f"{y}.bias", n)], f"{y}.biased")

    def norm(x: str, branch: str, part: str) -> str:
        gamma, beta = chain.vector(f"{name}.{part}.gamma", width), chain.vector(f"{name}.{part}.beta", width)
        return chain.node("SkipLayerNormalization", [x, branch, gamma, beta], f"{name}.{part}", {"epsilon": 1e-12}, MICROSOFT)

    rows = chain.node("Reshape", [biased(x, width, 3 * width, "qkv"), "one_text"], f"{name}.rows")
    qkv = chain.node("Split", [rows], f"{name}.q", {"axis": 2, "num_outputs": 3}, outputs=3)
    heads = {"q_num_heads": width // ENCODER_HEAD, "kv_num_heads": width // ENCODER_HEAD}
    attended = chain.node("Attention", [qkv, f"{qkv}.1", f"{qkv}.2", "mask"], f"{name}.attn", heads)
    attended = chain.node("Reshape", [attended, "tokens"], f"{name}.flat")
    x = norm(x, biased(attended, width, width, "out"), "norm_0")
    active = chain.node("Gelu", [biased(x, width, inner, "up")], f"{name}.act", {}, MICROSOFT)
    return norm(x, biased(active, inner, width, "down"), "norm_1")


def layer_model(layer: Case, count: int) -> bytes:
    """`count` layers in a row: x [1, m, width] in, the last layer's output and the caches out."""
    chain = Chain(layer)
    flat = ("m", layer.k) if layer.op == ENCODER else (1, "m", layer.k)
    chain.inputs = [Value("x", flat)]
    if layer.op == ENCODER:
        chain.inputs.append(Value("mask", (1, 1, "m", "m")))
        chain.constants |= {"one_text": np.array([1, -1, 3 * layer.k], np.int64), "tokens": np.array([-1, layer.k], np.int64)}
        x = "x"
        for index in range(count):
            x = encoder_layer(chain, index, x)
    else:
        chain.inputs += [Value("seqlens", (1,), INT32), Value("total", (1,), INT32)]
        angles = np.linspace(0, 1, ROPE_POSITIONS * HEAD // 2, dtype=np.float32).reshape(ROPE_POSITIONS, -1)
        chain.constants |= {"cos": np.cos(angles), "sin": np.sin(angles)}
        total = x = "x"
        for index in range(count):
            total, x = decoder_layer(chain, index, total, x)
    chain.outputs.insert(0, Value(x, flat))
    return model_bytes(Graph(chain.nodes, chain.inputs, chain.outputs, chain.constants))


def open_layers(layer: Case, threads: int, stream_bytes: int) -> CaseRun:
    """A session of the chain that fills so many bytes. Raises TargetError without onnxruntime."""
    count = depth(layer, stream_bytes)
    return CaseRun(layer, count, open_model(layer_model(layer, count), threads))


class Step:
    """What a step of generation does beside its layers: bind the mask, a dozen small operators on positions, choose the largest of VOCABULARY logits.

    Timed between two runs of a chain, when the caches hold the chain's weights, as in generation.
    """

    def __init__(self, threads: int, context: int) -> None:
        self.session = open_model(_prologue(), threads)
        self.binding = self.session.io_binding()
        self.mask = np.ones((1, context + 1), np.int64)
        self.results: list[NDArray[Any]] = [np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros((1, 1), np.int64)]
        self.logits = np.random.default_rng(0).standard_normal((1, VOCABULARY), np.float32)
        for value, array in zip(self.session.get_outputs(), self.results, strict=True):
            self.binding.bind_output(value.name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)

    def __call__(self) -> int:
        self.binding.bind_input("mask", "cpu", 0, np.int64, list(self.mask.shape), self.mask.ctypes.data)
        self.session.run_with_iobinding(self.binding)
        best = self.logits.argmax(axis=-1)
        if not np.isfinite(self.logits[np.arange(len(best)), best]).all():
            raise TargetError("probe", expected="finite logits", found="others", remedy="this is a fault of trimtab: report it")
        return int(best[0])


def _prologue() -> bytes:
    """mask [1, total] -> tokens before the last, tokens in all, place of the last token: the small operators that a decoder begins with."""
    nodes = [
        Node("Shape", ["mask"], ["shape"]),
        Node("Gather", ["shape", "one"], ["long"], {"axis": 0}),
        Node("Cast", ["long"], ["total_wide"], {"to": INT32}),
        Node("Reshape", ["total_wide", "single"], ["total"]),
        Node("ReduceSum", ["mask", "one_axis"], ["valid"], {"keepdims": 0}),
        Node("Sub", ["valid", "one"], ["before"]),
        Node("Cast", ["before"], ["seqlens"], {"to": INT32}),
        Node("Sub", ["long", "one"], ["first"]),
        Node("Sub", ["valid", "first"], ["here"]),
        Node("Sub", ["here", "one"], ["index"]),
        Node("Max", ["index", "zero"], ["kept"]),
        Node("Unsqueeze", ["kept", "one_axis"], ["last"]),
    ]
    numbers = {"one": np.array(1, np.int64), "zero": np.array(0, np.int64), "one_axis": np.array([1], np.int64), "single": np.array([1], np.int64)}
    outputs = [Value("total", (1,), INT32), Value("seqlens", (1,), INT32), Value("last", (1, 1), INT64)]
    return model_bytes(Graph(nodes, [Value("mask", (1, "total"), INT64)], outputs, numbers))
