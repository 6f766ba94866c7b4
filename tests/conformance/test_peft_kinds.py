"""Every kind of PEFT adapter but plain LoRA against merge_and_unload on tiny models, every parameter non-zero."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from compiler.checkpoints.resolve import open_checkpoint  # noqa: E402
from compiler.checkpoints.write import write_checkpoint  # noqa: E402
from compiler.deltas.load import KINDS, load_delta  # noqa: E402
from compiler.errors import DeltaError  # noqa: E402
from compiler.stages.merge import merged_view  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

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


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, attention_bias=True)).eval()


def gpt2() -> Any:
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=4, n_positions=32)).eval()


def bert() -> Any:
    torch.manual_seed(2)
    return transformers.BertModel(transformers.BertConfig(**BERT)).eval()


LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_CONV = ["c_attn", "c_proj", "c_fc"]
BERT_LINEAR = ["query", "value", "dense"]
MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {"llama": (llama, LLAMA_LINEAR), "gpt2": (gpt2, GPT2_CONV), "bert": (bert, BERT_LINEAR)}


def randomize(parameters: Iterable[Any], seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def adapted(model: Any, config: Any, folder: Path, seed: int = 3) -> Any:
    """The PEFT model, every trained parameter random, saved in `folder`."""
    wrapped = peft.get_peft_model(model, config).eval()
    randomize((parameter for parameter in wrapped.parameters() if parameter.requires_grad), seed)
    wrapped.save_pretrained(str(folder))
    return wrapped


def base_model(name: str) -> Any:
    """Biases random too, so that nothing hides behind a zero."""
    model = MODELS[name][0]()
    randomize((parameter for key, parameter in model.named_parameters() if key.endswith(".bias")), seed=11)
    return model


def train(name: str, config: Any, folder: Path, seed: int = 3) -> Any:
    """(base saved in folder/base, adapter in folder/delta) -> the PEFT model."""
    model = base_model(name)
    model.save_pretrained(str(folder / "base"))
    return adapted(model, config, folder / "delta", seed)


def ours(folder: Path, weight: float = 1.0) -> Any:
    return merged_view(open_checkpoint(str(folder / "base")), [load_delta(str(folder / "delta"), weight=weight)])


def assert_same(merged: Any, theirs: Any) -> None:
    """Every tensor that both have agrees to 1e-6 relative to its largest entry; nothing of theirs is missing."""
    state = theirs.state_dict()
    tied = {"lm_head.weight"} if theirs.config.tie_word_embeddings else set()
    assert set(state) - tied <= set(merged.tensors)
    for name in set(state) & set(merged.tensors):
        expected = state[name].float().numpy()
        error = np.abs(merged.tensors[name].read() - expected).max()
        assert error <= 1e-6 * np.abs(expected).max(), name


def config_of(kind: str, model: str, **extra: Any) -> Any:
    """The PEFT config of a kind on all linear layers of a model."""
    targets = MODELS[model][1]
    conv = {"fan_in_fan_out": True} if model == "gpt2" else {}
    rows: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **conv, **extra}),
        "dora": lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": targets, **conv, **extra}),
        "adalora": lambda: peft.AdaLoraConfig(**{"init_r": 5, "lora_alpha": 8, "total_step": 10, "target_modules": targets, **conv, **extra}),
        "loha": lambda: peft.LoHaConfig(**{"r": 4, "alpha": 6, "target_modules": targets, **extra}),
        "lokr": lambda: peft.LoKrConfig(**{"r": 2, "alpha": 6, "target_modules": targets, **extra}),
        "ia3": lambda: peft.IA3Config(**{"target_modules": targets, "feedforward_modules": targets[-1:], **conv, **extra}),
        "vera": lambda: peft.VeraConfig(**{"r": 6, "target_modules": targets, **conv, **extra}),
        "oft": lambda: peft.OFTConfig(**{"oft_block_size": 4, "target_modules": targets, **extra}),
        "boft": lambda: peft.BOFTConfig(**{"boft_block_size": 4, "target_modules": targets, **extra}),
        "shira": lambda: peft.ShiraConfig(**{"r": 3, "random_seed": 5, "target_modules": targets, **extra}),
    }
    return rows[kind]()


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"{kind} {model}": (kind, model, {}) for kind in ("dora", "adalora", "ia3", "vera") for model in MODELS},
    **{f"{kind} {model}": (kind, model, {}) for kind in ("loha", "lokr", "oft", "boft", "shira") for model in ("llama", "bert")},  # not for Conv1D in PEFT
    "lora mica": ("lora", "llama", {"init_lora_weights": "mica"}),
    "lora orthogonal": ("lora", "llama", {"init_lora_weights": "orthogonal"}),
    "dora rslora and patterns": ("dora", "llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}}),
    "dora gpt2, flag forgotten": ("dora", "gpt2", {"fan_in_fan_out": False}),
    "dora embedding": ("dora", "llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "dora saved norm and biases": ("dora", "llama", {"modules_to_save": ["norm"], "bias": "lora_only"}),
    "adalora ranks pruned": ("adalora", "llama", {"target_modules": ["q_proj"]}),
    "adalora alpha 0": ("adalora", "llama", {"lora_alpha": 0}),
    "loha patterns": ("loha", "llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 1}}),
    "lokr both decomposed": ("lokr", "llama", {"r": 1, "decompose_both": True}),
    "lokr whole factors": ("lokr", "llama", {"r": 16}),
    "lokr factor": ("lokr", "bert", {"decompose_factor": 4, "rank_pattern": {"query": 1}}),
    "ia3 all feedforward": ("ia3", "gpt2", {"feedforward_modules": GPT2_CONV}),
    "vera biases": ("vera", "llama", {"bias": "vera_only"}),
    "oft exact": ("oft", "llama", {"use_cayley_neumann": False}),
    "oft shared, three terms": ("oft", "llama", {"block_share": True, "num_cayley_neumann_terms": 3}),
    "oft two terms": ("oft", "llama", {"num_cayley_neumann_terms": 2}),
    "oft seven terms": ("oft", "bert", {"num_cayley_neumann_terms": 7}),
    "oft constrained": ("oft", "llama", {"coft": True, "eps": 0.3}),
    "oft by r": ("oft", "llama", {"r": 4, "oft_block_size": 0}),
    "oft embedding": ("oft", "llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "boft by number": ("boft", "llama", {"boft_block_size": 0, "boft_block_num": 2}),
}


@pytest.mark.parametrize("factors, size", [(2, 4), (3, 2), (2, 2)])
def test_boft_of_several_butterfly_factors(factors: int, size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PEFT trains these with a CUDA kernel that builds block-diagonal matrices; with torch's in its place its own formula runs here."""
    from peft.tuners.boft import layer

    class BlockDiagonal:
        @staticmethod
        def apply(blocks: Any) -> Any:
            return torch.stack([torch.block_diag(*one) for one in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: object())
    monkeypatch.setattr(layer, "FastBlockDiag", BlockDiagonal)
    options = {"boft_block_size": size, "boft_n_butterfly_factor": factors, "target_modules": ["q_proj", "down_proj"]}
    wrapped = train("llama", config_of("boft", "llama", **options), tmp_path)
    assert wrapped.base_model.model.model.layers[0].self_attn.q_proj.boft_R["default"].shape[0] == factors
    assert_same(ours(tmp_path), wrapped.merge_and_unload())


TOKENS: dict[str, tuple[str, Callable[[], Any]]] = {
    "alone": ("llama", lambda: peft.TrainableTokensConfig(token_indices=[9, 3, 63], target_modules=["embed_tokens"])),
    "alone gpt2": ("gpt2", lambda: peft.TrainableTokensConfig(token_indices=[0, 5], target_modules=["wte"])),
    "alone bert": ("bert", lambda: peft.TrainableTokensConfig(token_indices=[7], target_modules=["word_embeddings"])),
    "beside a lora": ("llama", lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 1])),
    "by module": ("llama", lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 1], "lm_head": [2]})),
}


