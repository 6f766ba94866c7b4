"""`Step` and `Plan`: what will run, from which named parts, before anything runs.

`make_plan` is pure: recipe, sources and profile in, steps out. A step's key is sha256 over its parts; a part is a
content digest, a parameter, or a library version, so `trimtab explain` can name the part that differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from compiler.record import versions
from compiler.store import Store, cache_key

# Raised by hand whenever a stage's output changes for the same inputs.
CODES_VERSIONS = {"quantize": 4, "tune": 2}
EXPORT_VERSION = 5
EVALUATE_VERSION = 5


@dataclass(frozen=True)
class Step:
    """A stage bound to concrete parameters.

    parts  what the result depends on, by name; empty for steps that always run (latency is never cached)
    """

    stage: str
    params: Mapping[str, Any]
    parts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        return cache_key(self.named) if self.parts else ""

    @property
    def named(self) -> dict[str, Any]:
        """The parts of the key, the stage among them: what the store keeps beside the result."""
        return {"stage": self.stage, **self.parts}


@dataclass(frozen=True)
class Plan:
    """The steps of one recipe on one target, in order."""

    name: str
    target: str
    steps: Sequence[Step]

    def step(self, stage: str) -> Step:
        return next(step for step in self.steps if step.stage == stage)

    def rows(self, store: Store) -> list[dict[str, Any]]:
        """For printing: stage, its parameters, and whether the store already holds the result."""
        return [
            {"stage": s.stage, "params": dict(s.params), "key": s.key, "state": "view" if s.stage == "merge" else _state(s, store), "parts": s.named}
            for s in self.steps
        ]


def _state(step: Step, store: Store) -> str:
    if not step.key:
        return "always runs"
    return "cached" if store.get(step.key) else "to do"


def make_plan(
    name: str, target: str, merge: Mapping[str, Any], export: Mapping[str, Any], evaluate: Mapping[str, Any], codes: Mapping[str, Any] | None = None
) -> Plan:
    """Steps of one target.

    merge     base and delta digests, weights, combine method: the identity of the merged weights
    codes     steps that make the codes which the export takes, in order, with what each depends on: `quantize` for a quantizer that looks at more than a row
              block, `tune` for trained codes or scales; None where the export rounds to nearest as it streams
    export    schemes and graph options, already resolved from recipe and target
    evaluate  digest of the data, metrics
    """
    tools = versions(["numpy", "onnx-ir", "torch", "transformers"] if export["road"] == "encoder" else ["numpy", "onnx-ir", "gguf"])
    parts = {"version": EXPORT_VERSION, "merge": dict(merge), "options": dict(export), "tools": tools}
    made: list[Step] = []
    for stage, options in (codes or {}).items():
        with_tools = versions(["numpy", "torch", "transformers", "tokenizers"])
        before = {one.stage: one.key for one in made}
        made.append(Step(stage, options, {"version": CODES_VERSIONS[stage], "merge": dict(merge), "options": dict(options), "tools": with_tools, **before}))
        parts[stage] = made[-1].key
    exported = Step("export", export, parts)
    evaluated_with = versions(["torch", "transformers", "onnxruntime", "tokenizers"])
    evaluated = Step("evaluate", evaluate, {"version": EVALUATE_VERSION, "export": exported.key, "options": dict(evaluate), "tools": evaluated_with})
    return Plan(name, target, (Step("merge", merge), *made, exported, evaluated, Step("measure", {"target": target}), Step("package", {})))
