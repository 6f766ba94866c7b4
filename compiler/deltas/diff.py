"""Full differences: another checkpoint as a delta (task vectors, Ilharco et al. 2023, arXiv 2212.04089), or a file of differences.

    difference = other - base           per tensor; a checkpoint folder, a .gguf file
    difference = as stored              a safetensors file with the metadata of `sparse`'s format and kind `diff`; no `shapes`

A checkpoint is a delta of every float tensor it holds; integers (position ids) are left as they are in the base. A
classification head that the base lacks is added, at weight 1 only, with its labels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from compiler.checkpoints.files import sha256_file, sha256_parts
from compiler.checkpoints.safetensors import FLOATS, STORED
from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.deltas.base import Change, Delta, Edit, wrong_delta
from compiler.deltas.names import HEADS, Names
from compiler.deltas.peft import check_finite

HEAD_PARTS = re.compile(r"(.+\.)?(classifier|score|pre_classifier|pooler|qa_outputs)(\.dense|\.out_proj)?\.(weight|bias)")
TASKS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS", "QuestionAnswering": "QUESTION_ANS"}


def load_diff(path: Path, origin: str, weight: float, metadata: Mapping[str, str], tensors: Mapping[str, TensorView]) -> Delta:
    """A file of differences. Raises DeltaError: no tensors, a type that is no float, NaN or infinity."""
    for view in tensors.values():
        if view.dtype not in FLOATS:
            raise wrong_delta(f"{origin}: {view.name}", "differences of a float type", view.dtype, "write the delta again, without this tensor")
    if not tensors:
        raise wrong_delta(origin, "differences of at least one tensor", "none", "write the delta again")
    check_finite(origin, tensors.values())
    return Delta(
        kind="diff",
        origin=origin,
        weight=weight,
        edits=tuple(Edit(name, view.shape, _stored(view)) for name, view in tensors.items()),
        digest_of=lambda: sha256_parts({"delta.safetensors": sha256_file(path)}),
        base_name=metadata.get("base_name", ""),
        base_digest=metadata.get("base_digest") or None,
    )


def checkpoint_delta(other: Checkpoint, origin: str, weight: float) -> Delta:
    """`other` as a delta of whatever base it is merged into. Raises DeltaError: no float tensors, NaN or infinity."""
    floats = {name: view for name, view in other.tensors.items() if view.dtype in FLOATS or view.dtype not in STORED}
    if not floats:
        raise wrong_delta(origin, "a checkpoint with float tensors", "none", "name the folder of the trained model")
    check_finite(origin, floats.values())
    tied = bool(other.config.get("tie_word_embeddings", not any(name in floats for name in HEADS)))
    edits = [
        Edit(name, view.shape, _against(view), reads_base=True, may_add=bool(HEAD_PARTS.fullmatch(name)), brings=range(view.row_count))
        for name, view in floats.items()
        if not (tied and name in HEADS)
    ]
    head = _tied_head(other) if tied else None
    return Delta(
        kind="diff",
        origin=origin,
        weight=weight,
        edits=(*edits, head) if head else tuple(edits),
        digest_of=lambda: other.digest,
        labels={int(key): str(label) for key, label in (other.config.get("id2label") or {}).items() if str(key).isdigit()},
        task=next((task for name in other.config.get("architectures") or () for suffix, task in TASKS.items() if str(name).endswith(suffix)), ""),
        every_layer=True,
        tied=tied,
        assets=other.assets,
    )


def _tied_head(other: Checkpoint) -> Edit | None:
    """The head that a tied language model has without storing it: a base that stores one has to change there too."""
    embedding = Names(other.tensors, str(other.config.get("model_type"))).embedding()
    if embedding is None or not any(re.search("CausalLM|LMHead", str(name)) for name in other.config.get("architectures") or ()):
        return None
    view = other.tensors[embedding]
    return Edit(HEADS[0], view.shape, _against(view), optional=True, reads_base=True, brings=range(view.row_count))


def _stored(view: TensorView) -> Change:
    return lambda first, base, transposed: view.rows(first, first + len(base))


def _against(view: TensorView) -> Change:
    """The rows minus the base's; of a tensor that the base lacks, the rows: bound as a replacement, it is shown rows without columns."""

    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        rows = view.rows(first, first + len(base))
        return np.subtract(rows, base, out=rows) if base.shape == rows.shape else rows

    return change
