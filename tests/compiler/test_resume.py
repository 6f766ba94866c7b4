"""Resumed passes against whole ones, on decoders and an encoder."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from compiler.resume import Resumable  # noqa: E402

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "tied llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=32)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)),
    "albert": lambda: transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**SIZES, embedding_size=8)),
}
# part of a parameter's name -> layers that a pass with it changed may leave out
DEPTHS = {
    "llama": {"layers.0.": 0, "layers.1.self_attn.q_proj": 1, "layers.2.mlp.down_proj": 2, "model.norm": 3, "lm_head": 3, "embed_tokens": 0},
    "tied llama": {"embed_tokens": 0, "layers.2.input_layernorm": 2},
    "gpt2": {"h.1.attn.c_attn.weight": 1, "h.2.": 2, "ln_f": 3, "wpe": 0},
    "bert": {"layer.2.attention.self.query": 2, "layer.1.output": 1, "pooler": 3, "classifier": 3, "word_embeddings": 0},
    "albert": {"query": 0, "classifier": 0},
}


@pytest.mark.parametrize("family", MODELS)
def test_a_resumed_pass_is_the_whole_pass(family: str) -> None:
    torch.manual_seed(0)
    model = MODELS[family]().eval().requires_grad_(False)
    groups = {part: [one for name, one in model.named_parameters() if part in name] for part in DEPTHS[family]}
    runner = Resumable(model, groups.values())
    batches = [torch.randint(0, 40, (2, 7)), torch.randint(0, 40, (1, 4))]
    with torch.inference_mode(), runner.recording():
        before = [runner(input_ids=ids).logits for ids in batches]
    layers = max((module for module in model.modules() if isinstance(module, torch.nn.ModuleList)), key=len)
    ran: list[int] = []
    for place, layer in enumerate(layers):
        if family != "albert":
            inner = next(module for module in layer.modules() if isinstance(module, torch.nn.LayerNorm) or "Norm" in type(module).__name__)
            inner.register_forward_hook(lambda *_, place=place: ran.append(place))
    for part, parameters in groups.items():
        assert parameters, part
        old = [one.clone() for one in parameters]
        for one in parameters:
            one.add_(torch.randn_like(one) * 0.1)
        with torch.inference_mode():
            expected = [model(input_ids=ids).logits for ids in batches]
            ran.clear()
            with runner.resuming(parameters):
                found = [runner(input_ids=ids).logits for ids in batches]
        assert family == "albert" or set(ran) == set(range(DEPTHS[family][part], 3)), part
        for one, other, start in zip(found, expected, before, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
            assert not torch.equal(one, start), part
        for one, values in zip(parameters, old, strict=True):
            one.copy_(values)
