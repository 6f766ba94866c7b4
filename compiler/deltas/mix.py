"""Combining differences that have to be pruned, elected or truncated first, block by block.

1. A tensor is cut into a fixed grid of row blocks (GRID_BYTES of float32). Differences are computed on the grid only, so an
   entry has the same bits in every pass and for every reader; the last block is kept, so that a reader whose blocks cut
   across the grid computes none twice.
2. The k-th largest magnitude of a whole tensor is found exactly in two passes over its blocks: the bits of |x| as an integer
   are in the order of |x|, so a histogram of their upper 16 bits finds the bin and a second of the lower 15 the value. Only
   where that very value stands more often than it may be kept, a third pass finds the position of the last one kept.
3. Random drops are counter-based (Philox 4x64-10, Salmon et al. 2011): whether entry i of a tensor stays depends on seed,
   tensor name, digest of the delta and i alone, in no order.
4. `svd` holds one tensor whole; every other method holds one grid block per delta.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from compiler.deltas.combine import Combine

GRID_BYTES = 4 << 20
LOW_BITS = 15

Rows = Callable[[int, int], np.ndarray]  # (start, stop) -> float32 [stop - start, ...]


@dataclass(frozen=True)
class Term:
    """One delta on one tensor. key: its digest. change: (first row, base rows [n, ...]) -> difference at weight 1, float32 [n, ...]."""

    weight: float
    key: str
    change: Callable[[int, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Threshold:
    """Entries kept: bits of |x| above `bits`, or equal to it at a flat index up to `last` (None: all of these)."""

    bits: int
    last: int | None = None


class LastBlock:
    """Remembers the one block computed last, for all tensors of a view together. Threads at worst compute a block twice."""

    def __init__(self) -> None:
        self._held: tuple[Hashable, np.ndarray] | None = None

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        held = self._held
        if held is None or held[0] != key:
            self._held = held = None  # so that the old block is gone before the new one is made
            self._held = held = (key, make())
        return held[1]


def mixed_rows(name: str, shape: tuple[int, ...], base: Rows, terms: Sequence[Term], combine: Combine, last: LastBlock) -> Rows:
    """Rows of a tensor with its differences combined. base: the rows they are added to; the differences see the same ones."""
    count, width = (shape[0] if shape else 1), int(np.prod(shape[1:], dtype=np.int64))
    truncate = combine.row.truncate and len(shape) == 2
    step = max(count, 1) if truncate else max(1, GRID_BYTES // max(4 * width, 1))

    @cache
    def pruners() -> list[Callable[[np.ndarray, int], np.ndarray]]:
        return [_pruner(name, (count, step, width), base, term, combine) for term in terms]

    def block(first: int) -> np.ndarray:
        rows = base(first, min(first + step, count))
        kept = [prune(term.change(first, rows), first * width) for term, prune in zip(terms, pruners(), strict=True)]
        weights = [term.weight for term in terms]
        mixture = elect(weights, kept) if combine.row.elect else weighted_sum(weights, kept)
        return rows + (truncated(mixture, int(combine.rank or 1)) if truncate else mixture)

    def rows(start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *shape[1:]), np.float32)
        for first in range(start - start % step, stop, step):
            found = last.get((name, first), partial(block, first))
            begin, end = max(start, first), min(stop, first + step)
            out[begin - start : end - start] = found[begin - first : end - first]
        return out

    return rows


def _pruner(name: str, grid: tuple[int, int, int], base: Rows, term: Term, combine: Combine) -> Callable[[np.ndarray, int], np.ndarray]:
    """(difference, flat index of its first entry) -> the difference with what the method drops set to zero. grid: rows, rows of a block, width."""
    count, step, width = grid
    if combine.row.prune == "random":
        return lambda block, first: dropped(block, survivors((int(combine.seed or 0), name, term.key), first, block.size, combine.density or 1.0), combine)
    if combine.row.prune == "magnitude":
        starts = range(0, count, step)

        def blocks() -> Iterator[np.ndarray]:
            return (term.change(first, base(first, min(first + step, count))) for first in starts)

        held = list(blocks()) if len(starts) == 1 else None
        threshold = kth_magnitude(blocks if held is None else lambda: held, kept_count(count * width, combine.density or 1.0))
        return lambda block, first: trimmed(block, first, threshold)
    return lambda block, first: block


def kept_count(size: int, density: float) -> int:
    """How many entries stay: never none, or a small tensor would lose its delta without a word."""
    return min(size, max(1, int(density * size)))


def magnitude_bits(block: np.ndarray) -> np.ndarray:
    """float32 [...] -> uint32 [size] in the order of |x|: the bits without the sign."""
    return np.ascontiguousarray(block, np.float32).reshape(-1).view(np.uint32) & np.uint32(0x7FFFFFFF)


def kth_magnitude(blocks: Callable[[], Iterable[np.ndarray]], keep: int) -> Threshold:
    """The threshold above which `keep` entries of all blocks together stand (rule 2). [3, -1, 2], keep 2 -> bits of 2.0.

    blocks  gives the same blocks in the same order at each call
    """
    upper = np.zeros(1 << (31 - LOW_BITS), np.int64)
    for block in blocks():
        upper += np.bincount(magnitude_bits(block) >> LOW_BITS, minlength=len(upper))
    high, left = _descend(upper, keep)
    lower = np.zeros(1 << LOW_BITS, np.int64)
    for block in blocks():
        bits = magnitude_bits(block)
        lower += np.bincount(bits[bits >> LOW_BITS == high] & ((1 << LOW_BITS) - 1), minlength=len(lower))
    low, left = _descend(lower, left)
    bits_wanted = high << LOW_BITS | low
    if bits_wanted == 0 or lower[low] == left:  # zeros may all be kept: they change nothing
        return Threshold(bits_wanted)
    return Threshold(bits_wanted, _position(blocks(), bits_wanted, left))


def _descend(counts: np.ndarray, keep: int) -> tuple[int, int]:
    """(bin that holds the keep-th largest, its rank within the bin). [5, 2, 1], keep 2 -> (1, 1)."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, keep))
    return len(counts) - 1 - place, keep - int(above[place] - counts[::-1][place])


