"""Tune: scales of codes trained against the float model (compiler.quantizers.tune): a step between quantize and export, cached by what it read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler.checkpoints.view import Checkpoint
from compiler.errors import RecipeError
from compiler.evaluation.data import EvaluationSet
from compiler.quantizers import nbits
from compiler.quantizers.pack import Packed, pack, unpack
from compiler.scheme import Schemes, parse_scheme
from compiler.stages.quantize import matrices, save_packed
from compiler.store import writing

if TYPE_CHECKING:
    from compiler.quantizers.tune import Tuned

Report = Callable[[str, int, int], None]


def resolve_tuning(checkpoint: Checkpoint, schemes: Schemes, calibration: EvaluationSet, seed: int) -> dict[str, Any]:
    """The printable parameters of tuning. Raises RecipeError where no matrix has group scales."""
    from compiler.quantizers.tune import HELD, PASSES, RATE

    if not any(schemes.of(name).kernel == "nbits" for name in matrices(checkpoint)):
        raise RecipeError("quantize.tune", expected="scales of groups to tune", found=str(schemes.default), remedy="choose a scheme such as int4-g64")
    layers = {pattern: str(scheme) for pattern, scheme in schemes.overrides.items()}
    words = {"scheme": str(schemes.default), "layers": layers, "calibration": calibration.digest, "seed": seed}
    return {**words, "passes": PASSES, "rate": RATE, "held": HELD}


def tune_scales(
    checkpoint: Checkpoint, params: Mapping[str, Any], codes_of: Callable[[str], Packed | None], text: EvaluationSet, directory: Path, report: Report
) -> Tuned:
    """Fill `directory` with the codes of every matrix in groups, scales tuned: of what a quantizer made, or of what is rounded to nearest here.

    params  of `resolve_tuning`
    Raises RecipeError, CheckpointError or OutputError.
    """
    from compiler.quantizers.tune import tune
    from compiler.quantizers.windows import token_windows

    schemes = Schemes(parse_scheme(params["scheme"]), {pattern: parse_scheme(scheme) for pattern, scheme in params["layers"].items()})
    found = {}
    for name, views in matrices(checkpoint).items():
        scheme = schemes.of(name)
        if scheme.kernel == "nbits":
            packed = codes_of(name) or nbits.quantize(np.concatenate([view.read() for view in views]), scheme)
            found[name] = unpack(packed, scheme, views[0].shape[1])
    with writing(directory):
        tuned = tune(checkpoint, found, token_windows(text, checkpoint), report, params["seed"])
        for name, quantized in tuned.matrices.items():
            save_packed(directory / f"{name}.npz", pack(quantized))
    return tuned
