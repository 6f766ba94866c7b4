"""genai_config.json: what onnxruntime-genai must know to run the bundle unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from compiler.graph.spec import DecoderSpec

SAMPLING_KEYS = ("do_sample", "repetition_penalty", "temperature", "top_k", "top_p")
SAMPLING_DEFAULTS: Mapping[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0}


def special_tokens(spec: DecoderSpec, config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """bos, eos and pad ids: generation_config.json before config.json before the family's own. eos may be a list; pad falls back to eos."""

    def find(key: str) -> Any:
        for source in (generation, config, spec.family.defaults):
            if source.get(key) is not None:
                return source[key]
        return None

    eos = find("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    pad = find("pad_token_id")
    found = {"bos_token_id": find("bos_token_id"), "eos_token_id": eos, "pad_token_id": pad if pad is not None else first}
    return {key: value for key, value in found.items() if value is not None}


def genai_config(spec: DecoderSpec, config: Mapping[str, Any], assets: Mapping[str, bytes], length: int) -> dict[str, Any]:
    """The dict of genai_config.json. `length`: tokens of context; genai sizes its shared KV buffers by search.max_length.

    onnxruntime's warnings are off: it has one for each graph input with a default, of which adapters bring hundreds.
    """
    generation = json.loads(assets["generation_config.json"]) if "generation_config.json" in assets else {}
    decoder = {
        "filename": "model.onnx",
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], "log_severity_level": 3},
        "head_size": spec.head_size,
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": spec.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
    }
    sampling = {key: generation.get(key) if generation.get(key) is not None else SAMPLING_DEFAULTS[key] for key in SAMPLING_KEYS}
    search = {"min_length": 0, "max_length": length, "num_beams": 1, "num_return_sequences": 1, "past_present_share_buffer": True, **sampling}
    tokens = special_tokens(spec, config, generation)
    return {"model": {"type": spec.family.genai_type, "vocab_size": spec.vocab, "context_length": length, **tokens, "decoder": decoder}, "search": search}
