"""Stage 1: base + deltas -> one checkpoint, as a lazy float32 view. The base is never changed.

`plan_merge` binds every edit to a tensor of the base and raises for what does not fit; `MergePlan.view` reads rows through
base, differences and the combine method; `MergePlan.record` says which delta touched which tensor, for the manifest.

Tied embeddings. Input embedding and output head are one tensor; a delta trained on one side leaves the other as it was, so
writing it into the shared tensor would change both (PEFT issue 2777). The view unties instead: both tensors, each with its
own edits, `tie_word_embeddings` false. They stay tied when the delta was trained tied, or brings the same rows for both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from compiler.checkpoints.files import sha256_parts
from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.deltas.base import Delta, Edit, wrong_delta
from compiler.deltas.combine import Combine, combine_named
from compiler.deltas.load import labels_as_config
from compiler.deltas.names import HEADS, STORED_INPUT_FIRST, Names
from compiler.errors import DeltaError

# PEFT task type -> what transformers calls the class with that head
TASK_CLASSES = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification", "QUESTION_ANS": "ForQuestionAnswering"}
CLASSIFIERS = ("classifier.out_proj.weight", "classifier.weight", "score.weight")


@dataclass(frozen=True)
class Bound:
    """An edit that fits a tensor of the base. transposed: the base holds it as [in, out]."""

    delta: Delta
    edit: Edit
    transposed: bool


@dataclass(frozen=True)
class MergePlan:
    """What a merge does. bound: base or added name -> edits in order. head: (head's name, embedding's name) where it unties."""

    base: Checkpoint
    deltas: tuple[Delta, ...]
    combine: str
    bound: Mapping[str, tuple[Bound, ...]] = field(repr=False)
    added: tuple[str, ...] = ()
    head: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()

    def view(self) -> Checkpoint:
        """The merged checkpoint; nothing is computed until rows are read."""
        method = combine_named(self.combine)
        tensors = dict(self.base.tensors)
        if self.head:
            name, embedding = self.head
            tensors[name] = replace(self.base.tensors[embedding], name=name)
        tensors = {name: _merged(view, self.bound[name], method) if name in self.bound else view for name, view in tensors.items()}
        for name in self.added:
            tensors[name] = _added(name, self.bound[name], method)
        prefix = self._prefix
        if prefix:
            tensors = {_wrapped(name, prefix, self.added): replace(view, name=_wrapped(name, prefix, self.added)) for name, view in tensors.items()}
        origin = " + ".join([self.base.origin, *(delta.origin for delta in self.deltas)])
        return Checkpoint(tensors, self._config(), self.base.assets, origin, self._digest)

    def record(self) -> dict[str, Any]:
        """The merge for the manifest: base, deltas with weight and digest, tensors each one touched, what was untied or added."""
        touched = {delta.origin: sorted(name for name, edits in self.bound.items() if any(one.delta is delta for one in edits)) for delta in self.deltas}
        return {
            "base": {"name": self.base.origin, "digest": self.base.digest},
            "combine": self.combine,
            "deltas": [
                {
                    "name": delta.origin,
                    "kind": delta.kind,
                    "weight": delta.weight,
                    "digest": delta.digest,
                    "trained_on": delta.base_name,
                    "tensors": touched[delta.origin],
                }
                for delta in self.deltas
            ],
            "added": list(self.added),
            "notes": list(self.notes),
        }

    @cached_property
    def _names(self) -> Names:
        return Names(self.base.tensors, str(self.base.config.get("model_type")))

    @property
    def _prefix(self) -> str:
        """What base names gain when a head is put on a bare encoder, so that the result is one model with one naming."""
        return self._names.prefix if self.added and self._names.bare else ""

    def _config(self) -> dict[str, Any]:
        config = dict(self.base.config)
        if self.head:
            config["tie_word_embeddings"] = False
        for delta in self.deltas:
            config.update(_head_config(config, delta, self.bound))
        return config

    def _digest(self) -> str:
        parts = {"base": self.base.digest, "combine": self.combine}
        for number, delta in enumerate(self.deltas):
            parts[f"delta {number:04d}"] = f"{delta.digest} {delta.weight!r}"
        return sha256_parts(parts)


def merged_view(base: Checkpoint, deltas: Sequence[Delta], combine: str = "linear") -> Checkpoint:
    """base + deltas as a lazy checkpoint. Raises DeltaError for a delta that does not fit, RecipeError for an unknown combine."""
    return plan_merge(base, deltas, combine).view() if deltas else base


def plan_merge(base: Checkpoint, deltas: Sequence[Delta], combine: str = "linear") -> MergePlan:
    """Bind the deltas to the base.

    Raises DeltaError: a base digest that differs, keys that match nothing or only in part, shapes that do not fit, a replacement
    at a weight other than 1 or by two deltas; RecipeError: an unknown combine.
    """
    combine_named(combine)
    names = Names(base.tensors, str(base.config.get("model_type")))
    bound: dict[str, list[Bound]] = {}
    added: dict[str, None] = {}
    for delta in deltas:
        _check_digest(base, delta)
        for name, one in _bind(base, names, delta):
            bound.setdefault(name, []).append(one)
            if name not in base.tensors and name not in HEADS:
                added[name] = None
    _check_replacements(bound)
    head, notes = _untie(base, names, deltas, bound)
    known = base.tensors.keys() | added.keys() | ({head[0]} if head else set())
    plan = {name: tuple(edits) for name, edits in bound.items() if name in known}
    return MergePlan(base, tuple(deltas), combine, plan, tuple(added), head, notes)


def _check_digest(base: Checkpoint, delta: Delta) -> None:
    if delta.base_digest and delta.base_digest != base.digest:
        raise wrong_delta(delta.origin, f"the base it was made from, {delta.base_digest[:12]}", base.digest[:12], "compile it with the base it names")


def _bind(base: Checkpoint, names: Names, delta: Delta) -> Iterator[tuple[str, Bound]]:
    """(base name, edit) of every edit of one delta, the misfits refused first, all together."""
    found = {target: _find(base, names, target) for target in delta.names}
    may_add = {edit.target for edit in delta.edits if edit.may_add}
    lost = [target for target, name in found.items() if name is None and target not in may_add]
    if lost:
        raise _unmatched(base, names, delta, lost, len(found))
    input_first = base.config.get("model_type") in STORED_INPUT_FIRST
    for edit in delta.edits:
        name = found[edit.target]
        if name is None:
            yield edit.target, Bound(delta, edit, False)
            continue
        shape = _shape(base, names, name)
        transposed = replace(edit, flipped=edit.flipped or (input_first and name not in HEADS)).layout(shape)
        if transposed is None:
            raise wrong_delta(
                f"{delta.origin}: {edit.target}",
                f"a base tensor of shape {list(edit.shape)}",
                f"{list(shape)} in {base.origin}: the adapter is for another base",
                _trained_on(delta),
            )
        yield name, Bound(delta, edit, transposed)


def _find(base: Checkpoint, names: Names, target: str) -> str | None:
    """A tied base stores no head, yet a delta may change it."""
    name = names.find(target)
    if name is None and target in HEADS and names.embedding() and base.config.get("tie_word_embeddings", True):
        return target
    return name


def _shape(base: Checkpoint, names: Names, name: str) -> tuple[int, ...]:
    return base.tensors[name if name in base.tensors else str(names.embedding())].shape


def _trained_on(delta: Delta) -> str:
    return f"use the base it was trained on, {delta.base_name}" if delta.base_name else "use the base it was trained on"


def _unmatched(base: Checkpoint, names: Names, delta: Delta, lost: Sequence[str], total: int) -> DeltaError:
    near = names.nearest(lost[0])
    hint = f"nearest to {lost[0]}: {', '.join(near)}; " if near else ""
    some = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
    part = "nothing matches" if len(lost) == total else f"{len(lost)} of {total} keys match nothing"
    return wrong_delta(delta.origin, f"parameters of {base.origin}", f"{part}: {some}", hint + _trained_on(delta))


def _check_replacements(bound: Mapping[str, Sequence[Bound]]) -> None:
    for name, edits in bound.items():
        replacing = [one for one in edits if one.edit.replaces]
        for one in replacing:
            if one.delta.weight != 1.0:
                remedy = "give this delta weight 1.0, or leave the module out of modules_to_save"
                raise wrong_delta(f"{one.delta.origin}: {name}", "weight 1.0 for a module that is replaced whole", f"{one.delta.weight}", remedy)
        if len(replacing) > 1:
            origins = " and ".join(one.delta.origin for one in replacing)
            raise wrong_delta(name, "one delta that replaces it", origins, "keep the module in one of these deltas")


def _untie(base: Checkpoint, names: Names, deltas: Sequence[Delta], bound: dict[str, list[Bound]]) -> tuple[tuple[str, str] | None, tuple[str, ...]]:
    """((head, embedding), notes) where one tied tensor must become two; edits of a tied delta are given to both sides."""
    embedding = names.embedding()
    head = next((name for name in HEADS if name in bound or name in base.tensors), HEADS[0])
    stored = head in base.tensors
    if embedding is None or (embedding not in bound and head not in bound) or not _has_language_head(base, embedding, head):
        return None, ()
    if not base.config.get("tie_word_embeddings", not stored):
        return None, ()
    if _stay_tied(bound.get(embedding, []), bound.get(head, []), stored, deltas):
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


def _has_language_head(base: Checkpoint, embedding: str, head: str) -> bool:
    """Does the model end in a language head, stored or tied? An encoder does not, whatever its config says about tying."""
    classes = [str(name) for name in base.config.get("architectures") or ()]
    if head in base.tensors or not classes:
        return head in base.tensors or not embedding.endswith("word_embeddings.weight")
    return any(re.search("CausalLM|LMHead", name) for name in classes)


def _stay_tied(embedding: Sequence[Bound], head: Sequence[Bound], stored: bool, deltas: Sequence[Delta]) -> bool:
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


def _apply(block: np.ndarray, first: int, edits: Sequence[Bound], method: Combine) -> np.ndarray:
    """Replacements in turn, then all differences by the combine method."""
    for one in edits:
        if one.edit.replaces:
            block = one.edit.change(first, block, one.transposed)
    return method(block, ((one.delta.weight, one.edit.change(first, block, one.transposed)) for one in edits if not one.edit.replaces))


def _merged(view: TensorView, edits: Sequence[Bound], method: Combine) -> TensorView:
    def rows(start: int, stop: int) -> np.ndarray:
        return _apply(view.rows(start, stop), start, edits, method)

    return replace(view, rows=rows, raw=None)


def _added(name: str, edits: Sequence[Bound], method: Combine) -> TensorView:
    shape = edits[0].edit.shape

    def rows(start: int, stop: int) -> np.ndarray:
        return _apply(np.empty((stop - start, 0), np.float32), start, edits, method)

    return TensorView(name, shape, "F32", rows)


def _wrapped(name: str, prefix: str, added: Sequence[str]) -> str:
    return name if name in added else prefix + name


def _head_config(config: Mapping[str, Any], delta: Delta, bound: Mapping[str, Sequence[Bound]]) -> dict[str, Any]:
    """Class name and labels of the model with the delta's classification head; nothing for a delta without one."""
    outputs = [one.edit for name, edits in bound.items() for one in edits if one.delta is delta and one.edit.replaces and name.endswith(CLASSIFIERS)]
    suffix = TASK_CLASSES.get(delta.task)
    if not outputs or suffix is None:
        return {}
    classes = [re.sub(r"(Model|LMHeadModel|For[A-Z]\w*)$", "", str(name)) + suffix for name in (config.get("architectures") or ())[:1]]
    result: dict[str, Any] = {"architectures": classes} if classes else {}
    count = outputs[-1].shape[0]
    if len(delta.labels) == count:
        result.update(labels_as_config(delta.labels))
    elif len(config.get("id2label") or {}) != count:
        result.update(labels_as_config({number: f"LABEL_{number}" for number in range(count)}))
    return result


def describe(plan: MergePlan) -> str:
    """One line for people: `3 deltas on 210 tensors, 2 added`."""
    return f"{len(plan.deltas)} delta{'s' if len(plan.deltas) != 1 else ''} on {len(plan.bound)} tensors, {len(plan.added)} added"
