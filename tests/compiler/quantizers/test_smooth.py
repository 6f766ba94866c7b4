"""Smoothing leaves the float model the same function, in every family, and lowers what it says it lowers."""

from __future__ import annotations

import numpy as np
import pytest

from compiler.checkpoints.resolve import open_checkpoint
from compiler.quantizers.smooth import CANDIDATES, Choice, changes_of, smoothed, smoothing
from compiler.reference import reference_model
from compiler.scheme import Schemes, parse_scheme
from compiler.stages.quantize import matrices

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
}


@pytest.fixture(params=CONFIGS)
def checkpoint(request, tmp_path):
    """A tiny model with biases and norms that are not 1, so that a fold that forgets one of them shows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **{**SMALL, **CONFIGS[request.param]}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    return open_checkpoint(str(tmp_path))


def logits(checkpoint, ids):
    import torch

    with torch.inference_mode():
        return reference_model(checkpoint, "text-generation")(input_ids=torch.from_numpy(ids)).logits.numpy()


def any_scales(checkpoint):
    """Random s for every matrix; heads that share a value share it."""
    rng, found = np.random.default_rng(0), {}
    for name, views in matrices(checkpoint).items():
        scale = np.exp(rng.standard_normal(views[0].shape[1])).astype(np.float32)
        if name.endswith("o_proj"):
            scale = scale.reshape(2, 2, -1)[:, :1].repeat(2, 1).reshape(-1)
        found[name] = scale
    from compiler.graph.spec import decoder_spec
    from compiler.quantizers.smooth import makers

    return {name: scale for name, scale in found.items() if makers(decoder_spec(checkpoint.config), name, scale)}


def test_the_float_model_stays_the_same_function(checkpoint):
    ids, scales = np.random.default_rng(1).integers(3, 96, (2, 17)), any_scales(checkpoint)
    assert {name.rsplit(".")[-1] for name in scales} >= {"down_proj", "o_proj"} and "lm_head" not in scales
    changed = smoothed(checkpoint, scales)
    first = matrices(checkpoint)["model.layers.0.mlp.down_proj"][0]
    assert not np.allclose(changed.tensors[first.name].read(), first.read())
    np.testing.assert_allclose(logits(changed, ids), logits(checkpoint, ids), atol=2e-5, rtol=1e-4)
    assert changed.digest != checkpoint.digest and changed.digest == smoothed(checkpoint, scales).digest


def test_rows_are_read_in_blocks_as_whole(checkpoint):
    changed = smoothed(checkpoint, any_scales(checkpoint))
    for name in changes_of(checkpoint.tensors, checkpoint.config, any_scales(checkpoint)):
        view = changed.tensors[name]
        whole = view.read()
        np.testing.assert_array_equal(np.concatenate([view.rows(at, at + 1) for at in range(view.row_count)]).reshape(whole.shape), whole)


def test_a_loud_channel_is_moved_into_the_weights():
    """One input in 32 is a hundred times the others: its block's steps drown the rest until it is divided away."""
    import torch

    rng = np.random.default_rng(2)
    inputs = rng.standard_normal((256, 64)).astype(np.float32)
    inputs[:, 5] *= 100
    weight = rng.standard_normal((16, 64)).astype(np.float32)
    choice = Choice(weight, inputs.T @ inputs / 256, torch.from_numpy(inputs), parse_scheme("int8-g32"), 1.0)
    scale = choice.best()
    assert scale is not None and scale[5] > 5 * np.median(scale)
    assert choice.loss(scale) < 0.2 * choice.loss(np.ones(64, np.float32))
    assert choice.loss(scale) == min(choice.loss(choice.candidate(*powers, 1, 1)) for powers in CANDIDATES)
    shared = choice.candidate(1.0, 0.0, 2, 16).reshape(2, 2, 16)
    np.testing.assert_array_equal(shared[:, 0], shared[:, 1])


def test_scales_of_a_model_lower_its_error(tiny_llama):
    checkpoint = open_checkpoint(str(tiny_llama))
    windows = np.random.default_rng(0).integers(3, 96, (4, 64))
    scales = smoothing(checkpoint, windows, Schemes(parse_scheme("int8-g32")), "rtn", lambda *_: None)
    assert all(name.startswith("model.layers.") and scale.dtype == np.float32 for name, scale in scales.items())
    ids = windows[:2]
    np.testing.assert_allclose(logits(smoothed(checkpoint, scales), ids), logits(checkpoint, ids), atol=2e-5, rtol=1e-4)
    assert smoothing(checkpoint, windows, Schemes(parse_scheme("fp32")), "rtn", lambda *_: None) == {}
