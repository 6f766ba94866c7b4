"""Added tokens: adapters trained by PEFT on a resized model, merged into the base as it was before, against merge_and_unload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from compiler.checkpoints.resolve import open_checkpoint  # noqa: E402
from compiler.deltas.load import load_delta  # noqa: E402
from compiler.errors import DeltaError  # noqa: E402
from compiler.sources import DeltaSource, Mixture  # noqa: E402
from compiler.stages.merge import plan_merge  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS, ADDED = 48, 3
SIZES = {"vocab_size": ROWS, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
LINEAR = {"llama": ["q_proj", "down_proj"], "bert": ["query", "value"]}
TABLES = {"llama": ["embed_tokens", "lm_head"], "bert": ["word_embeddings"]}
TOKENS = list(range(ROWS, ROWS + ADDED))


def tokenizer(folder: Path, count: int) -> None:
    """A tokenizer of `count` words, the last of them added after training."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({("[UNK]" if n == 0 else f"w{n}"): n for n in range(ROWS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([f"<new{n}>" for n in range(count - ROWS)])
    made.save(str(folder / "tokenizer.json"))


def model_of(family: str, tied: bool) -> Any:
    torch.manual_seed(0)
    if family == "bert":
        return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()


def train(folder: Path, family: str = "llama", tied: bool = False, rows: int = ROWS + ADDED, name: str = "delta", **options: Any) -> Any:
    """Base in folder/base, an adapter of it with `rows` rows in folder/name, its tokenizer beside it -> the PEFT model."""
    save = options.pop("save", {})
    model = model_of(family, tied)
    model.save_pretrained(str(folder / "base"))
    tokenizer(folder / "base", ROWS)
    model.resize_token_embeddings(rows, mean_resizing=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR[family], **options})).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    wrapped.save_pretrained(str(folder / name), **save)
    tokenizer(folder / name, ROWS + ADDED)
    return wrapped


def plan(folder: Path, *names: str, **options: Any) -> Any:
    return plan_merge(open_checkpoint(str(folder / "base")), [load_delta(str(folder / name), **options) for name in names or ("delta",)])


def logits(model: Any) -> np.ndarray:
    ids = torch.tensor([[1, 5, ROWS, 7, ROWS + ADDED - 1, 2]])
    with torch.no_grad():
        out = model(input_ids=ids)
    return np.asarray((out.logits if "logits" in out else out.last_hidden_state).numpy())


CASES: dict[str, dict[str, Any]] = {
    "both tables saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both tables saved, padded": {"modules_to_save": ["embed_tokens", "lm_head"], "rows": 64},
    "linears trained, tables saved": {"save": {"save_embedding_layers": True}},
    "linears trained, tied tables saved": {"tied": True, "save": {"save_embedding_layers": True}},
    "tied, trained tied": {"tied": True, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied, both trained apart": {"tied": True, "modules_to_save": ["embed_tokens", "lm_head"]},
    "tied, trained tokens": {"tied": True, "trainable_token_indices": {"embed_tokens": TOKENS}},
    "adapted embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "save": {"save_embedding_layers": True}},
    "encoder": {"family": "bert", "modules_to_save": ["word_embeddings"]},
    "encoder, padded": {"family": "bert", "modules_to_save": ["word_embeddings"], "rows": 64},
    "encoder, trained tokens": {"family": "bert", "trainable_token_indices": {"word_embeddings": TOKENS}},
}


@pytest.mark.parametrize("case", CASES)
def test_merged_as_by_peft_on_the_resized_model(case: str, tmp_path: Path) -> None:
    options = dict(CASES[case])
    theirs = train(tmp_path, **options).merge_and_unload()
    merged = plan(tmp_path).view()
    rows = options.get("rows", ROWS + ADDED)
    state = theirs.state_dict()
    tied = merged.config.get("tie_word_embeddings", False) and "lm_head.weight" in state
    for name in set(state) - ({"lm_head.weight"} if tied else set()):
        expected = state[name].numpy()
        assert np.abs(merged.tensors[name].read() - expected).max() <= 1e-6 * max(np.abs(expected).max(), 1), name
    assert merged.config["vocab_size"] == rows
    assert b"<new2>" in merged.assets["tokenizer.json"] and set(merged.assets) == {
        "tokenizer.json",
        *(["generation_config.json"] if "lm_head.weight" in state else []),
    }
    if options.get("tied"):
        assert bool(merged.config["tie_word_embeddings"]) == (case != "tied, both trained apart")


@pytest.mark.parametrize("case", ["tied, trained tokens", "tied, both trained apart", "both tables saved, padded", "encoder"])
def test_the_written_checkpoint_computes_the_same_and_rolls_back(case: str, tmp_path: Path, trimtab: Any) -> None:
    from safetensors.numpy import load_file

    options = dict(CASES[case])
    wrapped = train(tmp_path, **options)
    code, _, stderr = trimtab("merge", tmp_path / "base", "--delta", tmp_path / "delta", "--rollback", "--out", tmp_path / "out")
    assert code == 0, stderr
    auto = transformers.AutoModel if options.get("family") == "bert" else transformers.AutoModelForCausalLM
    np.testing.assert_allclose(logits(auto.from_pretrained(str(tmp_path / "out")).eval()), logits(wrapped), atol=1e-5)
    assert b"<new0>" in (tmp_path / "out" / "tokenizer.json").read_bytes()
    code, _, stderr = trimtab("delta", "rollback", tmp_path / "out", "--out", tmp_path / "again")
    assert code == 0, stderr
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "again"))
    assert {name: one.tobytes() for name, one in before.items()} == {name: one.tobytes() for name, one in after.items()}
    assert json.loads((tmp_path / "again" / "config.json").read_text())["vocab_size"] == ROWS
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()


