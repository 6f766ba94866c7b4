"""Choosing the next token from logits, for all rows at once.

The order is that of transformers' processors: repetition penalty, temperature, top_k, top_p. Each row has a random stream of its own, seeded by
(seed, row), so what a row draws depends neither on the batch around it nor on how many rows have finished.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from targets.errors import TrimtabError

Floats = NDArray[np.floating[Any]]
NUCLEUS_FIRST = 1024  # candidates sorted before the whole vocabulary is: nearly every nucleus fits


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = [
            ("temperature", self.temperature, "a number >= 0", math.isfinite(self.temperature) and self.temperature >= 0),
            ("top_k", self.top_k, "a count >= 0 (0: all)", self.top_k >= 0),
            ("top_p", self.top_p, "a share in (0, 1]", 0 < self.top_p <= 1),
            ("repetition_penalty", self.repetition_penalty, "a number > 0 (1: none)", math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0),
            ("seed", self.seed, "a count >= 0", self.seed >= 0),
        ]
        for name, value, expected, fine in rules:
            if not fine:
                raise TrimtabError(name, expected=expected, found=str(value), remedy="change the option")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class Sampler:
    """Sampling for a batch: holds each row's random stream and the tokens it has seen."""

    def __init__(self, sampling: Sampling, prompts: list[list[int]], vocab_size: int) -> None:
        self._sampling = sampling
        self._streams = [np.random.default_rng([sampling.seed, row]) for row in range(len(prompts))]
        self._seen: NDArray[np.bool_] | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = np.zeros((len(prompts), vocab_size), np.bool_)  # [batch, vocab]
            for row, ids in enumerate(prompts):
                self._seen[row, ids] = True

    def choose(self, logits: Floats) -> NDArray[np.int64]:
        """logits [batch, vocab] -> ids [batch]. The logits are not changed. Raises TrimtabError when a row holds a NaN."""
        if self._seen is not None:
            penalty = self._sampling.repetition_penalty
            logits = np.where(self._seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
        best = logits.argmax(axis=-1)  # [batch]; argmax returns the first NaN when there is one, so checking the winner checks the row
        if not all(math.isfinite(row[at]) for row, at in zip(logits, best, strict=True)):
            raise TrimtabError(
                "logits",
                expected="finite numbers",
                found="NaN or infinity",
                remedy="the model overflows: check it with `trimtab verify` and its accuracy report",
            )
        ids = best if self._sampling.greedy else np.array([self._draw(logits[row], row) for row in range(len(best))], np.int64)
        if self._seen is not None:
            self._seen[np.arange(len(ids)), ids] = True
        return ids.astype(np.int64, copy=False)

    def _draw(self, logits: Floats, row: int) -> int:
        ids, shares = nucleus(logits, self._sampling)
        at = int(np.searchsorted(np.cumsum(shares), self._streams[row].random() * shares.sum(), side="right"))
        return int(ids[min(at, len(ids) - 1)])


def nucleus(logits: Floats, sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """logits [vocab] -> (ids [n], shares [n]) that top_k and top_p leave, largest first unless both are off.

    Rules: 1. top_k keeps the k largest. 2. top_p then keeps the fewest tokens whose shares reach p; the first one always stays.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    scaled -= scaled.max()
    if sampling.top_k == 0 and sampling.top_p >= 1.0:
        return np.arange(len(scaled)), np.exp(scaled)
    keep = min(sampling.top_k or len(scaled), len(scaled))
    total = None if sampling.top_k else float(np.exp(scaled).sum())
    first = keep if sampling.top_k else min(keep, NUCLEUS_FIRST)
    ids = _largest(scaled, first)
    shares = np.exp(scaled[ids])
    if total is None:
        total = float(shares.sum())
    elif first < keep and shares.sum() < sampling.top_p * total:
        ids = _largest(scaled, keep)
        shares = np.exp(scaled[ids])
    if sampling.top_p >= 1.0:
        return ids, shares
    count = int(np.searchsorted(np.cumsum(shares), sampling.top_p * total)) + 1
    return ids[:count], shares[:count]


def _largest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest, largest first; equal values by index, so that ties do not depend on the sort."""
    chosen = np.sort(np.argpartition(-values, count - 1)[:count]) if count < len(values) else np.arange(len(values))
    return chosen[np.argsort(-values[chosen], kind="stable")]
