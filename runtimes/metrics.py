"""Statistics behind a verdict, exact where exactness is cheap.

Percentiles. "The p-th percentile is at most L" is judged by counting, after MLPerf LoadGen's early stopping (loadgen/early_stopping.cc): of n
independent samples t exceed L. If the share over L were really 1-p or more, so few misses would be a stroke of luck of probability

    P(Bin(n, 1-p) <= t)          the false-pass probability

1. PASS when that is at most 1-c.  2. FAIL when P(Bin(n, 1-p) >= t) <= 1-c: so many misses would be luck if the limit held.  3. INCONCLUSIVE otherwise.

The same inequalities, solved for t, give the percentile's upper and lower confidence bounds as order statistics: PASS means that the upper bound is
at most L, FAIL that the lower one exceeds it.

    99 %: p50 needs 7 samples with none over, p90 64 with one over, p99 662 with one over.

Dependence. Requests that follow each other are not independent: a queue, a warm core, a slow minute last for several. n such samples are worth
n / D independent ones (`design_effect`). With `effect` D the test counts floor(n / D) samples; of them misses / D exceed L, rounded up for a PASS and down for
a FAIL; with floor(n / D) below LEAST_WORTH nothing is decided, because D itself is then a guess. Samples of unequal risk, as under drift,
make the test safer, not weaker (Hoeffding 1956): the claim is about the requests that were measured.

Looking more than once. Every look is another chance of a lucky pass. Look k (1, 2, 3 ...) may therefore only spend (1-c) / 2^k: all looks together stay
below 1-c, however many there are, and no cap has to be known beforehand (`look_confidence`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from targets.errors import TrimtabError

CONFIDENCE = 0.99
PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
LEAST_WORTH = 20
TAIL = 5.0  # times the share beyond a percentile: where ranks count for its dependence. By hand, at 3 one of 11 real series passed wrongly
CHUNK_ROWS = 64  # rows of logits in float64 at a time: 64 x 50,000 x 8 B x 3 arrays = 77 MB


@dataclass(frozen=True)
class PercentileTest:
    """The outcome of `percentile_test`. lower and upper bound the percentile at `confidence`; None when n is too small for that side."""

    outcome: str
    percentile: float
    limit: float | None
    confidence: float
    samples: int
    misses: int
    false_pass: float
    estimate: float | None
    lower: float | None
    upper: float | None
    effect: float = 1.0

    def inverse(self) -> PercentileTest:
        """The same of 1 / value: what was an upper bound is a lower one. For the median only, which keeps its place."""
        limit, estimate, lower, upper = (None if value is None else 1.0 / value for value in (self.limit, self.estimate, self.upper, self.lower))
        return replace(self, limit=limit, estimate=estimate, lower=lower, upper=upper)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def binomial_cdf(misses: int, samples: int, share: float) -> float:
    """P(Bin(samples, share) <= misses), summed term by term in logarithms. Exact to about 1e-12."""
    if misses < 0:
        return 0.0
    if misses >= samples:
        return 1.0
    hit, miss = math.log(share), math.log1p(-share)
    top = math.lgamma(samples + 1)
    terms = (top - math.lgamma(k + 1) - math.lgamma(samples - k + 1) + k * hit + (samples - k) * miss for k in range(misses + 1))
    return min(1.0, math.fsum(math.exp(term) for term in terms))


def design_effect(samples: ArrayLike, percentile: float | None = None) -> float:
    """How many samples in a row are worth one independent one, at least 1: 1 + 2 * sum of the autocorrelations of their ranks up to the first that is not
    positive (Geyer's initial sequence, Statistical Science 7, 1992); each is raised by the 1/n that estimating the mean takes from it. Ranks: one outlier
    decides nothing.

    With `percentile` what counts is near it, the larger of two: the same for ranks among the highest TAIL (1 - p), all below alike, since how quick requests
    wander says nothing about slow ones; and for being among the highest 2 (1 - p), since a slow mode that few samples are in hardly shows in ranks. Few samples
    tell too little of the tail: see `collect.Question.test`.

    [n] in order of time. 100 independent samples give about 1.2, an AR(1) process of correlation 0.9 about 15. Fewer than 8 samples give 1.
    """
    values = np.asarray(samples, np.float64).reshape(-1)
    count = len(values)
    if count < 8 or values.min() == values.max():
        return 1.0
    order = np.argsort(values, kind="stable")
    ranks = np.empty(count)
    ranks[order] = np.arange(count)
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.bincount(group, ranks) / sizes)[group]  # ties share their mean rank
    if percentile is None:
        return _initial_sum(ranks)
    beyond = 1.0 - percentile / 100.0
    slow = (ranks >= count * (1.0 - min(0.5, 2.0 * beyond))).astype(np.float64)
    return max(_initial_sum(np.maximum(ranks, count * (1.0 - min(1.0, TAIL * beyond)))), _initial_sum(slow))


def spell_effect(length: float) -> float:
    """The most that samples depend on each other for slow ones that come in spells of `length` on average (geometric): 2 * length - 1 in a row are worth one.

    For a machine of two modes, kept with probability s and entered with e, autocorrelations are the powers of s - e, at most 1 - 1/length, and their sum as in
    `design_effect` is (1 + s - e) / (1 - s + e). Spells that have not come yet show in no estimate: what they may be is an assumption.
    """
    return 2.0 * length - 1.0


def _initial_sum(values: NDArray[np.float64]) -> float:
    """1 + 2 * sum of the first positive autocorrelations of values [n] (all at once, by Fourier transform); 1 when they are all alike."""
    count, centred = len(values), values - values.mean()
    power = float(centred @ centred)
    if power == 0:
        return 1.0
    spectrum = np.fft.rfft(centred, 2 * count)
    found = np.fft.irfft(spectrum * spectrum.conj())[1 : count // 3] / power + 1.0 / count
    ends = np.flatnonzero(found <= 0)
    return 1.0 + 2.0 * float(found[: ends[0] if len(ends) else None].sum())


def percentile_test(samples: ArrayLike, limit: float | None, percentile: float, confidence: float = CONFIDENCE, effect: float = 1.0) -> PercentileTest:
    """Judge "the percentile is at most limit" from samples [n], each `effect` of which are worth one independent. limit None: INCONCLUSIVE, with the bounds.

    percentile and confidence: 95 and 0.99 for "p95 at 99 %". Raises TrimtabError for numbers that make no question (NaN above all: it compares false with
    everything, and would pass every limit).
    """
    share = _share_over(percentile, confidence)
    if limit is not None and not math.isfinite(limit):
        raise TrimtabError("limit", expected="a finite number", found=str(limit), remedy="change the limit")
    ordered = np.sort(np.asarray(samples, np.float64).reshape(-1))
    if not np.isfinite(ordered).all():
        raise TrimtabError("samples", expected="finite numbers", found="NaN or infinity", remedy="measure again")
    count, risk = len(ordered), 1.0 - confidence
    worth = int(count / effect)
    if effect > 1 and worth < LEAST_WORTH:
        worth = 0
    low, high = _bounds(worth, share, risk)
    # Back from misses among `worth` to misses among `count`: as many as still round up to `high`, or down to `low`.
    most = None if high is None else min(count - 1, math.floor(high * count / worth))
    fewest = None if low is None else math.ceil(low * count / worth)
    misses = 0 if limit is None else int(count - np.searchsorted(ordered, limit, side="right"))
    outcome = INCONCLUSIVE
    if limit is not None and most is not None and misses <= most:
        outcome = PASS
    elif limit is not None and fewest is not None and misses >= fewest:
        outcome = FAIL
    return PercentileTest(
        outcome=outcome,
        percentile=percentile,
        limit=limit,
        confidence=confidence,
        samples=count,
        misses=misses,
        false_pass=binomial_cdf(math.ceil(misses * worth / count), worth, share) if worth and limit is not None else 1.0,
        estimate=float(ordered[min(count - 1, math.ceil(percentile / 100 * count) - 1)]) if count else None,
        lower=None if fewest is None else float(ordered[count - fewest]),
        upper=None if most is None else float(ordered[count - 1 - most]),
        effect=effect,
    )


@lru_cache(4096)
def _bounds(count: int, share: float, risk: float) -> tuple[int | None, int | None]:
    """(fewest misses that FAIL, most misses that PASS) among `count` samples; None where no number does."""
    if count == 0:
        return None, None
    most = _largest(lambda misses: binomial_cdf(misses, count, share) <= risk, count)
    # P(>= t) = 1 - P(<= t-1) <= risk, so t-1 is the first number whose cdf reaches 1-risk.
    below = _largest(lambda misses: 1.0 - binomial_cdf(misses, count, share) > risk, count)
    fewest = 0 if below is None else below + 1
    fewest += 1
    return (fewest if fewest <= count else None), most


def _largest(holds: Callable[[int], bool], count: int) -> int | None:
    """The largest t in 0..count-1 for which `holds(t)`, which is true up to some point and false after; None when it never is."""
    low, high = -1, count - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low if low >= 0 else None


def min_samples(percentile: float, misses: int = 0, confidence: float = CONFIDENCE) -> int:
    """The fewest samples with which `misses` over the limit still pass: (90, 1, 0.99) -> 64."""
    share, risk = _share_over(percentile, confidence), 1.0 - confidence
    low, high = misses, misses + 1
    while binomial_cdf(misses, high, share) > risk:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if binomial_cdf(misses, middle, share) <= risk else (middle, high)
    return high


def look_confidence(look: int, confidence: float = CONFIDENCE) -> float:
    """The confidence that look 1, 2, 3 ... must reach so that all looks together keep `confidence`: 1 - (1-c) / 2^look."""
    return 1.0 - (1.0 - confidence) / 2**look


def _share_over(percentile: float, confidence: float) -> float:
    """The share of samples that may exceed a percentile, 1-p; checks both numbers."""
    if not 0 < percentile < 100:
        raise TrimtabError("percentile", expected="a number between 0 and 100", found=str(percentile), remedy="50, 90, 95 and 99 are usual")
    if not 0.5 <= confidence < 1:
        raise TrimtabError("confidence", expected="a number from 0.5 to below 1", found=str(confidence), remedy="0.99 is the default")
    return 1.0 - percentile / 100.0


# --- what quantization did to a decoder -----------------------------------------------------------------------------------------------------------------


def log_softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """logits [..., vocab] -> log shares [..., vocab], stable for any finite logits."""
    values = np.asarray(logits, np.float64)
    shifted = values - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_nats(reference: ArrayLike, candidate: ArrayLike) -> NDArray[np.float64]:
    """KL(reference || candidate) of each position, in nats: logits [..., vocab] twice -> [...]. Never negative."""
    first, second = _pair(reference, candidate)
    out = np.empty(len(first), np.float64)
    for rows in _chunks(len(first)):
        known, other = log_softmax(first[rows]), log_softmax(second[rows])
        out[rows] = (np.exp(known) * (known - other)).sum(axis=-1)
    return np.maximum(out, 0.0).reshape(np.shape(reference)[:-1])  # rounding may leave -1e-17


def top1_same(reference: ArrayLike, candidate: ArrayLike) -> NDArray[np.bool_]:
    """Whether both logits [..., vocab] put the same token first -> [...]."""
    first, second = _pair(reference, candidate)
    return (first.argmax(-1) == second.argmax(-1)).reshape(np.shape(reference)[:-1])


def nll_nats(logits: ArrayLike, targets: ArrayLike) -> NDArray[np.float64]:
    """-log share of the tokens that really followed: logits [..., vocab], targets [...] -> [...], in nats."""
    values, wanted = np.asarray(logits), np.asarray(targets, np.int64).reshape(-1)
    flat = values.reshape(-1, values.shape[-1])
    out = np.empty(len(flat), np.float64)
    for rows in _chunks(len(flat)):
        out[rows] = -log_softmax(flat[rows])[np.arange(rows.stop - rows.start), wanted[rows]]
    return out.reshape(values.shape[:-1])


def perplexity(nll: ArrayLike) -> float:
    """exp of the mean negative log likelihood in nats."""
    return float(np.exp(np.mean(np.asarray(nll, np.float64))))


def _pair(reference: ArrayLike, candidate: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    first, second = np.asarray(reference), np.asarray(candidate)
    if first.shape != second.shape:
        raise ValueError(f"logits of shapes {first.shape} and {second.shape} cannot be compared")
    return first.reshape(-1, first.shape[-1]), second.reshape(-1, second.shape[-1])


def _chunks(count: int) -> list[slice]:
    return [slice(at, min(at + CHUNK_ROWS, count)) for at in range(0, count, CHUNK_ROWS)]


# --- encoders -------------------------------------------------------------------------------------------------------------------------------------------


def cosine(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Cosine of each pair of rows: [n, width] twice -> [n]. Two zero vectors have cosine 1, a zero and a non-zero one 0."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    norms = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    product = norms[0] * norms[1]
    both_zero = (norms[0] == 0) & (norms[1] == 0)
    return np.where(both_zero, 1.0, (a * b).sum(-1) / np.where(product == 0, 1.0, product))


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Share of equal entries, in [0, 1]. Raises ValueError when there are none or the lengths differ."""
    a, b = np.asarray(predicted), np.asarray(labels)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"{a.shape} predictions for {b.shape} labels")
    return float((a == b).mean())
