"""Ways to combine several deltas on one tensor. A method is one function and one row.

    linear   W + sum_i w_i D_i        task arithmetic, Ilharco et al. 2023, arXiv 2212.04089

A method sees one row block of one tensor. Those that need a whole tensor first (TIES: its largest entries) take that in a
pass of their own over the same edits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from compiler.errors import RecipeError

# (base rows, which it may overwrite; (weight, difference) of each delta, each freshly made) -> merged rows
Combine = Callable[[np.ndarray, Iterable[tuple[float, np.ndarray]]], np.ndarray]


def linear(base: np.ndarray, differences: Iterable[tuple[float, np.ndarray]]) -> np.ndarray:
    """float32 [n, ...], in place: one block of base and one difference are all that is held."""
    for weight, difference in differences:
        if weight != 1.0:
            difference *= np.float32(weight)
        base += difference
    return base


COMBINES: Mapping[str, Combine] = {"linear": linear}


def combine_named(name: str, place: str = "combine") -> Combine:
    """Raises RecipeError for a method that is not a row of COMBINES."""
    if name not in COMBINES:
        raise RecipeError(place, expected=f"one of {', '.join(COMBINES)}", found=repr(name), remedy="choose one of these methods")
    return COMBINES[name]
