"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512), as PEFT 0.21 stores it: a LoRA whose ranks were pruned in training.

    difference = s * B (E o A)      A [r, in], B [out, r], E [r, 1] the singular values
    s = alpha / (init_r + 1e-5)     init_r whatever rank is left; alpha <= 0: init_r in its place

The rank left may differ from module to module, and may be 0: such a module is as in the base.
"""

from __future__ import annotations

import numpy as np

from compiler.checkpoints.view import TensorView
from compiler.deltas.base import Change, Delta, Edit, low_rank
from compiler.deltas.lora import check_pair, refuse_variants
from compiler.deltas.peft import Adapter, Parts, Whole, make_delta, misfit, modules_of, need

PARTS = ("lora_A", "lora_B", "lora_E")


def load_adalora(adapter: Adapter) -> Delta:
    """A PEFT AdaLoRA adapter. Raises DeltaError: variants not built, a missing part, parts that do not fit together."""
    refuse_variants(adapter.origin, adapter.config)
    modules, rest = modules_of(adapter, PARTS, "lora_")
    return make_delta(adapter, "adalora", [_edit(adapter, module, parts) for module, parts in modules.items()], modules, rest)


def _edit(adapter: Adapter, module: str, parts: Parts) -> Edit:
    place = adapter.place(module)
    a, b, e = need(place, parts, *PARTS)
    check_pair(place, a, b)
    if e.shape != (a.shape[0], 1):
        raise misfit(place, "lora_E [r, 1] beside lora_A [r, in]", parts)
    first = float(adapter.config.get("init_r", 12))
    alpha = float(adapter.config.get("lora_alpha", 8))
    scale = (alpha if alpha > 0 else first) / (first + 1e-5)
    flipped = bool(adapter.config.get("fan_in_fan_out"))
    change = _change(a, b, e, scale, adapter.whole)

    def factors(_: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        return b.read() * (e.read().ravel() * np.float32(scale)), a.read()

    return Edit(f"{module}.weight", (b.shape[0], a.shape[1]), change, transposes=True, flipped=flipped, factors=factors)


def _change(a: TensorView, b: TensorView, e: TensorView, scale: float, whole: Whole) -> Change:
    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        stop = first + len(base)
        values = e.read().ravel() * np.float32(scale)
        if transposed:
            return low_rank(whole(a)[:, first:stop].T * values, whole(b).T)
        return low_rank(b.rows(first, stop) * values, whole(a))

    return change
