"""Binding deltas to a base: every edit finds its tensor and fits it, or the merge does not start."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.deltas.base import ANY, Delta, Edit, wrong_delta
from compiler.deltas.names import EMBEDDINGS, HEADS, STORED_INPUT_FIRST, Names
from compiler.deltas.select import EVERYTHING, Selection, module_of
from compiler.errors import DeltaError

LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Bound:
    """An edit that fits a tensor of the base. transposed: the base holds it as [in, out]. factor: the selection's, beside the delta's weight."""

    delta: Delta
    edit: Edit
    transposed: bool
    factor: float = 1.0

    @property
    def weight(self) -> float:
        """What the difference is multiplied by."""
        return self.delta.weight * self.factor


def bind(base: Checkpoint, names: Names, deltas: Sequence[Delta], select: Selection = EVERYTHING) -> dict[str, list[Bound]]:
    """Base name, or the added name of a head, -> edits in order, those that are selected. select: for all deltas together, beside each one's own.

    Raises DeltaError: a base digest that differs, keys that match nothing or only in part, shapes that do not fit, layers left
    out that the delta says it adapts, patterns that select nothing, a replacement at a weight other than 1 or by two deltas.
    """
    found: list[list[tuple[str, Bound]]] = []
    for delta in deltas:
        _check_digest(base, delta)
        edits = list(_bind(base, names, delta))
        if delta.every_layer:
            _check_depth(base, delta, [name for name, _ in edits])
        found.append(edits)
    if deltas:
        select.check("deltas", (module_of(name) for edits in found for name, _ in edits))
    bound: dict[str, list[Bound]] = {}
    for delta, edits in zip(deltas, found, strict=True):
        for name, one in _selected(delta, edits, select):
            bound.setdefault(name, []).append(one)
    _check_replacements(bound)
    return {name: _prepared(base, names, name, edits) for name, edits in bound.items()}


def _check_digest(base: Checkpoint, delta: Delta) -> None:
    """The base is the one the delta was made from, or the one that the user names by its digest in that one's place."""
    if delta.accept_base and delta.accept_base != base.digest:
        remedy = "name the digest of the base that this delta is to be merged into"
        raise wrong_delta(delta.origin, f"the base that accept_base names, {delta.accept_base}", base.digest, remedy, "ADAPTER_BASE")
    if delta.base_digest and delta.base_digest != base.digest and not delta.accept_base:
        remedy = f"compile it with the base it names; to accept this one in its place, write accept_base: {base.digest}"
        raise wrong_delta(delta.origin, f"the base it was made from, {delta.base_digest[:12]}", base.digest[:12], remedy, "ADAPTER_BASE")


def _bind(base: Checkpoint, names: Names, delta: Delta) -> Iterator[tuple[str, Bound]]:
    """(base name, edit) of every edit of one delta, the misfits refused first, all together."""
    found = {target: _find(base, names, target) for target in delta.names}
    may_add = {edit.target for edit in delta.edits if edit.may_add or edit.optional}
    lost = [target for target, name in found.items() if name is None and target not in may_add]
    if lost:
        raise _unmatched(base, names, delta, lost, len(found))
    input_first = base.config.get("model_type") in STORED_INPUT_FIRST
    for edit in delta.edits:
        name = found[edit.target]
        if name is None and edit.optional:
            continue
        if name is None:
            yield edit.target, Bound(delta, replace(edit, replaces=True), False)  # there is nothing to take a difference against
            continue
        shape = _tensor(base, names, name).shape
        transposed = replace(edit, flipped=edit.flipped or (input_first and name not in HEADS)).layout(shape)
        if transposed is None and name.endswith((*EMBEDDINGS, *HEADS)) and edit.shape[1:] == shape[1:] and edit.shape[0] > shape[0]:
            raise wrong_delta(
                f"{delta.origin}: {edit.target}",
                f"the {shape[0]} rows of {base.origin}, or the values of the added ones",
                f"a difference of {edit.shape[0]} rows: what it is added to in the others is in neither base nor delta",
                "save the embeddings with the adapter (save_embedding_layers=True), or compile with the resized base of the training",
            )
        if transposed is None:
            raise wrong_delta(
                f"{delta.origin}: {edit.target}",
                f"a base tensor of shape [{', '.join('any' if size == ANY else str(size) for size in edit.shape)}]",
                f"{list(shape)} in {base.origin}: the adapter is for another base",
                _trained_on(delta),
                "ADAPTER_BASE",
            )
        yield name, Bound(delta, edit, transposed)


