"""Ablation on tiny real models: groups by hand, sums that must hold, and what the command prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compiler.ablation import group_of, kind_of


@pytest.mark.parametrize(
    ("name", "kind", "layer_kind"),
    [
        ("model.layers.3.mlp.down_proj.weight", "mlp", "layer 3 mlp"),
        ("model.layers.3.self_attn.q_proj.weight", "attn", "layer 3 attn"),
        ("model.layers.3.post_attention_layernorm.weight", "norm", "layer 3 norm"),
        ("model.embed_tokens.weight", "embedding", "embedding"),
        ("lm_head.weight", "head", "head"),
        ("transformer.h.11.attn.c_attn.weight", "attn", "layer 11 attn"),
        ("transformer.h.11.ln_1.bias", "norm", "layer 11 norm"),
        ("transformer.wpe.weight", "embedding", "embedding"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "attn", "layer 0 attn"),
        ("bert.encoder.layer.0.attention.output.LayerNorm.weight", "norm", "layer 0 norm"),
        ("bert.encoder.layer.0.output.dense.weight", "mlp", "layer 0 mlp"),
        ("bert.embeddings.word_embeddings.weight", "embedding", "embedding"),
        ("classifier.weight", "head", "head"),
        ("model.norm.weight", "norm", "norm"),
    ],
)
def test_groups_by_hand(name: str, kind: str, layer_kind: str) -> None:
    assert (kind_of(name), group_of(name, "layer-kind")) == (kind, layer_kind)
    assert group_of(name, "kind") == kind
    assert group_of(name, "layer") == (layer_kind.rsplit(" ", 1)[0] if layer_kind.startswith("layer") else kind)


@pytest.fixture
def recipe(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> Path:
    rows = [{"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} it is."}]} for n in range(8)]
    (tmp_path / "eval.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    parts = {"name": "tiny", "base": str(tiny_llama), "deltas": [{"path": str(tiny_lora)}], "evaluate": {"data": "eval.jsonl"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(parts))
    return tmp_path / "recipe.yaml"


def run(trimtab: Any, *arguments: Any) -> dict[str, Any]:
    code, stdout, stderr = trimtab("delta", "ablate", *arguments, "--json")
    assert code == 0, stderr
    return dict(json.loads(stdout))


def test_each_group_against_models_merged_without_it(trimtab: Any, recipe: Path) -> None:
    """The same losses from recipes whose `only` and `scale` leave a group out or in: another road to the same weights."""
    found = run(trimtab, recipe, "--by", "layer")
    assert [row["group"] for row in found["rows"]] == ["layer 0", "layer 1"] and found["all"]["accuracy"] is not None
    assert found["sequences"] == 8 and found["all"]["loss"] != found["base"]["loss"]
    for row, layer, other in zip(found["rows"], (0, 1), (1, 0), strict=True):
        left = run(trimtab, recipe, "--set", f"deltas.0.only=['*.layers.{other}.*']")
        assert left["all"]["loss"] - found["all"]["loss"] == pytest.approx(row["leave_out"]["value"], abs=1e-6)
        assert left["base"]["loss"] == pytest.approx(found["base"]["loss"], abs=1e-6)
        alone = run(trimtab, recipe, "--set", f"deltas.0.scale={{'*.layers.{other}.*': 0}}")
        assert alone["base"]["loss"] - alone["all"]["loss"] == pytest.approx(row["alone"]["value"], abs=1e-6), layer
        assert row["leave_out"]["low"] <= row["leave_out"]["value"] <= row["leave_out"]["high"]


def test_one_group_holds_everything_and_the_result_repeats(trimtab: Any, recipe: Path, tmp_path: Path) -> None:
    found = run(trimtab, recipe, "--by", "kind", "--limit-rows", 6, "--plot", tmp_path / "p.svg")
    again = run(trimtab, recipe, "--by", "kind", "--limit-rows", 6)
    assert {**found, "seconds": 0} == {**again, "seconds": 0} and found["sequences"] == 6
    assert [row["group"] for row in found["rows"]] == ["attn", "mlp"] and b"<svg" in (tmp_path / "p.svg").read_bytes()
    only = run(trimtab, recipe, "--by", "kind", "--limit-rows", 6, "--set", "deltas.0.only=['*.mlp.*']")
    (row,) = only["rows"]
    gain = only["base"]["loss"] - only["all"]["loss"]
    assert row["leave_out"]["value"] == pytest.approx(gain) and row["alone"]["value"] == pytest.approx(gain)


def test_the_table_says_when_there_are_too_few_sequences(trimtab: Any, recipe: Path) -> None:
    code, stdout, _ = trimtab("delta", "ablate", recipe, "--limit-rows", 3)
    assert code == 0 and "too few sequences" in stdout and "layer 1, 3 tensors" in stdout


def test_a_recipe_without_deltas_and_a_picture_of_no_kind(trimtab: Any, recipe: Path) -> None:
    assert "found none; name a recipe with deltas" in trimtab("delta", "ablate", recipe, "--set", "deltas=[]")[2]
    assert "expected a file ending in .svg" in trimtab("delta", "ablate", recipe, "--plot", "p.txt")[2]


def test_a_classifier_keeps_the_head_that_it_was_given(trimtab: Any, tmp_path: Path) -> None:
    """BERT with a LoRA and a saved head: the head the base lacks is in every model, its loss is that of the labels."""
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16, num_labels=2
    )
    whole = BertForSequenceClassification(config)
    whole.bert.save_pretrained(tmp_path / "base")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["[UNK]", "a", "b", "c", "d", "e", "f", "g"])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    options = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(whole, options).save_pretrained(tmp_path / "adapter")
    rows = [{"text": text, "label": f"LABEL_{number % 2}"} for number, text in enumerate(("a b", "c", "d e f", "g a", "b b c", "f"))]
    (tmp_path / "eval.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    parts = {"name": "tiny", "base": "base", "deltas": [{"path": "adapter"}], "quantize": {"scheme": "fp32"}, "evaluate": {"data": "eval.jsonl"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(parts))
    found = run(trimtab, tmp_path / "recipe.yaml", "--by", "layer-kind")
    assert [row["group"] for row in found["rows"]] == ["layer 0 attn", "layer 1 attn"]
    assert found["all"]["samples"] == 6 and 0 <= found["all"]["accuracy"] <= 1
    assert found["rows"][0]["leave_out"]["accuracy"]["samples"] == 6
