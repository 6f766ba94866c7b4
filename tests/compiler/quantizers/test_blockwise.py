"""Codes trained block by block: what is seen, where codes turn, errors that fall on windows that were not trained on, killed runs that go on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compiler.checkpoints.resolve import open_checkpoint
from compiler.errors import RecipeError
from compiler.quantizers import affine, blockwise
from compiler.quantizers.blockwise import Coded, Lesson
from compiler.quantizers.calibrate import BlockStream
from compiler.quantizers.pack import pack, unpack
from compiler.quantizers.windows import calibration_set, token_windows
from compiler.scheme import Schemes, parse_scheme
from compiler.stages import tune
from compiler.stages.quantize import codes_in, matrices

SCHEMES = Schemes(parse_scheme("int3-g32-asym-s16"), {"lm_head": parse_scheme("int4-g32"), "*.o_proj": parse_scheme("fp32")})


def quiet(*_: object) -> None:
    pass


def quantized_matrices(checkpoint):
    stacked = {name: np.concatenate([view.read() for view in views]) for name, views in matrices(checkpoint).items()}
    return {name: affine.quantize(weight, SCHEMES.of(name)) for name, weight in stacked.items() if SCHEMES.of(name).quantized}


@pytest.mark.parametrize("text", ["int4-g32-asym", "int8-g32", "int3-g64", "int5-g16-asym-s16"])
def test_the_gradient_is_that_without_rounding(text):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, 70)).astype(np.float32)
    quantized = affine.quantize(weight, parse_scheme(text))
    coded = Coded(quantized, slice(1, 4), torch.from_numpy(weight[1:4]))
    made = coded(torch.empty(0))
    assert np.allclose(made.detach(), affine.dequantize(quantized)[1:4], atol=1e-6)
    assert np.array_equal(coded.codes(), quantized.codes[1:4])
    down = torch.from_numpy(rng.standard_normal((3, 70)).astype(np.float32))
    made.backward(down)
    position = coded.position.detach().clone().requires_grad_()
    (coded.scales * position).reshape(3, -1)[:, :70].backward(down)
    assert torch.allclose(coded.position.grad, position.grad)


def test_codes_begin_where_the_quantizer_chose_and_turn_at_the_border():
    """Scale 1, codes of [-8, 3.4, 0.6, 0]: 0, 11, 9, 8. The second lies 0.4 above its code, so 0.2 more turns it; 0.4 more do not turn the last."""
    weight = np.array([[-8.0, 3.4, 0.6, 0.0] + [0.0] * 12], np.float32)
    coded = Coded(affine.quantize(weight, parse_scheme("int4-g16")), slice(0, 1), torch.from_numpy(weight))
    assert np.allclose(coded.position.detach()[0, 0, :4], [-8, 3.4, 0.6, 0])
    with torch.no_grad():
        coded.position[0, 0, :4] += torch.tensor([-3.0, 0.2, 0.2, 0.4])
    assert coded.codes()[0, :4].tolist() == [0, 12, 9, 8]  # below 0 there is no code
    far = Coded(affine.quantize(weight, parse_scheme("int4-g16")), slice(0, 1), torch.from_numpy(weight + 1))  # a quantizer that chose another code
    assert far.codes()[0, :4].tolist() == [0, 11, 9, 8]


def test_a_student_is_the_block_with_dequantized_weights(tiny_llama):
    checkpoint = open_checkpoint(str(tiny_llama))
    coded = quantized_matrices(checkpoint)
    stream = BlockStream(checkpoint, token_windows(calibration_set(None), checkpoint, count=2, length=64))
    block = next(stream.blocks())
    found = Lesson(stream, block, {name: coded[name] for name in block.linears if name in coded}, [], [], []).student()
    for name in block.linears.keys() & coded.keys():
        block.replace(name, affine.dequantize(coded[name]))
    assert found.codes().keys() == {name for name in block.linears if not name.endswith("o_proj")}
    (mine,), (wanted,) = found.run(block.hidden), block.run()
    assert torch.allclose(mine, wanted, atol=1e-5)


def test_what_was_not_trained_on_gets_nearer_and_a_killed_run_goes_on_to_the_same_codes(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(blockwise, "STEPS", 24)
    checkpoint = open_checkpoint(str(tiny_llama))
    before = quantized_matrices(checkpoint)
    windows = token_windows(calibration_set(None), checkpoint, count=96, length=64)
    trained = blockwise.train(checkpoint, before, windows, tmp_path / "one", quiet, seed=3)
    assert 0 < trained.after < 0.97 * trained.before
    assert trained.matrices.keys() == {name for name in before if name.startswith("model.layers.")}
    assert all(not np.array_equal(one.codes, before[name].codes) for name, one in trained.matrices.items())
    assert all(one.scales is before[name].scales and one.zero_points is before[name].zero_points for name, one in trained.matrices.items())
    learn, seen = Lesson.learn, []

    def dies(lesson, *given):
        seen.append(lesson.block.name)
        if lesson.block.name == "model.layers.1" and len(seen) == 2:
            raise KeyboardInterrupt
        return learn(lesson, *given)

    monkeypatch.setattr(Lesson, "learn", dies)
    with pytest.raises(KeyboardInterrupt):
        blockwise.train(checkpoint, before, windows, tmp_path / "two", quiet, seed=3)
    again = blockwise.train(checkpoint, before, windows, tmp_path / "two", quiet, seed=3)
    assert seen[:3] == ["model.layers.0", "model.layers.1", "model.layers.1"]  # the first block is not learnt again
    assert (again.before, again.after) == (trained.before, trained.after)
    assert all(np.array_equal(again.matrices[name].codes, one.codes) for name, one in trained.matrices.items())


def test_nothing_to_gain_keeps_the_codes(tiny_llama, tmp_path, monkeypatch):
    """A rate at which every check is worse on the windows held out."""
    monkeypatch.setattr(blockwise, "RATE", 5.0)
    monkeypatch.setattr(blockwise, "STEPS", 8)
    checkpoint = open_checkpoint(str(tiny_llama))
    before = quantized_matrices(checkpoint)
    trained = blockwise.train(checkpoint, before, token_windows(calibration_set(None), checkpoint, count=64, length=64), tmp_path, quiet)
    assert trained.after == trained.before
    assert all(np.array_equal(one.codes, before[name].codes) for name, one in trained.matrices.items())


def test_the_stage_writes_every_matrix_in_groups(tiny_llama, tmp_path, monkeypatch):
    """Trained codes of the blocks, the head's as they came, nothing for a float matrix."""
    monkeypatch.setattr(blockwise, "STEPS", 8)
    monkeypatch.setattr(blockwise, "RATE", 0.1)
    checkpoint, text = open_checkpoint(str(tiny_llama)), calibration_set(None)
    before = quantized_matrices(checkpoint)
    params = tune.resolve_tuning(checkpoint, SCHEMES, text, 0, "codes") | {"windows": 8}
    (tmp_path / "made").mkdir()
    told = tune.tune(checkpoint, params, lambda name: pack(before[name]), text, tmp_path / "made", tmp_path / "scratch", quiet)
    assert told.startswith("error of the last block") and {path.stem for path in (tmp_path / "made").iterdir()} == before.keys()
    read = codes_in(tmp_path / "made")
    found = {name: unpack(read(name), one.scheme, one.width) for name, one in before.items()}
    same = {name for name, one in found.items() if np.array_equal(one.codes, before[name].codes)}
    assert same == {"lm_head"}
    assert all(np.array_equal(one.scales, before[name].scales) for name, one in found.items())


def test_too_little_text_is_refused(tiny_llama, tmp_path):
    checkpoint = open_checkpoint(str(tiny_llama))
    with pytest.raises(RecipeError, match="to hold out"):
        blockwise.train(checkpoint, quantized_matrices(checkpoint), token_windows(calibration_set(None), checkpoint, count=4, length=64), tmp_path, quiet)