def _position(blocks: Iterable[np.ndarray], bits: int, number: int) -> int:
    """Flat index of the number-th entry (from 1) with these magnitude bits."""
    first = 0
    for block in blocks:
        found = np.flatnonzero(magnitude_bits(block) == bits)
        if len(found) >= number:
            return first + int(found[number - 1])
        number -= len(found)
        first += block.size
    raise AssertionError("blocks changed between two passes")


def trimmed(block: np.ndarray, first: int, threshold: Threshold) -> np.ndarray:
    """The block with entries below the threshold zeroed, in place. first: flat index of its first entry."""
    bits = magnitude_bits(block)
    keep = bits >= threshold.bits
    if threshold.last is not None:
        keep[max(threshold.last + 1 - first, 0) :] &= bits[max(threshold.last + 1 - first, 0) :] > threshold.bits
    block *= keep.reshape(block.shape)
    return block


def survivors(key: tuple[int, str, str], first: int, count: int, density: float) -> np.ndarray:
    """bool [count]: which of the entries first ... first + count - 1 stay (rule 3). key: seed, tensor name, digest of the delta.

    Entry i looks at the 32-bit half i % 2 of the stream's 64-bit word i // 2; one step of the counter makes four words.
    """
    secret = hashlib.sha256("\0".join(map(str, key)).encode()).digest()[:16]
    skip = first % 8
    stream = np.random.Philox(key=int.from_bytes(secret, "little"), counter=first // 8)
    words = stream.random_raw((skip + count + 1) // 2).astype("<u8", copy=False).view("<u4")[skip : skip + count]
    return words <= np.uint32(max(round(density * 2**32), 1) - 1)


def dropped(block: np.ndarray, keep: np.ndarray, combine: Combine) -> np.ndarray:
    """The block with what does not survive zeroed and the rest divided by the density, in place."""
    block *= keep.reshape(block.shape)
    block /= np.float32(combine.density or 1.0)
    return block


def weighted_sum(weights: Sequence[float], differences: Sequence[np.ndarray]) -> np.ndarray:
    """sum_i w_i D_i, float32 [n, ...]."""
    total = np.zeros_like(differences[0])
    for weight, difference in zip(weights, differences, strict=True):
        total += np.float32(weight) * difference
    return total


def elect(weights: Sequence[float], differences: Sequence[np.ndarray]) -> np.ndarray:
    """Sign election and disjoint mean, float32 [n, ...]. weights 1, 1 and entries 3, -1 -> 3; 1, 3 -> 2; 1, 0 -> 1.

    A sum of zero elects plus, as in PEFT. The weights scale what is averaged and have no vote: in the paper there are none.
    """
    positive = weighted_sum([1.0] * len(weights), differences) >= 0
    total, number = np.zeros_like(differences[0]), np.zeros(differences[0].shape, np.float32)
    for weight, difference in zip(weights, differences, strict=True):
        agrees = np.where(positive, difference > 0, difference < 0)
        total += np.float32(weight) * (difference * agrees)
        number += agrees
    return total / np.maximum(number, np.float32(1))


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Best approximation of rank at most `rank` in the Frobenius norm: float32 [n, m] -> float32 [n, m].

    The projection on the leading singular vectors of the shorter side, from the eigenvectors of its Gram matrix in float64.
    """
    if rank >= min(matrix.shape):
        return matrix
    wide = matrix.astype(np.float64)
    if wide.shape[0] <= wide.shape[1]:
        basis = np.linalg.eigh(wide @ wide.T)[1][:, -rank:]
        return (basis @ (basis.T @ wide)).astype(np.float32)
    basis = np.linalg.eigh(wide.T @ wide)[1][:, -rank:]
    return ((wide @ basis) @ basis.T).astype(np.float32)
