"""config.json and generation_config.json of a GGUF file, from its metadata. Architectures are rows of data.

What convert_hf_to_gguf.py of llama.cpp writes is read back; what it drops is restored from the constants that llama.cpp
itself hard-codes (gemma3: window pattern, local rope base, 27B query scale; smollm3: every fourth layer without rope).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compiler.errors import CheckpointError

BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
AUXILIARY = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # read into the config, no parameters


@dataclass(frozen=True)
class Source:
    """What a config is built from. get(key): metadata of the architecture, `get("block_count")`."""

    place: str
    architecture: str
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]  # GGUF tensor name -> shape
    read: Callable[[str], np.ndarray]  # a whole small tensor, float32

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or value <= 0:
            raise CheckpointError(
                self.place,
                expected=f"a positive number under {self.architecture}.{key}",
                found=repr(value)[:60],
                remedy="convert the model again with a current llama.cpp",
            )
        return value

    @property
    def head_dim(self) -> int:
        return int(self.get("attention.key_length") or self.need("embedding_length") // self.need("attention.head_count"))


@dataclass(frozen=True)
class Family:
    """One GGUF architecture. permuted: q and k rows are in llama.cpp's rotary order; norm_shift: added to norm weights by the converter."""

    model_type: str
    class_name: str
    permuted: bool = False
    norm_shift: float = 0.0
    block: Mapping[str, str] = field(default_factory=dict)
    extras: Callable[[Source], dict[str, Any]] = lambda source: {}


def _llama_extras(source: Source) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in source.shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in source.shapes,
        "head_dim": source.head_dim,
    }


def _granite_extras(source: Source) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in source.shapes,
        "attention_multiplier": source.get("attention.scale", 1.0),
        "embedding_multiplier": source.get("embedding_scale", 1.0),
        "residual_multiplier": source.get("residual_scale", 1.0),
        "logits_scaling": source.get("logit_scale", 1.0),
    }


def _smollm3_extras(source: Source) -> dict[str, Any]:
    layers = source.need("block_count")
    return {"no_rope_layer_interval": 4, "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(layers)], "use_sliding_window": False}


def _gemma3_extras(source: Source) -> dict[str, Any]:
    layers, heads = source.need("block_count"), source.need("attention.head_count")
    scale = source.need("embedding_length") // heads if layers == 62 else source.head_dim
    return {
        "head_dim": source.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scale,
        "sliding_window": source.get("attention.sliding_window", 4096),
        "layer_types": ["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(layers)],
        "final_logit_softcapping": source.get("final_logit_softcapping"),
    }


def _phi3_extras(source: Source) -> dict[str, Any]:
    window = source.get("attention.sliding_window")
    return {
        "sliding_window": window or None,
        "original_max_position_embeddings": source.get("rope.scaling.original_context_length", source.need("context_length")),
        "partial_rotary_factor": source.get("rope.dimension_count", source.head_dim) / source.head_dim,
    }


def _qwen_extras(source: Source) -> dict[str, Any]:
    return {"use_sliding_window": False}


def _qwen3_extras(source: Source) -> dict[str, Any]:
    return {"head_dim": source.head_dim, "use_sliding_window": False, "attention_bias": "blk.0.attn_q.bias" in source.shapes}


POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", permuted=True, extras=_llama_extras),
    "mistral3": Family("mistral", "MistralForCausalLM", permuted=True, extras=lambda source: {"head_dim": source.head_dim, "sliding_window": None}),
    "granite": Family("granite", "GraniteForCausalLM", permuted=True, extras=_granite_extras),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", permuted=True, extras=_smollm3_extras),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", extras=_qwen_extras),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", extras=_qwen3_extras),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", block=POST_NORMS),
    "phi3": Family("phi3", "Phi3ForCausalLM", block={"ffn_up": "mlp.gate_up_proj"}, extras=_phi3_extras),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", norm_shift=1.0, block={**POST_NORMS, "ffn_norm": "pre_feedforward_layernorm"}, extras=_gemma3_extras),
}


def family_of(place: str, metadata: Mapping[str, Any]) -> Family:
    """The row of the file's architecture. Raises CheckpointError for one that is not here, or a mixture of experts."""
    name = str(metadata.get("general.architecture"))
    if name not in FAMILIES:
        raise CheckpointError(
            place, expected=f"a GGUF architecture of {', '.join(FAMILIES)}", found=name, remedy="use the model's safetensors instead of its GGUF"
        )
    if metadata.get(f"{name}.expert_count"):
        raise CheckpointError(place, expected="a dense model", found="a mixture of experts", remedy="use a dense model: experts are not built yet")
    return FAMILIES[name]


