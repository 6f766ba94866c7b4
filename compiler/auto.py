"""`quantize: {scheme: auto}`: a row of choices for each matrix, chosen for one target's limits.

1. The loss of every matrix under every choice is estimated once per merged model (`quantizers.sensitivity`), and cached by contents and parameters.
2. What a choice costs comes from its bytes and from the target's kernel table (`compiler.workload`, `targets.predict`). What no choice changes (tokenizer,
   norms, attention) is taken off the limit first. Percentile limits are aimed at with HEADROOM: the estimate is of the usual request.
3. Without a limit on kl_mean: least loss within the limits on size_mb, tpot, ttft and peak_rss_mb. With one: least size that keeps it and the others.
   Without any of these: least loss in no more bytes than DEFAULT everywhere.
4. The bundle is then built (smoothed anew for what was chosen, where the recipe smooths), evaluated and measured as any other. Where a check of a limited
   quantity disagrees, its limit inside is moved by the ratio of what was measured to what was expected, and the choice is made again, ROUNDS times at most.
   What is published has passed its own checks.

Names under `quantize.layers` are not chosen for: they stay as written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from compiler.checkpoints.view import Checkpoint
from compiler.errors import RecipeError
from compiler.limits import PERCENTILE
from compiler.plan import Step
from compiler.quantizers.allocate import Allocation, allocate
from compiler.quantizers.pack import planes
from compiler.quantizers.sensitivity import Question, Report, Sensitivity, sensitivity
from compiler.record import versions
from compiler.scheme import Scheme, Schemes, parse_scheme
from compiler.store import Store
from compiler.workload import MatrixUse, matrices, workload
from targets.errors import TargetError
from targets.kernels import Point
from targets.predict import Clock, Conditions, Workload, predict
from targets.profile import Profile
from targets.table import KernelTable

FOUR_BITS = ("int3-g32-asym-s16", "int4-g128-asym-s16", "int4-g64-asym-s16", "int4-g32-asym-s16")  # run on the 4-bit kernel
EIGHT_BITS = (
    *("int5-g64-s16", "int5-g32-s16", "int5-g32-asym-s16", "int6-g128-s16", "int6-g64-s16", "int6-g32-s16"),
    *("int7-g64-s16", "int7-g32-s16", "int8-g128-s16", "int8-g64-s16", "int8-g32-s16", "int8-g16-s16"),
)
CHOICES = tuple(parse_scheme(text) for text in (*FOUR_BITS, *EIGHT_BITS))
PROBED = parse_scheme("int4-g64-asym-s16")
DEFAULT = parse_scheme("int4-g32-asym-s16")
WINDOWS = 8  # of 512 tokens of the calibration text
SENSITIVITY_VERSION = 4
ROUNDS = 3
HEADROOM = 1.1  # of a percentile over the usual request
CLOSE = 1.25  # a latency that is not proven but this near to its limit is aimed at again
PROVABLE = 1.1  # the factor by which a latency is then aimed lower: that far off, a hundred requests decide; half as far, several hundred (docs/power.svg)
LEAST = 1.02  # times the least of all choices: where a tightened limit ends
# beside weights and tokenizer: configs, self-test, norms; of each matrix nodes in model.onnx and alignment of its tensors; of each further plane the same
GRAPH_MB, MATRIX_MB, PLANE_MB = 0.04, 0.0033, 0.0016
CURVE = 12  # points of the size / KL curve in the report


class HasDocument(Protocol):
    """What a build gives back: the report document with its verdict."""

    @property
    def document(self) -> Mapping[str, Any]: ...


Built = TypeVar("Built", bound=HasDocument)


def sensitivity_step(identity: Mapping[str, Any], method: str, calibration: str) -> Step:
    """Rule 1 as a step: its key is made of the merged weights, the method, the calibration text and what is done with it."""
    params = {"choices": [str(choice) for choice in CHOICES], "probed": str(PROBED), "method": method, "windows": WINDOWS, "calibration": calibration}
    tools = versions(["numpy", "torch", "transformers"])
    return Step("sensitivity", params, {"version": SENSITIVITY_VERSION, "merge": dict(identity), "options": params, "tools": tools})


def stored_sensitivity(step: Step, store: Store) -> Sensitivity | None:
    """What an earlier run measured; None when there is none."""
    place = store.get(step.key)
    return Sensitivity.from_dict(json.loads((place / "sensitivity.json").read_text())) if place else None


def measured_sensitivity(merged: Checkpoint, step: Step, rows: Any, store: Store, report: Report) -> Sensitivity:
    """Rule 1: from the store, or measured now on calibration rows."""
    found = stored_sensitivity(step, store)
    if found is None:
        from compiler.quantizers.windows import token_windows

        question = Question(CHOICES, PROBED, step.params["method"])

        def fill(work: Path) -> None:
            measured = sensitivity(merged, token_windows(rows, merged, WINDOWS), question, report)
            (work / "sensitivity.json").write_text(json.dumps(measured.as_dict(), sort_keys=True))

        place = store.obtain(step.key, fill, step.named)
        found = Sensitivity.from_dict(json.loads((place / "sensitivity.json").read_text()))
    return found


def times_kernels(profile: Profile) -> bool:
    """Whether the profile can tell the time of the kernels that are chosen among."""
    return any(row.op == "MatMulNBits" for row in profile.kernels)


def require_kernels(profile: Profile, limits: Mapping[str, float]) -> None:
    """Raises TargetError for a latency limit on a profile without a kernel table."""
    for name in limits:
        match = PERCENTILE.fullmatch(name)
        if match and match["series"] != "encode" and not times_kernels(profile):
            raise TargetError(
                f"profile {profile.id}: kernels",
                expected=f"a kernel table, to choose by {name}",
                found="none",
                remedy="run `trimtab targets probe` on the target once (`here` then knows it), or limit size_mb or kl_mean",
            )


@dataclass(frozen=True)
class Chosen:
    """What came of a choice. expected: the limited quantities, kl_mean and size_mb, as estimated; curve: the size / KL / TPOT frontier, for the report."""

    schemes: Schemes
    expected: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]
    curve: Sequence[Mapping[str, Any]] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"expected": dict(self.expected), "rows": [dict(row) for row in self.rows], "curve": [dict(point) for point in self.curve]}

    def for_report(self, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The report's sections: what was chosen, and the stored matrices with their part of the loss."""
        known = {row["name"]: row for row in self.rows}
        extra = [{"kl": known[row["name"]]["kl"], "slope": known[row["name"]]["slope"]} if row["name"] in known else {} for row in layers]
        return {"allocation": self.as_dict(), "layers": [{**row, **more} for row, more in zip(layers, extra, strict=True)]}

    def counts(self) -> str:
        """`90 x int4-g64, 31 x int8-g32`"""
        return ", ".join(f"{count} x {scheme}" for scheme, count in Counter(row["scheme"] for row in self.rows).most_common())


