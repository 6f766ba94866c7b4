"""`Sources`: base and deltas, opened lazily and bound to each other, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from compiler.checkpoints.resolve import open_checkpoint
from compiler.checkpoints.view import Checkpoint
from compiler.deltas.combine import Combine
from compiler.deltas.load import load_delta
from compiler.stages.merge import MergePlan, plan_merge


@dataclass(frozen=True)
class Sources:
    """Base and deltas, bound: the merged checkpoint is a view, nothing is read yet.

    attached  name -> base and one delta that stays unmerged; `merged` of the whole is then the base alone
    """

    merge: MergePlan
    merged: Checkpoint
    attached: Mapping[str, Sources] = field(default_factory=dict)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines the merged weights: contents and parameters, no names or paths."""
        record = self.merge.record()
        deltas = [{key: row[key] for key in ("kind", "weight", "digest")} for row in record["deltas"]]
        named = {"attached": {name: one.identity["deltas"] for name, one in self.attached.items()}} if self.attached else {}
        return {"base": self.merge.base.digest, "deltas": deltas, "combine": str(self.merge.combine), **named}

    @cached_property
    def lineage(self) -> dict[str, Any]:
        record = self.merge.record()
        deltas = [
            {"origin": row["name"], "kind": row["kind"], "weight": row["weight"], "digest": row["digest"], "touched": len(row["tensors"])}
            for row in record["deltas"]
        ]
        deltas += [{**row, "adapter": name} for name, one in self.attached.items() for row in one.lineage["deltas"]]
        base = {"origin": self.merge.base.origin, "digest": self.merge.base.digest}
        return {"base": base, "deltas": deltas, "combine": str(self.merge.combine), "notes": record["notes"]}


def open_sources(base: str, deltas: Sequence[tuple[str, float]], combine: Combine | str = "linear", folder: Path | None = None) -> Sources:
    """Open base and deltas and bind them; raises CheckpointError, DeltaError or RecipeError before any work."""
    checkpoint = open_checkpoint(base, relative_to=folder)
    loaded = [load_delta(path, weight=weight, relative_to=folder) for path, weight in deltas]
    merge = plan_merge(checkpoint, loaded, combine)
    return Sources(merge, merge.view() if loaded else checkpoint)


def open_attached(base: str, deltas: Mapping[str, tuple[str, float]], folder: Path | None = None) -> Sources:
    """Open a base and deltas that stay unmerged, by name, each bound to the base as if it were merged alone. Raises as `open_sources`."""
    checkpoint = open_checkpoint(base, relative_to=folder)
    plans = {name: plan_merge(checkpoint, [load_delta(path, weight=weight, relative_to=folder)]) for name, (path, weight) in deltas.items()}
    return Sources(plan_merge(checkpoint, []), checkpoint, {name: Sources(plan, plan.view()) for name, plan in plans.items()})
