"""Percentile tests against the published table, scipy, and a simulation of the promise they make; distances against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes import metrics
from runtimes.metrics import FAIL, INCONCLUSIVE, PASS, binomial_cdf, look_confidence, min_samples, percentile_test
from targets.errors import TrimtabError

# (percentile, confidence) -> fewest samples that pass with 0, 1, 2, 5, 10 misses (MLPerf LoadGen's rule, notes on latency validation)
TABLE = {
    (50, 0.99): (7, 11, 14, 22, 35),
    (90, 0.95): (29, 46, 61, 103, 167),
    (90, 0.99): (44, 64, 81, 127, 197),
    (95, 0.99): (90, 130, 165, 259, 398),
    (97, 0.99): (152, 219, 277, 433, 667),
    (99, 0.95): (299, 473, 628, 1049, 1693),
    (99, 0.99): (459, 662, 838, 1307, 2010),
    (99.9, 0.99): (4603, 6636, 8403, 13105, 20140),
}


@pytest.mark.parametrize(("percentile", "confidence"), TABLE)
def test_the_published_table(percentile: float, confidence: float) -> None:
    row = TABLE[percentile, confidence]
    assert tuple(min_samples(percentile, misses, confidence) for misses in (0, 1, 2, 5, 10)) == row
    for misses, count in zip((0, 1, 2), row, strict=False):
        over = [2.0] * misses
        assert percentile_test([1.0] * (count - misses) + over, 1.5, percentile, confidence).outcome == PASS
        assert percentile_test([1.0] * (count - misses - 1) + over, 1.5, percentile, confidence).outcome == INCONCLUSIVE


@pytest.mark.parametrize("count", [1, 2, 7, 50, 64, 300])
@pytest.mark.parametrize("percentile", [50, 90, 99])
def test_every_number_of_misses_against_scipy(count: int, percentile: float) -> None:
    from scipy.stats import binom

    share = 1 - percentile / 100
    for misses in range(count + 1):
        limit = count - 1 - misses
        test = percentile_test(np.arange(count), limit, percentile)
        few, many = binom.cdf(misses, count, share), binom.sf(misses - 1, count, share)
        assert test.misses == misses
        assert test.outcome == (PASS if few <= 0.01 + 1e-12 else FAIL if many <= 0.01 + 1e-12 else INCONCLUSIVE)
        assert test.false_pass == pytest.approx(few, abs=1e-10)
        # the bounds say the same as the outcome
        assert (test.outcome == PASS) == (test.upper is not None and test.upper <= limit)
        assert (test.outcome == FAIL) == (test.lower is not None and test.lower > limit)


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 3000), share=st.floats(0.001, 0.999), at=st.floats(0, 1))
def test_binomial_cdf_is_scipys(count: int, share: float, at: float) -> None:
    from scipy.stats import binom

    misses = int(at * count)
    assert binomial_cdf(misses, count, share) == pytest.approx(binom.cdf(misses, count, share), rel=1e-8, abs=1e-12)


def test_the_promise_of_false_passes_holds() -> None:
    """5000 machines whose p90 lies exactly at the limit: at most 1 % may pass, and at most 1 % fail. Four standard errors of room."""
    rng = np.random.default_rng(0)
    trials = 5000
    over = rng.binomial(81, 0.1, trials)
    outcomes = {misses: percentile_test([0.0] * (81 - misses) + [1.0] * misses, 0.5, 90).outcome for misses in set(over.tolist())}
    for outcome in (PASS, FAIL):
        rate = np.mean([outcomes[misses] == outcome for misses in over.tolist()])
        assert rate <= 0.01 + 4 * math.sqrt(0.01 * 0.99 / trials)
    # and the test is not merely shy: a machine with a true share of 1 % over the limit mostly passes
    easy = rng.binomial(81, 0.01, 1000)
    assert np.mean([percentile_test([0.0] * (81 - m) + [1.0] * m, 0.5, 90).outcome == PASS for m in easy.tolist()]) > 0.9


def test_all_looks_together_spend_no_more_than_one() -> None:
    assert sum(1 - look_confidence(look) for look in range(1, 40)) <= 0.01 + 1e-12
    assert look_confidence(1) == pytest.approx(0.995)


def test_bounds_without_a_limit_and_without_samples() -> None:
    test = percentile_test(range(100), None, 90)
    assert (test.outcome, test.estimate) == (INCONCLUSIVE, 89)
    assert test.lower is not None and test.upper is not None and test.lower < 89 < test.upper
    empty = percentile_test([], 1.0, 90)
    assert (empty.outcome, empty.estimate, empty.false_pass) == (INCONCLUSIVE, None, 1.0)


@pytest.mark.parametrize(
    ("samples", "limit", "percentile", "confidence", "place"),
    [
        ([1.0], float("nan"), 90, 0.99, "limit"),
        ([float("nan")] * 100, 1.0, 90, 0.99, "samples"),
        ([1.0], 1.0, 100, 0.99, "percentile"),
        ([1.0], 1.0, float("nan"), 0.99, "percentile"),
        ([1.0], 1.0, 90, 1.0, "confidence"),
    ],
)
def test_numbers_that_make_no_question(samples: list[float], limit: float, percentile: float, confidence: float, place: str) -> None:
    with pytest.raises(TrimtabError, match=f"^{place}: expected"):
        percentile_test(samples, limit, percentile, confidence)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 150), vocab=st.integers(2, 60), scale=st.sampled_from([0.1, 5.0, 300.0]))
def test_kl_is_never_negative_and_equals_scipys(seed: int, rows: int, vocab: int, scale: float) -> None:
    from scipy.special import log_softmax, rel_entr

    rng = np.random.default_rng(seed)
    first, second = (rng.standard_normal((rows, vocab)) * scale for _ in range(2))
    got = metrics.kl_nats(first, second)
    assert got.shape == (rows,) and (got >= 0).all()
    if scale < 100:
        p, q = np.exp(log_softmax(first, -1)), np.exp(log_softmax(second, -1))
        np.testing.assert_allclose(got, rel_entr(p, q).sum(-1), rtol=1e-7, atol=1e-9)
    np.testing.assert_array_equal(metrics.kl_nats(first, first + 3.0) < 1e-9, True)  # a shift of all logits changes nothing


def test_kl_worked_by_hand() -> None:
    first, second = np.log([[[0.5, 0.5], [0.9, 0.1]]]), np.log([[[0.25, 0.75], [0.9, 0.1]]])
    np.testing.assert_allclose(metrics.kl_nats(first, second), [[0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0]], atol=1e-12)
    np.testing.assert_array_equal(metrics.top1_same(first, second), [[False, True]])


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    nll = metrics.nll_nats(np.zeros((3, 70, 50), np.float32), np.ones((3, 70), np.int64))
    assert nll.shape == (3, 70)
    assert metrics.perplexity(nll) == pytest.approx(50)
    with pytest.raises(ValueError, match="cannot be compared"):
        metrics.kl_nats(np.zeros((2, 3)), np.zeros((2, 4)))


def test_cosine_and_accuracy() -> None:
    vectors = np.array([[1.0, 0], [0, 0], [0, 0], [3, 4]])
    others = np.array([[0, 2.0], [0, 0], [1, 0], [6, 8]])
    np.testing.assert_allclose(metrics.cosine(vectors, others), [0, 1, 0, 1])
    assert metrics.accuracy(["a", "b", "c"], ["a", "x", "c"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="predictions"):
        metrics.accuracy([], [])


def test_dependent_samples_are_worth_fewer() -> None:
    rng = np.random.default_rng(2)
    noise, chain = rng.standard_normal(1000), [0.0]
    for value in noise:
        chain.append(0.9 * chain[-1] + value)
    effects = [metrics.design_effect(np.exp(row)) for row in (noise, np.array(chain[1:]))]
    assert effects[0] < 1.5 and 10 < effects[1] < 35  # (1 + 0.9) / (1 - 0.9) = 19
    assert metrics.design_effect([1.0] * 50) == metrics.design_effect([1.0, 2.0]) == 1.0
    assert metrics.design_effect(np.arange(100)) > 20  # a trend


def test_only_what_is_near_the_percentile_counts_for_its_dependence() -> None:
    rng = np.random.default_rng(3)
    slow = rng.random(2000) < 0.1
    wandering = 1.0 + 0.1 * np.sin(np.arange(2000) / 60)  # how quick the quick ones are
    values = np.where(slow, 2.0 + rng.random(2000), wandering)
    assert metrics.design_effect(values) > 20 and metrics.design_effect(values, 50) > 20
    assert metrics.design_effect(values, 98) < 1.5
    episodes = np.where(np.repeat(rng.random(100) < 0.1, 20), 2.0, 1.0) + 1e-3 * rng.random(2000)
    assert metrics.design_effect(episodes, 95) > 10  # slow ones that come twenty at a time


def test_an_effect_takes_samples_away() -> None:
    values = [1.0] * 200
    assert percentile_test(values, 1.5, 95).outcome == PASS
    assert percentile_test(values, 1.5, 95, effect=3.0).outcome == INCONCLUSIVE
    assert percentile_test(values, 1.5, 95, effect=3.0).false_pass == pytest.approx(0.95 ** (200 // 3))
    mixed = [1.0] * 150 + [2.0] * 50
    assert percentile_test(mixed, 1.5, 90).outcome == FAIL and percentile_test(mixed, 1.5, 90, effect=20.0).outcome == INCONCLUSIVE
    assert percentile_test([1.0] * 3, 1.5, 50, effect=9.0).outcome == INCONCLUSIVE  # worth no sample at all
