"""`Check` and `Verdict`: what was measured, against which limit, on how many samples, and what follows.

A limit is a promise to someone, so each check carries its evidence. The verdict of a target is the worst of its
checks: one FAIL fails it; without a FAIL one INCONCLUSIVE leaves it open. A measurement without a limit is INFO and
never changes a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PASS, FAIL, INCONCLUSIVE, INFO = "PASS", "FAIL", "INCONCLUSIVE", "INFO"
EXIT_CODES = {PASS: 0, FAIL: 3, INCONCLUSIVE: 4}


@dataclass(frozen=True)
class Check:
    """One measured quantity.

    name        as in the recipe's limits: `size_mb`, `kl_mean`, `ttft_p95_ms`
    measured    the point estimate, in `unit`
    limit       None for INFO
    samples     how many independent samples stand behind it (1 for a size)
    low, high   confidence bounds of the measured quantity, None when it is exact or has none
    confidence  of the bounds and of the outcome, e.g. 0.99
    false_pass  P(this PASS though the true value misses the limit), at most; None when exact
    stage       which stage the loss belongs to, when known
    note        one sentence a reader needs: how it was measured, what was dropped
    kind        "limit": what the recipe asks for; "behaviour": what every bundle must do (`runtimes.behaviours`)
    """

    name: str
    measured: float
    unit: str
    limit: float | None = None
    outcome: str = INFO
    samples: int = 1
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    false_pass: float | None = None
    stage: str | None = None
    note: str = ""
    kind: str = "limit"


@dataclass(frozen=True)
class Verdict:
    """All checks of one bundle on one target."""

    target: str
    checks: Sequence[Check]

    @property
    def outcome(self) -> str:
        outcomes = {check.outcome for check in self.checks}
        return next((worst for worst in (FAIL, INCONCLUSIVE) if worst in outcomes), PASS)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.outcome]

    @property
    def missed(self) -> list[Check]:
        return [check for check in self.checks if check.outcome in (FAIL, INCONCLUSIVE)]

    def as_dict(self) -> dict[str, Any]:
        return {"target": self.target, "outcome": self.outcome, "checks": [asdict(check) for check in self.checks]}
