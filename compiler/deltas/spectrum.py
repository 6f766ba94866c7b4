"""Leading singular triplets of a difference that is read by row block: Halko, Martinsson, Tropp 2011, arXiv 0909.4061.

    Y = D G             G [m, s] standard normal, s = most + OVERSAMPLING
    Q = orth(Y)         [n, s]; D is close to Q Q^T D, and equal to it where rank D <= s
    Q^T D = U S V^T     so the triplets of D are (Q U, S, V)

A second round with G = orth(D^T Q) follows where the first left more behind than is `enough`. Held: s (n + m) numbers and one
block, never the difference. All sums in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

OVERSAMPLING = 8
BLOCK_BYTES = 4 << 20
ROUNDING = 1e-6  # share of the norm below which nothing is left to find

SAMPLE_CHUNKS = 16

Rows = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Spectrum:
    """left [n, k], values [k] falling, right [k, m]; energy: the squared Frobenius norm of the whole difference."""

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray
    energy: float

    def residual(self, rank: int) -> float:
        """Frobenius norm of what the first `rank` triplets leave."""
        return float(np.sqrt(max(self.energy - float(np.sum(self.values[:rank] ** 2)), 0.0)))

    def rank_within(self, allowed: float, most: int) -> int | None:
        """The smallest rank, from 1 to `most`, whose residual is at most `allowed`; None when there is none."""
        return next((rank for rank in range(1, min(most, len(self.values)) + 1) if self.residual(rank) <= allowed), None)


def spectrum(rows: Rows, shape: tuple[int, int], most: int, enough: float = ROUNDING, seed: int = 0) -> Spectrum:
    """The leading `most` triplets of the matrix that `rows` reads. float32 [n, m] -> Spectrum. enough: what may be left behind, relative to the norm."""
    count, width = shape
    size = min(count, width, most + OVERSAMPLING)
    if size == min(count, width):
        start = np.eye(width) if size == width else None  # every direction fits: nothing to draw
    else:
        start = np.random.Generator(np.random.Philox(key=seed)).standard_normal((width, size))
    left = np.eye(count) if start is None else _orthonormal(_times(rows, shape, start))
    right, energy = _project(rows, shape, left)
    if size < min(count, width) and energy - float(np.sum(right**2)) > enough**2 * energy:
        left = _orthonormal(_times(rows, shape, _orthonormal(right.T)))
        right, energy = _project(rows, shape, left)
    u, values, v = np.linalg.svd(right, full_matrices=False)
    return Spectrum(left @ u, values, v, energy)


def beyond(rows: Rows, shape: tuple[int, int], most: int, norm: float) -> bool:
    """Does every approximation of rank `most` leave more than `norm`? True is certain, False is not: it takes a sample of the rows.

    The best approximation of a matrix, cut to some of its rows, is one of these rows: so what rank `most` leaves of the sample alone (4 most rows in
    SAMPLE_CHUNKS runs) is a lower bound of what it leaves of the whole. Rounding noise is told by one look at few rows, without any sketch.
    """
    run = -(-4 * most // SAMPLE_CHUNKS)
    if 2 * run * SAMPLE_CHUNKS > shape[0]:
        return False  # the whole is hardly more than the sample
    starts = np.linspace(0, shape[0] - run, SAMPLE_CHUNKS).astype(int)
    sample = np.concatenate([rows(int(start), int(start) + run) for start in starts]).astype(np.float64)
    left = np.linalg.eigvalsh(sample @ sample.T)[:-most]  # squares of the singular values, rising
    return float(np.maximum(left, 0).sum()) > max(norm, 0.0) ** 2 + 1e-12 * float(np.sum(sample * sample))


def _blocks(rows: Rows, shape: tuple[int, int]) -> Iterator[tuple[int, np.ndarray]]:
    step = max(1, BLOCK_BYTES // max(4 * shape[1], 1))
    for first in range(0, shape[0], step):
        yield first, rows(first, min(first + step, shape[0])).astype(np.float64)


def _times(rows: Rows, shape: tuple[int, int], right: np.ndarray) -> np.ndarray:
    """D right: [n, m] x [m, s] -> float64 [n, s]."""
    out = np.empty((shape[0], right.shape[1]))
    for first, block in _blocks(rows, shape):
        out[first : first + len(block)] = block @ right
    return out


def _project(rows: Rows, shape: tuple[int, int], left: np.ndarray) -> tuple[np.ndarray, float]:
    """(left^T D, energy of D): [n, s] -> float64 [s, m]."""
    out, energy = np.zeros((left.shape[1], shape[1])), 0.0
    for first, block in _blocks(rows, shape):
        out += left[first : first + len(block)].T @ block
        energy += float(np.sum(block * block))
    return out, energy


def _orthonormal(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.qr(matrix)[0]
