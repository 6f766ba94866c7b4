"""SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175), as PEFT 0.21 stores it: a sparse change of high rank.

    difference[i, j] = value      shira_indices [2, n] (rows i, columns j), shira_weight [n], n = r (in + out)

A file tells no shape, so the number of its entries and where they reach is compared with the base. PEFT writes it for linear layers only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from compiler.checkpoints.view import TensorView
from compiler.deltas.base import ANY, Change, Delta, Edit, wrong_delta
from compiler.deltas.peft import Adapter, Parts, make_delta, misfit, modules_of, need
from compiler.deltas.sparse import check_positions, integers, scatter

Read = Callable[[TensorView, TensorView, int], tuple[np.ndarray, np.ndarray]]


def load_shira(adapter: Adapter) -> Delta:
    """A PEFT SHiRA adapter. Raises DeltaError: a missing part, entries of another number than r (in + out), or outside of the base."""
    modules, rest = modules_of(adapter, ("shira_weight", "shira_indices"), "shira_")
    kept = lru_cache(maxsize=1)(_entries)
    edits = [_edit(adapter, module, parts, kept) for module, parts in modules.items()]
    return make_delta(adapter, "shira", edits, modules, rest)


def _entries(indices: TensorView, values: TensorView, columns: int) -> tuple[np.ndarray, np.ndarray]:
    rows, inside = integers(indices)
    positions = rows * columns + inside
    order = np.argsort(positions, kind="stable")
    return positions[order], values.read()[order]


def _edit(adapter: Adapter, module: str, parts: Parts, kept: Read) -> Edit:
    place = adapter.place(module)
    values, indices = need(place, parts, "shira_weight", "shira_indices")
    if len(values.shape) != 1 or indices.shape != (2, *values.shape):
        raise misfit(place, "shira_indices [2, n] and shira_weight [n]", parts)

    def prepare(tensor: TensorView, transposed: bool) -> Change:
        outputs, inputs = tensor.shape
        rank = int(adapter.config.get("r", 32))
        found, expected = values.shape[0], rank * (inputs + outputs)
        rows, columns = integers(indices)
        inside = rows.size and rows.min() >= 0 and columns.min() >= 0 and rows.max() < outputs and columns.max() < inputs
        if found != expected or not inside:
            reach = f"{found} entries up to row {rows.max(initial=0)}, column {columns.max(initial=0)}: the adapter is for another base"
            raise wrong_delta(place, f"{expected} entries, r {rank}, inside {[outputs, inputs]}", reach, "use the base it was trained on")
        check_positions(place, kept(indices, values, inputs)[0], outputs * inputs)
        return scatter(lambda: kept(indices, values, inputs))

    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        return scatter(lambda: kept(indices, values, base.shape[1]))(first, base, transposed)

    return Edit(f"{module}.weight", (ANY, ANY), change, prepare=prepare)
