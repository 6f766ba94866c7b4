"""LoHa (Hyeon-Woo et al. 2022, FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859), as PEFT 0.21 stores it.

difference = s * (A1 B1) o (A2 B2)      o: entry by entry; Ai [out, r] hada_wi_a, Bi [r, in] hada_wi_b
s = alpha / r                           rank_pattern and alpha_pattern as in LoRA
"""

from __future__ import annotations

import numpy as np

from compiler.checkpoints.view import TensorView
from compiler.deltas.base import Change, Delta, Edit, low_rank
from compiler.deltas.peft import Adapter, Parts, Whole, make_delta, misfit, modules_of, need

PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def load_loha(adapter: Adapter) -> Delta:
    """A PEFT LoHa adapter. Raises DeltaError: a missing part, convolutions (hada_t1), parts that do not fit together."""
    modules, rest = modules_of(adapter, PARTS, "hada_")
    return make_delta(adapter, "loha", [_edit(adapter, module, parts) for module, parts in modules.items()], modules, rest)


def _edit(adapter: Adapter, module: str, parts: Parts) -> Edit:
    place = adapter.place(module)
    a1, b1, a2, b2 = factors = need(place, parts, *PARTS)
    if any(len(view.shape) != 2 for view in factors) or a1.shape != a2.shape or b1.shape != b2.shape or a1.shape[1] != b1.shape[0]:
        raise misfit(place, "two pairs of one shape, [out, r] and [r, in]", parts)
    scale = adapter.scale(place, module, "alpha", a1.shape[1])
    return Edit(f"{module}.weight", (a1.shape[0], b1.shape[1]), _change((a1, b1), (a2, b2), scale, adapter.whole), transposes=True)


def _change(one: tuple[TensorView, TensorView], two: tuple[TensorView, TensorView], scale: float, whole: Whole) -> Change:
    def product(pair: tuple[TensorView, TensorView], first: int, stop: int, transposed: bool) -> np.ndarray:
        a, b = pair
        if transposed:
            return low_rank(whole(b)[:, first:stop].T, whole(a).T)
        return low_rank(a.rows(first, stop), whole(b))

    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        stop = first + len(base)
        result = product(one, first, stop, transposed)
        result *= product(two, first, stop, transposed)
        result *= np.float32(scale)
        return result

    return change
