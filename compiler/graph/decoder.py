"""The decoder builder: a checkpoint and its schemes straight to fused operators, weights streaming into external data.

No torch, no transformers, no model object. A llama layer is twelve nodes:

    Add, RMSNormalization, MatMulNBits (q, k, v packed), GroupQueryAttention (rope, cache and mask inside), MatMulNBits,
    Add, RMSNormalization, MatMulNBits (gate, up packed), Split, QuickGelu, Mul, MatMulNBits

Add and RMSNormalization are two nodes: onnxruntime's SkipSimplifiedLayerNormalization, which is both, takes 2.7 times as long with 512 tokens of width 576
and no less with one (onnxruntime 1.31, AVX512). Where `logits` is "last", the last layer goes on behind its attention with those tokens alone whose logits
are asked for: nothing reads the others.

Inputs and outputs are onnxruntime-genai's: input_ids [batch, sequence], attention_mask [batch, total], past_key_values.N.key/value
[batch, kv_heads, past, head_size]; logits [batch, 1 or sequence, vocab], present.N.key/value. Positions follow from the mask: prompts are padded on the
right, row b has sum(mask[b]) valid tokens, and `logits="last"` gives the logits of each row's last valid one; of as many of the last ones as the optional
input kept_positions says (int64, 1 unless fed), which is how drafts are checked.

With `prompts`, prompt.onnx is the same graph over matrices in 8-bit integers (`int8-rows`), for runs of many tokens: inputs, outputs and cache are the same,
and what is not rounded by row (head, embedding, norms) lies in model.onnx.data for both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from compiler.checkpoints.view import Checkpoint
from compiler.errors import ArchitectureError, CheckpointError
from compiler.graph.adapters import AdapterRow, Attachments, Site, Tenant, model_version
from compiler.graph.external_data import DataFile
from compiler.graph.genai_config import genai_config
from compiler.graph.nodes import MICROSOFT, GraphBuilder, save_model
from compiler.graph.passes import remove_unused
from compiler.graph.positions import Positions, prologue
from compiler.graph.spec import ACTIVATIONS, DecoderSpec, decoder_spec
from compiler.graph.weights import Codes, Matrix, Progress, WeightWriter
from compiler.scheme import Schemes

__all__ = ["DEFAULT_MAX_LENGTH", "DecoderExport", "DecoderSpec", "MatrixRow", "decoder_spec", "export_decoder"]

PROMPTS = "prompt.onnx"
DEFAULT_MAX_LENGTH = 8192  # tokens; the rope tables and genai's KV buffers are as long as the context, so a 128k model does not get 128k unasked


@dataclass(frozen=True)
class MatrixRow:
    """One stored weight matrix, for reports. shape [out, in]."""

    name: str
    shape: tuple[int, int]
    scheme: str
    bytes: int


@dataclass(frozen=True)
class DecoderExport:
    """What was written. max_length: tokens the graph has rope angles for; genai's context_length is the same."""

    spec: DecoderSpec
    matrices: tuple[MatrixRow, ...]
    model_bytes: int
    data_bytes: int
    max_length: int
    logits: str
    adapters: tuple[AdapterRow, ...] = ()
    prompt_bytes: int = 0

    @property
    def bytes(self) -> int:
        return self.model_bytes + self.data_bytes + self.prompt_bytes + sum(row.bytes for row in self.adapters)


