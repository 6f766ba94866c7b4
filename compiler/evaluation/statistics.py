"""Intervals of accuracy metrics, each one of 95 %: means and percentiles over clustered tokens, shares, drops, rank correlation, F1.

A metric is a dict as the report knows it: {value, low, high, samples, exact?}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

LEAST_SEQUENCES = 5
RESAMPLES = 2000
NOTHING = (float("-inf"), float("inf"))


def metric(value: Any, bounds: tuple[Any, Any], samples: int) -> dict[str, Any]:
    low, high = (None if bound is None else float(bound) for bound in bounds)
    return {"value": float(value), "low": low, "high": high, "samples": samples}


def cluster_interval(values: np.ndarray, groups: np.ndarray, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap-t interval of a mean over tokens, drawing whole sequences: tokens of one sequence are not independent.

    The mean is a ratio of sums, m = sum(s) / sum(n) over sequences. Of each draw (m* - m) / se* is kept, se the linearised standard error of a ratio; its
    quantiles times se give the bounds (Efron and Tibshirani 1993, chapter 12), stretched by Student's t over the normal quantile: a draw of few sequences knows
    its own spread poorly. Quantiles of m* themselves miss skewed losses four times too often at 24 sequences (docs/evaluation.md has what was measured).

    Fewer than LEAST_SEQUENCES say nothing about others: the interval is then everything, and no limit can pass on it. Values that are not finite give NaN.
    """
    _, groups = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(groups, values), np.bincount(groups)
    if len(sums) < LEAST_SEQUENCES:
        return float("-inf"), float("inf")
    (mean,), (error,) = ratio_and_error(sums[None], counts[None])
    if not error > 0:  # all sequences alike, or NaN
        return float(mean), float(mean)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (resamples, len(sums)))
    means, errors = ratio_and_error(sums[drawn], counts[drawn])
    usable = errors > 0  # a draw of one sequence only has no spread
    low, high = np.quantile((means[usable] - mean) / errors[usable], [0.025, 0.975]) * error * stretch(len(sums))
    return float(mean - high), float(mean - low)


