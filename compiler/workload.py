"""A model as the operators of one run: what `targets.predict` adds up and what allocation weighs.

From a plan: config.json and the schemes. From exported files: config.json and the matrices that the export lists. The operators are those of
`graph.decoder` and of the encoder road; what a run computes once (masks, rope tables, pooling) is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compiler.checkpoints.view import Checkpoint
from compiler.scheme import Scheme, Schemes, matrix_name, parse_scheme, prompt_scheme, stored_bytes
from targets.kernels import Case
from targets.predict import Operator, Workload

KERNELS = {
    "float": "MatMul",
    "nbits": "MatMulNBits",
    "stored": "MatMul",
    "dynamic": "DynamicQuantizeMatMul",
    "rows": "DynamicQuantizeMatMul",
    "tokens": "DynamicQuantizeMatMul",
}
QKV = re.compile(r"(.*[._])(query|key|value|[qkv]_lin|[qkv]_proj)\.weight")
TABLES = re.compile(r"embed|shared\.weight|wte|wpe")


@dataclass(frozen=True)
class MatrixUse:
    """A stored weight matrix: shape [out, in]."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme

    @property
    def bytes(self) -> int:
        return stored_bytes(self.shape, self.scheme)

    def case(self, decoder: bool = True) -> Case:
        """Its row in the kernel table. A decoder's float matrices are FusedMatMul."""
        scheme, (out, into) = self.scheme, self.shape
        op = "FusedMatMul" if decoder and not scheme.quantized else KERNELS[scheme.kernel]
        bits = scheme.kernel_bits if op in ("MatMulNBits", "DynamicQuantizeMatMul") else 32
        return Case(op, bits, (scheme.group_size or 0) if op == "MatMulNBits" else 0, into, out, scheme.symmetric)

    @property
    def resident_bytes(self) -> int:
        """In memory once a session is open: float32 where arithmetic is float32; MatMulNBits packs a scale and a sum, float32 each, beside a block's codes."""
        size = self.shape[0] * self.shape[1]
        if self.scheme.kernel == "nbits" and self.scheme.group_size:
            return size * self.scheme.kernel_bits // 8 + 8 * size // self.scheme.group_size
        return self.bytes if self.scheme.kernel in ("dynamic", "rows", "tokens") else 4 * size


def matrices(checkpoint: Checkpoint, schemes: Schemes, decoder: bool = True) -> list[MatrixUse]:
    """The fused matrices of a model, in the order of the checkpoint: query, key and value are one, gate and up are one."""
    found: dict[str, tuple[int, int]] = {}
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    for view in checkpoint.tensors.values():
        if len(view.shape) != 2 or (tied and view.name == "lm_head.weight"):
            continue
        match = QKV.fullmatch(view.name)
        name = matrix_name(view.name, checkpoint.config) if decoder else match[1] + "qkv" if match else view.name
        if name is not None:
            out, into = view.shape
            found[name] = (found.get(name, (0, 0))[0] + out, into)
    return [MatrixUse(name, shape, _narrowed(schemes.of(name), name, shape)) for name, shape in found.items()]


def _narrowed(scheme: Scheme, name: str, shape: tuple[int, int]) -> Scheme:
    """Under `rows` only queries, keys and values, and the widening matrix take integers; the others are float16 (`graph.encoder_weights`)."""
    return scheme if scheme.kernel != "rows" or name.endswith("qkv") or shape[0] > shape[1] else Scheme(16)


def workload(config: Mapping[str, Any], uses: Sequence[MatrixUse], decoder: bool) -> Workload:
    """The operators of one run of a model. Raises ArchitectureError for a decoder that no family covers."""
    return _decoder(config, uses) if decoder else _encoder(config, uses)


def with_adapter(work: Workload, ranks: Mapping[str, int], uses: Sequence[MatrixUse]) -> Workload:
    """The same with one unmerged adapter that answers: y + (x A) B beside the matrices in `ranks`, A [k, rank] and B [rank, n] in float32."""
    shapes = {use.name: use.shape for use in uses}
    beside: list[Operator] = []
    for name, rank in ranks.items():
        out, into = shapes[name]
        last = name == "lm_head"
        beside += [Operator(Case("MatMul", 32, 0, k, n), last=last) for k, n in ((into, rank), (rank, out))]
        beside.append(Operator(Case("Mul", 32, 0, out, 1), last=last))  # an Add of that width
    size = sum(4 * operator.case.k * operator.case.n for operator in beside if operator.case.op == "MatMul")
    stored, resident = work.stored_bytes + size, work.resident_bytes + size
    return replace(work, operators=(*work.operators, *beside), stored_bytes=stored, resident_bytes=resident)


def prompt_uses(uses: Sequence[MatrixUse]) -> list[MatrixUse]:
    """The matrices of the graph for prompts."""
    return [replace(use, scheme=prompt_scheme(use.name, use.scheme)) for use in uses]


