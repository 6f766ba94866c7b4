"""Two tables of a report from named metrics: what noise costs, and what changed outside of the task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compiler.evaluation.noise import NOISES
from compiler.limits import CONTROL

SCORES = ("exact_match", "choice_accuracy", "choice_accuracy_norm", "completion_accuracy", "accuracy", "spearman")
Metrics = Mapping[str, Mapping[str, Any]]


def robustness(metrics: Metrics) -> list[dict[str, Any]]:
    """Rows {noise, metric, reference_clean, reference, bundle_clean, bundle, excess, low, high, samples}: a score each, or perplexity where there is none.

    reference is the merged fp32 model. excess: what noise costs the bundle less what it costs the reference; in nats a token beside a perplexity.
    """
    rows = []
    for adapter in _adapters(metrics):
        scores = [name for name in SCORES if f"{name}{adapter}" in metrics]
        for noise in (name for name in NOISES if f"{name}.cosine_mean{adapter}" in metrics or f"{name}.kl_mean{adapter}" in metrics):
            for score in scores or (["perplexity"] if f"{noise}.nll_excess{adapter}" in metrics else []):
                excess = metrics[f"{noise}.{'nll' if score == 'perplexity' else score}_excess{adapter}"]
                values = {
                    "reference_clean": metrics[f"{score}_reference{adapter}"]["value"],
                    "reference": metrics[f"{noise}.{score}_reference{adapter}"]["value"],
                    "bundle_clean": metrics[f"{score}{adapter}"]["value"],
                    "bundle": metrics[f"{noise}.{score}{adapter}"]["value"],
                }
                told = {"excess": excess["value"], "low": excess["low"], "high": excess["high"], "samples": excess["samples"]}
                rows.append({"noise": f"{noise}{adapter}", "metric": score, **values, **told})
    return rows


def side_effects(metrics: Metrics) -> list[dict[str, Any]]:
    """Rows {metric, base, merged, bundle, change, low, high, samples, stage} of the control set; base is None where it could not be scored.

    change: bundle less base (less merged where there is no base) for scores, the ratio for a perplexity.
    """
    rows = []
    for adapter in _adapters(metrics):
        for score in SCORES:
            if f"{CONTROL}.{score}{adapter}" in metrics:
                rows.append(_effect(metrics, score, adapter))
        ratio = metrics.get(f"{CONTROL}.perplexity_ratio_since_base{adapter}") or metrics.get(f"{CONTROL}.perplexity_ratio{adapter}")
        if ratio:
            named = {system: metrics.get(f"{CONTROL}.perplexity{part}{adapter}", {}).get("value") for system, part in SYSTEMS.items()}
            rows.append({"metric": f"perplexity{adapter}", **named, "change": ratio["value"], **_bounds(ratio), "stage": ratio.get("stage")})
    return rows


SYSTEMS = {"base": "_base", "merged": "_reference", "bundle": ""}


def _effect(metrics: Metrics, score: str, adapter: str) -> dict[str, Any]:
    drop = metrics.get(f"{CONTROL}.{score}_drop_since_base{adapter}") or metrics[f"{CONTROL}.{score}_drop{adapter}"]
    low, high = drop["low"], drop["high"]
    bounds = {"low": None if high is None else -high, "high": None if low is None else -low, "samples": drop["samples"]}
    named = {system: metrics.get(f"{CONTROL}.{score}{part}{adapter}", {}).get("value") for system, part in SYSTEMS.items()}
    return {"metric": f"{score}{adapter}", **named, "change": -drop["value"], **bounds, "stage": drop.get("stage")}


def _bounds(metric: Mapping[str, Any]) -> dict[str, Any]:
    return {"low": metric["low"], "high": metric["high"], "samples": metric["samples"]}


def _adapters(metrics: Metrics) -> list[str]:
    """ "" for a merged bundle, "@support" ... for attached ones."""
    return sorted({name[name.index("@") :] if "@" in name else "" for name in metrics}) or [""]
