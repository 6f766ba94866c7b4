"""DoRA (Liu et al. 2024, arXiv 2402.09353), as PEFT 0.21 stores it: a LoRA adapter with `use_dora` and one magnitude vector per module.

    merged = m * V / ||V||,  V = W + s * B A        m [out], W [out, in], the norm over each output's inputs
    difference = merged - W
    embedding: m [dim], W [vocabulary, dim], the norm over each column

The norm is of the base the adapter is applied to, so the difference depends on the base. A linear weight's rows hold what
their norms need; those of a Conv1D [in, out] and of an embedding run down the columns, so one pass over the tensor, the
first time a row is asked for, adds up the squares (float64) and keeps one number per column.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from compiler.checkpoints.view import TensorView
from compiler.deltas.base import Change, Edit, wrong_delta
from compiler.errors import DeltaError


def dora_edit(lora: Edit, magnitude: TensorView, place: str, by_columns: bool) -> Edit:
    """The DoRA of a LoRA edit. by_columns: the weight is an embedding's. Raises DeltaError for a magnitude of another length."""
    outputs = lora.shape[1] if by_columns else lora.shape[0]
    if magnitude.shape != (outputs,):
        raise wrong_delta(
            place, f"a lora_magnitude_vector of shape [{outputs}]", f"{list(magnitude.shape)}", "save the adapter again: its parts belong to different runs"
        )

    def rows(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        assert not (by_columns or transposed), "norms down the columns need the bound tensor"
        moved = lora.change(first, base, False)
        moved += base
        factor = _factor(magnitude.rows(first, first + len(base)), np.sqrt(np.einsum("ij,ij->i", moved, moved, dtype=np.float64)), place)
        moved *= factor[:, None]
        return np.subtract(moved, base, out=moved)

    def prepare(tensor: TensorView, transposed: bool) -> Change:
        return _columns(lora, magnitude, tensor, place) if by_columns or transposed else rows

    return replace(lora, change=rows, prepare=prepare, reads_base=True, factors=None)


def _columns(lora: Edit, magnitude: TensorView, tensor: TensorView, place: str) -> Change:
    @lru_cache(maxsize=2)
    def factor(transposed: bool) -> np.ndarray:
        squares = np.zeros(tensor.shape[1], np.float64)
        for first, block in tensor.blocks():
            block += lora.change(first, block, transposed)
            squares += np.einsum("ij,ij->j", block, block, dtype=np.float64)
        return _factor(magnitude.read(), np.sqrt(squares), place)

    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        moved = lora.change(first, base, transposed)
        moved += base
        moved *= factor(transposed)
        return np.subtract(moved, base, out=moved)

    return change


def _factor(magnitude: np.ndarray, norms: np.ndarray, place: str) -> np.ndarray:
    """m / ||V|| float32. Raises DeltaError where the norm is 0: an output whose weights are all 0 has no direction to scale."""
    if not norms.all():
        raise _no_direction(place, int((norms == 0).sum()))
    return (magnitude / norms).astype(np.float32)


def _no_direction(place: str, count: int) -> DeltaError:
    remedy = "use the base it was trained on, or leave this module out of the adapter"
    return wrong_delta(place, "weights with a direction for DoRA to scale", f"{count} outputs whose weights are all 0 in the base", remedy)
