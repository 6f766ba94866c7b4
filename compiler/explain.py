"""Why a step is or is not cached: its key, part by part, beside the stored entry that comes nearest."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from compiler.pipeline import plan_recipe
from compiler.recipe import Recipe
from compiler.store import Entry, Store

MOST = 12  # differences told of one step
ABSENT = "nothing"


def explain_recipe(recipe: Recipe, store: Store) -> list[dict[str, Any]]:
    """Per target the steps with {stage, key, state, parts, nearest, differs}; differs: rows {part, here, stored}, fewest first found.

    Raises what planning raises. Nothing is run and nothing is stored.
    """
    entries = store.entries()
    return [
        {"name": plan["name"], "target": plan["target"], "steps": [_explained(row, entries) for row in plan["steps"]]} for plan in plan_recipe(recipe, store)
    ]


def _explained(row: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    step = {"stage": row["stage"], "key": row["key"], "state": row["state"], "parts": row["parts"], "nearest": "", "differs": []}
    if row["state"] != "to do":
        return step
    known = [(difference(row["parts"], entry.parts), entry) for entry in entries if entry.stage == row["stage"] and entry.key != row["key"]]
    if not known:
        return step
    rows, entry = min(known, key=lambda pair: (len(pair[0]), pair[1].key))
    return {**step, "nearest": entry.key, "differs": rows}


def difference(here: Any, stored: Any, place: str = "") -> list[dict[str, Any]]:
    """Leaves that differ, as rows {part, here, stored}: `{"a": {"b": 1}}` and `{"a": {"b": 2}}` -> [{part: "a.b", here: 1, stored: 2}].

    Lists are compared item by item; what one side lacks is "nothing". A key of an earlier step that differs is one row: explain that step.
    """
    if isinstance(here, Mapping) and isinstance(stored, Mapping):
        names = sorted({*here, *stored})
        return [row for name in names for row in difference(here.get(name, ABSENT), stored.get(name, ABSENT), f"{place}.{name}" if place else name)]
    if isinstance(here, list) and isinstance(stored, list):
        pairs = itertools.zip_longest(here, stored, fillvalue=ABSENT)
        return [row for i, (one, other) in enumerate(pairs) for row in difference(one, other, f"{place}.{i}")]
    return [] if here == stored else [{"part": place, "here": here, "stored": stored}]


def explanation_lines(plan: Mapping[str, Any]) -> list[str]:
    """For printing."""
    lines = [f"{plan['name']} for {plan['target']}"]
    for step in plan["steps"]:
        lines.append(f"  {step['stage']:11s} {step['state']:12s} {step['key'][:12]}")
        if step["state"] != "to do":
            continue
        if not step["nearest"]:
            lines.append("    the store holds no result of this stage")
        lines += [f"    {row['part']}: {_brief(row['here'])} here, {_brief(row['stored'])} in {step['nearest'][:12]}" for row in step["differs"][:MOST]]
        if len(step["differs"]) > MOST:
            lines.append(f"    and {len(step['differs']) - MOST} more parts")
    return lines


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:16] + "..."
