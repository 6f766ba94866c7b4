"""How requests come: what a recipe says under `targets.scenarios`, and the options of the measurements that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from compiler.errors import RecipeError
from compiler.limits import SCENE_PERCENTILE
from runtimes.collect import RATES

MEASURED = {"server": "{rate_per_s: 2}", "batch": "{size: 8}"}  # scenario -> an example of what it needs


class Part(BaseModel):
    """A piece of a recipe: frozen, no unknown keys, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Requests(Part):
    """What one request of a scenario is, where it differs from single-stream: tokens of a decoder's prompt and answer, tokens of an encoder's text."""

    prompt_tokens: int | None = Field(default=None, ge=1)
    new_tokens: int | None = Field(default=None, ge=2)
    length: int | None = Field(default=None, ge=1)

    @property
    def options(self) -> dict[str, Any]:
        """Options of a measurement that are named."""
        return {name: value for name in ("prompt_tokens", "new_tokens", "length") if (value := getattr(self, name)) is not None}


class Server(Requests):
    """Requests arrive by a Poisson process whether or not earlier ones are done; `concurrency` of them may run at once."""

    rate_per_s: float = Field(gt=0)
    concurrency: int = Field(default=1, ge=1, le=64)


class Batch(Requests):
    """So many requests in one call."""

    size: int = Field(ge=2, le=1024)


class ColdStart(Part):
    """So many fresh processes, each timed from before it begins to its first token or vector."""

    processes: int = Field(default=5, ge=1, le=100)


class Scenarios(Part):
    """Ways of asking besides one request after another, and what holds for each of them.

    seconds     cap of one latency measurement; the time of disturbed requests does not count
    slow_spell  requests that slow spells of the machine last on average: a PASS, and a FAIL, takes as many samples as tell spells of that length
    """

    seconds: float | None = Field(default=None, gt=0, le=86_400)
    slow_spell: float | None = Field(default=None, ge=1, le=10_000)
    server: Server | None = None
    batch: Batch | None = None
    cold_start: ColdStart | None = None

    @property
    def options(self) -> dict[str, float]:
        """What was said of every measurement, as options of `runtimes.bench.BenchOptions`."""
        return {name: value for name in ("seconds", "slow_spell") if (value := getattr(self, name)) is not None}

    def require(self, limit: str, option: str = "") -> None:
        """Raises RecipeError for a limit of a scenario that says not how requests come. option: where it may be said on a command line."""
        scene = limit.split(".")[0]
        if scene in MEASURED and getattr(self, scene) is None:
            needed = MEASURED[scene].strip("{}").replace(": ", "=")
            remedy = f"add {option} {scene}.{needed}" if option else f"add targets.scenarios: {{{scene}: {MEASURED[scene]}}}"
            raise RecipeError(
                f"--limit {limit}" if option else f"targets.limits.{limit}",
                expected=f"a scenario `{scene}` that says how requests come",
                found="none",
                remedy=remedy,
            )

    def measurements(self, limits: Mapping[str, float]) -> list[dict[str, Any]]:
        """Options of `runtimes.bench.BenchOptions` of each measurement that these scenarios and limits ask for. A limit on the cold start asks by itself."""
        made = []
        if self.batch:
            made.append({"scene": "batch", "batch": self.batch.size, **self.batch.options, "limits": _of("batch.", limits)})
        if self.server:
            load = {"rate_per_s": self.server.rate_per_s, "concurrency": self.server.concurrency}
            made.append({"scene": "server", **load, **self.server.options, "limits": _of("server.", limits)})
        cold = self.cold_start or (ColdStart() if "cold_start_ms" in limits else None)
        return made + [{"scene": "cold"}] * (cold.processes if cold else 0)


def _of(scene: str, limits: Mapping[str, float]) -> dict[str, float]:
    """Limits of a scenario on percentiles and rates; positive ones, for others are decided without a sample."""
    return {name: value for name, value in limits.items() if name.startswith(scene) and (SCENE_PERCENTILE.fullmatch(name) or name in RATES) and value > 0}
