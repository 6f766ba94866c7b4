"""What is in a delta: of every tensor it touches rank, norm and share of the energy, and the same by layer.

    norm      Frobenius norm of weight * difference
    energy    norm squared; its share says where a delta does its work
    rank      smallest r that leaves at most 1e-5 of the norm, up to MOST; None beyond it, and for vectors

A tensor that the delta replaces whole has a difference only against a base. Without one its norm is the new tensor's and it
stays out of the shares.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compiler.checkpoints.view import Checkpoint
from compiler.deltas.base import Delta, Edit, wrong_delta
from compiler.deltas.bind import bind
from compiler.deltas.names import HEADS, Names
from compiler.deltas.spectrum import spectrum
from compiler.deltas.vocabulary import grow

MOST = 64
PRECISION = 1e-5
BLOCK_BYTES = 4 << 20
BASE_FREE = ("adalora", "loha", "lokr", "lora", "sparse", "vera")  # kinds whose difference does not look at the base
LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class Touched:
    """One tensor. base_norm: of the base's tensor, None without a base. replaced: the norm is of the new tensor, see the top."""

    name: str
    shape: tuple[int, ...]
    rank: int | None
    norm: float
    base_norm: float | None
    replaced: bool

    @property
    def layer(self) -> str:
        """`model.layers.3`, or the module's name where there is no number."""
        match = LAYER.match(self.name)
        return match[1] if match else self.name.rpartition(".")[0]

    @property
    def energy(self) -> float:
        return 0.0 if self.replaced else self.norm**2


def survey(delta: Delta, base: Checkpoint | None = None) -> list[Touched]:
    """Every tensor the delta touches, in its order. Raises DeltaError: a kind whose difference needs the base and none is given, or `bind`'s errors."""
    untold = any(size < 0 for edit in delta.edits for size in edit.shape)  # a shape that only the base tells
    if base is None and (delta.kind not in BASE_FREE or untold):
        raise wrong_delta(delta.origin, "a base beside it", f"none, and the difference of a {delta.kind} delta depends on it", "add --base BASE")
    found = _bound(delta, base) if base else _alone(delta)
    return [_touched(name, edit, rows, shape, old) for name, edit, rows, shape, old in found]


Rows = Callable[[int, int], np.ndarray]
Row = tuple[str, Edit, Rows, tuple[int, ...], Rows | None]


def _alone(delta: Delta) -> Iterator[Row]:
    for edit in delta.edits:
        width = edit.shape[1:]

        def rows(first: int, stop: int, edit: Edit = edit, width: tuple[int, ...] = width) -> np.ndarray:
            change = edit.change(first, np.zeros((stop - first, *width), np.float32), False)
            return change if edit.replaces else change * np.float32(delta.weight)

        yield edit.target, edit, rows, edit.shape, None


def _bound(delta: Delta, base: Checkpoint) -> Iterator[Row]:
    names = Names(base.tensors, str(base.config.get("model_type")))
    base = grow(base, names, [delta]).ground
    for name, edits in bind(base, names, [delta]).items():
        view = base.tensors.get(name)
        if view is None and name in HEADS:  # the base ties it to its embedding: the same change, unless the delta was trained on one side only
            if delta.tied:
                continue
            view = base.tensors.get(names.embedding() or "")
        for one in edits:
            if view is None:
                yield name, one.edit, _alone_rows(one.edit), one.edit.shape, None
                continue

            def rows(first: int, stop: int, one: Any = one, old: Rows = view.rows) -> np.ndarray:
                before = old(first, stop)
                change = one.edit.change(first, before, one.transposed)
                return change - before if one.edit.replaces else change * np.float32(one.weight)

            yield name, one.edit, rows, view.shape, view.rows


def _alone_rows(edit: Edit) -> Rows:
    return lambda first, stop: edit.change(first, np.zeros((stop - first, *edit.shape[1:]), np.float32), False)


def _touched(name: str, edit: Edit, rows: Rows, shape: tuple[int, ...], old: Rows | None) -> Touched:
    replaced = edit.replaces and old is None
    if len(shape) == 2 and not replaced:
        matrix = spectrum(rows, (shape[0], shape[1]), MOST, PRECISION)
        rank = matrix.rank_within(PRECISION * math.sqrt(matrix.energy), MOST) if matrix.energy else 0
        norm = math.sqrt(matrix.energy)
    else:
        rank, norm = None, _norm(rows, shape)
    return Touched(name, shape, rank, norm, _norm(old, shape) if old else None, replaced)


def _norm(rows: Rows, shape: tuple[int, ...]) -> float:
    count = shape[0] if shape else 1
    step, total = max(1, BLOCK_BYTES // max(4 * math.prod(shape[1:]), 1)), 0.0
    for first in range(0, count, step):
        total += float(np.sum(np.square(rows(first, min(first + step, count)), dtype=np.float64)))
    return math.sqrt(total)


def as_table(found: Sequence[Touched]) -> dict[str, Any]:
    """{"tensors": [...], "layers": [...]}, with shares of the energy; layers in the order of first touch."""
    total = sum(one.energy for one in found) or 1.0
    layers: dict[str, list[Touched]] = {}
    for one in found:
        layers.setdefault(one.layer, []).append(one)
    tensors = [
        {
            "tensor": one.name,
            "shape": list(one.shape),
            "rank": one.rank,
            "norm": one.norm,
            "relative": one.norm / one.base_norm if one.base_norm else None,
            "energy": one.energy / total,
            "replaced": one.replaced,
        }
        for one in found
    ]
    rows = [
        {"layer": layer, "tensors": len(group), "norm": math.sqrt(sum(one.energy for one in group)), "energy": sum(one.energy for one in group) / total}
        for layer, group in layers.items()
    ]
    return {"tensors": tensors, "layers": rows}


def plot(table: Mapping[str, Any], title: str, path: Path) -> None:
    """Energy by layer as bars, in the format of the file's ending (svg, png, pdf). The caller turns OSError into its own."""
    from matplotlib.figure import Figure

    layers = table["layers"]
    figure = Figure(figsize=(7, 1 + 0.22 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh([row["layer"] for row in layers], [100 * row["energy"] for row in layers], color="#4c72b0")
    axes.invert_yaxis()
    axes.set_xlabel("share of the delta's energy, %")
    axes.set_title(title)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
