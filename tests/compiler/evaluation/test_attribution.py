"""Loss by stage: known models give known rows, and the stage that costs more is named."""

from __future__ import annotations

import numpy as np
import pytest

from compiler.evaluation import attribution
from compiler.evaluation.attribution import TokenStages, blamed, ordered, picked, text_stages
from compiler.evaluation.decoder import Scored, score
from compiler.limits import quantity
from compiler.report.verdict import FAIL
from compiler.stages.validate import Measured, checks

VOCAB = 11


def model(shift: float):
    """Logits that depend on the token alone, moved by `shift` times a fixed direction."""
    rng = np.random.default_rng(0)
    table, direction = rng.standard_normal((VOCAB, VOCAB)), rng.standard_normal(VOCAB)
    return lambda sequences: [table[ids] + shift * direction for ids in sequences]


def sequences(count: int, length: int = 20) -> list[Scored]:
    rng = np.random.default_rng(1)
    return [Scored(rng.integers(0, VOCAB, length), 8) for _ in range(count)]


def quiet(*_: object) -> None:
    return None


def test_rows_of_each_stage() -> None:
    given = sequences(6)
    stages = TokenStages(given, model(0.0))
    stages.scored(score(given, stages.reference, model(0.5), quiet))
    stages.after("quantize", model(0.3))
    stages.after("base", model(2.0))
    rows = {(row["stage"], row["metric"]): row for row in ordered(stages.rows)}
    kl = [rows[stage, "kl_mean"]["value"] for stage in ("merge", "quantize", "export", "base")]
    assert kl[0] == 0.0 and 0 < kl[1] < kl[2] < kl[3]
    assert rows["export", "kl_mean"]["samples"] == 6 * 12 and rows["export", "kl_mean"]["sequences"] == 6
    again = TokenStages(given, model(0.0))
    again.scored(score(given, again.reference, model(0.3), quiet))
    same = {(row["stage"], row["metric"]): row["value"] for row in again.rows}
    for metric in ("kl_mean", "nll_mean"):  # two ways to the same number
        assert rows["quantize", metric]["value"] == pytest.approx(same["export", metric], abs=1e-6)
    assert [row["stage"] for row in ordered(stages.rows)] == ["base", "merge", "quantize", "export"] * 2


def test_large_data_is_thinned_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "MOST_TOKENS", 50)
    given = sequences(9)
    stages = TokenStages(given, model(0.0))
    stages.scored(score(given, stages.reference, model(0.5), quiet))
    assert {row["sequences"] for row in stages.rows} == {2} and {row["samples"] for row in stages.rows} == {24}
    assert picked([600] * 4, 1024) == [0] and picked([1] * 5, 64) == [0, 1, 2, 3, 4] and picked([9000, 20], 10) == [1]


@pytest.mark.parametrize(("quantized", "exported", "stage"), [(0.08, 0.1, "quantize"), (0.01, 0.1, "export"), (None, 0.1, "quantize + export")])
def test_the_costlier_stage_is_blamed(quantized: float | None, exported: float, stage: str) -> None:
    values = {"merge": 0.0, "quantize": quantized, "export": exported}
    rows = [{"stage": name, "metric": "kl_mean", "value": value} for name, value in values.items() if value is not None]
    assert blamed(rows) == stage


def test_texts_by_cosine() -> None:
    reference = np.eye(4)
    rows = {row["stage"]: row["value"] for row in text_stages(reference, {"quantize": reference + 0.1, "export": reference + 0.5})}
    assert rows["merge"] == pytest.approx(0) and 0 < rows["quantize"] < rows["export"]


def test_a_failed_limit_names_its_stage() -> None:
    rows = {name: {"value": value, "low": value, "high": value, "samples": 9} for name, value in (("kl_mean", 0.5), ("perplexity", 20.0), ("accuracy", 0.6))}
    known = {"size_mb": 1.0, "accuracy": rows, "series": {}, "scalars": {}, "medians": {}}
    measured = Measured(**known, blamed="export", merged={"perplexity": 19.0, "accuracy": 0.9})  # type: ignore[arg-type]
    found = {check.name: check for check in checks({"kl_mean": 0.1, "perplexity": 10.0, "accuracy": 0.8}, measured)}
    assert {check.outcome for check in found.values() if check.limit is not None} == {FAIL}
    assert [found[name].stage for name in ("kl_mean", "perplexity", "accuracy")] == ["export", "merge", "export"]
    assert quantity("perplexity", "test").at_most
