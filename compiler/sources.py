"""`Sources`: base and deltas, opened lazily and bound to each other, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """Base and deltas, bound: the merged checkpoint is a view, nothing is read yet."""

    merge: MergePlan
    merged: Checkpoint

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines the merged weights: contents and parameters, no names or paths."""
        record = self.merge.record()
        deltas = [{key: row[key] for key in ("kind", "weight", "digest")} for row in record["deltas"]]
        return {"base": self.merge.base.digest, "deltas": deltas, "combine": str(self.merge.combine)}

    @cached_property
    def lineage(self) -> dict[str, Any]:
        record = self.merge.record()
        deltas = [
            {"origin": row["name"], "kind": row["kind"], "weight": row["weight"], "digest": row["digest"], "touched": len(row["tensors"])}
            for row in record["deltas"]
        ]
        base = {"origin": self.merge.base.origin, "digest": self.merge.base.digest}
        return {"base": base, "deltas": deltas, "combine": str(self.merge.combine), "notes": record["notes"]}


def open_sources(base: str, deltas: Sequence[tuple[str, float]], combine: Combine | str = "linear", folder: Path | None = None) -> Sources:
    """Open base and deltas and bind them; raises CheckpointError, DeltaError or RecipeError before any work."""
    checkpoint = open_checkpoint(base, relative_to=folder)
    loaded = [load_delta(path, weight=weight, relative_to=folder) for path, weight in deltas]
    merge = plan_merge(checkpoint, loaded, combine)
    return Sources(merge, merge.view() if loaded else checkpoint)