def export_decoder(
    checkpoint: Checkpoint,
    schemes: Schemes,
    directory: Path,
    *,
    logits: str = "last",
    max_length: int | None = None,
    progress: Progress | None = None,
    tenants: Sequence[Tenant] = (),
    codes_of: Codes | None = None,
    prompts: bool = False,
) -> DecoderExport:
    """Write model.onnx, model.onnx.data and genai_config.json into `directory`, which exists; with `prompts` also prompt.onnx and prompt.onnx.data.

    logits      "last": [batch, 1, vocab] of each row's last valid token; "all": [batch, sequence, vocab]
    max_length  tokens; by default the model's own, at most DEFAULT_MAX_LENGTH
    progress    called with (matrix, elements written, elements in all)
    tenants     adapters that stay unmerged, each written as NAME.onnx_adapter (compiler.graph.adapters)
    codes_of    matrix -> the codes a quantizer chose for it, or None to round to nearest here
    prompts     a second graph for prompts, its matrices made from the checkpoint, not from the first graph's codes; not with tenants

    Raises ArchitectureError for what the builder does not cover, CheckpointError for missing, misshapen or non-finite tensors, RecipeError for a scheme
    no decoder kernel has, OutputError when the disk is full.
    """
    if logits not in ("last", "all"):
        raise ValueError(f"logits must be 'last' or 'all', got {logits!r}")
    spec = decoder_spec(checkpoint.config)
    length = min(spec.max_positions, DEFAULT_MAX_LENGTH) if max_length is None else max_length
    check_kernel_limits(spec, length)
    if prompts and tenants:
        raise ValueError("a graph for prompts holds no adapters")

    def written(name: str, tenants: Sequence[Tenant], first: WeightWriter | None = None) -> tuple[DecoderBuild, int, int]:
        """One graph: (the build, bytes of NAME, bytes of NAME.data)."""
        graph = GraphBuilder()
        with DataFile(directory / f"{name}.data") as data:
            weights = WeightWriter(checkpoint, schemes, data, graph, progress, codes_of, first=first)
            build = DecoderBuild(spec, graph, weights, length, Attachments(tenants, graph))
            build.decoder(logits)
        model = graph.model()
        remove_unused(model.graph)
        return build, save_model(model, directory / name), data.size

    build, model_bytes, data_bytes = written("model.onnx", tenants)
    prompt_bytes = sum(written(PROMPTS, (), build.weights)[1:]) if prompts else 0
    adapters = build.attachments.write(directory, model_version(checkpoint.digest)) if tenants else ()
    config = genai_config(spec, checkpoint.config, checkpoint.assets, length)
    (directory / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    rows = tuple(MatrixRow(matrix.name, (matrix.n, matrix.k), str(matrix.scheme), matrix.nbytes) for matrix in build.matrices)
    return DecoderExport(spec, rows, model_bytes, data_bytes, length, logits, adapters, prompt_bytes)


def check_kernel_limits(spec: DecoderSpec, length: int) -> None:
    """Raises ArchitectureError for shapes that GroupQueryAttention refuses or lengths the model was not made for."""
    if spec.head_size % 8:
        raise ArchitectureError(
            "config.json: head_dim",
            expected="a multiple of 8 (GroupQueryAttention's rule)",
            found=str(spec.head_size),
            remedy="no fused kernel serves this width",
        )
    if not 0 < length <= spec.max_positions:
        raise ArchitectureError(
            "max_length",
            expected=f"1 to {spec.max_positions} tokens (max_position_embeddings)",
            found=str(length),
            remedy="ask for less",
        )


@dataclass
class Stream:
    """The residual stream: `total` so far and the `branch` that waits to be added by the next norm."""

    total: ir.Value
    branch: ir.Value | None = None


class DecoderBuild:
    """One build: walks the layers, writes each matrix when its node is made."""

    def __init__(self, spec: DecoderSpec, graph: GraphBuilder, weights: WeightWriter, length: int, attachments: Attachments) -> None:
        self.spec, self.graph, self.weights, self.length, self.attachments = spec, graph, weights, length, attachments
        self.matrices: list[Matrix] = []

    def matrix(self, name: str, sources: dict[str, int], k: int, scale: float = 1.0, bias: bool = False, part_of: str = "") -> Matrix:
        matrix = self.weights.matrix(name, sources, k, scale, bias, part_of)
        self.matrices.append(matrix)
        return matrix

    def linear(self, node: str, x: ir.Value, site: Site, bias: bool) -> ir.Value:
        """x [..., k] -> [..., n] through a matrix and the adapters' products beside it."""
        y = self.weights.linear(node, x, self.matrix(site.matrix, dict(site.sources), site.k, site.scale, bias))
        return self.attachments.beside(node, x, y, site)

    def decoder(self, logits: str) -> None:
        """The whole graph, front to back."""
        spec, graph = self.spec, self.graph
        ids = graph.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        mask = graph.input("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        head = self.head() if spec.tied else None
        table = head or self.matrix("model.embed_tokens", {"model.embed_tokens": spec.vocab}, spec.hidden)
        hidden = self.weights.lookup("/embed_tokens", ids, table)
        if spec.embedding_scale != 1.0:
            hidden = graph.op("/embed_tokens/scale", "Mul", [hidden, graph.constant("embedding_scale", np.array(spec.embedding_scale, np.float32))])
        positions = prologue(graph, spec, ids, mask, self.length)
        stream = Stream(hidden)
        for index in range(len(spec.layers)):
            kept = positions.last_token(graph) if logits == "last" and index == len(spec.layers) - 1 else None
            self.layer(index, stream, positions, kept)
        final = self.norm("/norm", stream, "model.norm.weight", spec.logits_scale)
        result = self.weights.linear("/lm_head", final, head or self.head())
        result = self.attachments.beside("/lm_head", final, result, Site("lm_head", {"lm_head": spec.vocab}, spec.hidden))
        if spec.final_softcap is not None:
            cap = graph.constant("final_softcap", np.array(spec.final_softcap, np.float32))
            bent = graph.op("/lm_head/tanh", "Tanh", [graph.op("/lm_head/div", "Div", [result, cap])])
            result = graph.op("/lm_head/softcap", "Mul", [bent, cap])
        graph.output(result, "logits", ir.DataType.FLOAT, ["batch_size", 1 if logits == "last" else "sequence_length", spec.vocab])
        graph.outputs.insert(0, graph.outputs.pop())  # logits first, then the cache

    def head(self) -> Matrix:
        """lm_head, from the embedding when tied. Raises CheckpointError when a tied checkpoint holds a head of its own that differs."""
        source = "lm_head"
        if self.spec.tied:
            source = "model.embed_tokens"
            self.check_tie()
        return self.matrix("lm_head", {source: self.spec.vocab}, self.spec.hidden)

    def check_tie(self) -> None:
        tensors, origin = self.weights.checkpoint.tensors, self.weights.checkpoint.origin
        if "lm_head.weight" not in tensors or "model.embed_tokens.weight" not in tensors:
            return
        head, table = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
        same = head.shape == table.shape and all(np.array_equal(block, table.rows(start, start + len(block))) for start, block in head.blocks())
        if not same:
            raise CheckpointError(
                f"{origin}: lm_head.weight",
                expected="the same numbers as model.embed_tokens.weight, because config.json says tie_word_embeddings",
                found="different ones",
                remedy="set tie_word_embeddings to false in config.json, or repair the checkpoint (a merge that touched one side breaks the tie)",
            )

    def norm(self, node: str, stream: Stream, weight: str | None, scale: float = 1.0) -> ir.Value:
        """Add the waiting branch to the stream and normalise the sum (weight None: only add)."""
        graph, spec = self.graph, self.spec
        gamma = None if weight is None else self.weights.vector(weight, spec.hidden, scale, spec.family.norm_offset)
        if stream.branch is None:
            return stream.total if gamma is None else self.simple_norm(node, stream.total, gamma)
        stream.total, stream.branch = graph.op(f"{node}/add", "Add", [stream.total, stream.branch]), None
        return stream.total if gamma is None else self.simple_norm(node, stream.total, gamma)

    def simple_norm(self, node: str, x: ir.Value, gamma: ir.Value) -> ir.Value:
        """RMS norm over the last axis."""
        return self.graph.op(node, "RMSNormalization", [x, gamma], axis=-1, epsilon=self.spec.norm_eps, stash_type=1)

    def layer(self, index: int, stream: Stream, positions: Positions, kept: ir.Value | None = None) -> None:
        """One layer; leaves its MLP branch waiting in the stream. kept: the tokens (GatherND indices) that go on behind the attention; None: all."""
        tensors, node = f"model.layers.{index}", f"/layers.{index}"
        before_attn, after_attn, before_mlp, after_mlp = (None if name is None else f"{tensors}.{name}.weight" for name in self.spec.family.norms)
        x = self.norm(f"{node}/norm_0", stream, before_attn)
        mixed = self.attention(index, x, positions)
        if kept is not None:
            mixed, stream.total = (
                self.graph.op(f"/last_token/{name}", "GatherND", [x, kept], batch_dims=1) for name, x in (("mixed", mixed), ("total", stream.total))
            )
        stream.branch = self.close(f"{node}/norm_1", self.attention_output(index, mixed, scaled=after_attn is None), after_attn)
        x = self.norm(f"{node}/norm_2", stream, before_mlp)
        stream.branch = self.close(f"{node}/norm_3", self.mlp(index, x, scaled=after_mlp is None), after_mlp)

    def close(self, node: str, branch: ir.Value, weight: str | None) -> ir.Value:
        """The norm at the end of a branch, which carries the residual scale where there is one."""
        if weight is None:
            return branch
        return self.simple_norm(node, branch, self.weights.vector(weight, self.spec.hidden, self.spec.residual_scale, self.spec.family.norm_offset))

    def attention(self, index: int, x: ir.Value, positions: Positions) -> ir.Value:
        """x [batch, sequence, hidden] -> the heads' results side by side. Queries, keys and values come from one matrix."""
        spec, name, node = self.spec, f"model.layers.{index}", f"/layers.{index}/attn"
        sources = {f"{name}.self_attn.{part}_proj": width for part, width in (("q", spec.q_width), ("k", spec.kv_width), ("v", spec.kv_width))}
        if spec.family.fused_weights:
            sources = {f"{name}.self_attn.qkv_proj": spec.q_width + 2 * spec.kv_width}
        qkv = self.linear(f"{node}/qkv_proj", x, Site(f"{name}.attn.qkv_proj", sources, spec.hidden), spec.qkv_bias)
        return self.attend(index, self.split_heads(index, qkv, positions), positions)

    def attention_output(self, index: int, mixed: ir.Value, scaled: bool) -> ir.Value:
        """The heads' results -> [batch, tokens, hidden]."""
        spec, name, node = self.spec, f"model.layers.{index}", f"/layers.{index}/attn"
        scale = spec.residual_scale if scaled else 1.0
        out = Site(f"{name}.attn.o_proj", {f"{name}.self_attn.o_proj": spec.hidden}, spec.q_width, scale)
        return self.linear(f"{node}/o_proj", mixed, out, spec.o_bias)

    def split_heads(self, index: int, qkv: ir.Value, positions: Positions) -> list[ir.Value | None]:
        """GroupQueryAttention's query, key, value: the packed matrix as it is, or split where queries and keys are normalised or rotated first."""
        spec, graph, node, rope = self.spec, self.graph, f"/layers.{index}/attn", self.spec.layers[index].rope
        if spec.family.qk_norm == "none" and not positions.explicit(rope):
            return [qkv, None, None]
        sizes = graph.integers(spec.q_width, spec.kv_width, spec.kv_width)
        query, key, value = graph.op(f"{node}/split", "Split", [qkv, sizes], outputs=3, axis=-1)
        made: list[ir.Value | None] = []
        for part, x, heads in (("q", query, spec.heads), ("k", key, spec.kv_heads)):
            x = x if spec.family.qk_norm == "none" else self.head_norm(index, part, x, heads)
            if rope is not None and positions.explicit(rope):
                x = positions.rotate(graph, f"{node}/{part}_rope", x, rope, (heads, spec.ropes[rope].rotary_dim))
            made.append(x)
        return [*made, value]

    def head_norm(self, index: int, part: str, x: ir.Value, heads: int) -> ir.Value:
        """x [batch, sequence, heads * head_size], normalised over each head or over the full width."""
        spec, node, full = self.spec, f"/layers.{index}/attn/{part}_norm", self.spec.family.qk_norm == "full"
        width = spec.head_size * (heads if full else 1)
        gamma = self.weights.vector(f"model.layers.{index}.self_attn.{part}_norm.weight", width, offset=spec.family.norm_offset)
        if full:
            return self.simple_norm(node, x, gamma)
        return self.graph.op(node, "BranchwiseRMSNorm", [x, gamma], MICROSOFT, epsilon=spec.norm_eps, num_branches=heads)  # no reshape around it

    def attend(self, index: int, heads: list[ir.Value | None], positions: Positions) -> ir.Value:
        """GroupQueryAttention with its cache: adds the layer's past inputs and present outputs to the model."""
        spec, graph, layer = self.spec, self.graph, self.spec.layers[index]
        shape: list[int | str] = ["batch_size", spec.kv_heads, "past_sequence_length", spec.head_size]
        past = [graph.input(f"past_key_values.{index}.{part}", ir.DataType.FLOAT, shape) for part in ("key", "value")]
        rotation = positions.inside(layer.rope)
        inputs = [*heads, *past, positions.seqlens, positions.total, *rotation]
        window = layer.window if layer.window is not None and layer.window < self.length else None
        attributes: dict[str, Any] = {"num_heads": spec.heads, "kv_num_heads": spec.kv_heads, "scale": spec.attention_scale, "local_window_size": window}
        node = f"/layers.{index}/attn/gqa"
        out = graph.op(node, "GroupQueryAttention", inputs, MICROSOFT, outputs=3, do_rotary=int(bool(rotation)), **attributes)
        shape = ["batch_size", spec.kv_heads, "total_sequence_length", spec.head_size]
        for part, present in zip(("key", "value"), out[1:], strict=True):
            graph.output(present, f"present.{index}.{part}", ir.DataType.FLOAT, shape)
        return out[0]

    def mlp(self, index: int, x: ir.Value, scaled: bool) -> ir.Value:
        """down(activation(gate(x)) * up(x)); gate and up are one matrix."""
        spec, graph, name, node = self.spec, self.graph, f"model.layers.{index}", f"/layers.{index}/mlp"
        sources = {f"{name}.mlp.{part}_proj": spec.intermediate for part in ("gate", "up")}
        if spec.family.fused_weights:
            sources = {f"{name}.mlp.gate_up_proj": 2 * spec.intermediate}
        elif not spec.mlp_bias and self.weights.by_token(f"{name}.mlp.gate_up_proj") and self.weights.by_token(f"{name}.mlp.down_proj"):
            return self.mlp_by_token(index, x, spec.residual_scale if scaled else 1.0)
        both = self.linear(f"{node}/gate_up_proj", x, Site(f"{name}.mlp.gate_up_proj", sources, spec.hidden), spec.mlp_bias)
        gate, up = graph.op(f"{node}/split", "Split", [both], outputs=2, axis=-1, num_outputs=2)
        op_type, domain, attributes = ACTIVATIONS[spec.activation]
        active = graph.op(f"{node}/mul", "Mul", [graph.op(f"{node}/act", op_type, [gate], domain, **attributes), up])
        scale = spec.residual_scale if scaled else 1.0
        down = Site(f"{name}.mlp.down_proj", {f"{name}.mlp.down_proj": spec.hidden}, spec.intermediate, scale)
        return self.linear(f"{node}/down_proj", active, down, spec.mlp_bias)

    def mlp_by_token(self, index: int, x: ir.Value, scale: float) -> ir.Value:
        """The same in 8-bit integers: gate and up are two matrices over one rounding, and nothing is split.

        A token's scale passes through a rounding by token, since rounding(c * h) has the codes of rounding(h): of up's product it is applied behind down.
        """
        spec, graph, name, node = self.spec, self.graph, f"model.layers.{index}.mlp", f"/layers.{index}/mlp"
        codes, most = self.weights.rounded(f"{node}/x", x)
        gate, up = (
            self.weights.product(
                f"{node}/{part}", codes, self.matrix(f"{name}.{part}", {f"{name}.{part}": spec.intermediate}, spec.hidden, part_of=f"{name}.gate_up_proj")
            )
            for part in ("gate_proj", "up_proj")
        )
        op_type, domain, attributes = ACTIVATIONS[spec.activation]
        active = graph.op(f"{node}/act", op_type, [graph.op(f"{node}/gate_proj/scale", "Mul", [gate, most])], domain, **attributes)
        codes, top = self.weights.rounded(f"{node}/mul", graph.op(f"{node}/mul", "Mul", [active, up]))
        down = self.matrix(f"{name}.down_proj", {f"{name}.down_proj": spec.hidden}, spec.intermediate, scale)
        y = self.weights.product(f"{node}/down_proj", codes, down)
        result: ir.Value = graph.op(f"{node}/down_proj/scale", "Mul", [y, graph.op(f"{node}/most", "Mul", [top, most])])
        return result