def prompt_bytes(uses: Sequence[MatrixUse]) -> int:
    """What that graph stores beside the first one's weights."""
    return sum(second.bytes for first, second in zip(uses, prompt_uses(uses), strict=True) if second != first)


def with_prompts(work: Workload, config: Mapping[str, Any], uses: Sequence[MatrixUse]) -> Workload:
    """The same with a second graph for runs of many tokens."""
    beside = prompt_bytes(uses)
    operators = workload(config, prompt_uses(uses), True).operators
    return replace(work, prompt_operators=operators, stored_bytes=work.stored_bytes + beside, resident_bytes=work.resident_bytes + beside)


def exported_workload(directory: Path) -> Workload:
    """Of an exported folder or a bundle, by its own list of matrices (export.json or report.json)."""
    listed = json.loads((directory / ("export.json" if (directory / "export.json").is_file() else "report.json")).read_text())
    config = json.loads((directory / "config.json").read_text())
    uses = matrix_uses([row for row in listed["layers"] if len(row["shape"]) == 2])
    work, adapters = workload(config, uses, listed["model"]["kind"] == "decoder"), listed["model"].get("adapters") or ()
    if listed["model"].get("prompts"):
        work = with_prompts(work, config, uses)
    if not adapters:
        return work
    largest = max(adapters, key=lambda row: row["parameters"])
    return with_adapter(work, dict.fromkeys(largest["matrices"], largest["rank"]), uses)


def matrix_uses(layers: Sequence[Mapping[str, Any]]) -> list[MatrixUse]:
    """Rows of export.json."""
    return [MatrixUse(row["name"], (row["shape"][0], row["shape"][1]), parse_scheme(row["scheme"])) for row in layers]


def _decoder(config: Mapping[str, Any], uses: Sequence[MatrixUse]) -> Workload:
    from compiler.graph.spec import decoder_spec

    spec = decoder_spec(config)
    layers = len(spec.layers)
    late = re.compile(rf"lm_head|model\.layers\.{layers - 1}\.(attn\.o_proj|mlp\..*)")  # behind the last attention, one token goes on
    operators = [Operator(use.case(), last=bool(late.fullmatch(use.name))) for use in uses if use.name != "model.embed_tokens"]
    operators += [
        Operator(Case("GroupQueryAttention", 32, spec.head_size, spec.q_width, spec.kv_width), layers),
        Operator(Case("RMSNormalization", 32, 0, spec.hidden, 1), 2 * layers - 1),
        Operator(Case("RMSNormalization", 32, 0, spec.hidden, 1), 2, last=True),  # before the last MLP, before the head
    ]
    for op, width in (("Split", 2 * spec.intermediate), ("QuickGelu", spec.intermediate), ("Mul", spec.intermediate)):
        operators += [Operator(Case(op, 32, 0, width, 1), layers - 1), Operator(Case(op, 32, 0, width, 1), last=True)]
    # the lookup of a tied table keeps the codes beside the head's packed ones
    table = sum(use.bytes for use in uses if use.name == "lm_head" and spec.tied and use.scheme.quantized)
    return Workload(
        "decoder",
        tuple(operators),
        stored_bytes=sum(use.bytes for use in uses),
        resident_bytes=sum(use.resident_bytes for use in uses) + table,
        cache_bytes=8 * spec.kv_width * layers,
        activation_bytes=4 * (2 * spec.hidden + 4 * spec.intermediate + spec.q_width),
    )


def _encoder(config: Mapping[str, Any], uses: Sequence[MatrixUse]) -> Workload:
    def size(*names: str) -> int:
        return int(next(config[name] for name in names if name in config))

    hidden, heads, layers = size("hidden_size", "dim"), size("num_attention_heads", "n_heads"), size("num_hidden_layers", "n_layers")
    inner = size("intermediate_size", "hidden_dim")
    linear = [use for use in uses if not TABLES.search(use.name)]
    per_row = [use for use in linear if re.search(r"pooler|classifier|head", use.name)]
    operators = [Operator(use.case(decoder=False), last=use in per_row) for use in linear]
    operators += [
        Operator(Case("Attention", 32, hidden // heads, hidden, hidden), layers),
        Operator(Case("SkipLayerNormalization", 32, 0, hidden, 1), 2 * layers + 2),  # the embeddings are added and normalised too
        Operator(Case("Split", 32, 0, 3 * hidden, 1), layers),
        Operator(Case("BiasGelu", 32, 0, inner, 1), layers),
    ]
    resident = sum(use.bytes if TABLES.search(use.name) else use.resident_bytes for use in uses)
    stored = sum(use.bytes for use in uses)
    return Workload("encoder", tuple(operators), stored, resident, activation_bytes=4 * (4 * hidden + 2 * inner))
