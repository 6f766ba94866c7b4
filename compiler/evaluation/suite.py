"""What one evaluation asks: the task's data, the same data with noise, a control set, metrics of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compiler.evaluation.custom import Custom, load_custom
from compiler.evaluation.data import EvaluationSet, load_rows
from compiler.evaluation.noise import NOISES
from compiler.recipe import Recipe

CONTROL = "control"


@dataclass(frozen=True)
class Suite:
    """noise: names of rows of `NOISES`; control: data outside of the task that the deltas were trained for."""

    data: EvaluationSet
    control: EvaluationSet | None = None
    noise: tuple[str, ...] = ()
    custom: tuple[Custom, ...] = ()

    @property
    def digests(self) -> list[str]:
        """The files that were read."""
        return [self.data.digest, *([self.control.digest] if self.control else [])]

    @property
    def parts(self) -> dict[str, Any]:
        """What the result depends on, for the cache's key; nothing for what is not asked."""
        parts: dict[str, Any] = {"data": self.data.digest, "rows": len(self.data.rows)}
        parts |= {"control": self.control.digest} if self.control else {}
        parts |= {"noise": list(self.noise)} if self.noise else {}
        return parts | ({"custom": {one.name: one.identity for one in self.custom}} if self.custom else {})

    @property
    def told(self) -> Mapping[str, Any]:
        """What the report says about the data."""
        facts: dict[str, Any] = {"origin": self.data.origin, "digest": self.data.digest, "rows": len(self.data.rows)}
        if self.control:
            facts["control"] = {"origin": self.control.origin, "digest": self.control.digest, "rows": len(self.control.rows)}
        return facts | ({"noise": list(self.noise)} if self.noise else {})


def recipe_suite(recipe: Recipe) -> Suite:
    """What a recipe asks. Raises RecipeError for a bad file, row or function."""
    asked = recipe.evaluate
    path = recipe.folder / asked.data if asked.data else None
    data = load_rows(path, asked.limit_rows)
    control = None
    if asked.control:
        control = load_rows(None if asked.control == "builtin" else recipe.folder / asked.control, asked.limit_rows, "evaluate.control")
    noise = tuple(name for name in NOISES if name in asked.noises)
    return Suite(data, control, noise, load_custom(asked.custom, recipe.folder))
