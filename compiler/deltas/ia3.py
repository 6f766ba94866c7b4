"""(IA)^3 (Liu et al. 2022, arXiv 2205.05638), as PEFT 0.21 stores it: one learned vector per module.

    merged = l * W, l [out, 1], and l * bias where there is one      keys, values, attention outputs
    merged = W * l, l [1, in]                                        feedforward_modules: the input is scaled
    difference = merged - W

A file tells one side of the weight only, so that side alone is compared with the base.
"""

from __future__ import annotations

import numpy as np

from compiler.checkpoints.view import TensorView
from compiler.deltas.base import ANY, Change, Delta, Edit
from compiler.deltas.peft import Adapter, Parts, make_delta, misfit, modules_of, need


def load_ia3(adapter: Adapter) -> Delta:
    """A PEFT IA3 adapter. Raises DeltaError: a vector of another form (convolutions)."""
    modules, rest = modules_of(adapter, ("ia3_l",), "ia3_")
    edits = [edit for module, parts in modules.items() for edit in _edits(adapter, module, parts)]
    return make_delta(adapter, "ia3", edits, modules, rest)


def _edits(adapter: Adapter, module: str, parts: Parts) -> list[Edit]:
    (vector,) = need(adapter.place(module), parts, "ia3_l")
    if len(vector.shape) != 2 or 1 not in vector.shape:
        raise misfit(adapter.place(module), "ia3_l of shape [out, 1] or [1, in]", parts)
    flipped = bool(adapter.config.get("fan_in_fan_out"))
    output = vector.shape[1] == 1
    shape = (vector.shape[0], ANY) if output else (ANY, vector.shape[1])
    weight = Edit(f"{module}.weight", shape, _weight_change(vector, output), transposes=True, flipped=flipped, reads_base=True)
    if not output:
        return [weight]
    return [weight, Edit(f"{module}.bias", (vector.shape[0],), _bias_change(vector), optional=True, reads_base=True)]


def _weight_change(vector: TensorView, output: bool) -> Change:
    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        scale = vector.read().ravel() - np.float32(1)
        if output != transposed:  # one factor per row
            scale = scale[first : first + len(base), None]
        return base * scale

    return change


def _bias_change(vector: TensorView) -> Change:
    return lambda first, base, transposed: base * (vector.read().ravel()[first : first + len(base)] - np.float32(1))
