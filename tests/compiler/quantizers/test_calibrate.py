"""Blocks run one at a time against the whole model of transformers; moments against their definition, and on disk."""

import json

import numpy as np
import pytest

from compiler.checkpoints.resolve import open_checkpoint
from compiler.errors import RecipeError
from compiler.evaluation.data import EvaluationSet, Row, builtin_text
from compiler.quantizers.calibrate import BlockStream, second_moments
from compiler.quantizers.moments import Moments, output_error, write_moments
from compiler.quantizers.windows import calibration_set, token_windows
from compiler.reference import reference_model


@pytest.fixture(scope="module")
def tiny_gemma(tmp_path_factory):
    """Scaled embeddings, two ropes, windows: what a block is handed differs from layer to layer."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(2)
    config = Gemma3TextConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], query_pre_attn_scalar=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny-gemma")
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def windows(count=5, length=24, vocab=120):
    return np.random.default_rng(0).integers(3, vocab, (count, length))


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gemma"])
def test_blocks_in_turn_are_the_whole_model(model, request):
    import torch

    checkpoint, ids = open_checkpoint(str(request.getfixturevalue(model))), windows()
    stream = BlockStream(checkpoint, ids)
    assert [block.name for block in stream.blocks()] == [f"model.layers.{index}" for index in range(stream.block_count)]
    found = torch.cat(stream.head_inputs())
    with torch.inference_mode():
        expected = reference_model(checkpoint, "text-generation").model(input_ids=torch.from_numpy(ids)).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)
    assert all(parameter.is_meta for parameter in stream.base.layers.parameters())  # nothing is kept


def test_moments_are_those_of_the_inputs(tiny_llama):
    import torch

    checkpoint, ids = open_checkpoint(str(tiny_llama)), windows()
    reference, seen = reference_model(checkpoint, "text-generation"), {}
    for name, module in reference.named_modules():
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, inputs))
    with torch.inference_mode():
        reference(input_ids=torch.from_numpy(ids))
    moments = dict(second_moments(checkpoint, ids))
    sources = {"attn.qkv_proj": "self_attn.v_proj", "attn.o_proj": "self_attn.o_proj", "mlp.gate_up_proj": "mlp.up_proj", "mlp.down_proj": "mlp.down_proj"}
    pairs = {f"model.layers.1.{matrix}": f"model.layers.1.{source}" for matrix, source in sources.items()} | {"lm_head": "lm_head"}
    assert len(moments) == 9
    for matrix, source in pairs.items():
        rows = seen[source][0].reshape(-1, seen[source][0].shape[-1]).numpy()
        assert np.allclose(moments[matrix], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5), matrix


def test_what_a_visitor_puts_in_the_next_blocks_see(tiny_llama):
    import torch

    checkpoint, ids = open_checkpoint(str(tiny_llama)), windows()
    stream = BlockStream(checkpoint, ids)
    for block in stream.blocks():
        if block.name.endswith(".0"):
            for matrix in ("attn.o_proj", "mlp.down_proj"):  # a block without branches hands on what it got
                block.replace(f"{block.name}.{matrix}", np.zeros_like(block.weight(f"{block.name}.{matrix}")))
            entered = torch.cat(block.hidden)
        else:
            assert torch.equal(torch.cat(block.hidden), entered)


def test_moments_on_disk(tmp_path):
    rng = np.random.default_rng(1)
    inputs = (rng.standard_normal((500, 40)) * 10.0 ** rng.integers(-4, 3, 40)).astype(np.float32)
    inputs[:, 7] = 0  # a dead input
    moment = inputs.T @ inputs / len(inputs)
    write_moments(tmp_path, [("a.b", moment)])
    again = Moments(tmp_path)
    assert list(again) == ["a.b"] and len(again) == 1
    spread = np.sqrt(np.outer(moment.diagonal(), moment.diagonal()))
    assert np.all(np.abs(again["a.b"] - moment) <= 1e-3 * spread)
    with pytest.raises(KeyError):
        again["c"]


def test_output_error_is_the_mean_square_of_the_outputs():
    rng = np.random.default_rng(2)
    inputs, change = rng.standard_normal((300, 16)).astype(np.float32), rng.standard_normal((5, 16)).astype(np.float32)
    direct = np.square(inputs @ change.T).sum(1).mean()
    assert np.isclose(output_error(change, inputs.T @ inputs / 300), direct, rtol=1e-4)
    assert output_error(np.array([[1.0, 2.0]]), np.diag([3.0, 4.0])) == 19


def test_builtin_calibration_is_other_text_than_the_evaluation():
    text = calibration_set(None).rows[0].text
    assert len(text) > 20_000
    lines = {line for line in text.splitlines() if len(line) > 60}
    assert not lines & set(builtin_text().decode().splitlines())


def test_windows_of_chats_and_texts(tiny_llama):
    checkpoint = open_checkpoint(str(tiny_llama))
    chat = Row(messages=({"role": "user", "content": "Where does the ferry go?"}, {"role": "assistant", "content": "To the island."}))
    ids = token_windows(EvaluationSet((chat, Row(text="Salt marshes form. " * 40)), "", ""), checkpoint, count=3, length=64)
    assert ids.shape[1] == 64 and 1 <= len(ids) <= 3
    tokenizer = json.loads(checkpoint.assets["tokenizer.json"])
    user = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == "<|user|>")
    assert ids[0, 0] == user  # the template's own marks
    with pytest.raises(RecipeError, match="at least 64 tokens"):
        token_windows(EvaluationSet((Row(text="short"),), "", ""), checkpoint)


def test_chats_need_a_template(tiny_gemma, tiny_llama):
    import dataclasses

    assets = {"tokenizer.json": open_checkpoint(str(tiny_llama)).assets["tokenizer.json"]}
    checkpoint = dataclasses.replace(open_checkpoint(str(tiny_gemma)), assets=assets)
    chat = Row(messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    with pytest.raises(RecipeError, match="chat template"):
        token_windows(EvaluationSet((chat,), "", ""), checkpoint)
