"""A delta that stays beside the base: its differences as products of two thin matrices, tensor by tensor.

    merged:    y = x (W + w L R)^T
    attached:  y = x W^T + (x R^T) (w L)^T        L [out, r], R [r, in], w the delta's weight

Both are the same function, so only a kind whose difference is exactly such a product can stay unmerged: LoRA, rsLoRA,
AdaLoRA and VeRA on linear weights. Binding, guards and names are those of a merge; what does not fit is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from compiler.checkpoints.view import Checkpoint
from compiler.deltas.base import Delta, wrong_delta
from compiler.deltas.bind import Bound
from compiler.deltas.names import EMBEDDINGS
from compiler.errors import DeltaError

Product = Callable[[], tuple[np.ndarray, np.ndarray]]  # -> left [rows, r], right [r, width] of a stored tensor's difference, float32, weight folded in


def products(base: Checkpoint, delta: Delta, bound: Mapping[str, Sequence[Bound]]) -> dict[str, Product]:
    """Tensor name -> its low-rank difference, read when it is asked for. bound: what a merge of this delta alone would do.

    Raises DeltaError naming everything that is no low-rank product of a linear weight.
    """
    misfits = [name for name, edits in bound.items() if name.endswith(EMBEDDINGS) or any(one.edit.factors is None for one in edits)]
    if misfits:
        raise _not_attachable(delta, misfits)
    return {name: partial(_product, edits, _shape(base, name)) for name, edits in bound.items()}


def _shape(base: Checkpoint, name: str) -> tuple[int, ...]:
    """A tied base stores no head: it has the embedding's shape."""
    return next(view.shape for stored, view in base.tensors.items() if stored == name or (name not in base.tensors and stored.endswith(EMBEDDINGS)))


def _product(edits: Sequence[Bound], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    lefts, rights = zip(*(_factors(one, shape) for one in edits), strict=True)
    return np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0)


def _factors(one: Bound, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of one edit, for the tensor as it is stored: (L R)^T = R^T L^T."""
    assert one.edit.factors is not None
    left, right = one.edit.factors(shape[::-1] if one.transposed else shape)
    left, right = (right.T, left.T) if one.transposed else (left, right)
    return left * np.float32(one.weight), right


def _not_attachable(delta: Delta, names: Sequence[str]) -> DeltaError:
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return wrong_delta(
        delta.origin,
        "low-rank products of linear weights (LoRA, rsLoRA, AdaLoRA, VeRA), which alone can stay unmerged",
        f"{delta.kind}, and no such product for {some}",
        "merge it: write `deltas: {mode: merged, ...}` for this delta in a recipe of its own",
    )
