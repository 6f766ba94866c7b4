"""Selective restore: which modules a delta changes, and by what factor there (docs/deltas.md).

    merged = W + sum_i weight_i s_i(module) D_i        D_i = f_i(W) - W for a kind that multiplies (DoRA, IA3, OFT, BOFT)

so a factor of 0 leaves the base's tensor, 1 the delta's, and between them lies the straight line from one to the other, whatever the kind.

1. Patterns are shell-style (`fnmatchcase`) and meet module names: the base's parameter name without its last part,
   `model.layers.3.mlp.down_proj`.
2. A module is changed when it matches one of `only`, of the mixture's and of the delta's own; an empty list is all.
3. Its factor is that of the last pattern in `scale` that matches, the mixture's patterns before the delta's own; 1 without one.
4. A pattern that matches no module touched by the delta (the mixture's: by any delta) is an error, and so is a delta of which nothing is left.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from compiler.errors import DeltaError, RecipeError


def module_of(name: str) -> str:
    """`model.layers.3.mlp.down_proj.weight` -> `model.layers.3.mlp.down_proj`; a name without a dot is its own module."""
    return name.rpartition(".")[0] or name


@dataclass(frozen=True)
class Selection:
    """only: patterns, empty for all modules. scale: (pattern, factor), the last match wins."""

    only: tuple[str, ...] = ()
    scale: tuple[tuple[str, float], ...] = ()

    def keeps(self, module: str) -> bool:
        return not self.only or any(fnmatchcase(module, pattern) for pattern in self.only)

    def factor(self, module: str, default: float = 1.0) -> float:
        return next((factor for pattern, factor in reversed(self.scale) if fnmatchcase(module, pattern)), default)

    def check(self, place: str, modules: Iterable[str]) -> None:
        """Raises DeltaError for a pattern that matches none of the modules (rule 4)."""
        known = sorted(set(modules))
        for pattern in (*self.only, *(pattern for pattern, _ in self.scale)):
            if not any(fnmatchcase(module, pattern) for module in known):
                raise DeltaError(
                    f"{place}: {pattern!r}", expected="a pattern of a module that the delta touches", found="no match", remedy=_near(pattern, known)
                )

    def as_dict(self) -> dict[str, object]:
        """For records and cache keys; empty where nothing is selected, so that an old key stays the same."""
        chosen: dict[str, object] = {"only": list(self.only), "scale": [list(row) for row in self.scale]}
        return {key: value for key, value in chosen.items() if value}

    def __str__(self) -> str:
        """Its identity in digests: `only ["*.mlp.*"] scale [["*.3.*", 0.5]]`, empty for all of it."""
        return " ".join(f"{key} {value}" for key, value in self.as_dict().items())


EVERYTHING = Selection()


def _near(pattern: str, known: Sequence[str]) -> str:
    """The module with the longest piece of the pattern's letters."""
    letters = pattern.replace("*", "")
    best = max(known, key=lambda module: difflib.SequenceMatcher(None, letters, module, autojunk=False).find_longest_match().size)
    return f"the nearest is {best!r}; trimtab delta inspect lists all {len(known)}"


def selection(only: Sequence[str], scale: Mapping[str, float] | Iterable[tuple[str, float]], place: str) -> Selection:
    """Checked. Raises RecipeError: an empty pattern, a factor that is not finite."""
    rows = tuple((pattern, float(factor)) for pattern, factor in (scale.items() if isinstance(scale, Mapping) else scale))
    for pattern in (*only, *(pattern for pattern, _ in rows)):
        if not pattern:
            raise RecipeError(place, expected="patterns of module names", found="an empty one", remedy='for example "model.layers.3.*"')
    for pattern, factor in rows:
        if not math.isfinite(factor):
            raise RecipeError(f"{place}.scale.{pattern}", expected="a finite factor", found=str(factor), remedy="0 leaves the base, 1 takes the delta whole")
    return Selection(tuple(only), rows)
