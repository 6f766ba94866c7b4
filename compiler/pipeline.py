"""The one loop: sources -> plan -> steps -> verdict -> bundle.

Mixture.open   base and deltas, opened lazily and bound to each other (compiler.sources)
make_plan      what will run, from which parts (compiler.plan)
run            merge (a view), quantize (cached, where a method needs it), export (cached), evaluate (cached), measure (never cached), package
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compiler import attached, auto, judge, memory, prepare
from compiler.economics import delta_bytes, economics
from compiler.errors import RecipeError
from compiler.evaluation.suite import Suite, recipe_suite
from compiler.evaluation.tables import robustness, side_effects
from compiler.foresight import foresee
from compiler.history import family_key, point_of, position, remember
from compiler.judge import Outcome
from compiler.plan import Plan, Step, make_plan
from compiler.progress import Progress
from compiler.recipe import Recipe, TargetItem
from compiler.record import RUN_FACTS, Record, Stopwatch, tree_bytes, versions
from compiler.report.verdict import PASS, Verdict
from compiler.scheme import Schemes
from compiler.sources import Sources, mixture_of
from compiler.stages import codes, package
from compiler.stages import distil as distil_stage
from compiler.stages import export as export_stage
from compiler.stages.keep import codes_for
from compiler.stages.quantize import predicted_bytes
from compiler.stages.validate import checks
from compiler.store import Store, writing
from compiler.workload import matrices, prompt_bytes
from runtimes.bundle import REPORTS
from targets.machine import this_machine
from targets.profile import Profile, fingerprint, load_profile

if TYPE_CHECKING:
    from compiler.evaluation.run import Exported


def _profile(recipe: Recipe, item: TargetItem) -> Profile:
    """A profile by name, or from a file beside the recipe."""
    file = recipe.folder / item.profile
    return load_profile(str(file) if file.suffix in (".yaml", ".yml") and file.is_file() else item.profile)


def _plan(recipe: Recipe, sources: Sources, suite: Suite, target: TargetItem, schemes: Schemes | None = None) -> Plan:
    """schemes: chosen for this target where the recipe says auto."""
    schemes = schemes or codes.schemes_of(recipe, sources.merged)
    options = export_stage.resolve_options(sources.merged, schemes, recipe.task, recipe.max_length, recipe.quantize.prompts)
    attached.check(sources, options)
    evaluate = {**suite.parts, "seed": recipe.seed}
    steps = codes.code_steps(recipe, sources.weights, schemes, options["road"])
    plan = make_plan(recipe.name, target.profile, sources.identity, options, evaluate, steps)
    ahead = [step for step in (sources.distil, sources.smooth) if step]
    return replace(plan, steps=(plan.steps[0], *ahead, *plan.steps[1:]))


def plan_recipe(recipe: Recipe, store: Store) -> list[dict[str, Any]]:
    """What compiling would run, per target: steps with key and state, the predicted size in MB, and what the profile lets foresee."""
    sources, suite = prepare.planned(recipe), recipe_suite(recipe)
    return [_foreseen(recipe, sources, suite, target, store) for target in recipe.targets]


def _foreseen(recipe: Recipe, sources: Sources, suite: Suite, target: TargetItem, store: Store) -> dict[str, Any]:
    profile, chosen = _profile(recipe, target), None
    if recipe.quantize.auto:
        step = _sensitivity_step(recipe, sources)
        auto.require_kernels(profile, target.limits)
        measured = auto.stored_sensitivity(step, store)
        if measured is None:
            unknown = {"unknown": "auto chooses once the sensitivities are measured, which compiling does"}
            distil = [sources.distil] if sources.distil else []
            steps = Plan(recipe.name, target.profile, (Step("merge", sources.identity), *distil, step)).rows(store)
            return {"name": recipe.name, "target": target.profile, "predicted_size_mb": None, "prediction": unknown, "steps": steps}
        chosen = auto.Chooser(sources.weights, measured, profile, target.limits, recipe.quantize.fixed).choose()
        sources = prepare.to_smooth(recipe, sources, chosen.schemes)
    schemes = chosen.schemes if chosen else codes.schemes_of(recipe, sources.merged)
    plan = _plan(recipe, sources, suite, target, schemes)
    export_stage.require_processor(schemes, profile.id, profile.isa)
    decoder = plan.step("export").params["road"] == export_stage.DECODER
    size_mb = (_weight_bytes(recipe, sources, schemes, decoder) + attached.predicted_bytes(sources)) / 1e6
    row = {"name": plan.name, "target": plan.target, "predicted_size_mb": size_mb}
    foreseen = foresee(sources.merged, schemes, decoder, profile, attached.ranks(sources), prompts=bool(recipe.quantize.prompts))
    row |= {"prediction": foreseen, "steps": plan.rows(store)}
    return row | ({"chosen": chosen.as_dict()} if chosen else {})


def _weight_bytes(recipe: Recipe, sources: Sources, schemes: Schemes, decoder: bool) -> int:
    """Of the merged weights as the bundle stores them, in all graphs."""
    stored = predicted_bytes(sources.merged, schemes, every_matrix=not decoder)
    return stored + (prompt_bytes(matrices(sources.merged, schemes)) if recipe.quantize.prompts else 0)


def _sensitivity_step(recipe: Recipe, sources: Sources) -> Step:
    """Raises RecipeError for an encoder, and for what no export with the fixed layers would take."""
    if export_stage.road(sources.merged.config, recipe.task) != export_stage.DECODER:
        raise RecipeError("quantize.scheme", expected="a scheme for an encoder", found="auto, which is for decoders", remedy="choose int8 or fp32")
    if recipe.quantize.prompts:
        expected, remedy = "a scheme: what a second graph costs is not weighed by auto", "name a scheme, or remove quantize.prompts"
        raise RecipeError("quantize.scheme", expected=expected, found="auto, with quantize.prompts", remedy=remedy)
    export_stage.resolve_options(sources.merged, Schemes(auto.DEFAULT, recipe.quantize.fixed), recipe.task, recipe.max_length)
    return auto.sensitivity_step(sources.identity, recipe.quantize.method, codes.calibration_text(recipe).digest)


def compile_recipe(recipe: Recipe, store: Store, out: Path, progress: Progress, only: Sequence[str] = (), max_seconds: float = 0.0) -> list[Outcome]:
    """The main job, for every target of the recipe (or those in `only`). Raises TrimtabError; a missed limit is an Outcome."""
    unknown = sorted(set(only) - {item.profile for item in recipe.targets})
    if unknown:
        known = ", ".join(item.profile for item in recipe.targets)
        raise RecipeError("--target", expected=f"a target of the recipe ({known})", found=unknown[0], remedy="name one of them")
    targets = [(item, _profile(recipe, item)) for item in recipe.targets if not only or item.profile in only]
    with progress.stage("merge", str(mixture_of(recipe))):
        sources, suite = prepare.planned(recipe), recipe_suite(recipe)
    _require_buildable(recipe, sources, suite, targets, store)
    package.require_writable(out)
    run = Run(recipe, prepare.made(recipe, sources, store, progress), suite, store, progress, max_seconds)
    return [(run.settle if recipe.quantize.auto else run.target)(item, profile, out) for item, profile in targets]


def _require_buildable(recipe: Recipe, sources: Sources, suite: Suite, targets: Sequence[tuple[TargetItem, Profile]], store: Store) -> None:
    """What cannot be built is told before anything is made; memory only where work is left that takes it."""
    trains = sources.distil is not None and store.get(sources.distil.key) is None
    if recipe.quantize.auto:
        step = _sensitivity_step(recipe, sources)
        for item, profile in targets:
            auto.require_kernels(profile, item.limits)
        if store.get(step.key) is None:
            memory.check(sources, 0, trains)
        return
    plans = [_plan(recipe, sources, suite, item) for item, _ in targets]
    machines = [*((profile.id, profile.isa) for _, profile in targets), ("this machine, where it is evaluated", this_machine().isa)]
    for name, isa in machines:
        export_stage.require_processor(codes.schemes_of(recipe, sources.merged), name, isa)
    if any(store.get(plan.step("evaluate").key) is None for plan in plans):
        decoder = plans[0].step("export").params["road"] == export_stage.DECODER
        stored = _weight_bytes(recipe, sources, codes.schemes_of(recipe, sources.merged), decoder)
        memory.check(sources, attached.predicted_bytes(sources) + stored, trains)


def export_again(recipe: Recipe, options: Mapping[str, Any], store: Store, progress: Progress, check: Callable[[Sources], None]) -> Path:
    """The exported files of a recipe under the resolved options of an earlier export; `check` sees the sources before any work. Nothing is evaluated."""
    with progress.stage("merge", str(mixture_of(recipe))):
        sources = prepare.planned(recipe)
        if recipe.quantize.auto:
            sources = prepare.to_smooth(recipe, sources, export_stage.schemes_in(options))
        check(sources)
    sources = prepare.made(recipe, sources, store, progress)
    steps = codes.code_steps(recipe, sources.weights, export_stage.schemes_in(options), options["road"])
    plan = make_plan(recipe.name, "", sources.identity, options, {}, steps)
    run = Run(recipe, sources, cast(Suite, None), store, progress)  # a suite is what evaluating asks for
    return run._export(plan, sources, run._codes(plan, sources)[0])[0]


@dataclass(frozen=True)
class Run:
    """One recipe on its way to one bundle per target."""

    recipe: Recipe
    sources: Sources
    suite: Suite
    store: Store
    progress: Progress
    max_seconds: float = 0.0  # cap on measuring one target; 0 for none
    chosen: auto.Chosen | None = None  # for the target at hand, where the recipe says auto

    def settle(self, item: TargetItem, profile: Profile, out: Path) -> Outcome:
        """Choose for the target, build, and choose again where a check disagrees (compiler.auto)."""
        step, weights = _sensitivity_step(self.recipe, self.sources), self.sources.weights
        with prepare.recorded(step, f"{len(auto.CHOICES)} choices a matrix", weights, "sensitivity.json", self.store, self.progress) as records:
            found = auto.measured_sensitivity(weights, step, codes.calibration_text(self.recipe), self.store, self.progress.update)
        measured = replace(self.sources, records=(*self.sources.records, *records))
        chooser = auto.Chooser(weights, found, profile, item.limits, self.recipe.quantize.fixed)

        def build(chosen: auto.Chosen) -> Outcome:
            expected = ", ".join(f"{name} {value:.4g}" for name, value in chosen.expected.items())
            with self.progress.stage("choose", f"{chosen.counts()}; expected {expected}"):
                pass
            sources = prepare.smoothed(self.recipe, prepare.to_smooth(self.recipe, measured, chosen.schemes), self.store, self.progress)
            outcome = replace(self, chosen=chosen, sources=sources).target(item, profile, out)
            for check in outcome.document["verdict"]["checks"]:
                if check["name"] in item.limits:
                    self.progress.note(f"verdict    {check['name']} {check['measured']:.4g}, limit {check['limit']:.4g}: {check['outcome']}")
            return outcome

        return auto.settle(chooser, build)

    def target(self, item: TargetItem, profile: Profile, out: Path) -> Outcome:
        """Export and evaluate (from the store where it has them), package, measure, judge; publish on PASS."""
        plan = _plan(self.recipe, self.sources, self.suite, item, self.chosen.schemes if self.chosen else None)
        notes = codes.notes(self.recipe, self.sources.merged, plan.step("export").params)
        for note in notes:
            self.progress.note(f"note: {note}")
        merged = Record("merge", "", [self.sources.merge.base.origin], [], self.sources.identity)
        made, quantized = self._codes(plan, self.sources)
        exported, export_record = self._export(plan, self.sources, made)
        evaluation, evaluate_record = self._evaluate(plan, exported, made)
        summary = json.loads((exported / export_stage.SUMMARY).read_text())
        records = [merged, *self.sources.records, *quantized, export_record, evaluate_record]
        place = out / f"{self.recipe.name}-{Path(item.profile).stem}"
        with package.staging(place) as work:
            package.assemble(exported, work)
            facts = self._facts(profile, item, summary["model"], records)
            facts["lineage"]["notes"] = [*facts["lineage"]["notes"], *notes]
            package.write_manifest(work, facts)
            self._selftest(work)
            cap = item.scenarios.seconds or judge.MEASURE_SECONDS
            with self.progress.stage("measure", f"behaviours, latency and memory on this machine, sampling for at most {cap:g} s"):
                watch = Stopwatch()
                asked = judge.Asked(item.limits, self.recipe.evaluate.metrics, self.max_seconds, item.scenarios)
                measured, series = judge.measure(work, asked, judge.Evaluated.of(evaluation), profile, self.progress)
            records.append(Record("measure", "", [], [], {"conditions": dict(measured.conditions)}, **watch.account))
            verdict = Verdict(profile.id, checks(item.limits, measured))
            document = _document(self.recipe.name, profile, verdict, facts, records, evaluation, summary["layers"], series)
            document["target"] |= judge.emulation(measured)
            document |= self.chosen.for_report(summary["layers"]) if self.chosen else {}
            document |= distil_stage.told_of(self.sources.distil, self.store)
            document["adapters"] = self._cost(item, profile, work, summary["model"])
            document |= self._standing(plan, document, verdict)
            return _finish(work, place, document, facts, verdict)

    def _standing(self, plan: Plan, document: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
        """Where this build stands among earlier ones, and what it saves."""
        made = {"economics": economics(self.recipe.cost, document, delta_bytes(self.recipe))}
        point = point_of(plan.step("export").key, document["model"]["scheme"], verdict.checks, fingerprint())
        if point is not None:
            points = remember(self.store, family_key(self.sources.identity, self.suite.data.digest), point)
            made["position"] = position(points, fingerprint())
        return made

    def _cost(self, item: TargetItem, profile: Profile, work: Path, model: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What leaving deltas unmerged costs, measured on the heaviest of them against its merged twin; nothing where all are merged."""
        name = attached.heaviest(model)
        if not name:
            return []
        twin = self.sources.attached[name]
        plan = _plan(self.recipe, twin, self.suite, item, self.chosen.schemes if self.chosen else None)
        exported, _ = self._export(plan, twin, self._codes(plan, twin)[0])
        with self.progress.stage("cost", f"merged and attached in turn, {attached.ROUNDS} rounds"), package.staging(work.with_name(name)) as merged:
            package.assemble(exported, merged)
            package.write_manifest(merged, {"name": name, "model": json.loads((exported / export_stage.SUMMARY).read_text())["model"]})
            return attached.cost_rows(work, merged, name, judge.threads(profile), self.progress.update)

    def _codes(self, plan: Plan, sources: Sources) -> tuple[Path | None, list[Record]]:
        """Codes of quantizers that look at more than a row block, with tuned scales if asked; nothing where the export rounds to nearest as it streams."""
        rest = [self.store.get(plan.step(stage).key) for stage in ("export", "evaluate")]
        made: Path | None = None
        records: list[Record] = []
        for step in (step for step in plan.steps if step.stage in codes.STAGES):
            watch = Stopwatch()
            cached = self.store.get(step.key) or (rest[0] if all(rest) else None)  # with both at hand nobody asks for the codes
            with self.progress.stage(step.stage, codes.described(step) + (" (cached)" if cached else "")):
                if cached is None:
                    make = partial(codes.make, step, self.recipe, sources.weights, made, store=self.store, progress=self.progress)
                    self.store.obtain(step.key, make, step.named)
                    self.store.forget(step.key)
            made, read = self.store.place(step.key), [sources.weights.digest]
            records.append(Record(step.stage, step.key, read, ["codes"], dict(step.params), cached is not None, bytes=tree_bytes(made), **watch.account))
        return made, records

    def _export(self, plan: Plan, sources: Sources, made: Path | None) -> tuple[Path, Record]:
        step, watch = plan.step("export"), Stopwatch()
        cached = self.store.get(step.key)
        with self.progress.stage("export", f"{step.params['scheme']}, {step.params['road']} road" + (" (cached)" if cached else "")):

            def fill(work: Path) -> None:
                export_stage.try_small_files(sources.merged)
                export_stage.export(sources.weights, step.params, work, self.progress.update, made, attached.tenants(sources))

            place = cached or self.store.obtain(step.key, fill, step.named)
        wrote = sorted(path.name for path in place.iterdir())
        known = [sources.merged.digest]
        record = Record("export", step.key, known, wrote, dict(step.params), cached is not None, bytes=tree_bytes(place), **watch.account)
        return place, record

    def _evaluate(self, plan: Plan, exported: Path, made: Path | None) -> tuple[dict[str, Any], Record]:
        from compiler.evaluation.run import Exported

        step, watch = plan.step("evaluate"), Stopwatch()
        cached = self.store.get(step.key)
        with self.progress.stage("evaluate", f"{len(self.suite.data.rows)} rows of {self.suite.data.origin}" + (" (cached)" if cached else "")):

            def fill(work: Path) -> None:
                params = plan.step("export").params
                decodes = params["road"] == export_stage.DECODER
                codes_of = codes_for(self.sources.weights, export_stage.schemes_in(params), made) if decodes else None
                found = self._answers(Exported(exported, codes_of, self.sources.scales))
                (work / "evaluation.json").write_text(json.dumps(found, ensure_ascii=False, sort_keys=True))

            place = cached or self.store.obtain(step.key, fill, step.named)
        result = json.loads((place / "evaluation.json").read_text())
        values = {name: metric["value"] for name, metric in result["metrics"].items()}
        return result, Record("evaluate", step.key, self.suite.digests, [], values, cached is not None, **watch.account)

    def _answers(self, files: Exported) -> dict[str, Any]:
        from compiler.evaluation.run import evaluate, evaluate_attached

        base, how = self.sources.merge.base, (files, self.suite, self.progress.update, self.recipe.seed)
        if self.sources.attached:
            return evaluate_attached({name: one.merged for name, one in self.sources.attached.items()}, base, *how)
        student = self.sources.merged if self.sources.teacher else None
        return evaluate(self.sources.reference, base if self.recipe.deltas.items else None, *how, student=student)

    def _facts(self, profile: Profile, item: TargetItem, model: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
        """The manifest but for its files. Seconds and memory of this run stay out: they differ from run to run."""
        recipe = self.recipe.model_dump(mode="json")
        steps = [{key: value for key, value in record.as_dict().items() if key not in RUN_FACTS} for record in records]
        lineage = {**self.sources.lineage, "recipe": recipe, "tools": versions()}
        target = {"id": profile.id, "fingerprint": profile.fingerprint}
        facts = {"name": self.recipe.name, "target": target, "model": dict(model), "lineage": lineage, "limits": dict(item.limits), "records": steps}
        scenarios = item.scenarios.model_dump(mode="json", exclude_none=True)
        return facts | ({"scenarios": scenarios} if scenarios else {})

    def _selftest(self, work: Path) -> None:
        from runtimes.bundle import open_bundle
        from runtimes.selftest import FILE, make_selftest

        canaries = make_selftest(open_bundle(work))
        with writing(work):
            (work / FILE).write_text(json.dumps(canaries, indent=1, ensure_ascii=False) + "\n")


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
        "stages": evaluation["stages"],
        "task": evaluation["task"],
        "samples": evaluation["samples"],
        "evaluation": evaluation.get("data", {}),
        "robustness": robustness(evaluation["metrics"]),
        "side_effects": side_effects(evaluation["metrics"]),
    }


def _finish(work: Path, place: Path, document: dict[str, Any], facts: Mapping[str, Any], verdict: Verdict) -> Outcome:
    """Write the reports; publish on PASS, else leave only the reports beside the place where the bundle would have been."""
    from compiler.report.markdown import model_card

    document["files"] = [row for row in package.write_manifest(work, facts)["files"] if row["path"] not in REPORTS]
    with writing(work):
        judge.write_reports(document, work)
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
