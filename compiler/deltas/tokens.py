"""Trainable tokens, as PEFT 0.21 stores them: a few rows of an embedding, beside a LoRA (`trainable_token_indices`) or alone (TRAINABLE_TOKENS).

    merged[index_k] = value_k            value [tokens, dim], the other rows as they are
    difference = merged - W

The rows stand in trainable_tokens_delta (for new values, not differences); the indices are in adapter_config.json: a list for the
input embedding, or module name -> list. PEFT trains the head with the embedding where the model ties them, so such a delta stays tied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from compiler.checkpoints.view import TensorView
from compiler.deltas.base import ANY, Change, Edit, wrong_delta

PART = ".trainable_tokens_delta"


def is_tokens(name: str) -> bool:
    """Is a tensor of an adapter such rows?"""
    return name.endswith(PART)


def token_edit(place: str, module: str, rows: TensorView, config: Mapping[str, Any]) -> Edit:
    """The edit of an embedding's rows. Raises DeltaError: no indices for the module, another number of rows, indices twice or below 0."""
    indices = _indices(module, config)
    if indices is None or len(rows.shape) != 2 or len(indices) != rows.shape[0]:
        found = f"{'no' if indices is None else len(indices)} indices, and rows {list(rows.shape)}"
        raise wrong_delta(place, "one token index for each trained row", found, "put the adapter_config.json of this training run beside its weights")
    order = np.argsort(indices, kind="stable")
    places = np.asarray(indices, np.int64)[order]
    if len(places) and (places[0] < 0 or (np.diff(places) == 0).any()):
        raise wrong_delta(place, "token indices of at least 0, each once", str(list(indices))[:80], "correct adapter_config.json")
    read = lru_cache(maxsize=1)(lambda: rows.read()[order])

    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        low, high = np.searchsorted(places, (first, first + len(base)))
        result = np.zeros_like(base)
        result[places[low:high] - first] = read()[low:high] - base[places[low:high] - first]
        return result

    def prepare(tensor: TensorView, transposed: bool) -> Change:
        if len(places) and places[-1] >= tensor.shape[0]:
            found = f"index {places[-1]}: the adapter is for a base with more tokens"
            raise wrong_delta(place, f"token indices below {tensor.shape[0]}", found, "use the base it was trained on")
        return change

    return Edit(f"{module}.weight", (ANY, rows.shape[1]), change, reads_base=True, prepare=prepare, brings=tuple(places.tolist()))


def _indices(module: str, config: Mapping[str, Any]) -> Sequence[int] | None:
    told = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(told, Mapping):
        told = next((rows for name, rows in told.items() if module == name or module.endswith(f".{name}")), None)
    return [int(index) for index in told] if isinstance(told, Sequence) else None
