"""Tune: codes (compiler.quantizers.blockwise) or scales (compiler.quantizers.tune) trained against the float model, between quantize and export, cached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compiler.checkpoints.view import Checkpoint
from compiler.errors import RecipeError
from compiler.evaluation.data import EvaluationSet
from compiler.quantizers import nbits
from compiler.quantizers.affine import Quantized
from compiler.quantizers.pack import Packed, pack, unpack
from compiler.scheme import Schemes, parse_scheme
from compiler.stages.quantize import matrices, save_packed
from compiler.store import writing

CODES_WINDOWS = 64
Report = Callable[[str, int, int], None]


def resolve_tuning(checkpoint: Checkpoint, schemes: Schemes, calibration: EvaluationSet, seed: int, trained: str) -> dict[str, Any]:
    """The printable parameters of tuning. trained: codes or scales. Raises RecipeError where no matrix has group scales."""
    if not any(schemes.of(name).kernel == "nbits" for name in matrices(checkpoint)):
        raise RecipeError("quantize.tune", expected="codes in groups to tune", found=str(schemes.default), remedy="choose a scheme such as int4-g64")
    layers = {pattern: str(scheme) for pattern, scheme in schemes.overrides.items()}
    words = {"scheme": str(schemes.default), "layers": layers, "calibration": calibration.digest, "seed": seed, "trained": trained}
    if trained == "scales":
        from compiler.quantizers import tune

        return {**words, "passes": tune.PASSES, "rate": tune.RATE, "held": tune.HELD}
    from compiler.quantizers import blockwise

    return {**words, "windows": CODES_WINDOWS, "steps": blockwise.STEPS, "rate": blockwise.RATE, "held": blockwise.HELD}


def tune(
    checkpoint: Checkpoint,
    params: Mapping[str, Any],
    codes_of: Callable[[str], Packed | None],
    text: EvaluationSet,
    directory: Path,
    scratch: Path,
    report: Report,
) -> str:
    """Fill `directory` with the codes of every matrix in groups, trained: of what a quantizer made, or of what is rounded to nearest here.

    params   of `resolve_tuning`
    scratch  for what is to be gone on from when this is killed
    Returns what it did to the error on windows held out, in words. Raises RecipeError, CheckpointError or OutputError.
    """
    schemes = Schemes(parse_scheme(params["scheme"]), {pattern: parse_scheme(scheme) for pattern, scheme in params["layers"].items()})
    found = {}
    for name, views in matrices(checkpoint).items():
        scheme = schemes.of(name)
        if scheme.kernel == "nbits":
            packed = codes_of(name) or nbits.quantize(np.concatenate([view.read() for view in views]), scheme)
            found[name] = unpack(packed, scheme, views[0].shape[1])
    with writing(directory):
        made, words = _trained(checkpoint, params, found, text, scratch, report)
        for name, quantized in (found | made).items():
            save_packed(directory / f"{name}.npz", pack(quantized))
    return words


def _trained(
    checkpoint: Checkpoint, params: Mapping[str, Any], found: Mapping[str, Quantized], text: EvaluationSet, scratch: Path, report: Report
) -> tuple[dict[str, Quantized], str]:
    from compiler.quantizers import blockwise, tune
    from compiler.quantizers.windows import token_windows

    if params["trained"] == "scales":
        tuned = tune.tune(checkpoint, found, token_windows(text, checkpoint), report, params["seed"])
        return dict(tuned.matrices), f"KL {tuned.before:.4f}, tuned {tuned.after:.4f}"
    trained = blockwise.train(checkpoint, found, token_windows(text, checkpoint, params["windows"]), scratch / "blocks", report, params["seed"])
    return dict(trained.matrices), f"error of the last block {trained.before:.4f}, trained {trained.after:.4f}"
