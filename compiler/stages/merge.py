"""Stage 1: base + deltas -> one checkpoint, as a lazy float32 view. The base is never changed.

`plan_merge` binds every edit to a tensor of the base and raises for what does not fit; `MergePlan.view` reads rows through
base, differences and the combine method; `MergePlan.record` says which delta touched which tensor, for the manifest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from compiler.checkpoints.files import sha256_parts
from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.deltas.base import Delta
from compiler.deltas.bind import Bound, bind
from compiler.deltas.combine import Combine, combine_named, linear
from compiler.deltas.heads import check_head, head_config
from compiler.deltas.mix import LastBlock, Term, mixed_rows
from compiler.deltas.names import HEADS, Names
from compiler.deltas.select import EVERYTHING, Selection
from compiler.deltas.tied import untie
from compiler.deltas.vocabulary import Growth, check_added, grow


@dataclass(frozen=True)
class MergePlan:
    """What a merge does.

    bound   base or added name -> edits in order
    head    (head's name, embedding's name) where it unties
    select  of all deltas
    growth  the base with the token rows and the tokenizer that deltas bring
    """

    base: Checkpoint
    deltas: tuple[Delta, ...]
    combine: Combine
    bound: Mapping[str, tuple[Bound, ...]] = field(repr=False)
    added: tuple[str, ...] = ()
    head: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()
    select: Selection = EVERYTHING
    growth: Growth | None = None

    @property
    def ground(self) -> Checkpoint:
        """The base as the deltas see it."""
        return self.growth.ground if self.growth else self.base

    def view(self) -> Checkpoint:
        """The merged checkpoint; nothing is computed until rows are read."""
        last = LastBlock()
        tensors = dict(self.ground.tensors)
        if self.head:
            name, embedding = self.head
            tensors[name] = replace(self.ground.tensors[embedding], name=name)
        tensors = {name: _merged(view, self.bound[name], self.combine, last) if name in self.bound else view for name, view in tensors.items()}
        for name in self.added:
            tensors[name] = _added(name, self.bound[name])
        if self._prefix:
            tensors = {(called := self.merged_name(name)): replace(view, name=called) for name, view in tensors.items()}
        origin = " + ".join([self.base.origin, *(delta.origin for delta in self.deltas)])
        return Checkpoint(tensors, self._config(), self.ground.assets, origin, self._digest)

    def merged_name(self, name: str) -> str:
        """What a tensor of the base, or an added one, is called in the merged view."""
        return name if name in self.added or name == (self.head or ("",))[0] else self._prefix + name

    def record(self) -> dict[str, Any]:
        """The merge for the manifest: base, deltas with weight and digest, tensors each one touched, what was untied or added."""
        return {
            "base": {"name": self.base.origin, "digest": self.base.digest},
            "combine": str(self.combine),
            "select": self.select.as_dict(),
            "deltas": [self._delta_record(delta) for delta in self.deltas],
            "added": list(self.added),
            "notes": list(self.notes),
            "tokenizer": self.growth.tokenizer if self.growth else None,
        }

    def _delta_record(self, delta: Delta) -> dict[str, Any]:
        return {
            "name": delta.name,
            "origin": delta.origin,
            "kind": delta.kind,
            "weight": delta.weight,
            "select": delta.select.as_dict(),
            "made_from": delta.base_digest,
            "accepted_base": self.base.digest if _overridden(self.base, delta) else None,
            "digest": delta.digest,
            "trained_on": delta.base_name,
            "tensors": sorted(name for name, edits in self.bound.items() if any(one.delta is delta for one in edits)),
        }

    @cached_property
    def _names(self) -> Names:
        return Names(self.base.tensors, str(self.base.config.get("model_type")))

    @property
    def _prefix(self) -> str:
        """What base names gain when a head is put on a bare encoder, so that the result is one model with one naming."""
        return self._names.prefix if (self.added or self.head) and self._names.bare else ""

    def _config(self) -> dict[str, Any]:
        config = dict(self.ground.config)
        if self.head:
            config["tie_word_embeddings"] = False
        for delta in self.deltas:
            config.update(head_config(config, delta, self.bound))
        return config

    def _digest(self) -> str:
        parts = {"base": self.base.digest, "combine": str(self.combine)}
        for number, delta in enumerate(self.deltas):
            parts[f"delta {number:04d}"] = f"{delta.digest} {delta.weight!r} {delta.select}".rstrip()
        if self.select.as_dict():
            parts["select"] = str(self.select)
        if self.growth and self.growth.tokenizer:
            parts["tokenizer"] = self.growth.tokenizer
        return sha256_parts(parts)


def merged_view(base: Checkpoint, deltas: Sequence[Delta], combine: Combine | str = "linear") -> Checkpoint:
    """base + deltas as a lazy checkpoint. Raises DeltaError for a delta that does not fit, RecipeError for an unknown combine."""
    return plan_merge(base, deltas, combine).view() if deltas else base


def plan_merge(base: Checkpoint, deltas: Sequence[Delta], combine: Combine | str = "linear", select: Selection = EVERYTHING) -> MergePlan:
    """Bind the deltas, where `select` keeps them, to the base.

    Raises DeltaError as `grow`, `bind`, `check_head`, `untie`, `check_added` say, RecipeError for an unknown combine.
    """
    mixture = combine_named(combine) if isinstance(combine, str) else combine
    names = Names(base.tensors, str(base.config.get("model_type")))
    growth = grow(base, names, deltas)
    bound = bind(growth.ground, names, deltas, select)
    added = tuple(name for name in bound if name not in base.tensors and name not in HEADS)
    for delta in deltas:
        check_head(base, names, delta, added)
    head, notes = untie(growth.ground, names, bound)
    check_added(growth, bound, head, mixture.row.plain)
    known = {*base.tensors, *added, *(head or ())[:1]}
    kept = {name: tuple(edits) for name, edits in bound.items() if name in known}
    return MergePlan(base, tuple(deltas), mixture, kept, added, head, (*growth.notes, *notes, *_said(base, deltas, select)), select, growth)


def _overridden(base: Checkpoint, delta: Delta) -> bool:
    """Does the user let this base stand for another that the delta was made from?"""
    return bool(delta.accept_base and delta.base_digest and delta.base_digest != base.digest)


def _said(base: Checkpoint, deltas: Sequence[Delta], select: Selection) -> Iterator[str]:
    """What the user overrode or chose, for the manifest and the report."""
    for delta in deltas:
        if _overridden(base, delta):
            yield f"{delta.origin} was made from base {delta.base_digest}; accept_base names {base.digest} in its place"
        if delta.select.as_dict():
            yield f"{delta.origin}: {delta.select}"
    if select.as_dict():
        yield f"all deltas: {select}"


def _replaced(block: np.ndarray, first: int, edits: Sequence[Bound]) -> np.ndarray:
    for one in edits:
        if one.edit.replaces:
            block = one.edit.change(first, block, one.transposed)
    return block


def _apply(block: np.ndarray, first: int, edits: Sequence[Bound]) -> np.ndarray:
    """Replacements in turn, then the weighted sum of all differences, each against the base alone."""
    block = _replaced(block, first, edits)
    changes = [one for one in edits if not one.edit.replaces]
    # the sum is taken in its block, while later differences still have to read it
    base = block.copy() if any(one.edit.reads_base for one in changes[1:]) else block
    return linear(block, ((one.weight, one.edit.change(first, base, one.transposed)) for one in changes))


def _terms(edits: Sequence[Bound]) -> list[Term]:
    """The differences on one tensor, one term per delta: a delta may have several edits of a tied tensor."""
    groups: dict[int, list[Bound]] = {}
    for one in edits:
        if not one.edit.replaces:
            groups.setdefault(id(one.delta), []).append(one)

    def change(group: Sequence[Bound], first: int, base: np.ndarray) -> np.ndarray:
        total = group[0].edit.change(first, base, group[0].transposed)
        for one in group[1:]:
            total = total + one.edit.change(first, base, one.transposed)
        return total

    return [Term(group[0].weight, group[0].delta.digest, partial(change, group)) for group in groups.values()]


def _merged(view: TensorView, edits: Sequence[Bound], combine: Combine, last: LastBlock) -> TensorView:
    if combine.row.plain or all(one.edit.replaces for one in edits):
        return replace(view, rows=lambda start, stop: _apply(view.rows(start, stop), start, edits))
    rows = mixed_rows(view.name, view.shape, lambda start, stop: _replaced(view.rows(start, stop), start, edits), _terms(edits), combine, last)
    return replace(view, rows=rows)


def _added(name: str, edits: Sequence[Bound]) -> TensorView:
    """A tensor that the base lacks: replacements only."""
    return TensorView(name, edits[0].edit.shape, "F32", lambda start, stop: _apply(np.empty((stop - start, 0), np.float32), start, edits))


def describe(plan: MergePlan) -> str:
    """One line for people: `3 deltas on 210 tensors, 2 added`."""
    return f"{len(plan.deltas)} delta{'s' if len(plan.deltas) != 1 else ''} on {len(plan.bound)} tensors, {len(plan.added)} added"
