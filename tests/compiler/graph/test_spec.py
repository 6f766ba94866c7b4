"""Reading config.json: both spellings of transformers, defaults of the families, refusals by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from compiler.errors import ArchitectureError
from compiler.graph.architectures import FAMILIES
from compiler.graph.rope import rope_of
from compiler.graph.spec import decoder_spec

BASE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}


def config(model_type: str, **changes: Any) -> dict[str, Any]:
    return {**BASE, "model_type": model_type, **changes}


def windows(found: dict[str, Any]) -> list[int | None]:
    return [layer.window for layer in decoder_spec(found).layers]


def test_old_and_new_spelling_of_rope_agree() -> None:
    old = decoder_spec(config("llama", rope_theta=500_000.0, rope_scaling=LLAMA3))
    new = decoder_spec(config("llama", rope_parameters={**LLAMA3, "rope_theta": 500_000.0}))
    older = decoder_spec(config("llama", rope_theta=500_000.0, rope_scaling={**LLAMA3, "rope_type": None, "type": "llama3"}))
    assert old.ropes == new.ropes == older.ropes
    assert old.ropes != decoder_spec(config("llama", rope_theta=500_000.0)).ropes


def test_gemma_ropes_by_layer_type_in_both_spellings() -> None:
    old = config("gemma3_text", head_dim=32, rope_theta=1_000_000, rope_local_base_freq=10_000, rope_scaling={"rope_type": "linear", "factor": 8.0})
    kinds = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    spec = decoder_spec(old)
    assert spec == decoder_spec(config("gemma3_text", head_dim=32, rope_parameters=kinds))
    assert [layer.window for layer in spec.layers] == [4096] * 5 + [None]
    local, full = (spec.ropes[spec.layers[index].rope or 0] for index in (0, 5))
    assert local == rope_of(kinds["sliding_attention"], 32, 512)
    assert full == rope_of(kinds["full_attention"], 32, 512)
    assert spec.tied
    assert spec.embedding_scale == math.sqrt(128)
    assert spec.attention_scale == 256**-0.5


def test_windows_of_each_rule() -> None:
    assert windows(config("llama", sliding_window=8)) == [None] * 6
    assert windows(config("mistral")) == [4096] * 6
    assert windows(config("mistral", sliding_window=None)) == [None] * 6
    assert windows(config("qwen2", sliding_window=8)) == [None] * 6
    assert windows(config("qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=4)) == [None] * 4 + [8] * 2
    kinds = ["sliding_attention", "full_attention"] * 3
    assert windows(config("qwen3", sliding_window=8, use_sliding_window=True, layer_types=kinds)) == [8, None] * 3
    assert windows(config("smollm3", use_sliding_window=True, sliding_window=8, no_rope_layer_interval=3)) == [None, None, 8] * 2


def test_layers_without_rope() -> None:
    assert [layer.rope for layer in decoder_spec(config("smollm3")).layers] == [0, 0, 0, None, 0, 0]
    assert [layer.rope for layer in decoder_spec(config("smollm3", no_rope_layers=[1, 0, 1, 0, 1, 0])).layers] == [0, None] * 3


def test_defaults_of_the_families() -> None:
    assert decoder_spec(config("qwen2")).qkv_bias
    assert not decoder_spec(config("qwen2")).o_bias
    assert decoder_spec(config("qwen3")).head_size == 128
    assert decoder_spec(config("llama", num_key_value_heads=None)).kv_heads == 4
    assert decoder_spec(config("olmo2")).norm_eps == 1e-5
    assert not decoder_spec(config("llama")).tied
    assert decoder_spec(config("smollm3")).tied
    granite = decoder_spec(config("granite", logits_scaling=4.0, attention_multiplier=0.1, residual_multiplier=0.5, embedding_multiplier=3.0))
    assert (granite.logits_scale, granite.attention_scale, granite.residual_scale, granite.embedding_scale) == (0.25, 0.1, 0.5, 3.0)


def test_phi3_calls_longrope_by_other_names() -> None:
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    for name in ("su", "yarn", "longrope"):
        rope = decoder_spec(config("phi3", original_max_position_embeddings=128, rope_scaling={"type": name, **factors})).ropes[0]
        assert (rope.kind, rope.switch_length) == ("longrope", 128)
        assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(128)))


def test_every_family_reads_the_base_config() -> None:
    for name in FAMILIES:
        assert len(decoder_spec(config(name)).layers) == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, ["model_type", "llama", "gemma3_text", "'bert'", "other road"]),
        ({"model_type": None}, ["model_type", "None"]),
        ({"num_local_experts": 8}, ["num_local_experts", "8"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "50.0"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping", "nothing for llama"]),
        ({"hidden_act": "xielu"}, ["hidden_act", "silu", "'xielu'"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_type", "'dynamic'"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["rope_parameters", "one set"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"layer_types": ["sliding_attention"] * 6}, ["layer_types", "full_attention"]),
        ({"layer_types": ["linear_attention"] * 6}, ["layer_types", "linear_attention"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "divisor", "3"]),
        ({"hidden_size": None}, ["hidden_size", "positive whole number", "None"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ArchitectureError) as caught:
        decoder_spec({**config("llama"), **changes})
    assert all(word in str(caught.value) for word in words)
