"""Every decoder family against eager transformers, float32: prefill and 16 cached steps, batch 1 and a right-padded batch of 3.

Each row is a tiny random model with odd sizes (three heads on one key head, widths that are no multiple of a group, windows shorter than the text) and
what makes its family different switched on. Norm weights are random too, or a wrong norm would hide behind ones.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers

from compiler.checkpoints.resolve import open_checkpoint
from compiler.graph.decoder import export_decoder
from compiler.scheme import Scheme, Schemes

FP32 = Schemes(Scheme())
STEPS = 16
PROMPTS = (9, 4, 20)  # tokens; the third is beyond longrope's switch below, the others cross it on the way or never
SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 24}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}
GEMMA_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
}
FIVE = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]

# id -> (config class, what differs from SIZES)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-biases-tied": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-head_dim": ("LlamaConfig", {"head_dim": 32, "rope_parameters": LLAMA3_ROPE}),
    "llama-head8": ("LlamaConfig", {"head_dim": 8}),
    "qwen3-head24": ("Qwen3Config", {"head_dim": 24}),
    "phi3-partial6": ("Phi3Config", {"partial_rotary_factor": 0.375}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0}}),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN_ROPE, "head_dim": 32}),
    "llama-gelu": ("LlamaConfig", {"hidden_act": "gelu"}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "mistral-full": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3-window": ("Qwen3Config", {"head_dim": 16, "attention_bias": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "smollm3-window": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 4, "tie_word_embeddings": False}),
    "phi3": ("Phi3Config", {"sliding_window": 7}),
    "phi3-partial": ("Phi3Config", {"hidden_size": 96, "partial_rotary_factor": 0.5}),
    "phi3-longrope": ("Phi3Config", {"original_max_position_embeddings": 18, "rope_parameters": LONGROPE}),
    "phi3-longrope-partial": (
        "Phi3Config",
        {"hidden_size": 96, "original_max_position_embeddings": 18, "partial_rotary_factor": 0.5, "rope_parameters": LONGROPE},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"num_hidden_layers": 4, "head_dim": 16, "layer_types": FIVE, "sliding_window": 5, "rope_parameters": GEMMA_ROPES, "query_pre_attn_scalar": 24},
    ),
    "gemma3-softcap": ("Gemma3TextConfig", {"head_dim": 32, "final_logit_softcapping": 3.0, "sliding_window": 5, "tie_word_embeddings": False}),
    "olmo2": ("Olmo2Config", {}),
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 6.0, "logits_scaling": 4.0, "residual_multiplier": 0.3, "attention_multiplier": 0.1, "tie_word_embeddings": True},
    ),
}


def tiny_model(name: str) -> torch.nn.Module:
    """A random model of a row, in eval mode. Norms and biases are drawn too."""
    config_class, changes = ROWS[name]
    torch.set_num_threads(1)
    config = getattr(transformers, config_class)(**copy.deepcopy({**SIZES, **changes}))  # the config classes write into their rope dicts
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        centre = 1.0 if parameter_name.endswith("norm.weight") and "Gemma" not in config_class else 0.0
        with torch.no_grad():
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def reference(model: torch.nn.Module, rows: list[list[int]]) -> list[np.ndarray]:
    """Per row, logits [prompt + STEPS, vocab] of eager transformers: the prompt at once, then token by token with its cache."""
    found = []
    for tokens, prompt in zip(rows, PROMPTS, strict=True):
        with torch.no_grad():
            out = model(torch.tensor([tokens[:prompt]]), use_cache=True)
            parts = [out.logits[0]]
            for token in tokens[prompt:]:
                out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
                parts.append(out.logits[0])
        found.append(torch.cat(parts).numpy())
    return found


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options)


def run(session: ort.InferenceSession, rows: list[list[int]]) -> list[np.ndarray]:
    """Per row, logits as `reference` gives them, from one batch: prompts padded on the right, then STEPS cached steps."""
    inputs = {item.name: item for item in session.get_inputs()}
    cache = {name: np.zeros((len(rows), item.shape[1], 0, item.shape[3]), np.float32) for name, item in inputs.items() if name.startswith("past")}
    prompts = list(PROMPTS[: len(rows)])
    width = max(prompts)
    ids = np.zeros((len(rows), width), np.int64)
    for index, (tokens, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[index, :prompt] = tokens[:prompt]
    collected: list[list[np.ndarray]] = [[] for _ in rows]
    for step in range(STEPS + 1):
        mask = (np.arange(width + step)[None] < np.array(prompts)[:, None] + step).astype(np.int64)
        logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask, **cache})
        cache = dict(zip(cache, present, strict=True))
        for index, prompt in enumerate(prompts):
            collected[index].append(logits[index, :prompt] if step == 0 and logits.shape[1] > 1 else logits[index, -1:])
        ids = np.array([[rows[index][prompts[index] + min(step, STEPS - 1)]] for index in range(len(rows))])
    return [np.concatenate(parts) for parts in collected]


@dataclass(frozen=True)
class Case:
    """A tiny model's graphs, its token rows and what eager transformers says of them."""

    folder: Path
    rows: list[list[int]]
    expected: list[np.ndarray]


@pytest.fixture(scope="module", params=list(ROWS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param)
    model.save_pretrained(folder)
    for logits in ("all", "last"):
        (folder / logits).mkdir()
        export_decoder(open_checkpoint(str(folder)), FP32, folder / logits, logits=logits)
    draw = np.random.default_rng(3)
    rows = [draw.integers(3, SIZES["vocab_size"], prompt + STEPS).tolist() for prompt in PROMPTS]
    return Case(folder, rows, reference(model, rows))


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_match_eager(case: Case, batch: int) -> None:
    for logits in ("all", "last"):
        found = run(session(case.folder / logits / "model.onnx"), case.rows[:batch])
        for row, (one, other) in enumerate(zip(found, case.expected, strict=False)):
            kept = other if logits == "all" else other[PROMPTS[row] - 1 :]
            assert one.shape == kept.shape
            assert np.abs(one - kept).max() < 1e-4, f"{logits}, row {row}"
