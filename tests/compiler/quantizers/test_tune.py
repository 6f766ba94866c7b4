"""Tuned scales: gradients against torch's own, codes that stay, KL that falls on windows that were not trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from compiler.checkpoints.resolve import open_checkpoint
from compiler.quantizers import affine, tune
from compiler.quantizers.windows import calibration_set, token_windows
from compiler.reference import reference_model
from compiler.scheme import Schemes, parse_scheme
from compiler.stages.quantize import matrices


def quiet(*_: object) -> None:
    pass


def quantized_matrices(checkpoint, schemes):
    stacked = {name: np.concatenate([view.read() for view in views]) for name, views in matrices(checkpoint).items()}
    return {name: affine.quantize(weight, schemes.of(name)) for name, weight in stacked.items()}


@pytest.mark.parametrize("text", ["int4-g32-asym", "int8-g32", "int3-g64"])
def test_gradients_are_torch_s_own(text):
    rng = np.random.default_rng(0)
    matrix = tune.Matrix(affine.quantize(rng.standard_normal((5, 70)).astype(np.float32), parse_scheme(text)))
    x = torch.from_numpy(rng.standard_normal((2, 3, 70)).astype(np.float32))
    down = torch.from_numpy(rng.standard_normal((2, 3, 5)).astype(np.float32))
    found = []
    for product in (lambda a, s: tune.Product.apply(a, s, matrix.steps, 70), lambda a, s: a @ tune.dense(s, matrix.steps, 70).T):
        inputs, scales = x.clone().requires_grad_(), matrix.scales.clone().requires_grad_()
        y = product(inputs, scales)
        y.backward(down)
        found.append((y.detach(), inputs.grad, scales.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_granite"])
def test_the_student_is_the_quantized_model(model, request):
    checkpoint = open_checkpoint(str(request.getfixturevalue(model)))
    schemes = Schemes(parse_scheme("int4-g32-asym"), {"*.o_proj": parse_scheme("fp32")})
    coded = {name: one for name, one in quantized_matrices(checkpoint, Schemes(parse_scheme("int4-g32-asym"))).items() if schemes.of(name).quantized}
    student = tune.Student(checkpoint, coded)
    reference = reference_model(checkpoint, "text-generation")
    places: dict[str, int] = {}
    with torch.no_grad():
        for name, views in matrices(checkpoint).items():
            for view in views if name in coded else ():
                start = places.get(name, 0)
                places[name] = start + view.shape[0]
                reference.get_parameter(view.name).copy_(torch.from_numpy(affine.dequantize(coded[name])[start : places[name]]))
        ids = np.arange(3, 60)
        expected = reference(input_ids=torch.from_numpy(ids)[None]).logits[0]
        found = student.logits(student.hidden(ids))
    assert torch.allclose(found, expected, atol=2e-4 * float(expected.std()))


@pytest.fixture(scope="module")
def tiny_granite(tmp_path_factory):
    """Scaled embeddings and logits, an untied head, biases."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_bias": True, "tie_word_embeddings": False}
    folder = tmp_path_factory.mktemp("tiny-granite")
    GraniteForCausalLM(GraniteConfig(**sizes, **more)).save_pretrained(folder)
    return folder


def test_held_out_loss_falls_and_the_codes_stay(tiny_llama):
    checkpoint = open_checkpoint(str(tiny_llama))
    schemes = Schemes(parse_scheme("int3-g32-asym-s16"), {"lm_head": parse_scheme("int4-g32")})
    before = quantized_matrices(checkpoint, schemes)
    windows = token_windows(calibration_set(None), checkpoint, count=16, length=64)
    first, second = (tune.tune(checkpoint, before, windows, quiet, seed=3) for _ in range(2))
    assert 0 < first.after < 0.97 * first.before
    for name, tuned in first.matrices.items():
        assert np.array_equal(tuned.codes, before[name].codes) and tuned.zero_points is before[name].zero_points
        assert np.array_equal(tuned.scales, second.matrices[name].scales)  # seeded
        assert np.array_equal(tuned.scales, affine.storable(tuned.scales, tuned.scheme))
    assert any(not np.array_equal(tuned.scales, before[name].scales) for name, tuned in first.matrices.items())


def test_nothing_to_gain_changes_nothing(tiny_llama, monkeypatch):
    """A rate at which every pass is worse on the windows held out: the scales it began with are kept."""
    checkpoint = open_checkpoint(str(tiny_llama))
    monkeypatch.setattr(tune, "RATE", 0.5)
    monkeypatch.setattr(tune, "PASSES", 1)
    before = quantized_matrices(checkpoint, Schemes(parse_scheme("int8-g32")))
    tuned = tune.tune(checkpoint, before, token_windows(calibration_set(None), checkpoint, count=3, length=64), quiet)
    assert tuned.after == tuned.before
    assert all(np.array_equal(tuned.matrices[name].scales, one.scales) for name, one in before.items())
    assert replace(before["lm_head"], scales=tuned.matrices["lm_head"].scales).scheme == before["lm_head"].scheme