@pytest.mark.parametrize("case", TOKENS)
def test_trainable_tokens(case: str, tmp_path: Path) -> None:
    model, config = TOKENS[case]
    wrapped = train(model, config(), tmp_path)
    merged = ours(tmp_path)
    assert_same(merged, wrapped.merge_and_unload())
    base = open_checkpoint(str(tmp_path / "base"))
    changed = sum(int((base.tensors[name].read() != view.read()).any(-1).sum()) for name, view in merged.tensors.items() if "embed" in name or "wte" in name)
    assert changed == len(getattr(config(), "token_indices", None) or [5, 1])


def test_trainable_tokens_of_a_tied_model_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)).eval()
    model.save_pretrained(str(tmp_path / "base"))
    wrapped = adapted(model, TOKENS["beside a lora"][1](), tmp_path / "delta")
    write_checkpoint(ours(tmp_path), tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out")).eval()
    assert again.config.tie_word_embeddings is True
    np.testing.assert_allclose(logits(again), logits(wrapped), atol=1e-5)


def test_token_indices_that_do_not_fit(tmp_path: Path) -> None:
    train("llama", TOKENS["alone"][1](), tmp_path)
    path = tmp_path / "delta" / "adapter_config.json"
    config = json.loads(path.read_text())
    for indices, message in {
        (9, 3): r"expected one token index for each trained row, found 2 indices, and rows \[3, 24\]",
        (9, 9, 3): r"expected token indices of at least 0, each once, found \[9, 9, 3\]",
        (9, 3, 64): r"expected tokenizer.json with the added tokens of 1 added rows, found none",
    }.items():
        path.write_text(json.dumps({**config, "token_indices": indices}))
        with pytest.raises(DeltaError, match=message):
            ours(tmp_path)


@pytest.mark.parametrize("kind", sorted(peft.PeftType))
def test_every_type_of_peft_is_read_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    """KINDS is what is read; each other name that this PEFT knows is refused with that name, before its weights are looked at."""
    name = str(getattr(kind, "value", kind))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": name}))
    message = "expected adapter_model.safetensors, found none" if name in KINDS else f"found {name}; .*{name} is not built"
    with pytest.raises(DeltaError, match=message):
        load_delta(str(tmp_path))


def test_every_kind_that_is_read_is_one_of_peft() -> None:
    covered = {"LORA", "ADALORA", "LOHA", "LOKR", "IA3", "VERA", "OFT", "BOFT", "SHIRA", "TRAINABLE_TOKENS"}  # each has cases above
    assert set(KINDS) == covered <= {kind.value for kind in peft.PeftType}


@pytest.mark.parametrize("case", CASES)
def test_equals_merge_and_unload(case: str, tmp_path: Path) -> None:
    kind, model, options = CASES[case]
    wrapped = train(model, config_of(kind, model, **options), tmp_path)
    if case == "adalora ranks pruned":
        wrapped = prune(wrapped, tmp_path)
    merged = ours(tmp_path)
    assert load_delta(str(tmp_path / "delta")).kind == kind
    base = open_checkpoint(str(tmp_path / "base"))
    changed = [name for name in base.tensors if not np.array_equal(base.tensors[name].read(), merged.tensors[name].read())]
    assert len(changed) >= (2 if "target_modules" in options else 8)
    assert_same(merged, wrapped.merge_and_unload())


def prune(wrapped: Any, folder: Path) -> Any:
    """The ranks that AdaLoRA's allocator would leave: some, all, none; then loaded again as PEFT loads them."""
    ranks = {"model.layers.0.self_attn.q_proj.lora_E": [True, False, True, True, False], "model.layers.1.self_attn.q_proj.lora_E": [True] * 5}
    wrapped.peft_config["default"].rank_pattern = ranks
    wrapped.save_pretrained(str(folder / "delta"))
    return peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(str(folder / "base")), str(folder / "delta"))


