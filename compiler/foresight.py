"""Predictions for what users look at before they compile: a plan on its target, a bundle on this machine. Never a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compiler.checkpoints.view import Checkpoint
from compiler.scheme import Schemes
from compiler.workload import exported_workload, matrices, with_adapter, with_prompts, workload
from targets.errors import TargetError
from targets.predict import Workload, predict
from targets.profile import Profile

SHOWN = ("ttft_ms", "tpot_ms", "encode_ms", "peak_rss_mb", "load_s")


def foresee(
    merged: Checkpoint, schemes: Schemes, decoder: bool, profile: Profile, ranks: Mapping[str, int] | None = None, *, prompts: bool = False
) -> dict[str, Any]:
    """`Prediction.as_dict` of a model that is not exported yet, or {"unknown": why} when the profile holds too little.

    ranks    of the unmerged adapter that answers, by fused matrix (`compiler.attached.ranks`)
    prompts  a second graph reads prompts
    """
    uses = matrices(merged, schemes, decoder)
    work = workload(merged.config, uses, decoder)
    if prompts:
        work = with_prompts(work, merged.config, uses)
    return _told(with_adapter(work, ranks, uses) if ranks else work, profile)


def foresee_bundle(folder: Path, profile: Profile) -> dict[str, Any]:
    """The same for exported files, or {"unknown": why} when they do not say what is in them."""
    if not any((folder / name).is_file() for name in ("export.json", "report.json")):
        return {"unknown": "the folder has no list of its matrices (report.json)"}
    return _told(exported_workload(folder), profile)


def prediction_lines(prediction: Mapping[str, Any]) -> Iterator[str]:
    """For the terminal: one line a figure, or the reason why there is none."""
    if "unknown" in prediction:
        yield f"no prediction of latency: {prediction['unknown']}"
        return
    for name in SHOWN:
        if name in prediction["figures"]:
            row = prediction["figures"][name]
            yield f"{name:12s} about {row['value']:.3g} {row['unit']} ({row['low']:.3g} to {row['high']:.3g}; predicted by {prediction['basis']}, no verdict)"


def _told(work: Workload, profile: Profile) -> dict[str, Any]:
    try:
        return predict(work, profile).as_dict()
    except TargetError as error:
        return {"unknown": f"{error.place} is not known; {error.remedy}"}
