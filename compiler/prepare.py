"""The model that is rounded: base and deltas, the student, loud inputs folded into weights. Planned first, so that what cannot be is told early, then made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from compiler.checkpoints.view import Checkpoint
from compiler.errors import RecipeError
from compiler.plan import Step
from compiler.progress import Progress
from compiler.recipe import Recipe
from compiler.record import Record, Stopwatch, tree_bytes
from compiler.scheme import Schemes, parse_scheme
from compiler.sources import Sources, mixture_of
from compiler.stages import codes
from compiler.stages import distil as distil_stage
from compiler.stages import export as export_stage
from compiler.stages.keep import AS_IS
from compiler.stages.smooth import UNDER_AUTO, smooth_step, smoothed_sources
from compiler.store import Store


def planned(recipe: Recipe) -> Sources:
    """Base and deltas, and the smoothing that the recipe asks for, not done yet. Raises RecipeError where it cannot be."""
    sources = mixture_of(recipe).open()
    if recipe.distil:
        sources = _with_student(recipe, sources)
    if not recipe.quantize.smooth:
        return sources
    _require_smoothable(recipe, sources)
    return to_smooth(recipe, sources, Schemes(parse_scheme(UNDER_AUTO), recipe.quantize.fixed) if recipe.quantize.auto else recipe.quantize.schemes)


def _require_smoothable(recipe: Recipe, sources: Sources) -> None:
    """Raises RecipeError where `smooth` does not go with the rest."""
    if sources.attached or export_stage.road(sources.merged.config, recipe.task) != export_stage.DECODER:
        found = "deltas that stay unmerged" if sources.attached else "an encoder"
        raise RecipeError("quantize.smooth", expected="a decoder with its deltas merged", found=found, remedy="remove it")
    if recipe.quantize.scheme == AS_IS:
        raise RecipeError("quantize.smooth", expected="a scheme that rounds", found="as-is, which keeps the codes that came", remedy="remove one of them")


def to_smooth(recipe: Recipe, sources: Sources, schemes: Schemes) -> Sources:
    """The sources with the smoothing for some schemes in place of any other, not done yet; as they are where the recipe asks for none."""
    if not recipe.quantize.smooth:
        return sources
    plain = replace(sources, smooth=None, scales={})
    return replace(plain, smooth=smooth_step(plain.identity, schemes, recipe.quantize.method, codes.calibration_text(recipe).digest))


def _with_student(recipe: Recipe, sources: Sources) -> Sources:
    """The sources with the student that the recipe asks for, not made yet. Raises RecipeError where it cannot be."""
    ask = recipe.distil
    assert ask is not None
    if sources.attached:
        raise RecipeError("distil", expected="merged deltas", found="deltas.mode attached", remedy="remove one of them")
    if recipe.quantize.scheme == AS_IS:
        raise RecipeError("distil", expected="a scheme that rounds", found="as-is, which keeps the codes that came", remedy="choose a scheme")
    if ask.quantized and (recipe.quantize.auto or recipe.quantize.method != "rtn" or recipe.quantize.smooth or recipe.quantize.tune):
        expected = "one scheme, method rtn, neither smooth nor tune: what is trained is what is rounded to nearest"
        raise RecipeError("distil.quantized", expected=expected, found="another quantizer", remedy="change `quantize`, or remove distil.quantized")
    schemes = recipe.quantize.schemes if ask.quantized else None
    step = distil_stage.distil_step(ask, sources, codes.training_rows(recipe), recipe.task, schemes, recipe.seed, recipe.folder)
    return distil_stage.planned_student(sources, step, ask, recipe.folder)


def made(recipe: Recipe, sources: Sources, store: Store, progress: Progress) -> Sources:
    """The sources once student and smoothing that were planned are there."""
    if sources.distil and recipe.distil:
        size = f"{sources.merged.parameter_count / 1e6:.1f} M parameters of {sources.reference.parameter_count / 1e6:.1f} M"
        with recorded(sources.distil, size, sources.reference, "student", store, progress) as records:
            sources = distil_stage.distilled_sources(sources, recipe.distil, codes.training_rows(recipe), store, progress.update, recipe.folder)
        sources = replace(sources, records=(*sources.records, *records))
    return smoothed(recipe, sources, store, progress)


def smoothed(recipe: Recipe, sources: Sources, store: Store, progress: Progress) -> Sources:
    """The sources once the smoothing that was planned is there: from the store, or made now."""
    if not sources.smooth:
        return sources
    others = len(sources.smooth.params["layers"])
    told = f"for {sources.smooth.params['scheme']}" + (f" and {others} matrices of their own schemes" if others else "")
    with recorded(sources.smooth, told, sources.merged, "scales", store, progress) as records:
        sources = smoothed_sources(sources, sources.smooth, store, codes.calibration_text(recipe), progress.update)
    return replace(sources, records=(*sources.records, *records))


@contextmanager
def recorded(step: Step, told: str, read: Checkpoint, wrote: str, store: Store, progress: Progress) -> Iterator[list[Record]]:
    """A stage with its progress; its record is in the list on leaving."""
    watch, cached, records = Stopwatch(), store.get(step.key) is not None, list[Record]()
    with progress.stage(step.stage, told + (" (cached)" if cached else "")):
        yield records
    record = Record(step.stage, step.key, [read.digest], [wrote], dict(step.params), cached, bytes=tree_bytes(store.place(step.key)), **watch.account)
    records.append(record)