@pytest.mark.parametrize("kind, model", [("dora", "llama"), ("dora", "gpt2"), ("ia3", "llama"), ("ia3", "gpt2"), ("oft", "llama"), ("lokr", "bert")])
def test_blocks_of_rows_are_rows_of_the_whole(kind: str, model: str, tmp_path: Path) -> None:
    train(model, config_of(kind, model), tmp_path)
    for view in ours(tmp_path).tensors.values():
        blocks = np.concatenate([block for _, block in view.blocks(400)])
        np.testing.assert_allclose(blocks, view.read(), rtol=1e-5, atol=1e-6)


def test_differences_are_taken_against_the_base_whatever_the_order(tmp_path: Path) -> None:
    """PEFT merges one after the other, which makes the order matter; ours is W + sum_i w_i (f_i(W) - W)."""
    first = train("llama", config_of("dora", "llama"), tmp_path / "one").merge_and_unload().state_dict()
    second = train("llama", config_of("ia3", "llama"), tmp_path / "two", seed=8).merge_and_unload().state_dict()
    base = open_checkpoint(str(tmp_path / "one" / "base"))
    deltas = [load_delta(str(tmp_path / "one" / "delta"), weight=0.5), load_delta(str(tmp_path / "two" / "delta"), weight=-2)]
    there, back = (merged_view(base, some).tensors for some in (deltas, deltas[::-1]))
    for name, view in base.tensors.items():
        original = view.read()
        expected = original + 0.5 * (first[name].numpy() - original) - 2 * (second[name].numpy() - original)
        np.testing.assert_allclose(there[name].read(), expected, atol=2e-5)
        np.testing.assert_allclose(back[name].read(), expected, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_a_delta(name: str, tmp_path: Path) -> None:
    train(name, config_of("dora", name), tmp_path).merge_and_unload().save_pretrained(str(tmp_path / "other"))
    base, other = (open_checkpoint(str(tmp_path / part)) for part in ("base", "other"))
    whole = merged_view(base, [load_delta(str(tmp_path / "other"))])
    half = merged_view(base, [load_delta(str(tmp_path / "other"), weight=0.5)])
    assert set(whole.tensors) == set(base.tensors) and whole.config.get("tie_word_embeddings") == base.config.get("tie_word_embeddings")
    for key, view in other.tensors.items():
        expected = view.read()
        limit = 1e-6 * max(float(np.abs(expected).max()), 1.0)
        np.testing.assert_allclose(whole.tensors[key].read(), expected, rtol=0, atol=limit)
        np.testing.assert_allclose(half.tensors[key].read(), (expected + base.tensors[key].read()) / 2, rtol=0, atol=limit)


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(input_ids=torch.arange(1, 13).reshape(2, 6)).logits.numpy())


