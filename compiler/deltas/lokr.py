"""LoKr (Edalati et al. 2022, KronA, arXiv 2212.10650; LyCORIS, arXiv 2309.14859), as PEFT 0.21 stores it.

    difference = s * W1 (x) W2              (x): Kronecker product; W1 [a, c], W2 [b, d], weight [a b, c d]
    W1 = lokr_w1, or lokr_w1_a lokr_w1_b    [a, r] [r, c] (decompose_both)
    W2 = lokr_w2, or lokr_w2_a lokr_w2_b    [b, r] [r, d]
    s = alpha / r                           rank_pattern and alpha_pattern as in LoRA

Row i of the product is W1[i // b] (x) W2[i % b], so a block of rows needs the two small factors only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from compiler.checkpoints.view import TensorView
from compiler.deltas.base import Change, Delta, Edit, low_rank, wrong_delta
from compiler.deltas.peft import Adapter, Parts, Whole, by_pattern, make_delta, misfit, modules_of, need

PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def load_lokr(adapter: Adapter) -> Delta:
    """A PEFT LoKr adapter. Raises DeltaError: a missing part, convolutions (lokr_t2), parts that do not fit together."""
    modules, rest = modules_of(adapter, PARTS, "lokr_")
    return make_delta(adapter, "lokr", [_edit(adapter, module, parts) for module, parts in modules.items()], modules, rest)


def _edit(adapter: Adapter, module: str, parts: Parts) -> Edit:
    place = adapter.place(module)
    if any(len(view.shape) != 2 for view in parts.values()):
        raise misfit(place, "factors of two dimensions", parts)
    one, (a, c), first_rank = _factor(place, parts, "lokr_w1", adapter.whole)
    two, (b, d), second_rank = _factor(place, parts, "lokr_w2", adapter.whole)
    said = int(by_pattern(adapter.config.get("rank_pattern"), module, adapter.config.get("r", 8)))
    for rank in (first_rank, second_rank):
        if rank is not None and rank != said:
            raise wrong_delta(
                place,
                f"rank {said} as adapter_config.json says",
                f"rank {rank} in the weights",
                "put the adapter_config.json of this training run beside its weights",
            )
    scale = adapter.scale(place, module, "alpha", said)  # a factor stored whole does not tell its rank
    return Edit(f"{module}.weight", (a * b, c * d), _change(one, two, scale), transposes=True)


def _factor(place: str, parts: Parts, name: str, whole: Whole) -> tuple[Callable[[], np.ndarray], tuple[int, int], int | None]:
    """(reader of W1 or W2, its shape, its rank or None where it is stored whole)."""
    if name in parts:
        view: TensorView = parts[name]
        return (lambda: whole(view)), (view.shape[0], view.shape[1]), None
    left, right = need(place, parts, f"{name}_a", f"{name}_b")
    if left.shape[1] != right.shape[0]:
        raise misfit(place, f"{name}_a [_, r] and {name}_b [r, _]", parts)
    return (lambda: low_rank(whole(left), whole(right))), (left.shape[0], right.shape[1]), left.shape[1]


def _change(one: Callable[[], np.ndarray], two: Callable[[], np.ndarray], scale: float) -> Change:
    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        left, right = one() * np.float32(scale), two()
        if transposed:  # (W1 (x) W2)^T = W1^T (x) W2^T
            left, right = left.T, right.T
        rows = np.arange(first, first + len(base))
        product = left[rows // len(right)][:, :, None] * right[rows % len(right)][:, None, :]
        return product.reshape(len(base), -1)

    return change
