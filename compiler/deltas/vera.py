"""VeRA (Kopiczko et al. 2024, arXiv 2310.11454), as PEFT 0.21 stores it: one random pair for all modules, two vectors for each.

    difference = (b o B[:out]) (d o A[:, :in])      B [largest out, r] vera_B, A [r, largest in] vera_A
                                                    b [out] vera_lambda_b, d [r] vera_lambda_d

A and B come from torch's random generator; only a file that holds them (save_projection, PEFT's default) says what they were.
A file tells `out` only, so that side alone is compared with the base, and `in` with the width of A.
"""

from __future__ import annotations

import numpy as np

from compiler.checkpoints.view import TensorView
from compiler.deltas.base import ANY, Change, Delta, Edit, low_rank, wrong_delta
from compiler.deltas.peft import Adapter, Parts, make_delta, misfit, modules_of, need

PARTS = ("vera_lambda_b", "vera_lambda_d")
SHARED = ("base_model.vera_A", "base_model.vera_B")


def load_vera(adapter: Adapter) -> Delta:
    """A PEFT VeRA adapter. Raises DeltaError: projections not saved, a missing part, parts that do not fit together."""
    missing = [name for name in SHARED if name not in adapter.tensors]
    if missing:
        remedy = "save it again with save_projection=True: they come from a random generator that may differ between versions and machines"
        raise wrong_delta(adapter.origin, "vera_A and vera_B in the file", f"no {missing[0]}", remedy)
    modules, rest = modules_of(adapter, PARTS, "vera_lambda")
    edits = [_edit(adapter, module, parts) for module, parts in modules.items()]
    return make_delta(adapter, "vera", edits, modules, {name: view for name, view in rest.items() if name not in SHARED})


def _edit(adapter: Adapter, module: str, parts: Parts) -> Edit:
    place = adapter.place(module)
    left, right = need(place, parts, *PARTS)
    a, b = (adapter.tensors[name] for name in SHARED)
    fits = len(left.shape) == len(right.shape) == 1 and a.shape[0] == b.shape[1] == right.shape[0] and left.shape[0] <= b.shape[0]
    if not fits:
        raise misfit(place, "vera_lambda_b [out], vera_lambda_d [r]", {**parts, "vera_A": a, "vera_B": b})
    change = _change(adapter, left, right)

    def prepare(tensor: TensorView, transposed: bool) -> Change:
        inputs = tensor.shape[0 if transposed else 1]
        if inputs > a.shape[1]:
            found = f"{inputs}, and vera_A {list(a.shape)}: the adapter is for another base"
            raise wrong_delta(place, "inputs that vera_A covers", found, "use the base it was trained on")
        return change

    def factors(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        return b.rows(0, shape[0]) * left.read()[:, None], adapter.whole(a)[:, : shape[1]] * right.read()[:, None]

    flipped = bool(adapter.config.get("fan_in_fan_out"))
    return Edit(f"{module}.weight", (left.shape[0], ANY), change, transposes=True, flipped=flipped, prepare=prepare, factors=factors)


def _change(adapter: Adapter, left: TensorView, right: TensorView) -> Change:
    a, b = (adapter.tensors[name] for name in SHARED)

    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        stop, outputs = first + len(base), left.shape[0]
        if transposed:
            return low_rank((adapter.whole(a)[:, first:stop] * right.read()[:, None]).T, (adapter.whole(b)[:outputs] * left.read()[:, None]).T)
        return low_rank(b.rows(first, stop) * left.rows(first, stop)[:, None] * right.read(), adapter.whole(a)[:, : base.shape[1]])

    return change
