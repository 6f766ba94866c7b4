"""Our merge against PEFT's: merge_and_unload on tiny models, every factor non-zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from compiler.checkpoints.resolve import open_checkpoint  # noqa: E402
from compiler.checkpoints.write import write_checkpoint  # noqa: E402
from compiler.deltas.load import load_delta  # noqa: E402
from compiler.errors import DeltaError  # noqa: E402
from compiler.stages.merge import merged_view, plan_merge  # noqa: E402

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
BERT = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(**extra: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **extra)).eval()


def gpt2() -> Any:
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=4, n_positions=32)).eval()


def bert_base() -> Any:
    torch.manual_seed(2)
    return transformers.BertModel(transformers.BertConfig(**BERT)).eval()


def train(model: Any, config: Any, folder: Path, seed: int = 3) -> Any:
    """A PEFT model whose every trainable tensor is random, saved in `folder`."""
    wrapped = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    wrapped.save_pretrained(str(folder))
    return wrapped


def lora(**extra: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **extra})


def assert_same(ours: Any, theirs: Any) -> None:
    """Every tensor that both have agrees to 1e-6 relative to its largest entry; nothing of theirs is missing."""
    state = theirs.state_dict()
    names = set(ours.tensors)
    tied = {"lm_head.weight"} if theirs.config.tie_word_embeddings else set()
    assert set(state) - tied <= names
    for name in set(state) & names:
        expected = state[name].float().numpy()
        error = np.abs(ours.tensors[name].read() - expected).max()
        assert error <= 1e-6 * max(np.abs(expected).max(), 1.0), name


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama all linears": (llama, {"target_modules": ALL_LINEAR}),
    "llama rslora": (llama, {"target_modules": ALL_LINEAR, "use_rslora": True}),
    "llama patterns": (
        llama,
        {"target_modules": ALL_LINEAR, "rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 3}, "alpha_pattern": {r"model.layers.0.self_attn.v_proj": 5}},
    ),
    "llama untied head and embedding": (llama, {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "llama saved norm": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "llama biases all": (lambda: llama(attention_bias=True, mlp_bias=True), {"target_modules": ALL_LINEAR, "bias": "all"}),
    "llama biases lora_only": (lambda: llama(attention_bias=True), {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "llama lora bias": (lambda: llama(attention_bias=True), {"target_modules": ["q_proj", "o_proj"], "lora_bias": True}),
    "gpt2 conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 square conv1d, flag forgotten": (gpt2, {"target_modules": ["attn.c_proj"]}),
    "bert bare": (bert_base, {"target_modules": ["query", "value", "dense"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_equals_merge_and_unload(case: str, tmp_path: Path) -> None:
    build, options = CASES[case]
    build().save_pretrained(str(tmp_path / "base"))
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    theirs = train(build(), lora(**options), tmp_path / "delta").merge_and_unload()
    ours = merged_view(open_checkpoint(str(tmp_path / "base")), [load_delta(str(tmp_path / "delta"))])
    assert_same(ours, theirs)
    write_checkpoint(ours, tmp_path / "out")
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


@pytest.mark.filterwarnings("ignore")
def test_every_case_changes_something(tmp_path: Path) -> None:
    """The comparison above would pass on two untouched models; this one would not."""
    llama().save_pretrained(str(tmp_path / "base"))
    train(llama(), lora(target_modules=ALL_LINEAR), tmp_path / "delta")
    base = open_checkpoint(str(tmp_path / "base"))
    ours = merged_view(base, [load_delta(str(tmp_path / "delta"))])
    changed = [name for name in base.tensors if not np.array_equal(base.tensors[name].read(), ours.tensors[name].read())]
    assert len(changed) == 14


@pytest.mark.filterwarnings("ignore")
def test_two_weighted_loras_add_up(tmp_path: Path) -> None:
    llama().save_pretrained(str(tmp_path / "base"))
    wrapped = train(llama(), lora(target_modules=ALL_LINEAR), tmp_path / "one")
    train(llama(), lora(target_modules=["q_proj", "down_proj"], r=2), tmp_path / "two", seed=9)
    wrapped.load_adapter(str(tmp_path / "two"), "two")
    wrapped.add_weighted_adapter(["default", "two"], [0.7, -1.3], "mixed", combination_type="cat")
    wrapped.set_adapter("mixed")
    deltas = [load_delta(str(tmp_path / "one"), weight=0.7), load_delta(str(tmp_path / "two"), weight=-1.3)]
    assert_same(merged_view(open_checkpoint(str(tmp_path / "base")), deltas), wrapped.merge_and_unload())


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 13).reshape(2, 6)).logits.numpy()


FAMILIES = {
    "roberta": ("RobertaConfig", "RobertaModel", ["query", "value"], ""),
    "distilbert": ("DistilBertConfig", "DistilBertModel", ["q_lin", "v_lin"], ""),
    "mpnet": ("MPNetConfig", "MPNetModel", ["attn.q", "attn.v"], ""),
    "deberta": ("DebertaV2Config", "DebertaV2Model", ["query_proj", "value_proj"], "pooler"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_other_encoders(family: str, tmp_path: Path) -> None:
    config_class, model_class, targets, between = FAMILIES[family]
    torch.manual_seed(5)
    sizes = {"dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 4, "vocab_size": 64} if family == "distilbert" else BERT
    getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).save_pretrained(str(tmp_path / "base"))
    trained = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "base"), num_labels=3)
    base = open_checkpoint(str(tmp_path / "base"))
    options = {"task_type": "SEQ_CLS", "target_modules": targets}
    if between:  # a layer that was random in training, and that PEFT saves only when told to
        train(copy.deepcopy(trained), lora(**options), tmp_path / "incomplete")
        with pytest.raises(DeltaError, match=f"in neither: it was random .*train it again with modules_to_save=.*{between}"):
            merged_view(base, [load_delta(str(tmp_path / "incomplete"))])
        options["modules_to_save"] = ["classifier", between]
    wrapped = train(trained, lora(**options), tmp_path / "delta")
    write_checkpoint(merged_view(open_checkpoint(str(tmp_path / "base")), [load_delta(str(tmp_path / "delta"))]), tmp_path / "out")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "out")).eval()
    assert again.config.num_labels == 3
    np.testing.assert_allclose(logits(again), logits(wrapped), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls, auto", [("SEQ_CLS", "AutoModelForSequenceClassification"), ("TOKEN_CLS", "AutoModelForTokenClassification")])
def test_bert_with_a_head_that_the_base_lacks(cls: str, auto: str, tmp_path: Path) -> None:
    bert_base().save_pretrained(str(tmp_path / "base"))
    torch.manual_seed(4)
    trained = getattr(transformers, auto).from_pretrained(str(tmp_path / "base"), num_labels=5)
    wrapped = train(trained, lora(task_type=cls, target_modules=["query", "value", "dense"]), tmp_path / "delta")
    expected = logits(wrapped)
    ours = merged_view(open_checkpoint(str(tmp_path / "base")), [load_delta(str(tmp_path / "delta"))])
    write_checkpoint(ours, tmp_path / "out")
    again = getattr(transformers, auto).from_pretrained(str(tmp_path / "out")).eval()
    assert again.config.num_labels == 5
    assert again.config.architectures == [type(again).__name__]
    np.testing.assert_allclose(logits(again), expected, atol=1e-5)
    assert all(name.startswith(("bert.", "classifier.")) for name in ours.tensors)


TIED = {
    "head only": {"target_modules": ["lm_head"]},
    "embedding only": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "neither": {"target_modules": ["q_proj"]},
    "tied saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied embedding": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TIED)
def test_tied_model_computes_what_the_adapter_computed(case: str, tmp_path: Path) -> None:
    """PEFT's own merge writes one side into the shared tensor; the adapter before merging is the reference."""
    llama(tie_word_embeddings=True).save_pretrained(str(tmp_path / "base"))
    wrapped = train(llama(tie_word_embeddings=True), lora(**TIED[case]), tmp_path / "delta")
    plan = plan_merge(open_checkpoint(str(tmp_path / "base")), [load_delta(str(tmp_path / "delta"))])
    write_checkpoint(plan.view(), tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out")).eval()
    np.testing.assert_allclose(logits(again), logits(wrapped), atol=1e-5)
    stays = case == "neither" or case.startswith("tied")
    assert again.config.tie_word_embeddings == stays
    assert bool(plan.notes) != stays


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [{"target_modules": ["wte"]}, {"target_modules": ["lm_head", "c_attn"]}, {"target_modules": ["c_attn"]}])
def test_tied_gpt2_whose_checkpoint_has_no_prefix(case: dict[str, Any], tmp_path: Path) -> None:
    """The published gpt2 says `h.0...` and `wte.weight`; a head beside them needs the full names."""
    from safetensors.torch import save_file

    gpt2().save_pretrained(str(tmp_path / "base"))
    bare = {name.removeprefix("transformer."): value.contiguous() for name, value in gpt2().transformer.state_dict().items()}
    save_file(bare, str(tmp_path / "base" / "model.safetensors"), {"format": "pt"})
    wrapped = train(gpt2(), lora(**case), tmp_path / "delta")
    write_checkpoint(merged_view(open_checkpoint(str(tmp_path / "base")), [load_delta(str(tmp_path / "delta"))]), tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out")).eval()
    np.testing.assert_allclose(logits(again), logits(wrapped), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"use_qalora": True}, {"init_lora_weights": "pissa"}])
def test_variants_are_refused_by_name(options: dict[str, Any], tmp_path: Path) -> None:
    train(llama(), lora(target_modules=["q_proj"], **options), tmp_path / "delta")
    with pytest.raises(Exception, match=r"QALoRA: use_qalora|pissa"):
        load_delta(str(tmp_path / "delta"))