@dataclass(frozen=True)
class Chooser:
    """Rules 2 and 3 for one model on one target. moved: limit -> factor on what is allowed inside (rule 4)."""

    merged: Checkpoint
    found: Sensitivity
    profile: Profile
    limits: Mapping[str, float]
    fixed: Mapping[str, Scheme] = field(default_factory=dict)
    moved: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def uses(self) -> list[MatrixUse]:
        return matrices(self.merged, Schemes(DEFAULT, self.fixed))

    @cached_property
    def items(self) -> list[MatrixUse]:
        """The matrices that are chosen for."""
        known = {row.matrix for row in self.found.rows}
        return [use for use in self.uses if use.name in known and not any(fnmatchcase(use.name, pattern) for pattern in self.fixed)]

    @cached_property
    def costs(self) -> dict[str, np.ndarray]:
        """Quantity -> [items, choices], and what no choice changes under (quantity, None)."""
        kinds = {"size_mb": self._bytes, "peak_rss_mb": self._resident}
        if self.timed:
            kinds |= {"tpot": lambda use: self._times(use)[0], "ttft": lambda use: self._times(use)[1]}
        return {name: np.array([[cost(replace(use, scheme=choice)) for choice in CHOICES] for use in self.items]) for name, cost in kinds.items()}

    @cached_property
    def timed(self) -> bool:
        return times_kernels(self.profile)

    @cached_property
    def base(self) -> dict[str, float]:
        """What no choice changes: the figure of the whole model under DEFAULT less what the items then cost."""
        at = CHOICES.index(DEFAULT)
        figures = predict(self.work, self.profile).figures if self.timed else {}
        whole = {"tpot": figures["tpot_ms"].value, "ttft": figures["ttft_ms"].value, "peak_rss_mb": figures["peak_rss_mb"].value} if figures else {}
        rest = {name: value - float(self.costs[name][:, at].sum()) for name, value in whole.items()}
        vectors = sum(4 * view.size for view in self.merged.tensors.values() if len(view.shape) != 2)
        fixed = sum(use.bytes for use in self.uses if use not in self.items)
        assets = sum(len(content) for content in self.merged.assets.values())
        rest["size_mb"] = (vectors + fixed + assets) / 1e6 + GRAPH_MB + MATRIX_MB * len(self.uses)
        if "peak_rss_mb" not in rest:
            from targets.predict import RUNTIME_BYTES

            rest["peak_rss_mb"] = RUNTIME_BYTES / 1e6 + rest["size_mb"]
        return rest

    def _bytes(self, use: MatrixUse) -> float:
        """Weights, and the nodes that put planes together."""
        return use.bytes / 1e6 + (PLANE_MB * (len(planes(use.scheme.bits)) - 1) if use.scheme.shift else 0.0)

    def _resident(self, use: MatrixUse) -> float:
        """A tied table is held twice: packed for the head, as stored for the lookup."""
        twice = use.name == "lm_head" and bool(self.merged.config.get("tie_word_embeddings"))
        return (use.resident_bytes + (use.bytes if twice else 0)) / 1e6

    @cached_property
    def work(self) -> Workload:
        return workload(self.merged.config, self.uses, True)

    @cached_property
    def clock(self) -> Clock:
        return Clock(self.profile, KernelTable(self.profile.kernels))

    def _times(self, use: MatrixUse) -> tuple[float, float]:
        """(ms a token, ms a prompt) of one matrix under the usual conditions."""
        case, tokens = use.case(), Conditions().prompt_tokens
        token = self.clock.matrix_us(self.work, case, Point(1)) / 1e3
        return token, token if use.name == "lm_head" else self.clock.matrix_us(self.work, case, Point(tokens)) / 1e3

    def inside(self) -> dict[str, float]:
        """Rule 2: limits on the sum over items. Raises TargetError as `require_kernels` does."""
        require_kernels(self.profile, self.limits)
        found: dict[str, float] = {}
        for name, limit in self.limits.items():
            match = PERCENTILE.fullmatch(name)
            series = match["series"] if match else name
            if series in self.costs:
                given = limit / (HEADROOM if match else 1.0)
                aimed = given * self.moved.get(name, 1.0) - self.base[series]
                if match and name in self.moved:  # beyond the table's least, which is an estimate too: about the least is tried before giving up
                    aimed = max(aimed, min(given - self.base[series], LEAST * float(self.costs[series].min(axis=1).sum())))
                found[series] = min(found.get(series, np.inf), aimed)
        return found

    def choose(self, curve: bool = False) -> Chosen:
        """Rule 3. Raises RecipeError when even the smallest choices exceed a limit, TargetError as `inside` does."""
        loss = self.found.table([use.name for use in self.items], CHOICES)
        limits = self.inside()
        if "kl_mean" in self.limits:
            kl = self.limits["kl_mean"] * self.moved.get("kl_mean", 1.0)
            problem = Allocation(self.costs["size_mb"], {**self.costs, "kl_mean": loss}, {**limits, "kl_mean": kl})
        else:
            if not limits:
                limits = {"size_mb": float(self.costs["size_mb"][:, CHOICES.index(DEFAULT)].sum())}
            problem = Allocation(loss, self.costs, limits)
        picked = allocate(problem)
        return self._chosen(picked, loss, self._curve(loss) if curve else ())

    def _chosen(self, picked: np.ndarray, loss: np.ndarray, curve: Sequence[Mapping[str, Any]]) -> Chosen:
        names = [CHOICES[column] for column in picked]
        default = Counter(names).most_common(1)[0][0] if names else DEFAULT
        overrides = {use.name: scheme for use, scheme in zip(self.items, names, strict=True) if scheme != default}
        error = {(row.matrix, row.scheme): row.error for row in self.found.rows}
        rows = [
            {"name": use.name, "scheme": str(scheme), "kl": float(loss[at, picked[at]]), "output_error": error[use.name, str(scheme)]}
            | {"slope": self.found.slope[use.name], "bytes": replace(use, scheme=scheme).bytes}
            for at, (use, scheme) in enumerate(zip(self.items, names, strict=True))
        ]
        return Chosen(Schemes(default, {**overrides, **self.fixed}), self._expected(picked, loss), rows, curve)

    def _expected(self, picked: np.ndarray, loss: np.ndarray) -> dict[str, float]:
        at = np.arange(len(picked))
        sums = {name: float(cost[at, picked].sum()) + self.base[name] for name, cost in self.costs.items()}
        return {"kl_mean": float(loss[at, picked].sum())} | {f"{name}_ms" if name in ("tpot", "ttft") else name: value for name, value in sums.items()}

    def _curve(self, loss: np.ndarray) -> list[dict[str, Any]]:
        """The frontier: least loss at sizes from the smallest choices to the largest."""
        size = self.costs["size_mb"]
        low, high = float(size.min(axis=1).sum()), float(size.max(axis=1).sum())
        budgets = np.linspace(low * 1.0001, high, CURVE)
        return [self._expected(allocate(Allocation(loss, {"size_mb": size}, {"size_mb": float(budget)})), loss) for budget in budgets]