def ratio_and_error(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sums, counts [draws, sequences] -> ratio of totals and its standard error by linearisation, [draws] each."""
    totals, n = counts.sum(axis=1), sums.shape[1]
    ratios = sums.sum(axis=1) / totals
    residuals = sums - ratios[:, None] * counts
    return ratios, np.sqrt((residuals**2).sum(axis=1) * n / (n - 1)) / totals


def stretch(sequences: int) -> float:
    """Student's 97.5 % quantile with n - 1 degrees of freedom over the normal one: 24 -> 1.056."""
    from scipy.stats import norm, t

    return float(t.ppf(0.975, sequences - 1) / norm.ppf(0.975))


def exact_bounds(hits: int, samples: int, tail: float) -> tuple[float, float]:
    """Clopper-Pearson bounds of a share, `tail` on each side. No hit in 5 rows is still compatible with many: (0, 0.52) at 0.025."""
    from scipy.stats import beta

    low = float(beta.ppf(tail, hits, samples - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, samples - hits)) if hits < samples else 1.0
    return low, high


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """A share with its exact 95 % interval."""
    low, high = exact_bounds(int(sum(hits)), len(hits), 0.025)
    return {"value": sum(hits) / len(hits), "low": low, "high": high, "samples": len(hits), "exact": True}


def paired_drop(before: Sequence[bool], after: Sequence[bool], tail: float = 0.0125) -> dict[str, Any]:
    """Share lost less share won, over the same rows, with a 95 % interval.

    Rows lost and rows won are each bounded exactly at half the risk (Bonferroni), so agreement on few rows proves little: a
    bootstrap would give an interval of width 0 there. tail: the risk of each of the four bounds.
    """
    n = len(before)
    lost = sum(was and not is_ for was, is_ in zip(before, after, strict=True))
    won = sum(is_ and not was for was, is_ in zip(before, after, strict=True))
    (lost_low, lost_high), (won_low, won_high) = exact_bounds(lost, n, tail), exact_bounds(won, n, tail)
    return {"value": (lost - won) / n, "low": lost_low - won_high, "high": lost_high - won_low, "samples": n, "exact": True}


def percentile_interval(values: np.ndarray, groups: np.ndarray, share_below: float) -> tuple[float, float]:
    """Woodruff's interval of a percentile over clustered values [n]: the share beyond the estimate has a standard error over clusters; the bounds are the
    percentiles at the share plus and minus Student's t times that (Woodruff, Journal of the American Statistical Association 47, 1952).

    The upper bound is infinite where share and error reach 1: the data do not hold the tail that was asked for. Few clusters, NaN: as `cluster_interval`.
    """
    from scipy.stats import t

    _, groups = np.unique(groups, return_inverse=True)
    counts = np.bincount(groups)
    if np.isnan(values).any():
        return float("nan"), float("nan")
    if len(counts) < LEAST_SEQUENCES:
        return NOTHING
    estimate = np.quantile(values, share_below, method="inverted_cdf")
    over = np.bincount(groups, (values > estimate).astype(np.float64))
    _, (error,) = ratio_and_error(over[None], counts[None])
    reach = float(t.ppf(0.975, len(counts) - 1)) * max(float(error), (share_below * (1 - share_below) / len(values)) ** 0.5)
    low = float(np.quantile(values, max(0.0, share_below - reach), method="inverted_cdf"))
    return low, float("inf") if share_below + reach >= 1 else float(np.quantile(values, share_below + reach, method="inverted_cdf"))


def mean_of_rows(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """A mean over independent rows: exact where every value is 0 or 1, else bootstrap-t."""
    if set(values) <= {0.0, 1.0}:
        return share([bool(value) for value in values])
    return metric(np.mean(values), cluster_interval(np.asarray(values, np.float64), np.arange(len(values)), seed), len(values))


def drop_of_rows(before: Sequence[float], after: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Mean of before - after over the same rows."""
    if set(before) | set(after) <= {0.0, 1.0}:
        return paired_drop([bool(value) for value in before], [bool(value) for value in after])
    values = np.asarray(before, np.float64) - np.asarray(after, np.float64)
    if not values.any():  # alike in all rows seen: only their number tells how often others may differ, in units of the largest value seen
        reach = max(1e-12, float(np.abs(before).max())) * exact_bounds(0, len(values), 0.0125)[1]
        return metric(0.0, (-reach, reach), len(values))
    return metric(values.mean(), cluster_interval(values, np.arange(len(values)), seed), len(values))


def flips(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """Share of rows that change between right and wrong either way (Dutta et al., "Accuracy is not all you need", arXiv 2407.09141)."""
    return share([was != is_ for was, is_ in zip(before, after, strict=True)])


def excess(clean: tuple[Sequence[bool], Sequence[bool]], noisy: tuple[Sequence[bool], Sequence[bool]]) -> dict[str, Any]:
    """(reference, bundle) right or wrong on clean rows, and on the same rows with noise -> what noise costs the bundle less what it costs the reference.

    It is the drop from reference to bundle under noise less that without: each is bounded exactly at half the risk, so both hold together at 95 %.
    """
    with_noise, without = (paired_drop(*pair, tail=0.00625) for pair in (noisy, clean))
    value, low, high = with_noise["value"] - without["value"], with_noise["low"] - without["high"], with_noise["high"] - without["low"]
    return {"value": value, "low": low, "high": high, "samples": len(clean[0]), "exact": True}


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; ties share their mean rank. [10, 30, 30] -> [0, 1.5, 1.5]"""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return ((last - sizes + last - 1) / 2)[group]


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation; NaN where one side does not vary or is not finite."""
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("nan")
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    power = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / power if power else float("nan")


def spearman_metric(scores: np.ndarray, cosines: np.ndarray) -> dict[str, Any]:
    """Spearman's correlation with the interval of Bonett and Wright (Psychometrika 65, 2000): Fisher's z with variance (1 + r^2 / 2) / (n - 3)."""
    value, count = spearman(scores, cosines), len(scores)
    if count < 10:
        return metric(value, NOTHING, count)
    centre, reach = np.arctanh(np.clip(value, -0.999999, 0.999999)), 1.959964 * np.sqrt((1 + value**2 / 2) / (count - 3))
    return metric(value, (np.tanh(centre - reach), np.tanh(centre + reach)), count)


def spearman_drop(scores: np.ndarray, before: np.ndarray, after: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Correlation of `before` less that of `after`, with a percentile bootstrap over pairs."""
    value, count = spearman(scores, before) - spearman(scores, after), len(scores)
    if count < 10 or not np.isfinite(value):
        return metric(value, NOTHING if np.isfinite(value) else (value, value), count)
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(0, count, count) for _ in range(RESAMPLES // 2)]
    values = np.array([spearman(scores[rows], before[rows]) - spearman(scores[rows], after[rows]) for rows in drawn])
    values = values[np.isfinite(values)]
    return metric(value, tuple(np.quantile(values, [0.025, 0.975])), count)


def macro_f1(truth: np.ndarray, found: np.ndarray, labels: Sequence[int]) -> float:
    """Mean over labels of 2 TP / (2 TP + FP + FN), over the labels that occur in `truth`."""
    scores = []
    for label in labels:
        hit = int(((truth == label) & (found == label)).sum())
        scores.append(2 * hit / int((truth == label).sum() + (found == label).sum()))
    return float(np.mean(scores))


def f1_metric(truth: np.ndarray, found: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Macro F1 with an interval that is never narrower than what unseen rows may do.

    A percentile bootstrap over rows; and, because it sees no mistake where none was drawn, at least as wide as the exact interval of the accuracy.
    """
    labels, count, rng = np.unique(truth).tolist(), len(truth), np.random.default_rng(seed)
    value = macro_f1(truth, found, labels)
    if count < LEAST_SEQUENCES:
        return metric(value, NOTHING, count)
    drawn = (rng.integers(0, count, count) for _ in range(RESAMPLES // 2))
    values = [macro_f1(truth[rows], found[rows], np.unique(truth[rows]).tolist()) for rows in drawn]
    low, high = np.quantile(values, [0.025, 0.975])
    right = share((truth == found).tolist())
    low, high = min(low, value - (right["value"] - right["low"])), max(high, value + (right["high"] - right["value"]))
    return metric(value, (max(0.0, low), min(1.0, high)), count)
