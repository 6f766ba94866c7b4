"""Intervals by hand and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from compiler.evaluation import statistics


def test_rank_correlation_is_scipys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 40).astype(float), rng.standard_normal(40)
        assert statistics.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert np.isnan(statistics.spearman(np.ones(5), np.arange(5.0))) and np.isnan(statistics.spearman(np.arange(5.0), np.full(5, np.nan)))
    assert statistics.spearman_metric(np.arange(5.0), np.arange(5.0))["high"] == float("inf")  # five pairs prove nothing


def test_rank_correlations_interval_covers() -> None:
    rng, missed, trials = np.random.default_rng(1), 0, 400
    truth = 6 / np.pi * np.arcsin(0.8 / 2)  # of a bivariate normal with correlation 0.8
    for _ in range(trials):
        pairs = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], 60)
        found = statistics.spearman_metric(pairs[:, 0], pairs[:, 1])
        missed += not found["low"] <= truth <= found["high"]
    assert missed / trials <= 0.08


def test_f1_by_hand() -> None:
    # labels 0: TP 2, FP 1, FN 0 -> 4/5; label 1: TP 1, FP 0, FN 1 -> 2/3
    truth, found = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0])
    assert statistics.macro_f1(truth, found, [0, 1]) == pytest.approx((4 / 5 + 2 / 3) / 2)
    perfect = statistics.f1_metric(np.tile([0, 1], 20), np.tile([0, 1], 20))
    assert perfect["value"] == 1 and perfect["low"] < 0.95  # forty right answers do not prove that the next is


def test_percentile_of_clustered_values() -> None:
    rng, missed, trials = np.random.default_rng(2), np.zeros(2), 300
    truth = -np.log(0.1)  # 90th percentile of an exponential
    for _ in range(trials):
        values, groups = rng.exponential(1.0, 600), np.repeat(np.arange(30), 20)
        low, high = statistics.percentile_interval(values, groups, 0.9)
        missed += (low > truth, high < truth)
    assert (missed / trials <= 0.05).all()
    assert statistics.percentile_interval(np.arange(40.0), np.repeat(np.arange(20), 2), 0.99)[1] == float("inf")  # 40 values hold no p99
    assert statistics.percentile_interval(np.arange(40.0), np.repeat(np.arange(4), 10), 0.5) == (float("-inf"), float("inf"))
    assert np.isnan(statistics.percentile_interval(np.full(40, np.nan), np.arange(40), 0.5)).all()


def test_percentile_of_strongly_clustered_values_as_the_docs_say() -> None:
    """docs/evaluation.md: a PASS of kl_p99 is as safe as stated, a FAIL near its limit is not. Each of 24 sequences has a mean of its own."""
    rng, missed, trials = np.random.default_rng(4), np.zeros(2), 300
    truth = np.quantile(rng.exponential(rng.gamma(1.0, 0.05, 1_000_000)), 0.99)
    groups = np.repeat(np.arange(24), 20)
    for _ in range(trials):
        low, high = statistics.percentile_interval(rng.exponential(rng.gamma(1.0, 0.05, 24)[groups]), groups, 0.99)
        missed += (low > truth, high < truth)
    assert missed[1] / trials <= 0.05 and missed[0] / trials <= 0.15


def test_flips_count_both_ways() -> None:
    assert statistics.flips([True, True, False, False], [True, False, True, False])["value"] == 0.5


def test_excess_is_the_noisy_drop_less_the_clean_one() -> None:
    reference, bundle = [True] * 100, [True] * 90 + [False] * 10
    found = statistics.excess((reference, reference), (reference, bundle))
    assert found["value"] == pytest.approx(0.1) and found["low"] < 0.1 < found["high"] and found["exact"]
    assert statistics.excess((reference, bundle), (reference, bundle))["value"] == 0  # it was as much worse without noise
    few, many = [statistics.excess(([True] * n,) * 2, ([True] * n,) * 2)["high"] for n in (20, 2000)]
    assert few > 0.3 and many < 0.01


def test_drops_of_numbers_that_never_differ_still_have_width() -> None:
    found = statistics.drop_of_rows([0.3, 0.7, 0.2] * 10, [0.3, 0.7, 0.2] * 10)
    assert found["value"] == 0 and found["high"] > 0.05
    assert statistics.drop_of_rows([1.0] * 30, [1.0] * 30)["exact"]