def settle(chooser: Chooser, build: Callable[[Chosen], Built]) -> Built:
    """Rule 4: choose, build, look at the verdict, and choose again while a limit that can be steered was missed."""
    chosen = chooser.choose(curve=True)
    outcome = build(chosen)
    for _ in range(ROUNDS - 1):
        moved = moved_limits(outcome.document["verdict"]["checks"], chooser.moved, chosen.expected)
        if moved is None:
            break
        chooser, before = replace(chooser, moved=moved), chosen.schemes
        try:
            chosen = chooser.choose(curve=True)
        except RecipeError:  # nothing smaller or faster is left: the verdict that was reached stands
            break
        if chosen.schemes == before:
            break
        outcome = build(chosen)
    return outcome


def moved_limits(checks: Sequence[Mapping[str, Any]], moved: Mapping[str, float], expected: Mapping[str, float]) -> dict[str, float] | None:
    """Rule 4: new factors after a verdict, or None when no limited quantity that can be steered was missed.

    {"name": "size_mb", "measured": 101, "limit": 100, "outcome": "FAIL"}, expected 100 -> {"size_mb": 0.99 * 0.998}; expected 80, as where the limit
    did not bind: {"size_mb": 0.8 * 0.99 * 0.998}
    """
    found = dict(moved)
    for check in checks:
        name, limit = check["name"], check["limit"]
        steerable = name in ("size_mb", "kl_mean", "peak_rss_mb") or name.startswith(("tpot_", "ttft_"))
        worst = check["high"] if check.get("high") is not None and np.isfinite(check["high"]) else check["measured"]
        timed, unproven = PERCENTILE.fullmatch(name), check["outcome"] == "INCONCLUSIVE"
        close = bool(timed and limit and limit / CLOSE < check["measured"] < limit * CLOSE)
        if unproven and close:  # far from the limit it is the machine that is busy, and no other choice would help
            worst = max(check["measured"], limit) * PROVABLE
        elif timed:
            worst = max(worst, check["measured"] * PROVABLE)
        missed = check["outcome"] == "FAIL" or (unproven and (name == "kl_mean" or close))
        if steerable and missed and limit and np.isfinite(worst) and worst > limit:
            foreseen = expected.get(f"{timed['series']}_ms" if timed else name, np.inf) * (HEADROOM if timed else 1.0) / limit
            found[name] = min(found.get(name, 1.0), foreseen) * limit / worst * 0.998
    return found if found != dict(moved) else None
