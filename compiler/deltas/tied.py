"""Tied embeddings: input embedding and output head are one tensor.

A delta trained on one side leaves the other as it was, so writing it into the shared tensor would change both (PEFT issue
2777). The two are untied instead: both tensors, each with its own edits, `tie_word_embeddings` false. They stay tied when
the delta was trained tied, or brings the same rows for both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from compiler.checkpoints.view import Checkpoint
from compiler.deltas.base import wrong_delta
from compiler.deltas.bind import Bound
from compiler.deltas.heads import TASK_CLASSES
from compiler.deltas.names import HEADS, Names


def untie(base: Checkpoint, names: Names, bound: dict[str, list[Bound]]) -> tuple[tuple[str, str] | None, tuple[str, ...]]:
    """((head, embedding), notes) where one tied tensor must become two; edits of a tied delta are given to both sides."""
    embedding = names.embedding()
    head = next((name for name in HEADS if name in bound or name in base.tensors), HEADS[0])
    stored = head in base.tensors
    _refuse_tied_mask_head(base, bound.get(embedding or "", ()))
    if embedding is None or (embedding not in bound and head not in bound) or not _has_language_head(base, embedding, head):
        return None, ()
    if not base.config.get("tie_word_embeddings", not stored):
        return None, ()
    if _stay_tied(bound.get(embedding, []), bound.get(head, [])):
        shared = bound.get(embedding) or bound.get(head) or []
        bound[embedding] = shared
        if stored:
            bound[head] = shared
        else:
            bound.pop(head, None)
        return None, ()
    size = 4 * base.tensors[embedding].size
    sides = " and ".join(name for name in (embedding, head) if name in bound)
    return (head, embedding), (f"untied {head} from {embedding}: the delta changes {sides} only on its own side; costs {size} bytes in float32",)


def _refuse_tied_mask_head(base: Checkpoint, edits: Sequence[Bound]) -> None:
    """A masked language model ties its decoder to the embedding under a name of each family's own: not built, so not guessed."""
    masked = any(re.search("MaskedLM|PreTraining", str(name)) for name in base.config.get("architectures") or ())
    for one in edits:
        if masked and not one.delta.tied and one.delta.task not in (*TASK_CLASSES, "FEATURE_EXTRACTION"):
            found = "an adapter of the input embedding, which this base ties to its mask head"
            raise wrong_delta(
                one.delta.origin, "an adapter of linear layers, or a task that drops the mask head", found, "set task_type in adapter_config.json"
            )


def _has_language_head(base: Checkpoint, embedding: str, head: str) -> bool:
    """Does the model end in a language head, stored or tied? An encoder does not, whatever its config says about tying."""
    classes = [str(name) for name in base.config.get("architectures") or ()]
    if head in base.tensors or not classes:
        return head in base.tensors or not embedding.endswith("word_embeddings.weight")
    return any(re.search("CausalLM|LMHead", name) for name in classes)


def _stay_tied(embedding: Sequence[Bound], head: Sequence[Bound]) -> bool:
    if all(one.delta.tied for one in (*embedding, *head)):
        return True
    if len(embedding) != 1 or len(head) != 1 or not (embedding[0].edit.replaces and head[0].edit.replaces):
        return False
    shape, step = embedding[0].edit.shape, 4096
    shown = np.empty((step, 0), np.float32)  # a replacement looks only at how many rows it is shown
    for first in range(0, shape[0], step):
        rows = shown[: min(step, shape[0] - first)]
        if not np.array_equal(embedding[0].edit.change(first, rows, False), head[0].edit.change(first, rows, False)):
            return False
    return True
