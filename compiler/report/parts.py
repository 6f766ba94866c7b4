"""Pieces of a report document: what all have in common, and the rows of robustness, side effects, position, cost and return."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

NAN = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
Number = Annotated[float, WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": sorted(NAN)}]})]


class Part(BaseModel):
    """A frozen piece of the document that keeps keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    def extras(self) -> dict[str, Any]:
        """The keys that this version does not know, in document order."""
        return dict(self.__pydantic_extra__ or {})


class RobustnessRow(Part):
    """A metric with and without one kind of noise; excess: what noise costs the bundle less what it costs the merged fp32 model (`reference`)."""

    noise: str
    metric: str
    reference_clean: Number
    reference: Number
    bundle_clean: Number
    bundle: Number
    excess: Number
    low: Number | None = None
    high: Number | None = None
    samples: int | None = None


class DistilCheck(Part):
    """What the held-out items said after a step; loss: mean of the training loss since the check before."""

    step: int
    held: Number
    loss: Number


class Dropped(Part):
    """A layer that the student does without, and its block influence when it went."""

    layer: int
    influence: Number


class Distil(Part):
    """The student: what of the teacher it kept, and what training changed. measure: what before, after and the checks are; best_step 0: nothing better came."""

    measure: str = ""
    before: Number
    after: Number
    steps: int = 0
    tokens: int = 0
    best_step: int = 0
    held: int = 0
    parameters: dict[str, int] = Field(default_factory=dict)
    dropped: tuple[Dropped, ...] = ()
    checks: tuple[DistilCheck, ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)


class EffectRow(Part):
    """A metric of the control set by system; change: bundle less base (a perplexity: the ratio). stage: whose doing more of it is, where known."""

    metric: str
    base: Number | None = None
    merged: Number | None = None
    bundle: Number | None = None
    change: Number
    low: Number | None = None
    high: Number | None = None
    samples: int | None = None
    stage: str | None = None


class BuildPoint(Part):
    """One build of the same models on the same data; front: no other build is smaller and better; this: the one of this report."""

    scheme: str
    size_mb: Number
    loss: Number
    latency_ms: Number | None = None
    front: bool = False
    this: bool = False


class Position(Part):
    """Where the build stands: loss is the KL of a decoder, 1 - cosine of an encoder; metric is the measured one."""

    metric: str
    builds: tuple[BuildPoint, ...] = ()


class StageCost(Part):
    """What one stage took in this run; energy_wh only where the recipe states the power of the machine."""

    stage: str
    cached: bool = False
    seconds: Number | None = None
    cpu_seconds: Number | None = None
    peak_rss_mb: Number | None = None
    bytes: int | None = None
    energy_wh: Number | None = None


class SavingRow(Part):
    """The bundle against what would be done without it, by a stated formula."""

    what: str
    alternative: Number
    bundle: Number
    unit: str = ""
    formula: str = ""


class Economics(Part):
    """Cost and return; inputs are the recipe's own words."""

    stages: tuple[StageCost, ...] = ()
    savings: tuple[SavingRow, ...] = ()
    inputs: dict[str, Any] = Field(default_factory=dict)