@pytest.mark.parametrize("kind", ["dora", "ia3", "oft"])
def test_a_head_that_the_base_lacks(kind: str, tmp_path: Path) -> None:
    base_model("bert").save_pretrained(str(tmp_path / "base"))
    torch.manual_seed(4)
    trained = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "base"), num_labels=5)
    wrapped = adapted(trained, config_of(kind, "bert", task_type="SEQ_CLS"), tmp_path / "delta")
    write_checkpoint(ours(tmp_path), tmp_path / "out")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "out")).eval()
    assert again.config.num_labels == 5
    np.testing.assert_allclose(logits(again), logits(wrapped), atol=1e-5)


@pytest.mark.parametrize("auto, labels", [("AutoModelForSequenceClassification", 5), ("AutoModelForTokenClassification", 7)])
def test_a_checkpoint_with_a_head_that_the_base_lacks(auto: str, labels: int, tmp_path: Path) -> None:
    base_model("bert").save_pretrained(str(tmp_path / "base"))
    torch.manual_seed(4)
    trained = getattr(transformers, auto).from_pretrained(str(tmp_path / "base"), num_labels=labels).eval()
    trained.config.id2label = {number: f"name {number}" for number in range(labels)}
    randomize(trained.parameters())
    trained.save_pretrained(str(tmp_path / "delta"))
    write_checkpoint(ours(tmp_path), tmp_path / "out")
    again = getattr(transformers, auto).from_pretrained(str(tmp_path / "out")).eval()
    assert again.config.id2label == trained.config.id2label
    np.testing.assert_allclose(logits(again), logits(trained), atol=1e-5)
    with pytest.raises(DeltaError, match=r"expected weight 1.0 for a module that is replaced or added whole, found 0.5"):
        ours(tmp_path, weight=0.5)


@pytest.mark.parametrize("kind, targets", [("dora", ["lm_head"]), ("dora", ["embed_tokens"]), ("oft", ["embed_tokens"]), ("ia3", ["lm_head"])])
def test_tied_model_computes_what_the_adapter_computed(kind: str, targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)).eval()
    model.save_pretrained(str(tmp_path / "base"))
    options = {"feedforward_modules": []} if kind == "ia3" else {}
    wrapped = adapted(model, config_of(kind, "llama", target_modules=targets, **options), tmp_path / "delta")
    write_checkpoint(ours(tmp_path), tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out")).eval()
    assert again.config.tie_word_embeddings is False
    np.testing.assert_allclose(logits(again), logits(wrapped), atol=1e-5)


# guards


def test_vera_without_its_projections(tmp_path: Path) -> None:
    train("llama", config_of("vera", "llama", save_projection=False), tmp_path)
    with pytest.raises(DeltaError, match=r"expected vera_A and vera_B in the file, found no base_model.vera_A; save it again with save_projection=True"):
        ours(tmp_path)


def test_another_base_of_the_same_names(tmp_path: Path) -> None:
    for kind, message in {
        "dora": r"expected a base tensor of shape \[24, 24\], found \[48, 48\]",
        "ia3": r"expected a base tensor of shape \[24, any\], found \[48, 48\]",
        "vera": r"expected a base tensor of shape \[24, any\], found \[48, 48\]",
        "oft": r"expected a base tensor of shape \[any, 24\], found \[48, 48\]",
        "shira": r"expected 288 entries, r 3, inside \[48, 48\], found 144 entries up to row \d+, column \d+: the adapter is for another base",
    }.items():
        options = {"feedforward_modules": []} if kind == "ia3" else {}
        train("llama", config_of(kind, "llama", target_modules=["q_proj"], **options), tmp_path / kind)
        larger = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "hidden_size": 48}, attention_bias=True))
        larger.save_pretrained(str(tmp_path / kind / "base"))
        with pytest.raises(DeltaError, match=message):
            ours(tmp_path / kind)


def test_kinds_that_are_not_built_are_refused_by_name(tmp_path: Path) -> None:
    train("llama", peft.HiraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    with pytest.raises(DeltaError, match=r"expected a delta of kind LORA, ADALORA, .*, found HIRA; merge it with PEFT, .*HIRA is not built"):
        ours(tmp_path)