def test_another_checkpoint_with_more_rows(tmp_path: Path) -> None:
    theirs = train(tmp_path, modules_to_save=["embed_tokens", "lm_head"]).merge_and_unload()
    theirs.save_pretrained(str(tmp_path / "whole"))
    tokenizer(tmp_path / "whole", ROWS + ADDED)
    merged = plan(tmp_path, "whole").view()
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_allclose(merged.tensors[name].read(), tensor.numpy(), rtol=1e-6, atol=1e-6)
    with pytest.raises(DeltaError, match=r"expected added rows as they were trained, found a weight, scale or combine method that changes them"):
        plan(tmp_path, "whole", weight=0.5)


def test_the_tokenizer_is_part_of_the_key(tmp_path: Path) -> None:
    train(tmp_path, modules_to_save=["embed_tokens", "lm_head"], rows=64)

    def keys() -> tuple[str, str]:
        sources = Mixture(str(tmp_path / "base"), [DeltaSource(str(tmp_path / "delta"))]).open()
        return sources.merged.digest, json.dumps(sources.identity, sort_keys=True)

    before = keys()
    tokenizer(tmp_path / "delta", ROWS + ADDED + 1)
    assert all(one != other for one, other in zip(before, keys(), strict=True))


def test_a_tokenizer_without_rows_for_its_tokens_stays_out(tmp_path: Path) -> None:
    """A padding token added to the tokenizer only, as many training scripts do."""
    train(tmp_path, rows=ROWS)
    found = plan(tmp_path)
    assert found.view().assets["tokenizer.json"] == (tmp_path / "base" / "tokenizer.json").read_bytes()
    assert f"a tokenizer of {ROWS + ADDED} tokens, more than the {ROWS} rows of the model: the base's is kept" in found.notes[0]


REFUSED: dict[str, tuple[dict[str, Any], int | None, str]] = {
    "no tokenizer": ({}, None, r"delta: expected tokenizer.json with the added tokens of 3 added rows, found none; save the tokenizer of the training"),
    "the base's tokenizer": ({}, ROWS, r"expected tokenizer.json with the added tokens of 3 added rows, found one with no more tokens than the base's"),
    "too many tokens": ({}, 60, r"tokenizer.json: expected at most 51 tokens, the rows of its tables, found 60; resize the embeddings"),
    "head without its rows": (
        {"modules_to_save": ["embed_tokens"], "save": {"save_embedding_layers": False}},
        ROWS + ADDED,
        r"lm_head.weight: expected the values of rows 48 to 50, found none for row 48: they are in neither base nor delta; save this table",
    ),
    "some of the rows": (
        {"tied": True, "modules_to_save": None, "trainable_token_indices": {"embed_tokens": [ROWS, ROWS + 2]}, "save": {"save_embedding_layers": False}},
        ROWS + ADDED,
        r"embed_tokens.weight: expected the values of rows 48 to 50, found none for row 49",
    ),
    "a difference only": (
        {"modules_to_save": None, "target_modules": ["lm_head"], "save": {"save_embedding_layers": False}},
        ROWS + ADDED,
        r"lm_head.weight: expected the 48 rows of .*, found a difference of 51 rows: what it is added to .*; save the embeddings with the adapter",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case: str, tmp_path: Path) -> None:
    options, tokens, message = REFUSED[case]
    train(tmp_path, **{"modules_to_save": ["embed_tokens", "lm_head"], **options})
    if tokens:
        tokenizer(tmp_path / "delta", tokens)
    else:
        (tmp_path / "delta" / "tokenizer.json").unlink()
    with pytest.raises(DeltaError, match=message):
        plan(tmp_path)


def test_two_deltas_that_add_rows(tmp_path: Path) -> None:
    train(tmp_path, modules_to_save=["embed_tokens", "lm_head"])
    train(tmp_path, modules_to_save=["embed_tokens", "lm_head"], rows=64, name="padded")
    train(tmp_path, rows=ROWS, name="plain")
    with pytest.raises(DeltaError, match=r"expected one number of token rows, found 51 in .*delta, 64 in .*padded; merge them apart"):
        plan(tmp_path, "delta", "padded")
    assert plan(tmp_path, "delta", "plain").view().config["vocab_size"] == ROWS + ADDED
    tokenizer(tmp_path / "plain", ROWS + 1)
    with pytest.raises(DeltaError, match=r"expected one tokenizer with added tokens, found two that differ; merge them apart"):
        plan(tmp_path, "delta", "plain")


def test_an_attached_delta_with_added_tokens_is_refused(tmp_path: Path) -> None:
    from compiler.attached import tenants

    train(tmp_path, modules_to_save=["embed_tokens", "lm_head"])
    sources = Mixture(str(tmp_path / "base"), [DeltaSource(str(tmp_path / "delta"), name="a")], attached=True).open()
    with pytest.raises(DeltaError, match=r"expected a delta without added tokens: attached ones share .*, found 3 token rows added by .*; merge it"):
        tenants(sources)
