"""`Mixture`: base and deltas as a user names them, and `Sources`: the same, opened and bound to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.checkpoints.resolve import open_checkpoint
from compiler.checkpoints.view import Checkpoint
from compiler.deltas.base import Delta
from compiler.deltas.combine import Combine
from compiler.deltas.load import load_delta
from compiler.deltas.select import EVERYTHING, Selection
from compiler.stages.merge import MergePlan, plan_merge
from compiler.text import default_name

if TYPE_CHECKING:
    import numpy as np

    from compiler.plan import Step
    from compiler.recipe import Recipe
    from compiler.record import Record

LINEAR = Combine()
IDENTITY = ("kind", "weight", "digest", "select")
LINEAGE = ("name", "origin", "kind", "weight", "digest", "select", "made_from", "accepted_base")


@dataclass(frozen=True)
class DeltaSource:
    """One delta of a mixture: a path, package:MODULE/path or hub id. select, accept_base: as in `compiler.deltas.base.Delta`."""

    path: str
    weight: float = 1.0
    name: str = ""
    select: Selection = EVERYTHING
    accept_base: str | None = None

    def load(self, folder: Path | None) -> Delta:
        name = self.name or default_name(self.path)
        return load_delta(self.path, weight=self.weight, relative_to=folder, name=name, select=self.select, accept_base=self.accept_base)


@dataclass(frozen=True)
class Mixture:
    """What is to be merged. select: of all deltas together. folder: where relative paths start. attached: each delta stays beside the base."""

    base: str
    deltas: Sequence[DeltaSource] = ()
    combine: Combine = LINEAR
    select: Selection = EVERYTHING
    folder: Path | None = None
    attached: bool = False

    def __str__(self) -> str:
        return f"{self.base} + {len(self.deltas)} delta(s)"

    def open(self) -> Sources:
        """Open base and deltas and bind them; raises CheckpointError, DeltaError or RecipeError before any work."""
        base = open_checkpoint(self.base, relative_to=self.folder)
        deltas = [one.load(self.folder) for one in self.deltas]
        if self.attached:
            alone = {delta.name: plan_merge(base, [delta], LINEAR, self.select) for delta in deltas}
            return Sources(plan_merge(base, [], LINEAR, self.select), base, {name: Sources(plan, plan.view()) for name, plan in alone.items()})
        merge = plan_merge(base, deltas, self.combine, self.select)
        return Sources(merge, merge.view() if deltas else base)


def mixture_of(recipe: Recipe) -> Mixture:
    """What a recipe asks to merge."""
    deltas = recipe.deltas
    named = zip(deltas.items, deltas.names, strict=True)
    items = tuple(DeltaSource(item.path, item.weight, name, item.select, item.accept_base) for item, name in named)
    return Mixture(recipe.base, items, recipe.combine.checked, deltas.select, recipe.folder, deltas.mode == "attached")


@dataclass(frozen=True)
class Sources:
    """Base and deltas, bound: the merged checkpoint is a view, nothing is read yet.

    merged    what is built: base and deltas, or the student of them
    attached  name -> base and one delta that stays unmerged; `merged` of the whole is then the base alone
    teacher   what `merged` was distilled from, and what the bundle is compared with; None without a student
    distil    the step that makes the student, if any
    smooth    the step that changes the weights before they are rounded, if any
    scales    what that step gave, by fused matrix
    records   accounts of what was made on the way here
    """

    merge: MergePlan
    merged: Checkpoint
    attached: Mapping[str, Sources] = field(default_factory=dict)
    teacher: Checkpoint | None = None
    distil: Step | None = None
    smooth: Step | None = None
    scales: Mapping[str, np.ndarray] = field(default_factory=dict)
    records: Sequence[Record] = ()

    @property
    def reference(self) -> Checkpoint:
        """What accuracy is measured against: the merged fp32 model, also where a student of it is built."""
        return self.teacher or self.merged

    @cached_property
    def weights(self) -> Checkpoint:
        """What is rounded and exported: the merged checkpoint, or the same function with smoothed weights."""
        from compiler.quantizers.smooth import smoothed

        return smoothed(self.merged, self.scales) if self.scales else self.merged

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines the merged weights: contents and parameters, no names or paths."""
        record = self.merge.record()
        deltas = [{key: row[key] for key in IDENTITY} for row in record["deltas"]]
        tokenizer = {"tokenizer": record["tokenizer"]} if record["tokenizer"] else {}
        alone = {"attached": {name: one.identity["deltas"] for name, one in self.attached.items()}} if self.attached else {}
        distil = {"distil": self.distil.key} if self.distil else {}
        smooth = {"smooth": self.smooth.key} if self.smooth else {}
        return {
            "base": self.merge.base.digest,
            "deltas": deltas,
            "combine": str(self.merge.combine),
            "select": record["select"],
            **tokenizer,
            **alone,
            **distil,
            **smooth,
        }

    @cached_property
    def lineage(self) -> dict[str, Any]:
        record = self.merge.record()
        deltas = [{**{key: row[key] for key in LINEAGE}, "touched": len(row["tensors"])} for row in record["deltas"]]
        deltas += [row for one in self.attached.values() for row in one.lineage["deltas"]]
        base = {"origin": self.merge.base.origin, "digest": self.merge.base.digest}
        return {"base": base, "deltas": deltas, "combine": str(self.merge.combine), "select": record["select"], "notes": record["notes"]}
