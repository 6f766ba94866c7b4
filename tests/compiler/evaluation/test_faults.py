"""Export faults: each is put into a healthy export and must be refused by the built-in check; healthy exports must not be.

No fault is measured against the limit of a user: most cost less than four bits do. The check compares with the very weights that are stored.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.faults import PARTS, Graph, blocks_swapped, everywhere, heads_of, last_token_before, one_scaled, rows_zeroed, scaled, split_swapped
from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.evaluation import faithful
from compiler.graph.decoder import export_decoder
from compiler.graph.encoder import export_encoder
from compiler.reference import model_class_of, reference_model
from compiler.scheme import Schemes, parse_scheme

DECODER: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {"vocab_size": 1100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 128}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}

# name -> (model_type, what differs, task, scheme)
MODELS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}, "text-generation", "int4-g32-asym"),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, "text-generation", "int8-g32"),
    "llama-rows": ("llama", {}, "text-generation", "int8-rows"),
    "mistral": ("mistral", {"sliding_window": 5}, "text-generation", "int4-g32"),
    "qwen3": ("qwen3", {"head_dim": 32}, "text-generation", "fp32"),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24}, "text-generation", "int8-g16-asym"),
    "granite": ("granite", {"residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 6.0}, "text-generation", "int4-g32-asym"),
    "phi3": ("phi3", {}, "text-generation", "fp16"),
    "bert": ("bert", {}, "feature-extraction", "int8"),
    "bert-dynamic": ("bert", {}, "feature-extraction", "int8-dynamic"),
    "bert-vnni": ("bert", {}, "feature-extraction", "int8-dynamic-vnni"),
    "roberta": ("roberta", {**SPECIAL, "type_vocab_size": 1}, "text-classification", "int4-g32-asym"),
    "distilbert": (
        "distilbert",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "vocab_size": 1100, "max_position_embeddings": 128},
        "token-classification",
        "fp16",
    ),
}


def checkpoint(name: str) -> Checkpoint:
    """The model `name` with wide random weights, norms and biases, so that a dropped one shows; the same each time."""
    from transformers import AutoConfig

    family, changes, task, _ = MODELS[name]
    torch.manual_seed(7)
    sizes = DECODER if task == "text-generation" else {} if family == "distilbert" else ENCODER
    config = AutoConfig.for_model(family, **{**sizes, **changes})
    model = model_class_of(task).from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            centre = 1.0 if key.endswith("orm.weight") and family != "gemma3_text" else 0.0
            parameter.normal_(centre, 0.15)
    tensors = {}
    for key, value in model.state_dict().items():
        array = value.numpy().copy()
        tensors[key] = TensorView(key, array.shape, "F32", lambda start, stop, array=array: array[start:stop] if array.ndim else array.reshape(1))
    if getattr(config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    return Checkpoint(tensors, config.to_dict() | {"model_type": family}, {}, name, lambda: name)


@dataclass(frozen=True)
class Healthy:
    """An export, what it says of itself, and the torch model with the weights it stores."""

    folder: Path
    facts: dict[str, Any]
    model: Any


def export(name: str, folder: Path) -> Healthy:
    source, (_, _, task, scheme) = checkpoint(name), MODELS[name]
    if task == "text-generation":
        rows: Any = export_decoder(source, Schemes(parse_scheme(scheme)), folder).matrices
        facts: dict[str, Any] = {"kind": "decoder", "scheme": scheme}
    else:
        done = export_encoder(source, parse_scheme(scheme), folder, task=task)
        rows, facts = done.matrices, {"kind": "encoder", "scheme": scheme, "max_length": done.max_length, "pooling": done.pooling, "normalize": done.normalize}
    model = faithful.see_through(reference_model(source, task), [asdict(row) for row in rows], facts, source.config, None, faithful.input_factors(folder))
    return Healthy(folder, facts, model)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Healthy]:
    """healthy("llama"): exported once."""
    made: dict[str, Healthy] = {}

    def get(name: str) -> Healthy:
        if name not in made:
            torch.set_num_threads(1)
            made[name] = export(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


LAYER = "model.layers.1"
Fault = Callable[[Graph], None]

# fault -> (model, what is done to its graph)
FAULTS: dict[str, tuple[str, Fault]] = {
    "weights of two layers swapped": (
        "llama",
        lambda g: [g.swap(f"{LAYER}.mlp.down_proj.{part}", f"model.layers.0.mlp.down_proj.{part}") for part in PARTS] and None,
    ),
    "codes of another layer": ("llama", lambda g: g.put(f"{LAYER}.attn.o_proj.codes", g.array("model.layers.0.attn.o_proj.codes"))),
    "bias dropped": ("llama", lambda g: g.change(f"{LAYER}.attn.qkv_proj.bias", scaled(0.0))),
    "bias added twice": ("llama", lambda g: g.change(f"{LAYER}.mlp.down_proj.bias", scaled(2.0))),
    "epsilon of one norm": ("llama", lambda g: g.attribute(g.node("/layers.1/norm_2"), "epsilon", 1e-2)),
    "epsilon of the first norm": ("llama", lambda g: g.attribute(g.node("/layers.0/norm_0"), "epsilon", 1e-4)),
    "mask off by one": ("llama", lambda g: g.rewire(g.node("/positions/seqlens"), 0, g.node("/positions/valid").outputs[0])),
    "last token off by one": ("llama", last_token_before),
    "rope base": ("llama", lambda g: g.change("/rope.0/inv_freq_0", lambda a: 5000.0 ** (-np.arange(a.size) / a.size).reshape(a.shape))),
    "rope frequencies reversed": ("llama", lambda g: g.change("/rope.0/inv_freq_0", lambda a: a[..., ::-1])),
    "rope left out": ("llama", lambda g: g.attribute(g.node("/layers.1/attn/gqa"), "do_rotary", 0)),
    "cosine for sine": ("llama", lambda g: g.rewire(g.node("/layers.1/attn/gqa"), 8, g.node("/rope.0/cos").outputs[0])),
    "attention scale": ("llama", lambda g: g.attribute(g.node("/layers.1/attn/gqa"), "scale", 0.2)),
    "heads of the output transposed": ("llama", lambda g: everywhere(g, f"{LAYER}.attn.o_proj", lambda a: a[:, ::-1] if a.ndim > 1 and a.shape[1] > 1 else -a)),
    "queries of two heads swapped": ("llama", lambda g: everywhere(g, f"{LAYER}.attn.qkv_proj", blocks_swapped(0, 16))),
    "key heads mapped wrongly": ("llama", lambda g: everywhere(g, f"{LAYER}.attn.qkv_proj", blocks_swapped(64, 16))),
    "keys for values": ("llama", lambda g: everywhere(g, f"{LAYER}.attn.qkv_proj", blocks_swapped(64, 32))),
    "gate and up swapped": ("llama", lambda g: split_swapped(g, g.node("/layers.1/mlp/split"))),
    "activation": ("llama", lambda g: g.attribute(g.node("/layers.1/mlp/act"), "alpha", 1.702)),
    "residual missing": ("llama", lambda g: g.rewire(g.node("/layers.1/norm_2"), 0, g.node("/layers.1/attn/o_proj").outputs[0])),
    "norm of another layer": ("llama", lambda g: g.swap(f"{LAYER}.input_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight")),
    "stale scales": ("llama", lambda g: g.put(f"{LAYER}.attn.o_proj.scales", g.array("model.layers.0.attn.o_proj.scales"))),
    "one stale scale": ("llama", lambda g: g.change(f"{LAYER}.attn.o_proj.scales", one_scaled(7))),
    "scales of the neighbouring group": ("llama", lambda g: g.change(f"{LAYER}.mlp.gate_up_proj.scales", lambda a: np.roll(a, 1, axis=1))),
    "stale zero points": ("llama", lambda g: g.change(f"{LAYER}.mlp.down_proj.zero_points", lambda a: np.full_like(a, 0x88))),
    "last rows of the head missing": ("llama", lambda g: g.change("lm_head.scales", rows_zeroed(208))),
    "last rows of the table missing": ("llama-tied", lambda g: g.change("lm_head.scales", rows_zeroed(210))),
    "tied head of another scheme": ("llama-tied", lambda g: g.change("lm_head.scales", scaled(1.01))),
    "by token: codes of another layer": ("llama-rows", lambda g: g.put(f"{LAYER}.attn.o_proj.codes", g.array("model.layers.0.attn.o_proj.codes"))),
    "by token: scales of another layer": ("llama-rows", lambda g: g.put(f"{LAYER}.attn.o_proj.scales", g.array("model.layers.0.attn.o_proj.scales"))),
    "by token: the scale of another product": (
        "llama-rows",
        lambda g: g.rewire(g.node("/layers.1/mlp/down_proj/scale"), 1, g.node("/layers.1/attn/o_proj/most").outputs[0]),
    ),
    "window off by one": ("mistral", lambda g: g.attribute(g.node("/layers.1/attn/gqa"), "local_window_size", 6)),
    "window left out": ("mistral", lambda g: g.attribute(g.node("/layers.0/attn/gqa"), "local_window_size", -1)),
    "norms of queries and keys swapped": ("qwen3", lambda g: g.swap(f"{LAYER}.self_attn.q_norm.weight", f"{LAYER}.self_attn.k_norm.weight")),
    "epsilon of the norm of queries": ("qwen3", lambda g: g.attribute(g.node("/layers.1/attn/q_norm"), "epsilon", 0.1)),
    "matrix transposed": ("qwen3", lambda g: g.change(f"{LAYER}.attn.o_proj.weight", lambda a: np.ascontiguousarray(a.T).reshape(a.shape))),
    "norm without its offset": ("gemma3", lambda g: g.change(f"{LAYER}.input_layernorm.weight", lambda a: a - 1.0)),
    "embedding scale left out": ("gemma3", lambda g: g.change("embedding_scale", lambda a: np.ones_like(a))),
    "residual scale left out": ("granite", lambda g: g.change(f"{LAYER}.attn.o_proj.scales", scaled(1 / 0.3))),
    "logits scale left out": ("granite", lambda g: g.change("model.norm.weight", scaled(4.0))),
    "halves of a fused matrix swapped": ("phi3", lambda g: g.change(f"{LAYER}.mlp.gate_up_proj.weight", blocks_swapped(0, 96))),
    "encoder: epsilon": ("roberta", lambda g: g.attribute(g.typed("LayerNormalization", 1), "epsilon", 3e-2)),
    "encoder: number of heads": ("roberta", lambda g: heads_of(g.typed("Attention"), g, 2)),
    "encoder: bias of the activation dropped": ("roberta", lambda g: g.change(g.typed("MatMulNBits", 2).inputs[5].name, scaled(0.0))),
    "encoder: queries for keys": ("roberta", lambda g: split_swapped(g, g.typed("Split"))),
    "encoder: scales of another layer": (
        "roberta",
        lambda g: g.put(g.typed("MatMulNBits", 1).inputs[2].name, g.array(g.typed("MatMulNBits", 5).inputs[2].name)),
    ),
    "encoder: zero points": ("roberta", lambda g: g.change(g.typed("MatMulNBits", 2).inputs[3].name, lambda a: np.full_like(a, 0x88))),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_healthy_export_is_not_refused(name: str, healthy: Callable[[str], Healthy]) -> None:
    export = healthy(name)
    found = faithful.check(export.model, export.folder, export.facts)
    assert found["value"] <= found["tolerance"] / 5  # and not by a hair


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused(fault: str, healthy: Callable[[str], Healthy], tmp_path: Path) -> None:
    name, inject = FAULTS[fault]
    export = healthy(name)
    shutil.copytree(export.folder, tmp_path / "faulty")
    graph = Graph(tmp_path / "faulty" / "model.onnx")
    inject(graph)
    graph.save()
    found = faithful.check(export.model, tmp_path / "faulty", export.facts)
    assert not found["value"] <= found["tolerance"]
