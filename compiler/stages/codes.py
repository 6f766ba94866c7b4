"""What a recipe's `quantize` asks of one model: schemes, the steps that make codes ahead of the export, calibration text, and what the user should be told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compiler.checkpoints.view import Checkpoint
from compiler.errors import RecipeError
from compiler.evaluation.data import EvaluationSet
from compiler.plan import Step
from compiler.progress import Progress
from compiler.quantizers.methods import METHODS
from compiler.quantizers.windows import calibration_set, unscored_rows
from compiler.recipe import Recipe
from compiler.scheme import Schemes
from compiler.stages import export as export_stage
from compiler.stages.keep import AS_IS, codes_for, rounded_again, schemes_for
from compiler.stages.quantize import quantize_matrices, resolve_method
from compiler.stages.tune import resolve_tuning, tune
from compiler.store import Store

STAGES = ("quantize", "tune")


def schemes_of(recipe: Recipe, merged: Checkpoint) -> Schemes:
    """As the recipe's words have them for these weights. Raises RecipeError."""
    if recipe.quantize.scheme == AS_IS and _beyond_rounding(recipe):
        raise RecipeError("quantize", expected="neither method nor tune beside as-is, which keeps codes and scales", found="one", remedy="remove it")
    return schemes_for(recipe.quantize.scheme, recipe.quantize.fixed, merged)


def _beyond_rounding(recipe: Recipe) -> bool:
    return recipe.quantize.method != "rtn" or recipe.quantize.tune is not None


def code_steps(recipe: Recipe, merged: Checkpoint, schemes: Schemes, road: str) -> dict[str, Any]:
    """Stage -> its parameters, in order, of what runs ahead of the export; empty where that rounds to nearest as it streams. Raises RecipeError."""
    if road != export_stage.DECODER:
        if _beyond_rounding(recipe):
            raise RecipeError("quantize.method", expected="rtn for an encoder", found="another, or tune", remedy="remove it: encoders round to nearest")
        return {}
    text = calibration_text(recipe) if METHODS[recipe.quantize.method].calibrated else None
    made = {"quantize": resolve_method(merged, schemes, {"*": recipe.quantize.method}, text)}
    if recipe.quantize.tune:
        made["tune"] = resolve_tuning(merged, schemes, calibration_text(recipe), recipe.seed, recipe.quantize.tune)
    return {stage: params for stage, params in made.items() if params is not None}


def calibration_text(recipe: Recipe) -> EvaluationSet:
    """The text that is run through the model. Raises RecipeError."""
    named = recipe.quantize.calibration
    if named == "recipe":
        return unscored_rows(_data_file(recipe), recipe.evaluate.limit_rows)[0]
    return calibration_set(None if named == "builtin" else recipe.folder / named)


def training_rows(recipe: Recipe) -> EvaluationSet:
    """What a student is trained on. Raises RecipeError."""
    named = recipe.distil.data if recipe.distil else "builtin"
    if named == "recipe":
        return unscored_rows(_data_file(recipe), recipe.evaluate.limit_rows)[0]
    return calibration_set(None if named == "builtin" else recipe.folder / named, "distil.data")


def _data_file(recipe: Recipe) -> Path | None:
    return recipe.folder / recipe.evaluate.data if recipe.evaluate.data else None


def notes(recipe: Recipe, merged: Checkpoint, options: Mapping[str, Any]) -> list[str]:
    """About weights that came quantized, and about the calibration. options: of the export."""
    if options["road"] != export_stage.DECODER:
        return []
    found = rounded_again(merged, export_stage.schemes_in(options), lambda _: recipe.quantize.method)
    reads = recipe.quantize.auto or recipe.quantize.tune or METHODS[recipe.quantize.method].calibrated
    if recipe.quantize.calibration == "recipe" and reads:
        found += filter(None, [unscored_rows(_data_file(recipe), recipe.evaluate.limit_rows)[1]])
    return found


def make(step: Step, recipe: Recipe, merged: Checkpoint, before: Path | None, work: Path, store: Store, progress: Progress) -> None:
    """Fill `work` with the codes of one of STAGES. before: what the step ahead of it made."""
    if step.stage == "quantize":
        text = calibration_text(recipe) if step.params["calibration"] else None
        quantize_matrices(merged, step.params, text, work, progress.update)
        return
    codes_of = codes_for(merged, export_stage.schemes_in(step.params), before)
    with store.scratch(step.key) as scratch:
        told = tune(merged, step.params, codes_of, calibration_text(recipe), work, scratch, progress.update)
    progress.note(f"tune       on calibration windows held out: {told}")


def described(step: Step) -> str:
    """For the progress line: scheme, and methods."""
    how = sorted(set(step.params["methods"].values())) if step.stage == "quantize" else [f"{step.params['trained']} against the float model"]
    return f"{step.params['scheme']}, {', '.join(how)}"
