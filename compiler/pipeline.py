"""The one loop: sources -> plan -> steps -> verdict -> bundle. Every command that does work comes through here.

Mixture.open   base and deltas, opened lazily and bound to each other (compiler.sources)
make_plan      what will run, from which parts (compiler.plan)
run            merge (a view), export (cached), evaluate (cached), measure (never cached), package
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compiler.errors import OutputError, RecipeError
from compiler.evaluation.data import EvaluationSet, load_rows
from compiler.limits import PERCENTILE
from compiler.plan import Plan, make_plan
from compiler.progress import Progress
from compiler.recipe import Recipe, TargetItem
from compiler.record import Record, Stopwatch, peak_rss_mb, versions
from compiler.report.verdict import PASS, Verdict
from compiler.scheme import Schemes, parse_scheme
from compiler.sources import Mixture, Sources, mixture_of
from compiler.stages import export as export_stage
from compiler.stages import package
from compiler.stages.quantize import predicted_bytes, quantized_view
from compiler.stages.validate import Measured, checks
from compiler.store import Store, writing
from targets.machine import usable_cores
from targets.profile import Profile, fingerprint, load_profile

MEASURE_SECONDS = 90.0  # cap of one latency measurement
FRESH_PROCESSES = 2  # beyond the one that samples latency, for memory and load time


@dataclass(frozen=True)
class Outcome:
    """What came of one target. `bundle` is None when nothing was published."""

    document: Mapping[str, Any]
    exit_code: int
    bundle: Path | None
    report: Path | None

    def as_dict(self) -> dict[str, Any]:
        return {"document": dict(self.document), "exit_code": self.exit_code, "bundle": str(self.bundle) if self.bundle else None}


def _profile(recipe: Recipe, item: TargetItem) -> Profile:
    """A profile by name, or from a file beside the recipe."""
    file = recipe.folder / item.profile
    return load_profile(str(file) if file.suffix in (".yaml", ".yml") and file.is_file() else item.profile)


def _recipe_data(recipe: Recipe) -> EvaluationSet:
    path = recipe.folder / recipe.evaluate.data if recipe.evaluate.data else None
    return load_rows(path, recipe.evaluate.limit_rows)


def _plan(recipe: Recipe, sources: Sources, data: EvaluationSet, target: TargetItem) -> Plan:
    options = export_stage.resolve_options(sources.merged, recipe.quantize.schemes, recipe.task, recipe.max_length)
    evaluate = {"data": data.digest, "rows": len(data.rows), "seed": recipe.seed}
    return make_plan(recipe.name, target.profile, sources.identity, options, evaluate)


def plan_recipe(recipe: Recipe, store: Store) -> list[dict[str, Any]]:
    """What compiling would run, per target: steps with key and state, and the predicted size in MB."""
    sources, data = mixture_of(recipe).open(), _recipe_data(recipe)
    plans = [_plan(recipe, sources, data, target) for target in recipe.targets]
    options = plans[0].step("export").params
    size_mb = predicted_bytes(sources.merged, recipe.quantize.schemes, every_matrix=options["road"] == export_stage.ENCODER) / 1e6
    return [{"name": plan.name, "target": plan.target, "predicted_size_mb": size_mb, "steps": plan.rows(store)} for plan in plans]


def compile_recipe(recipe: Recipe, store: Store, out: Path, progress: Progress, only: Sequence[str] = ()) -> list[Outcome]:
    """The main job, for every target of the recipe (or those in `only`). Raises TrimtabError; a missed limit is an Outcome."""
    unknown = sorted(set(only) - {item.profile for item in recipe.targets})
    if unknown:
        known = ", ".join(item.profile for item in recipe.targets)
        raise RecipeError("--target", expected=f"a target of the recipe ({known})", found=unknown[0], remedy="name one of them")
    targets = [(item, _profile(recipe, item)) for item in recipe.targets if not only or item.profile in only]
    with progress.stage("merge", str(mixture_of(recipe))):
        sources, data = mixture_of(recipe).open(), _recipe_data(recipe)
    return [Run(recipe, sources, data, store, progress).target(item, profile, out) for item, profile in targets]


@dataclass(frozen=True)
class Run:
    """One recipe on its way to one bundle per target."""

    recipe: Recipe
    sources: Sources
    data: EvaluationSet
    store: Store
    progress: Progress

    def target(self, item: TargetItem, profile: Profile, out: Path) -> Outcome:
        """Export and evaluate (from the store where it has them), package, measure, judge; publish on PASS."""
        plan = _plan(self.recipe, self.sources, self.data, item)
        merged = Record("merge", "", [self.sources.merge.base.origin], [], self.sources.identity)
        exported, export_record = self._export(plan)
        evaluation, evaluate_record = self._evaluate(plan, exported)
        summary = json.loads((exported / export_stage.SUMMARY).read_text())
        records = [merged, export_record, evaluate_record]
        place = out / f"{self.recipe.name}-{Path(item.profile).stem}"
        with package.staging(place) as work:
            package.assemble(exported, work)
            facts = self._facts(profile, item.limits, summary["model"], records)
            package.write_manifest(work, facts)
            self._selftest(work)
            with self.progress.stage("measure", f"latency and memory on this machine, at most {MEASURE_SECONDS:.0f} s"):
                watch = Stopwatch()
                measured, series = measure(work, item.limits, evaluation["metrics"], profile, self.progress, self.recipe.evaluate.metrics)
            records.append(Record("measure", "", [], [], {"conditions": measured.conditions}, seconds=watch.seconds, peak_rss_mb=peak_rss_mb()))
            verdict = Verdict(profile.id, checks(item.limits, measured))
            document = _document(self.recipe.name, profile, verdict, facts, records, evaluation, summary["layers"], series)
            return _finish(work, place, document, facts, verdict)

    def _export(self, plan: Plan) -> tuple[Path, Record]:
        step, watch = plan.step("export"), Stopwatch()
        cached = self.store.get(step.key)
        with self.progress.stage("export", f"{step.params['scheme']}, {step.params['road']} road" + (" (cached)" if cached else "")):
            if cached is None:
                with self.store.make(step.key) as work:
                    export_stage.export(self.sources.merged, step.params, work, self.progress.update)
        place = cached or self.store.place(step.key)
        wrote = sorted(path.name for path in place.iterdir())
        record = Record("export", step.key, [self.sources.merged.digest], wrote, dict(step.params), cached is not None, watch.seconds, peak_rss_mb())
        return place, record

    def _evaluate(self, plan: Plan, exported: Path) -> tuple[dict[str, Any], Record]:
        from compiler.evaluation.run import evaluate

        step, watch = plan.step("evaluate"), Stopwatch()
        cached = self.store.get(step.key)
        with self.progress.stage("evaluate", f"{len(self.data.rows)} rows of {self.data.origin}" + (" (cached)" if cached else "")):
            if cached is None:
                base = self.sources.merge.base if self.recipe.deltas.items else None
                result = evaluate(self.sources.merged, base, exported, self.data, self.progress.update, self.recipe.seed)
                with self.store.make(step.key) as work:
                    (work / "evaluation.json").write_text(json.dumps(result, ensure_ascii=False, sort_keys=True))
        place = cached or self.store.place(step.key)
        result = json.loads((place / "evaluation.json").read_text())
        values = {name: metric["value"] for name, metric in result["metrics"].items()}
        return result, Record("evaluate", step.key, [self.data.digest], [], values, cached is not None, watch.seconds, peak_rss_mb())

    def _facts(self, profile: Profile, limits: Mapping[str, float], model: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
        """The manifest but for its files. Seconds and memory of this run stay out: they differ from run to run."""
        recipe = self.recipe.model_dump(mode="json")
        steps = [{key: value for key, value in record.as_dict().items() if key not in ("seconds", "peak_rss_mb", "cached")} for record in records]
        lineage = {**self.sources.lineage, "recipe": recipe, "tools": versions()}
        target = {"id": profile.id, "fingerprint": profile.fingerprint}
        return {"name": self.recipe.name, "target": target, "model": dict(model), "lineage": lineage, "limits": dict(limits), "records": steps}

    def _selftest(self, work: Path) -> None:
        from runtimes.bundle import open_bundle
        from runtimes.selftest import FILE, make_selftest

        canaries = make_selftest(open_bundle(work))
        with writing(work):
            (work / FILE).write_text(json.dumps(canaries, indent=1, ensure_ascii=False) + "\n")


def measure(
    bundle: Path, limits: Mapping[str, float], accuracy: Mapping[str, Any], profile: Profile, progress: Progress, metrics: Sequence[str] = ()
) -> tuple[Measured, dict[str, Any]]:
    """Latency, memory and load time of a bundle folder in fresh processes, and the raw series for the report.

    metrics  accuracy metrics to report besides those that are limited; empty for all
    """
    from runtimes.bench import BenchOptions, measure_in_child

    timed = {name: value for name, value in limits.items() if PERCENTILE.fullmatch(name) and value > 0}
    options = BenchOptions(limits=timed, seconds=MEASURE_SECONDS, threads=min(profile.threads, usable_cores()))
    result = measure_in_child(bundle, options, lambda done, most, _: progress.update("requests", done, most))
    short = replace(options, limits={}, least=3, most=3, seconds=10.0)
    again = [measure_in_child(bundle, short) for _ in range(FRESH_PROCESSES)]
    here = profile.fingerprint == fingerprint()
    conditions = ", ".join(f"{key} {value}" for key, value in result.conditions.items() if key != "seed")
    series = {name.removesuffix("_ms"): values for name, values in result.series.items() if name.endswith("_ms")}
    shown = {name: metric for name, metric in accuracy.items() if not metrics or name in (*metrics, *limits)}
    measured = Measured(
        size_mb=package.device_bytes(bundle) / 1e6,
        accuracy=shown,
        series=series,
        scalars={"peak_rss_mb": [one.peak_rss_mb for one in (result, *again)], "load_s": [one.load_s for one in (result, *again)]},
        medians={name: values for name, values in result.series.items() if name.endswith("_tok_s")},
        tests={test["name"]: test for test in result.tests},
        dropped=result.dropped,
        here=here,
        conditions=conditions,
    )
    return measured, {**{f"{name}_ms": values for name, values in series.items()}, "dropped": result.dropped}


def _document(
    name: str,
    profile: Profile,
    verdict: Verdict,
    facts: Mapping[str, Any],
    records: Sequence[Record],
    evaluation: Mapping[str, Any],
    layers: Sequence[Any],
    series: Mapping[str, Any],
) -> dict[str, Any]:
    """The report document (compiler.report.document says what each section holds)."""
    target = {"id": profile.id, "cores": profile.cores, "isa": profile.isa, "fingerprint": profile.fingerprint}
    return {
        "schema": 1,
        "name": name,
        "target": target,
        "verdict": verdict.as_dict(),
        "model": facts["model"],
        "lineage": facts["lineage"],
        "files": [],
        "records": [record.as_dict() for record in records],
        "layers": list(layers),
        "latency": dict(series),
        "stages": [],
        "task": evaluation["task"],
        "samples": evaluation["samples"],
        "evaluation": evaluation.get("data", {}),
    }


def _finish(work: Path, place: Path, document: dict[str, Any], facts: Mapping[str, Any], verdict: Verdict) -> Outcome:
    """Write the reports; publish on PASS, else leave only the reports beside the place where the bundle would have been."""
    from compiler.report.markdown import model_card

    document["files"] = [row for row in package.write_manifest(work, facts)["files"] if row["path"] not in package.REPORTS]
    with writing(work):
        write_reports(document, work)
        (work / "README.md").write_text(model_card(document), encoding="utf-8")
    package.write_manifest(work, facts)
    if verdict.outcome == PASS:
        package.publish(work, place)
        return Outcome(document, verdict.exit_code, place, place / "report.html")
    reports = place.with_name(place.name + ".report")
    with writing(reports):
        reports.mkdir(parents=True, exist_ok=True)
        for name in ("report.html", "report.json"):
            shutil.copyfile(work / name, reports / name)
    return Outcome(document, verdict.exit_code, None, reports / "report.html")


def write_reports(document: Mapping[str, Any], folder: Path) -> None:
    """report.json and report.html. Raises OutputError through `writing`."""
    from compiler.report.document import write_document
    from compiler.report.html import render_html

    (folder / "report.json").write_text(write_document(document), encoding="utf-8")
    (folder / "report.html").write_text(render_html(document), encoding="utf-8")


def validate_bundle(bundle: Path, target: str | None, limits: Sequence[str], report: Path | None, junit: Path | None, progress: Progress) -> Outcome:
    """Verify a bundle, let it answer its self-test, measure it here and judge it by its own limits with `limits` laid over.

    Accuracy is taken from the manifest's records: it belongs to the bytes, which were just verified, not to the machine.
    """
    from compiler.recipe import parse_limits
    from compiler.report.document import load_document
    from compiler.report.junit import render_junit
    from runtimes.bundle import open_bundle, verify_bundle
    from runtimes.selftest import run_selftest

    extra = parse_limits(limits)
    with progress.stage("verify", str(bundle)):
        verify_bundle(bundle)
        run_selftest(bundle)
    manifest = open_bundle(bundle).manifest
    profile = load_profile(target or manifest["target"]["id"])
    built = load_document(bundle / "report.json")
    asked = {**manifest["limits"], **extra}
    accuracy = {row["name"]: {**row, "value": row["measured"]} for row in built["verdict"]["checks"] if row["name"] in _evaluated(manifest)}
    if not target and manifest["target"]["fingerprint"]:
        profile = replace(profile, fingerprint=manifest["target"]["fingerprint"])
    with progress.stage("measure", "latency and memory on this machine"):
        measured, series = measure(bundle, asked, accuracy, profile, progress)
    verdict = Verdict(profile.id, checks(asked, measured))
    document = {**built, "verdict": verdict.as_dict(), "latency": series, "target": {**built["target"], "id": profile.id}}
    if report:
        with writing(report):
            report.mkdir(parents=True, exist_ok=True)
            write_reports(document, report)
    if junit:
        with writing(junit):
            junit.write_text(render_junit(document), encoding="utf-8")
    return Outcome(document, verdict.exit_code, bundle, report)


def _evaluated(manifest: Mapping[str, Any]) -> set[str]:
    return {name for record in manifest["records"] if record["stage"] == "evaluate" for name in record["measured"]}


# --- files in, files out ------------------------------------------------------------------------------------------------------------


def _empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(str(out), expected="a new or empty folder", found="something there", remedy="choose another --out")


def _publish_folder(work: Path, out: Path) -> None:
    with writing(out):
        if out.is_dir():
            out.rmdir()
        work.chmod(0o755)
        work.rename(out)


def _account(out: Path, watch: Stopwatch, **more: Any) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    return {"out": str(out), "size_mb": round(size / 1e6, 3), "seconds": round(watch.seconds, 2), "peak_rss_mb": round(peak_rss_mb(), 1), **more}


def merge_files(mixture: Mixture, dtype: str | None, out: Path, progress: Progress) -> dict[str, Any]:
    """`trimtab merge`: a merged checkpoint on disk, written block by block."""
    from compiler.checkpoints.write import write_checkpoint

    _empty(out)
    watch = Stopwatch()
    sources = mixture.open()
    with progress.stage("merge", str(mixture)):
        write_checkpoint(sources.merged, out, dtype=dtype, progress=progress.update)
    return _account(out, watch, lineage=sources.lineage)


def quantize_files(mixture: Mixture, scheme: str, out: Path, progress: Progress) -> dict[str, Any]:
    """`trimtab quantize`: a float32 checkpoint seen through a weight-only scheme."""
    from compiler.checkpoints.write import write_checkpoint

    _empty(out)
    parsed = parse_scheme(scheme, "--scheme")
    if parsed.kernel != "nbits":
        raise RecipeError("--scheme", expected="a weight-only scheme such as int4-g32", found=scheme, remedy="other schemes exist only inside the graph")
    watch = Stopwatch()
    sources = mixture.open()
    with progress.stage("quantize", scheme):
        write_checkpoint(quantized_view(sources.merged, Schemes(parsed)), out, dtype="F32", progress=progress.update)
    return _account(out, watch, scheme=scheme)


def export_files(mixture: Mixture, scheme: str, task: str | None, out: Path, progress: Progress) -> dict[str, Any]:
    """`trimtab export`: merge, quantize and write ONNX in one stream."""
    _empty(out)
    watch = Stopwatch()
    parsed = parse_scheme(scheme, "--scheme")
    sources = mixture.open()
    options = export_stage.resolve_options(sources.merged, Schemes(parsed), task, None)
    with package.staging(out) as work:
        with progress.stage("export", f"{scheme}, {options['road']} road"):
            summary = export_stage.export(sources.merged, options, work, progress.update)
        (work / export_stage.SUMMARY).unlink()
        _publish_folder(work, out)
    return _account(out, watch, model=summary["model"])
