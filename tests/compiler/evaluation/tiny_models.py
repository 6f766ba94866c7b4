"""Tiny random models of many families as checkpoints: decoders and encoders with everything switched on that a fault could hide in."""

from __future__ import annotations

from typing import Any

import torch

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.reference import model_class_of

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
    "mistral": ("mistral", {"sliding_window": 5}, "text-generation", "int4-g32"),
    "qwen3": ("qwen3", {"head_dim": 32}, "text-generation", "fp32"),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24}, "text-generation", "int8-g16-asym"),
    "granite": ("granite", {"residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 6.0}, "text-generation", "int4-g32-asym"),
    "phi3": ("phi3", {}, "text-generation", "fp16"),
    "bert": ("bert", {}, "feature-extraction", "int8"),
    "bert-dynamic": ("bert", {}, "feature-extraction", "int8-dynamic"),
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
    model = model_class_of(task if task != "text-generation" else __import__("transformers").AutoModelForCausalLM).from_config(config)
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
