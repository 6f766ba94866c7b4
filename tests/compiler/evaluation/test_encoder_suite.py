"""Whole evaluations of a tiny encoder: labels, pairs, noise, a control set, metrics of the user's own; and the comparison of two of its bundles."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiler.checkpoints.resolve import open_checkpoint
from compiler.compare import Ask, compare
from compiler.evaluation.custom import load_custom
from compiler.evaluation.data import EvaluationSet, load_rows
from compiler.evaluation.run import Exported, evaluate
from compiler.evaluation.suite import Suite
from compiler.progress import Progress
from compiler.scheme import Schemes, parse_scheme
from compiler.stages import export, package

LABELS = ["pump", "lathe", "press"]
TEXTS = ["the pump leaks oil", "the lathe is too hot", "the press lost pressure", "water under the pump", "spindle of the lathe", "press number four"]


def write(path: Path, rows: list[dict[str, Any]]) -> EvaluationSet:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return load_rows(path)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random BERT as a folder: bert("feature-extraction") or bert("text-classification")."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    def build(task: str) -> Path:
        folder = tmp_path_factory.mktemp(task)
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False)
        tokenizer.train_from_iterator(TEXTS, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
        named = {"id2label": dict(enumerate(LABELS)), "label2id": {label: place for place, label in enumerate(LABELS)}}
        config = BertConfig(vocab_size=tokenizer.get_vocab_size(), pad_token_id=0, initializer_range=0.2, **sizes, **(named if "class" in task else {}))
        (BertForSequenceClassification if "class" in task else BertModel)(config).save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]", "model_max_length": 64}))
        return folder

    return build


def exported(folder: Path, task: str, scheme: str, place: Path) -> Exported:
    checkpoint = open_checkpoint(str(folder))
    place.mkdir()
    export.export(checkpoint, export.resolve_options(checkpoint, Schemes(parse_scheme(scheme)), task, None), place, lambda *_: None)
    return Exported(place)


def quiet(*_: object) -> None:
    return None


def test_a_classifier_with_noise_a_control_set_and_a_metric_of_ones_own(bert: Callable[[str], Path], tmp_path: Path) -> None:
    folder = bert("text-classification")
    data = write(tmp_path / "data.jsonl", [{"text": text, "label": LABELS[place % 3]} for place, text in enumerate(TEXTS * 4)])
    control = write(tmp_path / "control.jsonl", [{"text": f"{text} again", "label": LABELS[place % 3]} for place, text in enumerate(TEXTS)])
    (tmp_path / "margins.py").write_text("def margin(row, output):\n    a, b = sorted(output)[-2:]\n    return b - a\n")
    files, checkpoint = exported(folder, "text-classification", "int8", tmp_path / "onnx"), open_checkpoint(str(folder))
    suite = Suite(data, control, ("typos", "long"), load_custom({"margin": "margins:margin"}, tmp_path))
    found = evaluate(checkpoint, checkpoint, files, suite, quiet)
    metrics = found["metrics"]
    for name in ("accuracy_drop", "f1", "flips", "cosine_mean", "custom.margin", "custom.margin_drop"):
        for prefix in ("", "typos.", "long.", "control."):
            assert math.isfinite(metrics[prefix + name]["value"]), prefix + name
    for name in ("typos.accuracy_excess", "long.accuracy_excess"):
        assert metrics[name]["exact"] and metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"]
    # the base is the merged model here: what is since the base is what quantization did
    assert metrics["control.accuracy_drop_since_base"]["value"] == metrics["control.accuracy_drop"]["value"]
    assert metrics["typos.cosine_mean"]["value"] > 0.9 and {row["metric"] for row in found["task"]} == {"accuracy", "f1"}
    from compiler.evaluation.tables import robustness, side_effects

    assert {(row["noise"], row["metric"]) for row in robustness(metrics)} == {("typos", "accuracy"), ("long", "accuracy")}
    (effect,) = side_effects(metrics)
    assert effect["base"] == effect["merged"] and effect["low"] <= effect["change"] <= effect["high"]


def test_pairs_give_a_rank_correlation_and_bundles_are_compared(bert: Callable[[str], Path], tmp_path: Path) -> None:
    folder = bert("feature-extraction")
    rows = [{"sentence1": one, "sentence2": other, "score": float(one[4] == other[4])} for one in TEXTS for other in TEXTS[:3] if one != other]
    data = write(tmp_path / "pairs.jsonl", rows)
    checkpoint, bundles = open_checkpoint(str(folder)), []
    for scheme in ("fp32", "int8"):
        files = exported(folder, "feature-extraction", scheme, tmp_path / f"{scheme}.onnx")
        metrics = evaluate(checkpoint, checkpoint, files, Suite(data, data, ("casing",)), quiet)["metrics"]
        assert metrics["spearman"]["samples"] == len(rows) and abs(metrics["spearman"]["value"]) <= 1
        assert metrics["spearman_drop"]["value"] == pytest.approx(metrics["spearman_reference"]["value"] - metrics["spearman"]["value"])
        if scheme == "fp32":
            assert metrics["spearman_drop"]["value"] == pytest.approx(0, abs=1e-6)
        assert metrics["control.spearman_drop_since_base"]["value"] == pytest.approx(metrics["spearman_drop"]["value"], abs=1e-6)
        assert metrics["casing.spearman_excess"]["low"] <= metrics["casing.spearman_excess"]["high"]
        bundle = tmp_path / scheme
        bundle.mkdir()
        package.assemble(files.directory, bundle)
        lineage = {"base": {"origin": "tiny", "digest": checkpoint.digest}, "deltas": []}
        facts = {"name": scheme, "target": {"id": "here", "fingerprint": ""}, "lineage": lineage, "limits": {}, "records": []}
        package.write_manifest(bundle, {**facts, "model": files.summary["model"]})
        bundles.append(bundle)
    found = compare(bundles, Ask(tmp_path / "pairs.jsonl", rounds=0), Progress(quiet=True)).as_dict()
    named = {row["metric"]: row for row in found["rows"]}
    assert {"spearman", "cosine_mean", "cosine_min", "size_mb"} == set(named)
    assert named["spearman"]["against_first"][0]["difference"] == pytest.approx(named["spearman"]["values"][1] - named["spearman"]["values"][0])
