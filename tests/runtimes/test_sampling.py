"""Sampling against the plain definitions and against transformers' processors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.sampling import NUCLEUS_FIRST, Sampler, Sampling, nucleus
from targets.errors import TrimtabError


def slow_nucleus(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The definitions, one after the other: shares [vocab] with zeros for what is cut."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    keep = order[: sampling.top_k or len(order)]
    shares = np.zeros(len(scaled))
    shares[keep] = np.exp(scaled[keep] - scaled.max())
    shares /= shares.sum()
    if sampling.top_p < 1:
        total, stop = 0.0, len(keep)
        for at, token in enumerate(keep):
            total += shares[token]
            if total >= sampling.top_p:
                stop = at + 1
                break
        cut = np.zeros_like(shares)
        cut[keep[:stop]] = shares[keep[:stop]]
        shares = cut / cut.sum()
    return shares


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([2, 17, NUCLEUS_FIRST + 300]),
    scale=st.sampled_from([0.01, 1.0, 20.0]),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.97, 1.0]),
)
def test_nucleus_equals_its_definition(seed: int, size: int, scale: float, temperature: float, top_k: int, top_p: float) -> None:
    logits = (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    ids, shares = nucleus(logits, sampling)
    dense = np.zeros(size)
    dense[ids] = shares / shares.sum()
    np.testing.assert_allclose(dense, slow_nucleus(logits, sampling), atol=1e-9)


def test_worked_nucleus() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25]))
    ids, shares = nucleus(logits, Sampling(temperature=1.0, top_p=0.7))
    assert ids.tolist() == [1, 3]
    np.testing.assert_allclose(shares / shares.sum(), [2 / 3, 1 / 3])


def test_draws_follow_the_shares() -> None:
    logits = np.log(np.array([[0.6, 0.3, 0.1]], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=3), [[0]], 3)
    counts = np.bincount([int(sampler.choose(logits)[0]) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.6, 0.3, 0.1], atol=0.03)


def test_repetition_penalty_is_that_of_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(0).standard_normal((2, 30)).astype(np.float32)
    prompts = [[1, 2, 2], [29]]
    ours = Sampler(Sampling(repetition_penalty=50.0), prompts, 30).choose(logits)
    theirs = [
        int(RepetitionPenaltyLogitsProcessor(50.0)(torch.tensor([ids]), torch.from_numpy(logits[row : row + 1])).argmax()) for row, ids in enumerate(prompts)
    ]
    assert ours.tolist() == theirs
    best = int(logits[1].argmax())
    again = Sampler(Sampling(repetition_penalty=1e6), [[], []], 30)
    assert again.choose(logits)[1] == best and again.choose(logits)[1] != best  # what was chosen counts as seen


def test_greedy_takes_the_first_of_equals_and_leaves_logits_alone() -> None:
    logits = np.array([[1.0, 3.0, 3.0]], np.float32)
    before = logits.copy()
    assert Sampler(Sampling(), [[0]], 3).choose(logits).tolist() == [1]
    Sampler(Sampling(temperature=0.5, top_k=2, repetition_penalty=2.0), [[1]], 3).choose(logits)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_stops_the_answer(bad: float) -> None:
    logits = np.zeros((2, 8), np.float32)
    logits[1, 3] = bad
    with pytest.raises(TrimtabError, match="logits: expected finite numbers"):
        Sampler(Sampling(), [[0], [0]], 8).choose(logits)
