"""What the `trimtab delta` commands do, files in and files out, as library calls that return plain data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compiler.checkpoints.files import beside
from compiler.checkpoints.resolve import locate, open_checkpoint
from compiler.checkpoints.view import Checkpoint
from compiler.checkpoints.write import write_checkpoint
from compiler.deltas import extract, rollback, survey
from compiler.deltas.load import load_delta
from compiler.errors import DeltaError, OutputError
from compiler.evaluation.data import load_rows
from compiler.progress import Progress
from compiler.recipe import Recipe
from compiler.record import Stopwatch, peak_rss_mb
from compiler.scheme import Schemes, parse_scheme
from compiler.sources import Mixture, mixture_of
from compiler.stages import export as export_stage
from compiler.store import writing

PICTURES = (".svg", ".png", ".pdf")


@contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place on leaving without an error. Raises OutputError, also for an `out` with something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(str(out), expected="a new or empty folder", found="something there", remedy="choose another --out")
    work = beside(out, "making")
    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            work.mkdir()
            yield work
            if out.is_dir():
                out.rmdir()
            work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def account(out: Path, watch: Stopwatch, **more: Any) -> dict[str, Any]:
    """What a command that writes a folder reports."""
    size = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    return {"out": str(out), "size_mb": round(size / 1e6, 3), "seconds": round(watch.seconds, 2), "peak_rss_mb": round(peak_rss_mb(), 1), **more}


def merge_reversibly(mixture: Mixture, dtype: str | None, out: Path, mode: str, progress: Progress) -> dict[str, Any]:
    """`trimtab merge --rollback`: a merged checkpoint and, in the same folder, what takes it back to its base (compiler.deltas.rollback)."""
    watch = Stopwatch()
    with publishing(out) as work:
        sources = mixture.open()
        with progress.stage("merge", str(mixture)):
            write_checkpoint(sources.merged, work, dtype=dtype, progress=progress.update)
        plan = sources.merge
        names = {name: plan.merged_name(name) for name in plan.base.tensors}
        with progress.stage("record", "what the merge changed, for rollback"):
            record = rollback.write_record(work, plan.base, open_checkpoint(str(work)), names, plan.record(), mode=mode, update=progress.update)
    kept = {"rollback": record["mode"], "rollback_mb": round(record["residual_bytes"] / 1e6, 3)}
    return account(out, watch, **kept, lineage=sources.lineage)


def roll_back(merged: str, record: Path | None, base: str | None, out: Path, progress: Progress) -> dict[str, Any]:
    """`trimtab delta rollback`: the base of a merged checkpoint, verified before anything is written. Raises CheckpointError, OutputError."""
    watch = Stopwatch()
    path = record or locate(merged) / rollback.RECORD
    told = rollback.read_record(path)
    source = open_checkpoint(base or told["base"]["name"]) if told["mode"] == "reference" else None
    with publishing(out) as work:
        restored = rollback.restored(open_checkpoint(merged), path, source)
        with progress.stage("verify", "restored tensors against the digests of the base"):
            rollback.verify_restored(restored, path, progress.update)
        with progress.stage("write", str(out)):
            write_checkpoint(restored, work, progress=progress.update)
    return account(out, watch, mode=told["mode"], tensors=len(told["tensors"]), base=told["base"]["name"])


def inspect_delta(path: str, base: str | None, picture: Path | None) -> dict[str, Any]:
    """`trimtab delta inspect`: rank, norm and energy of every tensor and layer; a picture by layer where a file is named. Raises DeltaError, OutputError."""
    delta = load_delta(path)
    table = survey.as_table(survey.survey(delta, open_checkpoint(base) if base else None))
    if picture:
        _check_picture(picture)
        with writing(picture):
            survey.plot(table, f"{path} ({delta.kind})", picture)
    return {"delta": path, "kind": delta.kind, "trained_on": delta.base_name, "digest": delta.digest, **table}


def _check_picture(path: Path) -> None:
    if path.suffix not in PICTURES:
        raise OutputError(str(path), expected=f"a file ending in {', '.join(PICTURES)}", found=repr(path.suffix), remedy="name it so")


def ablate_recipe(recipe: Recipe, by: str, limit_rows: int | None, picture: Path | None, progress: Progress) -> dict[str, Any]:
    """`trimtab delta ablate`: what each group of modules contributes to the recipe's evaluation (compiler.ablation). Raises TrimtabError."""
    from compiler import ablation

    if picture:
        _check_picture(picture)
    watch = Stopwatch()
    limits = [limit for limit in (limit_rows, recipe.evaluate.limit_rows) if limit]
    data = load_rows(recipe.folder / recipe.evaluate.data if recipe.evaluate.data else None, min(limits, default=None))
    sources = mixture_of(recipe).open()
    task = str(export_stage.resolve_options(sources.merged, Schemes(parse_scheme("fp32")), recipe.task, recipe.max_length)["task"])
    found = ablation.ablate(sources, data, by, task, recipe.seed, progress)
    if picture:
        with writing(picture):
            ablation.plot(found, f"{recipe.name}: contribution by {by}", picture)
    return {"recipe": recipe.name, **found, "data": data.origin, "lineage": sources.lineage, "seconds": round(watch.seconds, 2)}


@dataclass(frozen=True)
class DiffOptions:
    """How to look for a delta. most: rank. form: of the result, None for the smallest. activations: `builtin`, a file of text, or None: plain norms."""

    error: float = 1e-5
    most: int = 64
    form: str | None = None
    activations: str | None = None


def _input_rms(before: Checkpoint, activations: str | None, progress: Progress) -> dict[str, np.ndarray] | None:
    if activations is None:
        return None
    from compiler.activations import input_rms

    data = load_rows(None if activations == "builtin" else Path(activations))
    with progress.stage("run", f"{before.origin} on {data.origin}"):
        task = str(export_stage.resolve_options(before, Schemes(parse_scheme("fp32")), None, None)["task"])
        return input_rms(before, data, task)


def diff_checkpoints(old: str, new: str, out: Path, options: DiffOptions, progress: Progress) -> dict[str, Any]:
    """`trimtab delta diff`: the smallest delta from `old` to `new` (compiler.deltas.extract). Raises DeltaError, OutputError."""
    watch, form, most = Stopwatch(), options.form, options.most
    before, after = open_checkpoint(old), open_checkpoint(new)
    rms = _input_rms(before, options.activations, progress)
    with publishing(out) as work:
        with progress.stage("compare", f"{old} and {new}"):
            found = extract.differences(before, after, options.error, most, progress.update, rms)
        best, sizes = extract.smallest(found)
        if form and form not in sizes:
            raise DeltaError(
                new, expected=f"differences that {form} can hold", found=f"no matrix of rank {most} or less", remedy=f"leave --form out: {best} holds them"
            )
        with progress.stage("write", f"{form or best} to {out}"):
            extract.write_delta(work, form or best, found, before, after)
    worst = max((row["error"] for row in extract.summary(found, form or best)), default=0.0)
    kinds = {f"{name}_mb": round(size / 1e6, 3) for name, size in sorted(sizes.items())}
    return account(out, watch, form=form or best, tensors=len(found), error=worst, **kinds, changes=extract.summary(found, form or best))
