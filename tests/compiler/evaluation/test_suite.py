"""Whole evaluations of tiny models: choices, completions, noise, a control set, metrics of the user's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler.checkpoints.resolve import open_checkpoint
from compiler.errors import RecipeError, TrimtabError
from compiler.evaluation import decoder, sheet
from compiler.evaluation.custom import load_custom
from compiler.evaluation.data import EvaluationSet, Row, load_rows
from compiler.evaluation.noise import NOISES
from compiler.evaluation.run import Exported, evaluate
from compiler.evaluation.run_encoder import texts_for
from compiler.evaluation.subject import ChatFormat
from compiler.evaluation.suite import Suite
from compiler.recipe import parse_recipe
from compiler.scheme import Schemes, parse_scheme

CHATS = [{"messages": [{"role": "user", "content": f"Say {n} to the operator."}, {"role": "assistant", "content": f"{n} it is."}]} for n in range(6)]
CHOICES = [{"context": f"Machine {n} is", "choices": ["running", "a pump that leaks", "blue"], "answer": n % 3} for n in range(6)]
METRICS = """
def length(row, output):
    return len(output)

def best(row, output):
    return float(output[row["answer"]] == max(output))

def broken(row, output):
    return 1 / 0

def nothing(row, output):
    return None

class Thing:
    value = 3
thing = 3
"""


def write(path: Path, rows: list[dict[str, Any]]) -> EvaluationSet:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return load_rows(path)


@pytest.fixture(scope="module")
def exported(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The tiny model in int4, with what the export stage writes."""
    from compiler.stages import export

    folder = tmp_path_factory.mktemp("exported")
    checkpoint = open_checkpoint(str(tiny_llama))
    export.export(checkpoint, export.resolve_options(checkpoint, Schemes(parse_scheme("int4-g32")), None, None), folder, lambda *_: None)
    return Exported(folder)


def quiet(*_: object) -> None:
    return None


def test_a_decoder_with_everything_asked(tiny_llama: Path, tiny_lora: Path, exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "my_metrics.py").write_text(METRICS)
    checkpoint = open_checkpoint(str(tiny_llama))
    custom = load_custom({"length": "my_metrics:length"}, tmp_path)
    control = EvaluationSet((*load_rows(None).rows[:0], *write(tmp_path / "control.jsonl", CHOICES).rows), "c", "control")
    suite = Suite(write(tmp_path / "chats.jsonl", CHATS), control, ("typos", "long"), custom)
    found = evaluate(checkpoint, checkpoint, exported, suite, quiet)
    metrics = found["metrics"]
    for prefix in ("", "typos.", "long."):
        for name in (
            "kl_mean",
            "kl_p99",
            "top1_agreement",
            "top5_agreement",
            "perplexity_ratio",
            "exact_match_drop",
            "flips",
            "first_divergence",
            "custom.length",
        ):
            assert math.isfinite(metrics[prefix + name]["value"]), prefix + name
    assert metrics["top5_agreement"]["value"] >= metrics["top1_agreement"]["value"]
    assert metrics["typos.exact_match_excess"]["exact"] and math.isfinite(metrics["long.nll_excess"]["value"])
    # the base is the merged model here: what is since the base is what quantization did
    assert metrics["control.kl_mean_since_base"]["value"] == pytest.approx(metrics["control.kl_mean"]["value"], rel=1e-4)
    assert metrics["control.choice_accuracy_drop_since_base"]["value"] == metrics["control.choice_accuracy_drop"]["value"]
    assert metrics["control.choice_accuracy_base"]["value"] == metrics["control.choice_accuracy_reference"]["value"]
    assert found["data"]["noise"] == ["typos", "long"] and found["data"]["control"]["rows"] == 6
    again = evaluate(checkpoint, checkpoint, exported, Suite(suite.data, None, ("typos",)), quiet)["metrics"]
    assert again["typos.kl_mean"] == metrics["typos.kl_mean"]  # the same noise again


