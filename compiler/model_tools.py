"""What `trimtab merge`, `quantize` and `export` do: files in, files out, as library calls that return plain data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compiler.checkpoints.resolve import open_checkpoint
from compiler.checkpoints.write import write_checkpoint
from compiler.delta_tools import account, publishing
from compiler.distil.ask import Distil
from compiler.errors import RecipeError
from compiler.progress import Progress
from compiler.recipe import parse_part
from compiler.record import Stopwatch
from compiler.scheme import Schemes, parse_scheme
from compiler.sources import Mixture
from compiler.stages import distil as distil_stage
from compiler.stages import export as export_stage
from compiler.stages.keep import AS_IS, schemes_for
from compiler.stages.quantize import quantized_view
from compiler.store import Store


def merge_files(mixture: Mixture, dtype: str | None, out: Path, progress: Progress) -> dict[str, Any]:
    """`trimtab merge`: a merged checkpoint on disk, written block by block."""
    watch = Stopwatch()
    with publishing(out) as work:
        sources = mixture.open()
        with progress.stage("merge", str(mixture)):
            write_checkpoint(sources.merged, work, dtype=dtype, progress=progress.update)
    return account(out, watch, lineage=sources.lineage)


def distil_files(mixture: Mixture, asked: Mapping[str, Any], data: Path | None, task: str | None, seed: int, out: Path, progress: Progress) -> dict[str, Any]:
    """`trimtab distil`: a trained student on disk. asked: keys of `distil` in a recipe, without data."""
    from compiler.quantizers.windows import calibration_set

    watch = Stopwatch()
    ask, rows, here = parse_part(Distil, asked, "distil"), calibration_set(data, "--data"), Path()
    with publishing(out) as work:
        sources = mixture.open()
        step = distil_stage.distil_step(ask, sources, rows, task, None, seed, here)
        planned = distil_stage.planned_student(sources, step, ask, here)
        with progress.stage("distil", f"{planned.merged.parameter_count / 1e6:.1f} M parameters of {sources.merged.parameter_count / 1e6:.1f} M"):
            store = Store.default()
            made = distil_stage.distilled_sources(planned, ask, rows, store, progress.update, here)
        write_checkpoint(open_checkpoint(made.merged.origin), work)
    told = distil_stage.told_of(step, store)["distil"]
    facts = {key: told[key] for key in ("measure", "before", "after", "steps", "tokens", "best_step", "parameters", "dropped", "checks")}
    return account(out, watch, lineage=planned.lineage, **facts)


def quantize_files(mixture: Mixture, scheme: str, out: Path, progress: Progress) -> dict[str, Any]:
    """`trimtab quantize`: a float32 checkpoint seen through a weight-only scheme."""
    watch, parsed = Stopwatch(), parse_scheme(scheme, "--scheme")
    if parsed.kernel != "nbits":
        raise RecipeError("--scheme", expected="a weight-only scheme such as int4-g32", found=scheme, remedy="other schemes exist only inside the graph")
    with publishing(out) as work:
        sources = mixture.open()
        with progress.stage("quantize", scheme):
            write_checkpoint(quantized_view(sources.merged, Schemes(parsed)), work, dtype="F32", progress=progress.update)
    return account(out, watch, scheme=scheme)


def export_files(mixture: Mixture, scheme: str, task: str | None, out: Path, progress: Progress) -> dict[str, Any]:
    """`trimtab export`: merge, quantize and write ONNX in one stream."""
    watch = Stopwatch()
    _ = scheme == AS_IS or parse_scheme(scheme, "--scheme")  # an unknown one is told before anything is opened
    with publishing(out) as work:
        sources = mixture.open()
        options = export_stage.resolve_options(sources.merged, schemes_for(scheme, {}, sources.merged, "--scheme"), task, None)
        with progress.stage("export", f"{scheme}, {options['road']} road"):
            summary = export_stage.export(sources.merged, options, work, progress.update)
        (work / export_stage.SUMMARY).unlink()
    return account(out, watch, model=summary["model"])
