"""Tiny llamas in numpy: a config and random weights as a Checkpoint, no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from compiler.checkpoints.view import Checkpoint, TensorView

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 80,  # no multiple of 32 or 64: every row has a tail
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        found |= {f"{layer}.self_attn.{part}_proj.weight": (rows, hidden) for part, rows in (("q", q), ("k", kv), ("v", kv))}
        found |= {f"{layer}.mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        found |= {f"{layer}.self_attn.o_proj.weight": (hidden, q), f"{layer}.mlp.down_proj.weight": (hidden, inner)}
        found |= {f"{layer}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    return found


def as_checkpoint(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Checkpoint:
    views = {name: TensorView(name, array.shape, "F32", lambda start, stop, array=array: array[start:stop]) for name, array in arrays.items()}
    return Checkpoint(views, config, {}, "tiny", lambda: "0" * 64)


@pytest.fixture
def make_checkpoint() -> Callable[..., Checkpoint]:
    """make_checkpoint(change=lambda arrays: ..., **config changes) -> Checkpoint with the same random weights each time."""

    def make(change: Callable[[dict[str, np.ndarray]], Any] | None = None, **changes: Any) -> Checkpoint:
        config = {**CONFIG, **changes}
        draw = np.random.default_rng(11)
        arrays = {name: (0.1 * draw.standard_normal(shape) + (len(shape) == 1)).astype(np.float32) for name, shape in shapes(config).items()}
        if change is not None:
            change(arrays)
        return as_checkpoint(config, arrays)

    return make