def test_log_likelihoods_of_choices_are_torchs(tiny_llama: Path) -> None:
    from compiler.reference import reference_model

    checkpoint = open_checkpoint(str(tiny_llama))
    chat, model = ChatFormat(checkpoint), decoder.merged_logits(reference_model(checkpoint, "text-generation"))
    rows = [Row(context="Machine 3 is", choices=("running", "a pump"), gold=1), Row(context="It will", continuation="leak")]
    made = sheet.prepare(rows, chat)
    assert made.counted == 2 and [item.places for item in made.items] == [(2, 0), (1,)]
    text = chat.tokenizer.decode(made.sequences[2].ids.tolist())
    assert text == "Machine 3 is running"
    scores = decoder.score(made.sequences, model, model, quiet)
    likely = sheet.likelihoods(scores, scores.reference_nll, len(made.sequences))
    for place, ending in ((2, " running"), (0, " a pump")):
        ids = chat.tokenizer.encode("Machine 3 is" + ending).ids
        (logits,) = model([np.array(ids)])
        shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        first = made.sequences[place].first
        assert likely[place] == pytest.approx(sum(shares[at - 1, ids[at]] for at in range(first, len(ids))), rel=1e-4)
    hits = sheet.hits_of(made, scores)
    assert hits.reference == hits.bundle and hits.reference["choice_accuracy"] == [bool(likely[0] > likely[2])]
    assert hits.reference["choice_accuracy_norm"] == [bool(likely[0] / 6 > likely[2] / 7)]


