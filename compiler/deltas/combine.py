"""Ways to combine several deltas on one tensor. A method is one row: what it drops of each difference, and how the rest meet.

    linear            W + sum_i w_i D_i                           task arithmetic, Ilharco et al. 2023, arXiv 2212.04089
    cat               the same: stacking LoRA factors side by side multiplies out to this sum
    svd               W + best rank-r approximation of that sum   Eckart, Young 1936; what PEFT calls svd
    magnitude_prune   W + sum_i w_i top(D_i)                      the largest `density` of each difference, by magnitude
    ties              W + elect(w_i, top(D_i))                    Yadav et al. 2023, arXiv 2306.01708
    dare_linear       W + sum_i w_i drop(D_i)                     Yu et al. 2024, arXiv 2311.03099
    dare_ties         W + elect(w_i, drop(D_i))                   both

    top(D)    keeps the max(1, floor(density n)) entries of largest magnitude of the whole tensor; equal ones by position
    drop(D)   keeps an entry with probability `density`, divided by it
    elect     sign s = sign(sum_i D_i), then sum of w_i D_i over the entries that have sign s, divided by their number

The names are those of PEFT's `combination_type`. PEFT applies them to the factors A and B of LoRAs; here they act on the
differences themselves, as the papers do, so that kinds may be mixed. `compiler.deltas.mix` does the work by row block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from compiler.errors import RecipeError
from compiler.text import nearest

DENSITY = 0.2  # default share that is kept: what the TIES paper uses


@dataclass(frozen=True)
class Method:
    """prune: how entries of each difference are chosen; elect: signs are elected, not summed; truncate: the sum is cut to a rank."""

    prune: Literal["magnitude", "random", ""] = ""
    elect: bool = False
    truncate: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """What may be set beside the method's name."""
        return (*(["density"] if self.prune else []), *(["seed"] if self.prune == "random" else []), *(["rank"] if self.truncate else []))

    @property
    def plain(self) -> bool:
        """Is it the weighted sum, which needs neither a pass of its own nor all differences at once?"""
        return not (self.prune or self.elect or self.truncate)


METHODS: Mapping[str, Method] = {
    "linear": Method(),
    "cat": Method(),
    "svd": Method(truncate=True),
    "magnitude_prune": Method(prune="magnitude"),
    "ties": Method(prune="magnitude", elect=True),
    "dare_linear": Method(prune="random"),
    "dare_ties": Method(prune="random", elect=True),
}


@dataclass(frozen=True)
class Combine:
    """A method with its parameters; those it does not have are None. str: `ties density=0.2`, its identity in digests and cache keys."""

    method: str = "linear"
    density: float | None = None
    seed: int | None = None
    rank: int | None = None

    @property
    def row(self) -> Method:
        return METHODS[self.method]

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{name}={getattr(self, name)!r}" for name in self.row.parameters)])


def combine_named(method: str, density: float | None = None, seed: int | None = None, rank: int | None = None, *, place: str = "combine") -> Combine:
    """The method with its parameters checked and defaults filled in. Raises RecipeError: unknown method, a parameter it has not, or out of range."""
    if method not in METHODS:
        raise RecipeError(place, expected=f"one of {', '.join(METHODS)}", found=repr(method), remedy=nearest(method, METHODS))
    given = {"density": density, "seed": seed, "rank": rank}
    takes = METHODS[method].parameters
    for name, value in given.items():
        if value is not None and name not in takes:
            expected = f"{' and '.join(takes)} for {method}" if takes else f"no parameter for {method}"
            raise RecipeError(f"{place}.{name}", expected=expected, found=repr(value), remedy=f"remove {name}, or choose a method that has it")
    if density is not None and not (math.isfinite(density) and 0 < density <= 1):
        raise RecipeError(f"{place}.density", expected="a number above 0 and at most 1", found=repr(density), remedy="it is the share of entries that is kept")
    if seed is not None and seed < 0:
        raise RecipeError(f"{place}.seed", expected="a whole number of at least 0", found=repr(seed), remedy="choose another seed")
    if "rank" in takes and (rank is None or rank < 1):
        raise RecipeError(
            f"{place}.rank", expected="a whole number of at least 1 for svd", found=repr(rank), remedy="for example combine: {method: svd, rank: 16}"
        )
    return Combine(method, (density or DENSITY) if "density" in takes else None, (seed or 0) if "seed" in takes else None, rank)


def linear(base: np.ndarray, differences: Iterable[tuple[float, np.ndarray]]) -> np.ndarray:
    """The weighted sum. float32 [n, ...], in place: one block of base and one difference, which is the callee's to change, are all that is held."""
    for weight, difference in differences:
        if weight != 1.0:
            difference *= np.float32(weight)
        base += difference
    return base
