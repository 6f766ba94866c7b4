"""The rope twin against transformers' own initialisers, and refusals by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compiler.errors import ArchitectureError
from compiler.graph.rope import Rope, rope_of

HEAD = 64
POSITIONS = 4096
FACTORS = [1.0 + 0.05 * index for index in range(HEAD // 2)]
PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "default-1e6": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 1024,
        "mscale": 0.8,
        "mscale_all_dim": 1.2,
        "beta_fast": 24,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": FACTORS,
        "long_factor": [2 * value for value in FACTORS],
        "original_max_position_embeddings": 1024,
    },
}


def transformers_rope(parameters: dict[str, Any], length: int) -> tuple[np.ndarray, float]:
    """inv_freq and attention factor as transformers computes them for sequences of `length`."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(hidden_size=2 * HEAD, num_attention_heads=2, max_position_embeddings=POSITIONS, rope_parameters=dict(parameters))
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        frequencies, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
    return frequencies.numpy(), factor


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_equals_transformers(name: str) -> None:
    rope = rope_of(PARAMETERS[name], HEAD, POSITIONS)
    frequencies, factor = transformers_rope(PARAMETERS[name], 1024)
    assert np.allclose(rope.inv_freq, frequencies, rtol=3e-7, atol=0)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
    if rope.long_inv_freq is not None:
        long, _ = transformers_rope(PARAMETERS[name], 1025)
        assert rope.switch_length == 1024
        assert np.allclose(rope.long_inv_freq, long, rtol=3e-7, atol=0)


def test_worked_case() -> None:
    """theta 10000, width 32: the frequencies fall from 1 by 10 ** (-1/4) a step."""
    rope = rope_of(PARAMETERS["default"], 32, POSITIONS)
    assert isinstance(rope, Rope)
    assert rope.rotary_dim == 32
    assert rope.inv_freq[:5:4] == pytest.approx((1.0, 0.1), rel=1e-6)


def test_partial_rotation_takes_the_first_part() -> None:
    assert rope_of({"rope_theta": 10_000.0, "partial_rotary_factor": 0.75}, 128, POSITIONS).rotary_dim == 96


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}, ["rope_type", "'dynamic'", "longrope"]),
        ({"rope_type": "linear", "rope_theta": 10_000.0}, ["rope_parameters", "factor for rope type linear"]),
        ({**PARAMETERS["longrope"], "short_factor": [1.0]}, ["32 values", "1 and 32"]),
        ({"rope_theta": 10_000.0, "partial_rotary_factor": 0.4}, ["even rotary width", "25 of head size 64"]),
    ],
)
def test_refusals(parameters: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ArchitectureError) as caught:
        rope_of(parameters, HEAD, POSITIONS)
    assert all(word in str(caught.value) for word in words)