def test_the_forms_of_rows(tmp_path: Path) -> None:
    arc = {"id": "x", "question": {"stem": "Why?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]}, "answerKey": "B"}
    lists = {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    numbered = {"question": "Why?", "choice0": "a", "choice1": "b", "label": 1}
    gauntlet = {"query": "Question: Why?", "choices": ["a", "b"], "gold": 1}
    rows = write(tmp_path / "a.jsonl", [arc, lists, numbered, gauntlet]).rows
    assert {(row.context, row.choices, row.gold) for row in rows} == {("Question: Why?\nAnswer:", ("a", "b"), 1)}
    assert rows[0].raw == arc
    pair, lambada = write(tmp_path / "b.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 2.5}, {"context": "c", "continuation": "d"}]).rows
    assert (pair.pair, pair.score, lambada.continuation) == (("a", "b"), 2.5, "d")
    bad = [{**lists, "answerKey": "C"}, {"context": "x", "choices": ["a"], "answer": 0}, {"context": "x", "choices": ["a", "b"], "answer": 2}]
    bad += [{"context": "x", "choices": ["a", 3], "answer": 0}, {"context": "c", "continuation": " "}, {"sentence1": "a", "sentence2": "b", "score": "high"}]
    for row in bad:
        with pytest.raises(RecipeError, match=r"c.jsonl:1: expected"):
            write(tmp_path / "c.jsonl", [row])


@pytest.mark.parametrize("name", NOISES)
def test_noise_leaves_the_scored_tokens_of_plain_text(name: str, tiny_llama: Path) -> None:
    chat = ChatFormat(open_checkpoint(str(tiny_llama)))
    rows = load_rows(None).rows
    clean, noisy = sheet.prepare(rows, chat), sheet.prepare(rows, chat, NOISES[name], seed=1, context=900)
    assert len(clean.sequences) == len(noisy.sequences)
    for one, other in zip(clean.sequences, noisy.sequences, strict=True):
        assert one.ids[one.first :].tolist() == other.ids[other.first :].tolist() and len(other.ids) <= 900
    assert any(one.ids[: one.first].tolist() != other.ids[: other.first].tolist() for one, other in zip(clean.sequences, noisy.sequences, strict=True))


def test_what_a_decoder_or_an_encoder_cannot_be_asked(tiny_llama: Path) -> None:
    with pytest.raises(RecipeError, match="expected rows for a decoder, found pairs"):
        sheet.prepare([Row(pair=("a", "b"), score=1.0)], ChatFormat(open_checkpoint(str(tiny_llama))))
    with pytest.raises(RecipeError, match="pairs of sentences in every row or in none"):
        texts_for([Row(pair=("a", "b"), score=1.0), Row(text="a")], None, 0)


# --- metrics of the user's own ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import sys

    monkeypatch.delitem(sys.modules, "my_metrics", raising=False)
    (tmp_path / "my_metrics.py").write_text(METRICS)
    (tmp_path / "half_written.py").write_text("def f(:\n")
    return tmp_path


def test_a_function_beside_the_recipe(metrics: Path) -> None:
    (one,) = load_custom({"length": "my_metrics:length"}, metrics)
    assert one.values([{}, {}], ["ab", "c"]) == [2.0, 1.0]
    (metrics / "my_metrics.py").write_text(METRICS + "\n# changed\n")
    assert load_custom({"length": "my_metrics:length"}, metrics)[0].identity != one.identity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("my_metrics:broken", r"evaluate.custom.m: row 1: expected a finite number .* ZeroDivisionError: division by zero; correct .* my_metrics.py:9"),
        ("my_metrics:nothing", r"row 1: expected a finite number .* found a NoneType; correct my_metrics.py:11"),
        ("my_metrics:none_such", r"evaluate.custom.m: expected a function 'my_metrics:none_such'"),
        ("my_metrics:thing", r"expected a function, found a int"),
        ("no_such_module:f", r"expected a module that can be imported"),
        ("half_written:f", r"found SyntaxError"),
        ("politness", r"expected an entry point of the group trimtab.metrics, found 'politness'"),
    ],
)
def test_a_users_mistake_is_one_line_with_place_and_remedy(metrics: Path, text: str, message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        load_custom({"m": text}, metrics)[0].values([{}], ["x"])


def test_an_entry_point(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = metrics / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trimtab.metrics]\nlength = my_metrics:length\n")
    monkeypatch.syspath_prepend(str(metrics))
    (one,) = load_custom({"politeness": "length"}, metrics)
    assert one.values([{}], ["abc"]) == [3.0]
    with pytest.raises(RecipeError, match="did you mean 'length'"):
        load_custom({"politeness": "lenght"}, metrics)


# --- limits on all of it ---------------------------------------------------------------------------------------------------------------------------------


def recipe(limits: dict[str, float], **asked: Any) -> Any:
    return parse_recipe({"name": "x", "base": "b", "evaluate": asked, "targets": [{"profile": "here", "limits": limits}]}, Path("recipe.yaml"))


def test_a_limit_needs_what_measures_it() -> None:
    assert recipe({"typos.accuracy_excess": 0.1, "noise.kl_mean": 0.2}, noise="all").evaluate.noises == tuple(NOISES)
    assert recipe({"control.choice_accuracy_drop_since_base": 0.1}, control="builtin").evaluate.control == "builtin"
    assert recipe({"custom.polite": 0.1, "custom.polite_drop": 0.1}, custom={"polite": "m:f"})
    for limits, key in (
        ({"typos.kl_mean": 1}, "noise"),
        ({"control.kl_mean": 1}, "control"),
        ({"custom.polite": 1}, "custom"),
        ({"noise.kl_mean": 1}, "noise"),
    ):
        with pytest.raises(RecipeError, match=rf"expected what it needs under evaluate.{key}"):
            recipe(limits)
    with pytest.raises(RecipeError, match=r"evaluate.noise: expected all, or some of .* found 'typo'; did you mean 'typos'"):
        recipe({}, noise=["typo"])


def test_a_limit_on_noise_must_hold_for_every_kind() -> None:
    from compiler.report.verdict import FAIL, PASS
    from compiler.stages.validate import Measured, checks

    def row(value: float, **more: Any) -> dict[str, Any]:
        return {"value": value, "low": value - 0.01, "high": value + 0.01, "samples": 100, **more}

    accuracy = {"typos.kl_mean": row(0.05), "long.kl_mean": row(0.5), "control.kl_mean_since_base": row(0.9, stage="merge"), "kl_mean": row(0.04)}
    known = Measured(1.0, accuracy, {}, {}, {})
    made = {check.name: check for check in checks({"noise.kl_mean": 0.1, "control.kl_mean_since_base": 0.5, "kl_mean": 0.1}, known) if check.limit is not None}
    outcomes = {name: check.outcome for name, check in made.items()}
    assert outcomes == {"typos.kl_mean": PASS, "long.kl_mean": FAIL, "control.kl_mean_since_base": FAIL, "kl_mean": PASS}
    assert made["control.kl_mean_since_base"].stage == "merge" and {check.unit for check in made.values()} == {"nats"}


def test_spearman_of_an_encoder_and_labels_under_noise() -> None:
    texts = texts_for([Row(pair=("a b", "a c"), score=1.0), Row(pair=("d", "e"), score=2.0)], None, 0)
    assert texts.texts == ("a b", "a c", "d", "e") and texts.scores == (1.0, 2.0)
    noisy = texts_for([Row(text="the hydraulic press leaks", label="x")] * 20, NOISES["typos"], 0)
    assert noisy.labels == ("x",) * 20 and len(set(noisy.texts)) > 1