def hugging_face_name(name: str, family: Family) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None for a name that the rows do not know."""
    stem, _, kind = name.rpartition(".")
    if stem in GLOBAL:
        return f"{GLOBAL[stem]}.{kind}"
    prefix, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    known = {**BLOCK, **family.block}
    if prefix != "blk" or not layer.isdigit() or part not in known:
        return None
    return f"model.layers.{layer}.{known[part]}.{kind}"


def build_config(source: Source, family: Family) -> dict[str, Any]:
    """config.json as a dict. Raises CheckpointError for a missing number or a rope scaling that is not known."""
    heads = source.need("attention.head_count")
    config: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "dtype": "float32",
        "vocab_size": source.shapes["token_embd.weight"][0],
        "hidden_size": source.need("embedding_length"),
        "intermediate_size": source.need("feed_forward_length"),
        "num_hidden_layers": source.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": source.get("attention.head_count_kv", heads),
        "max_position_embeddings": source.need("context_length"),
        "rms_norm_eps": source.get("attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": "output.weight" not in source.shapes,
        **token_ids(source.metadata),
        **family.extras(source),
    }
    if "hidden_activation" not in config:
        config["hidden_act"] = "silu"
    config.update(_rope(source, family))
    return {key: value for key, value in config.items() if value is not None or key in ("sliding_window", "pad_token_id", "bos_token_id")}


def token_ids(metadata: Mapping[str, Any]) -> dict[str, int | None]:
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids; eos is a list where the file names an end of turn or of message beside the end of text."""
    ids = {key: value for key, value in token_ids(metadata).items() if value is not None}
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(end for end in ends if end is not None))
    if len(stops) > 1:
        return {**ids, "eos_token_id": stops}
    return dict(ids)


def _rope(source: Source, family: Family) -> dict[str, Any]:
    """rope_parameters as transformers 5 writes them, and rope_theta / rope_scaling as older readers expect them."""
    theta = source.get("rope.freq_base", 10000.0)
    scaling = _rope_scaling(source, theta)
    flat = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    if family.model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": source.get("rope.freq_base_swa", 10000.0)}
        return {"rope_parameters": {"full_attention": flat, "sliding_attention": local}}
    if "partial_rotary_factor" in (extras := family.extras(source)):
        flat["partial_rotary_factor"] = extras["partial_rotary_factor"]
    return {"rope_parameters": flat, "rope_theta": theta, "rope_scaling": scaling}


def _rope_scaling(source: Source, theta: float) -> dict[str, Any] | None:
    if "rope_freqs.weight" in source.shapes:
        return _llama3_scaling(source, theta)
    if "rope_factors_long.weight" in source.shapes:
        return {
            "rope_type": "longrope",
            "long_factor": [float(str(value)) for value in source.read("rope_factors_long.weight")],
            "short_factor": [float(str(value)) for value in source.read("rope_factors_short.weight")],
            "original_max_position_embeddings": source.need("rope.scaling.original_context_length"),
        }
    kind = source.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": source.get("rope.scaling.factor", 1.0)}
    if kind == "linear":
        return scaling
    if kind == "yarn":
        return {**scaling, "original_max_position_embeddings": source.need("rope.scaling.original_context_length")}
    raise CheckpointError(
        source.place, expected="rope scaling none, linear, yarn, llama3 or longrope", found=kind, remedy="use the model's safetensors instead of its GGUF"
    )


def _llama3_scaling(source: Source, theta: float) -> dict[str, Any]:
    """The parameters whose factors are stored in rope_freqs: the converter keeps the factors only.

    Llama 3.1 and 3.2 use low 1, high 4, 8192 positions; the factor is the largest entry. Raises CheckpointError when these do not give the stored factors.
    """
    stored = source.read("rope_freqs.weight").reshape(-1)
    factor = float(stored.max())
    wavelength = 2 * math.pi * theta ** (np.arange(len(stored), dtype=np.float64) / len(stored))
    for low, high, positions in ((1.0, 4.0, 8192),):
        smooth = (positions / wavelength - low) / (high - low)
        middle = 1 / ((1 - smooth) / factor + smooth)
        factors = np.where(wavelength < positions / high, 1.0, np.where(wavelength > positions / low, factor, middle))
        if np.allclose(factors, stored, rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": positions}
    raise CheckpointError(
        source.place,
        expected="the rope factors of Llama 3",
        found="other factors in rope_freqs.weight",
        remedy="use the model's safetensors instead of its GGUF",
    )