def _selected(delta: Delta, edits: Sequence[tuple[str, Bound]], select: Selection) -> list[tuple[str, Bound]]:
    """The edits that both selections keep, with their factors (compiler.deltas.select, rules 2 to 4)."""
    own = delta.select
    own.check(delta.origin, (module_of(name) for name, _ in edits))
    kept = [(name, module_of(name), one) for name, one in edits if own.keeps(module_of(name)) and select.keeps(module_of(name))]
    if edits and not kept:
        patterns = ", ".join((*select.only, *own.only))
        raise wrong_delta(delta.origin, f"a module that {patterns} keeps", "none: nothing of the delta is left", "leave this delta out, or widen `only`")
    scaled = [(name, replace(one, factor=own.factor(module, select.factor(module)))) for name, module, one in kept]
    for name, one in scaled:
        if not math.isfinite(one.weight):
            raise wrong_delta(f"{delta.origin}: {name}", "a finite weight", f"{delta.weight} x {one.factor}", "choose smaller ones", "ADAPTER_SCALE")
    return scaled


def _find(base: Checkpoint, names: Names, target: str) -> str | None:
    """A tied base stores no head, yet a delta may change it."""
    name = names.find(target)
    if name is None and target in HEADS and names.embedding() and base.config.get("tie_word_embeddings", True):
        return target
    return name


def _tensor(base: Checkpoint, names: Names, name: str) -> TensorView:
    return base.tensors[name if name in base.tensors else str(names.embedding())]


def _prepared(base: Checkpoint, names: Names, name: str, edits: Sequence[Bound]) -> list[Bound]:
    """The edits of one tensor, those that ask for it given the tensor they will change: the base's, or what replaces it."""
    if not any(one.edit.prepare for one in edits):
        return list(edits)
    tensor = _tensor(base, names, name)
    for one in edits:
        if one.edit.replaces:
            tensor = replace(tensor, rows=_replacing(one.edit))
    return [replace(one, edit=replace(one.edit, change=one.edit.prepare(tensor, one.transposed))) if one.edit.prepare else one for one in edits]


def _replacing(edit: Edit) -> Callable[[int, int], np.ndarray]:
    return lambda start, stop: edit.change(start, np.empty((stop - start, 0), np.float32), False)


def _trained_on(delta: Delta) -> str:
    return f"use the base it was trained on, {delta.base_name}" if delta.base_name else "use the base it was trained on"


def _unmatched(base: Checkpoint, names: Names, delta: Delta, lost: Sequence[str], total: int) -> DeltaError:
    near = names.nearest(lost[0])
    hint = f"nearest to {lost[0]}: {', '.join(near)}; " if near else ""
    some = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
    part = "nothing matches" if len(lost) == total else f"{len(lost)} of {total} keys match nothing"
    return wrong_delta(delta.origin, f"parameters of {base.origin}", f"{part}: {some}", hint + _trained_on(delta), "ADAPTER_UNMATCHED")


def _check_depth(base: Checkpoint, delta: Delta, touched: Sequence[str]) -> None:
    """An adapter of 12 layers fits the first 12 of 24 by name and shape; only its own word that it adapts every layer tells."""
    layers: dict[str, set[int]] = {}
    for name in base.tensors:
        if match := LAYER.search(name):
            layers.setdefault(LAYER.sub(".*.", name, 1), set()).add(int(match[1]))
    adapted: dict[str, set[int]] = {}
    for name in touched:
        if match := LAYER.search(name):
            adapted.setdefault(LAYER.sub(".*.", name, 1), set()).add(int(match[1]))
    for module, found in adapted.items():
        if missing := layers.get(module, set()) - found:
            raise wrong_delta(
                f"{delta.origin}: {module}",
                f"all {len(layers[module])} layers of {base.origin}, since target_modules names every layer",
                f"{len(found)} adapted, {min(missing)} not: the adapter is for a base of another depth",
                _trained_on(delta),
            )


def _check_replacements(bound: Mapping[str, Sequence[Bound]]) -> None:
    for name, edits in bound.items():
        replacing = [one for one in edits if one.edit.replaces]
        for one in replacing:
            if one.weight != 1.0:
                remedy = "give this delta weight 1.0, or leave the module out of it (PEFT: modules_to_save)"
                raise wrong_delta(f"{one.delta.origin}: {name}", "weight 1.0 for a module that is replaced or added whole", f"{one.weight:g}", remedy)
        if len(replacing) > 1:
            origins = " and ".join(one.delta.origin for one in replacing)
            raise wrong_delta(name, "one delta that replaces it", origins, "keep the module in one of these deltas")
