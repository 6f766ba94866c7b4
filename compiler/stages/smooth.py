"""Smooth: the merged model as it is rounded, loud inputs folded into weights (compiler.quantizers.smooth). Decoders only.

The evaluation still compares with the merged model itself: in exact arithmetic both are one function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compiler.evaluation.data import EvaluationSet
from compiler.plan import Step
from compiler.quantizers.smooth import CANDIDATES, GAIN, REACH, Report, smoothing
from compiler.record import versions
from compiler.scheme import Schemes, parse_scheme
from compiler.sources import Sources
from compiler.store import Store

SMOOTH_VERSION = 1
WINDOWS = 4  # of 512 tokens of the calibration text
UNDER_AUTO = "int4-g64-asym-s16"  # what s is chosen for before `auto` has chosen; then it is chosen again, for that
FILE = "scales.npz"


def smooth_step(identity: Mapping[str, Any], schemes: Schemes, method: str, calibration: str) -> Step:
    """Its key is made of the merged weights, what they will be rounded to, and the calibration text."""
    layers = {pattern: str(scheme) for pattern, scheme in schemes.overrides.items()}
    params = {"scheme": str(schemes.default), "layers": layers, "method": method, "windows": WINDOWS, "calibration": calibration}
    rules = {"candidates": CANDIDATES, "gain": GAIN[method], "reach": REACH}
    tools = versions(["numpy", "torch", "transformers", "tokenizers"])
    return Step("smooth", params, {"version": SMOOTH_VERSION, "merge": dict(identity), "options": {**params, **rules}, "tools": tools})


def smoothed_sources(sources: Sources, step: Step, store: Store, rows: EvaluationSet, report: Report) -> Sources:
    """The sources with their scales, from the store or made now. Raises as BlockStream and token_windows do."""
    place = store.get(step.key)
    if place is None:
        from compiler.quantizers.windows import token_windows

        def fill(work: Path) -> None:
            schemes = Schemes(parse_scheme(step.params["scheme"]), {pattern: parse_scheme(text) for pattern, text in step.params["layers"].items()})
            scales = smoothing(sources.merged, token_windows(rows, sources.merged, WINDOWS), schemes, step.params["method"], report)
            np.savez(work / FILE, **scales)  # type: ignore[arg-type]  # numpy's own `allow_pickle` is not among the names

        place = store.obtain(step.key, fill, step.named)
    with np.load(place / FILE) as stored:
        return replace(sources, scales={name: stored[name] for name in stored.files})
