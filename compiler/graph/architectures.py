"""Decoder families as rows of data: what sets one family apart from a plain llama, and nothing else.

A row is the reading of one model of transformers (named in `source`). A new family that fits these columns is one row and one
tiny model in tests/conformance/test_decoder_families.py.

The decoder layer that every row fills in (`norms` names the four places, None where a family has no norm):

    a = attention(norm0(x));  x = x + residual_scale * norm1(a)
    m = mlp(norm2(x));        x = x + residual_scale * norm3(m)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from compiler.errors import ArchitectureError

PRE_NORM = ("input_layernorm", None, "post_attention_layernorm", None)
POST_NORM = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
SANDWICH_NORM = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")

# What a config may leave out, as transformers' config classes fill it in. A row overrides what differs.
COMMON_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
    }
)

# Keys that change the mathematics in ways no row covers, with the values that leave it alone.
REFUSED_KEYS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "quantization_config": (None,),  # GPTQ, AWQ, ...: the tensors are not plain weights
        "num_local_experts": (None, 0, 1),
        "num_experts": (None, 0, 1),
        "n_routed_experts": (None, 0, 1),
        "attn_logit_softcapping": (None,),  # transformers 5.23's gemma3 reads it and ignores it: the intent cannot be served silently
        "use_bidirectional_attention": (None, False),
        "attention_chunk_size": (None,),
        "is_encoder_decoder": (None, False),
        "add_cross_attention": (None, False),
    }
)


@dataclass(frozen=True)
class Family:
    """One decoder family.

    model_type      `model_type` of config.json
    genai_type      the name onnxruntime-genai knows it by
    source          where the row was read
    defaults        over COMMON_DEFAULTS
    bias_keys       which linears have a bias: matrix (qkv, o, mlp) -> True, False or the config key that says so
    fused_weights   the checkpoint holds qkv_proj and gate_up_proj as one tensor each
    qk_norm         none | head (RMS norm over each head) | full (over all heads together)
    norms           names of the four norms of a layer
    norm_offset     gamma = weight + norm_offset
    windows         which layers see a sliding window: none | all | upper (qwen) | pattern (gemma) | nope (smollm3); see spec.WINDOWS
    rope_skips      config may name layers without rope
    rope_aliases    rope types by which old configs call another
    partial_rotary  `partial_rotary_factor` is honoured
    local_rope      windowed layers have their own rope parameters
    scales          multiplier (embedding, attention, residual, logits) -> config key; see spec.scale_of for the rule of each
    activation_key  config key of the activation
    final_softcap   `final_logit_softcapping` c is honoured: logits = c * tanh(logits / c)
    """

    model_type: str
    genai_type: str
    source: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    bias_keys: Mapping[str, bool | str] = field(default_factory=dict)
    fused_weights: bool = False
    qk_norm: str = "none"
    norms: tuple[str | None, str | None, str | None, str | None] = PRE_NORM
    norm_offset: float = 0.0
    windows: str = "none"
    rope_skips: bool = False
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    partial_rotary: bool = False
    local_rope: bool = False
    scales: Mapping[str, str] = field(default_factory=dict)
    activation_key: str = "hidden_act"
    final_softcap: bool = False


ATTENTION_BIAS: Mapping[str, bool | str] = MappingProxyType({"qkv": "attention_bias", "o": "attention_bias"})
ALL_BIAS: Mapping[str, bool | str] = MappingProxyType({**ATTENTION_BIAS, "mlp": "mlp_bias"})

ROWS: tuple[Family, ...] = (
    Family("llama", "llama", "models/llama; Llama 2 (arXiv 2307.09288), Llama 3 (2407.21783)", bias_keys=ALL_BIAS),
    Family(
        "mistral",
        "mistral",
        "models/mistral; Mistral 7B (arXiv 2310.06825)",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
        windows="all",
    ),
    Family(
        "qwen2",
        "qwen2",
        "models/qwen2; Qwen2 (arXiv 2407.10671)",
        defaults={"max_position_embeddings": 32_768, "sliding_window": 4096, "max_window_layers": 28},
        bias_keys={"qkv": True},
        windows="upper",
    ),
    Family(
        "qwen3",
        "qwen3",
        "models/qwen3; Qwen3 (arXiv 2505.09388)",
        defaults={"max_position_embeddings": 32_768, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
        bias_keys=ATTENTION_BIAS,
        qk_norm="head",
        windows="upper",
    ),
    Family(
        "smollm3",
        "smollm3",
        "models/smollm3; NoPE (arXiv 2501.18795)",
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
            "pad_token_id": 128_004,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
        },
        bias_keys=ALL_BIAS,
        windows="nope",
        rope_skips=True,
    ),
    Family(
        "phi3",
        "phi3",
        "models/phi3; Phi-3 (arXiv 2404.14219), LongRoPE (2402.13753)",
        defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        fused_weights=True,
        windows="all",
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        partial_rotary=True,
    ),
    Family(
        "gemma3_text",
        "gemma3_text",
        "models/gemma3; Gemma 3 (arXiv 2503.19786)",
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "hidden_activation": "gelu_pytorch_tanh",
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
        bias_keys=ATTENTION_BIAS,
        qk_norm="head",
        norms=SANDWICH_NORM,
        norm_offset=1.0,
        windows="pattern",
        local_rope=True,
        scales={"embedding": "sqrt(hidden_size)", "attention": "query_pre_attn_scalar"},
        activation_key="hidden_activation",
        final_softcap=True,
    ),
    Family(
        "olmo2",
        "olmo",
        "models/olmo2; OLMo 2 (arXiv 2501.00656)",
        defaults={"rms_norm_eps": 1e-5},
        bias_keys=ATTENTION_BIAS,
        qk_norm="full",
        norms=POST_NORM,
    ),
    Family(
        "granite",
        "granite",
        "models/granite; Granite 3 (IBM)",
        bias_keys=ALL_BIAS,
        scales={
            "embedding": "embedding_multiplier",
            "attention": "attention_multiplier",
            "residual": "residual_multiplier",
            "logits": "logits_scaling",
        },
    ),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({row.model_type: row for row in ROWS})


def family_of(model_type: Any) -> Family:
    """The row of a `model_type`. Raises ArchitectureError naming the known families and the other road."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(FAMILIES)
    raise ArchitectureError(
        "config.json: model_type",
        expected=f"a decoder family ({known})",
        found=repr(model_type),
        remedy="encoders and classifiers take the other road (graph.encoder, through transformers.exporters); a new decoder family is a row in "
        "compiler/graph/architectures.py",
    )
