"""A tiny int4 bundle opens unchanged in onnxruntime-genai and gives the same greedy tokens as onnxruntime alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers

from compiler.checkpoints.resolve import open_checkpoint
from compiler.graph.decoder import export_decoder
from compiler.scheme import Schemes, parse_scheme

og = pytest.importorskip("onnxruntime_genai", reason="the dev extra brings onnxruntime-genai")

NEW_TOKENS = 12
PROMPTS = ([5, 9, 31, 7, 22], [8, 3, 40])
SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 80,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,  # a tied random model repeats its input
}
# Only the configs: genai must know each family's name. head_dim 32 where the class has a larger default.
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"head_dim": 32, "tie_word_embeddings": True},
    "MistralConfig": {"head_dim": 32, "sliding_window": 6},
    "Qwen2Config": {"hidden_size": 128, "tie_word_embeddings": True},
    "Qwen3Config": {"head_dim": 32},
    "SmolLM3Config": {"hidden_size": 128, "no_rope_layer_interval": 2},
    "Phi3Config": {"hidden_size": 128},
    "Gemma3TextConfig": {"head_dim": 32, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "Olmo2Config": {"hidden_size": 128},
    "GraniteConfig": {"hidden_size": 128, "attention_multiplier": 0.15, "embedding_multiplier": 3.0},
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of a family as an int4-g32 bundle."""
    folder = tmp_path_factory.mktemp(request.param)
    config = getattr(transformers, request.param)(**copy.deepcopy({**SIZES, **CONFIGS[request.param]}))
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder / "model")
    export_decoder(open_checkpoint(str(folder / "model")), Schemes(parse_scheme("int4-g32")), folder)
    return folder


def greedy(folder: Path, prompt: list[int]) -> list[int]:
    """NEW_TOKENS greedy tokens from onnxruntime alone, never the end token."""
    session = ort.InferenceSession(folder / "model.onnx")
    past = {item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32) for item in session.get_inputs() if item.name.startswith("past")}
    ids, seen, found = np.array([prompt], np.int64), len(prompt), []
    for _ in range(NEW_TOKENS):
        logits, *present = session.run(None, {"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64), **past})
        past = dict(zip(past, present, strict=True))
        logits[..., SIZES["eos_token_id"]] = -np.inf
        found.append(int(logits[0, -1].argmax()))
        ids, seen = np.array([[found[-1]]], np.int64), seen + 1
    return found


def genai_greedy(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """The same from onnxruntime-genai, whose min_length bars the end token too."""
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    length = len(prompts[0]) + NEW_TOKENS
    params.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(prompts))
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(prompts, np.int32))
    for _ in range(NEW_TOKENS):
        if generator.is_done():
            break
        generator.generate_next_token()
    return [generator.get_sequence(row).tolist()[len(prompts[0]) :] for row in range(len(prompts))]


def test_same_greedy_tokens(bundle: Path) -> None:
    ours = [greedy(bundle, prompt) for prompt in PROMPTS]
    assert len(set(ours[0] + ours[1])) > 3  # a model that repeats itself would hide a cache fault
    assert [genai_greedy(bundle, [prompt])[0] for prompt in PROMPTS] == ours


def test_ragged_batch_padded_on_the_right(bundle: Path) -> None:
    """genai counts a row's tokens by its pad tokens; the graph gives each row's last valid logits."""
    padded = [PROMPTS[0], PROMPTS[1] + [SIZES["pad_token_id"]] * 2]
    assert genai_greedy(bundle, padded) == [greedy(bundle, prompt) for prompt in PROMPTS]
