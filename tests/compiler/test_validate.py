"""Each rule of compiler/stages/validate.py, at its edges."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from compiler.report.verdict import FAIL, INCONCLUSIVE, PASS, Verdict
from compiler.stages.validate import Measured, checks
from runtimes.metrics import percentile_test

RNG = np.random.default_rng(0)


def decoded(limit, outcome=PASS):
    """What the sampler says of a throughput."""
    test = percentile_test([1e3 / 160.0] * 30, 1e3 / limit, 50.0)
    return asdict(replace(test, outcome=outcome, limit=limit, estimate=160.0, lower=159.0, upper=161.0))


def measured(**changes):
    facts = {
        "size_mb": 90.0,
        "accuracy": {"kl_mean": {"value": 0.05, "low": 0.04, "high": 0.06, "samples": 3000}},
        "series": {"tpot": RNG.uniform(5, 6, 200).tolist()},
        "scalars": {"peak_rss_mb": [200.0, 210.0]},
        "medians": {"decode_tok_s": RNG.uniform(150, 170, 30).tolist()},
        "tests": {"decode_tok_s": decoded(149.0)},
    }
    return Measured(**{**facts, **changes})


@pytest.mark.parametrize(
    ("name", "limit", "outcome"),
    [
        ("size_mb", 90.0, PASS),
        ("size_mb", 89.9, FAIL),
        ("kl_mean", 0.06, PASS),
        ("kl_mean", 0.05, INCONCLUSIVE),
        ("kl_mean", 0.03, FAIL),
        ("tpot_p95_ms", 6.1, PASS),
        ("tpot_p95_ms", 5.2, FAIL),
        ("tpot_p99_ms", 6.1, INCONCLUSIVE),  # 200 samples cannot prove a 99th percentile at 99 %
        ("peak_rss_mb", 210.0, PASS),
        ("peak_rss_mb", 209.0, FAIL),
        ("decode_tok_s", 149.0, PASS),
        ("decode_tok_s", -1.0, PASS),
        ("top1_agreement", 0.8, INCONCLUSIVE),  # asked for, not measured
        ("encode_p95_ms", 5.0, INCONCLUSIVE),
    ],
)
def test_outcomes(name, limit, outcome):
    (check,) = [row for row in checks({name: limit}, measured()) if row.name == name]
    assert check.outcome == outcome


def test_only_exact_intervals_state_a_false_pass_probability():
    metric = {"value": 0.0, "low": -0.02, "high": 0.02, "samples": 176}
    bootstrapped, exact = (checks({"accuracy_drop": 0.03}, measured(accuracy={"accuracy_drop": row}))[0] for row in (metric, {**metric, "exact": True}))
    assert bootstrapped.outcome == exact.outcome == PASS
    assert bootstrapped.false_pass is None and "approximate" in bootstrapped.note
    assert exact.false_pass == pytest.approx(0.025)


def test_not_a_number_never_passes():
    broken = measured(accuracy={"kl_mean": {"value": math.nan, "low": math.nan, "high": math.nan, "samples": 10}})
    assert checks({"kl_mean": 0.1}, broken)[0].outcome == FAIL


def test_another_machine_never_passes_a_latency_limit_but_keeps_sizes():
    rows = {row.name: row for row in checks({"tpot_p95_ms": 100.0, "peak_rss_mb": 1e6, "size_mb": 100.0}, measured(here=False))}
    assert (rows["tpot_p95_ms"].outcome, rows["peak_rss_mb"].outcome, rows["size_mb"].outcome) == (INCONCLUSIVE, INCONCLUSIVE, PASS)


def test_a_test_decided_while_sampling_is_taken_as_it_is():
    limit = {"tpot_p95_ms": 6.1}
    series = {"tpot": [5.0] * 140}
    assert checks(limit, measured(series=series))[0].outcome == PASS
    decided = {"estimate": 5.0, "outcome": INCONCLUSIVE, "samples": 140, "lower": None, "upper": None, "confidence": 0.998, "false_pass": 0.0077}
    assert checks(limit, measured(series=series, tests={"tpot_p95_ms": decided}))[0].outcome == INCONCLUSIVE


def test_verdict_is_its_worst_check():
    made = checks({"size_mb": 100.0, "tpot_p99_ms": 6.1}, measured())
    assert Verdict("here", made).outcome == INCONCLUSIVE
    assert Verdict("here", [*made, *checks({"size_mb": 1.0}, measured())]).exit_code == 3
    assert Verdict("here", checks({}, measured())).exit_code == 0


def test_what_has_no_limit_is_shown_as_information():
    names = {row.name for row in checks({}, measured())}
    assert {"size_mb", "kl_mean", "tpot_p50_ms", "tpot_p99_ms", "peak_rss_mb", "decode_tok_s"} <= names


def test_an_accuracy_limit_must_hold_for_every_adapter():
    good, bad = {"value": 0.05, "low": 0.04, "high": 0.06, "samples": 3000}, {"value": 0.5, "low": 0.4, "high": 0.6, "samples": 3000}
    two = measured(accuracy={"kl_mean@support": good, "kl_mean@sales": bad, "top1_agreement@support": good})
    made = checks({"kl_mean": 0.1, "size_mb": 95}, two)
    assert {row.name: row.outcome for row in made if row.limit is not None} == {"kl_mean@support": PASS, "kl_mean@sales": FAIL, "size_mb": PASS}
    assert Verdict("here", made).outcome == FAIL
    assert [row.name for row in made].count("kl_mean@support") == 1 and "top1_agreement@support" in {row.name for row in made if row.limit is None}
    assert next(row for row in made if row.name == "kl_mean@sales").unit == "nats"


@pytest.mark.parametrize("outcome", [PASS, FAIL, INCONCLUSIVE])
def test_a_throughput_is_judged_by_the_sampler(outcome):
    busy = measured(crowded="other processes took the time of 1.0 processors", tests={"decode_tok_s": decoded(171.0, outcome)})
    (check, *_) = checks({"decode_tok_s": 171.0}, busy)
    assert (check.outcome, check.measured, check.low, check.high) == (outcome, 160.0, 159.0, 161.0) and "other processes" in check.note


def test_company_fails_no_load_time():
    slow = {"scalars": {"load_s": [2.0, 1.0]}, "crowded": "other processes took the time of 1.0 processors"}
    assert [checks({"load_s": limit}, measured(**slow))[0].outcome for limit in (2.0, 1.0, 0.2)] == [PASS, INCONCLUSIVE, FAIL]


def test_without_an_undisturbed_sample_the_note_still_says_what_was_run():
    busy = measured(series={"server.latency": []}, conditions={"server": "scene server, rate_per_s 40"}, dropped={"server": 7})
    (check,) = [row for row in checks({"server.latency_p50_ms": 100.0}, busy) if row.name == "server.latency_p50_ms"]
    assert check.outcome == INCONCLUSIVE and check.note == "scene server, rate_per_s 40; no undisturbed sample; 7 disturbed samples left out"
