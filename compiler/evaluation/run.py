"""Evaluate an exported model against the merged fp32 model: one call, one dict, cached by what it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compiler.checkpoints.view import Checkpoint
from compiler.evaluation import faithful
from compiler.evaluation.run_decoder import SHOWN_SAMPLES, DecoderRun
from compiler.evaluation.run_encoder import EncoderRun
from compiler.evaluation.subject import ChatFormat, Exported, Report, Subject, unpackaged
from compiler.evaluation.suite import Suite

__all__ = ["ChatFormat", "Exported", "Subject", "evaluate", "evaluate_attached", "unpackaged"]


def evaluate(
    merged: Checkpoint, base: Checkpoint | None, exported: Exported, suite: Suite, report: Report, seed: int = 0, student: Checkpoint | None = None
) -> dict[str, Any]:
    """{"metrics": {name: {value, low, high, samples}}, "task": [...], "samples": [...], "stages": [...], "faithful": {...}, "data": {...}}.

    merged     the reference: the merged fp32 weights
    base       the base before the deltas, to show what they bring; None when there are none
    student    what was distilled from `merged` and exported in its place; None where that itself was
    """
    run = (DecoderRun if exported.model["kind"] == "decoder" else EncoderRun)(Subject(merged, base, exported, student=student), suite, report, seed)
    return {**run.run(), "data": dict(suite.told)}


def evaluate_attached(twins: Mapping[str, Checkpoint], base: Checkpoint, exported: Exported, suite: Suite, report: Report, seed: int = 0) -> dict[str, Any]:
    """The same for unmerged adapters: each is compared with its merged twin on the same data, and its metrics are called `kl_mean@NAME`.

    The graph without an adapter is held against the base. No loss is attributed: the weights of the twins are not the ones that are stored.
    twins  name of the adapter -> the merged fp32 weights it stands for
    """
    from compiler.reference import reference_model

    whole: dict[str, Any] = {"metrics": {}, "task": [], "samples": [], "stages": []}
    for name, twin in twins.items():

        def named(what: str, done: int, most: int, name: str = name) -> None:
            report(f"{what}, {name}", done, most)

        part = DecoderRun(Subject(twin, base, exported, name), suite, named, seed).run()
        whole["metrics"] |= {f"{metric}@{name}": value for metric, value in part["metrics"].items()}
        whole["task"] += [{**row, "metric": f"{row['metric']}@{name}"} for row in part["task"]]
        whole["samples"] += [{**row, "adapter": name} for row in part["samples"][: max(1, SHOWN_SAMPLES // len(twins))]]
    stored = exported.weights_of(reference_model(base, "text-generation"), base.config)
    same = {**faithful.check(stored, exported.directory, exported.model), "model": "base"}
    return {**whole, "faithful": same, "data": dict(suite.told)}
