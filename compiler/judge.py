"""Measure a bundle here and judge it: what `compile` does before it publishes, and all that `trimtab validate` does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compiler.attached import heaviest
from compiler.evaluation.attribution import blamed
from compiler.graph.passes import float_twin
from compiler.limits import PERCENTILE, bare, covers, plain
from compiler.progress import Progress
from compiler.record import Stopwatch
from compiler.report.verdict import Check, Verdict
from compiler.scenarios import Scenarios
from compiler.stages import package
from compiler.stages.validate import FAITHFUL, Measured, built_in, checks, scene_of
from compiler.store import writing
from runtimes.behaviours import Finding, behaviours
from runtimes.bench import BenchOptions, BenchResult, measure_in_child
from runtimes.bundle import Bundle, open_bundle
from runtimes.collect import RATES
from runtimes.confine import confinement
from targets.machine import usable_cores
from targets.profile import Profile, fingerprint, load_profile

MEASURE_SECONDS = 90.0  # cap of one latency measurement, if no scenario says otherwise
SINGLE_RATES = tuple(name for name in RATES if "." not in name)
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


@dataclass(frozen=True)
class Evaluated:
    """What is known of a bundle's answers: it belongs to the bytes, not to the machine.

    accuracy  name -> {value, low, high, samples}
    stages    rows of `compiler.evaluation.attribution`
    faithful  whether the graph is the model; None for bundles of an older trimtab
    """

    accuracy: Mapping[str, Mapping[str, Any]]
    stages: Sequence[Mapping[str, Any]]
    faithful: Check | None

    @staticmethod
    def of(result: Mapping[str, Any]) -> Evaluated:
        """From what the evaluate step found."""
        same = result["faithful"]
        note = f"against the {same['model']} model in torch with the same stored weights, {same['tokens']} tokens"
        return Evaluated(result["metrics"], result["stages"], built_in(FAITHFUL, same["value"], same["tolerance"], note))

    @staticmethod
    def read(document: Mapping[str, Any], names: Collection[str]) -> Evaluated:
        """From a bundle's report; `names` are the metrics that were evaluated when it was built."""
        rows = document["verdict"]["checks"]
        accuracy = {row["name"]: {**row, "value": row["measured"]} for row in rows if row["name"] in names}
        same = next((row for row in rows if row["name"] == FAITHFUL), None)
        note = "as found when the bundle was built"
        return Evaluated(accuracy, document.get("stages", ()), same and built_in(FAITHFUL, float(same["measured"]), float(same["limit"]), note))

    @property
    def merged(self) -> dict[str, float]:
        """Metrics of the merged fp32 model itself, under the bundle's names."""
        return {name.removesuffix("_reference"): metric["value"] for name, metric in self.accuracy.items() if name.endswith("_reference")}


@dataclass(frozen=True)
class Asked:
    """What to find out: limits by name, accuracy metrics to report besides them (empty for all), seconds that measuring may take in all (0: no cap), and the
    scenarios besides one request after another."""

    limits: Mapping[str, float]
    metrics: Sequence[str] = ()
    max_seconds: float = 0.0
    scenarios: Scenarios = field(default_factory=Scenarios)

    def reports(self, name: str) -> bool:
        """Whether an accuracy metric is shown. On other data than the task's, `metrics: [kl_mean]` asks for `typos.kl_mean` too."""
        return not self.metrics or bool({plain(name), bare(name)} & set(self.metrics)) or any(covers(limit, name) for limit in self.limits)


def measure(bundle: Path, asked: Asked, known: Evaluated, profile: Profile, progress: Progress) -> tuple[Measured, dict[str, Any]]:
    """Behaviours, then latency, memory and load time of a bundle folder in fresh processes; also the raw series for the report.

    After `asked.max_seconds` no further process is started and no further sample taken: what is undecided then is INCONCLUSIVE.
    Of several unmerged adapters the one with the largest products answers: the others take less time and memory.
    """
    watch, opened = Stopwatch(), open_bundle(bundle)
    adapter = heaviest(opened.model)
    found = [behaviour_check(finding) for finding in behaviours(opened, threads(profile), progress.update, float_twins(opened))]
    timed = {name: value for name, value in asked.limits.items() if (PERCENTILE.fullmatch(name) or name in SINGLE_RATES) and value > 0}

    def left() -> float:
        return max(1.0, asked.max_seconds - watch.seconds) if asked.max_seconds else 0.0

    small = confinement(profile)
    confined: dict[str, Any] = {"cores": small.cores, "core_threads": small.threads, "memory_bytes": small.memory_bytes}

    def capped(cap: float) -> dict[str, Any]:
        found: dict[str, Any] = {"seconds": MEASURE_SECONDS, **asked.scenarios.options}
        return found | {"seconds": min(found["seconds"], cap or found["seconds"]), "max_seconds": cap}

    how = {"threads": threads(profile), "adapter": adapter, "spin_ms": (profile.spin_ms or 0.0) if profile.is_here else 0.0, **confined}
    options = BenchOptions(limits=timed, **capped(left()), **how)
    result = measure_in_child(bundle, options, lambda done, most, _: progress.update("requests", done, most))
    short, fresh = replace(options, limits={}, least=3, most=3, seconds=10.0, max_seconds=0.0), [result]
    while len(fresh) <= FRESH_PROCESSES and not (asked.max_seconds and watch.seconds >= asked.max_seconds):
        fresh.append(measure_in_child(bundle, short))
    scenes = []
    for more in asked.scenarios.measurements(asked.limits):
        if asked.max_seconds and watch.seconds >= asked.max_seconds:
            break
        scene = replace(options, **{"limits": {}, **more}, **capped(left()))
        scenes.append(measure_in_child(bundle, scene, _counter(progress, scene.scene)))
    return _gathered(bundle, asked, known, profile, (result, fresh, scenes, found))


def _counter(progress: Progress, scene: str) -> Callable[[int, int, float], None]:
    return lambda done, most, _: progress.update(f"{scene} requests", done, most)


Results = tuple[BenchResult, list[BenchResult], list[BenchResult], list[Check]]  # single-stream, fresh processes, other scenarios, behaviours


def _gathered(bundle: Path, asked: Asked, known: Evaluated, profile: Profile, results: Results) -> tuple[Measured, dict[str, Any]]:
    result, fresh, scenes, found = results
    every = [result, *(one for one in scenes if one.conditions["scene"] != "cold")]
    series = {name.removesuffix("_ms"): values for one in every for name, values in one.series.items() if name.endswith("_ms")}
    cold = [value for one in scenes for value in one.series.get("cold_start_ms", ())]
    scalars = {name: [float(getattr(one, name)) for one in fresh] for name in ("peak_rss_mb", "load_peak_rss_mb", "load_s")}
    told = {one.conditions.get("scene", "single"): conditions(one) for one in [result, *scenes]}
    dropped = {one.conditions.get("scene", "single"): one.dropped for one in every}
    measured = Measured(
        size_mb=package.device_bytes(bundle) / 1e6,
        accuracy={name: metric for name, metric in known.accuracy.items() if asked.reports(name)},
        series=series,
        scalars={**scalars, **({"cold_start_ms": cold} if cold else {})},
        medians={name: values for one in every for name, values in one.series.items() if name.endswith("_s")},
        tests={test["name"]: test for one in every for test in one.tests},
        dropped=dropped,
        here=profile.fingerprint == fingerprint(),
        built_in=[*found, *([known.faithful] if known.faithful else [])],
        blamed=blamed(known.stages),
        merged=known.merged,
        conditions=told,
        emulated=result.emulated,
        crowded=next((one.crowded for one in every if one.crowded), ""),
    )
    counts = {f"{name}_ms": dropped[scene_of(name)] for name in series}
    document: dict[str, Any] = {f"{name}_ms": values for name, values in series.items()}
    return measured, {**document, "dropped": counts if scenes else result.dropped}


def conditions(result: BenchResult) -> str:
    """ "scene server, prompt_tokens 128, new_tokens 32, ..." """
    return ", ".join(f"{key} {value}" for key, value in result.conditions.items() if key != "seed")


def float_twins(bundle: Bundle) -> dict[str, bytes]:
    """Graph file -> its twin with float32 activations (`Subject.twins`), for the graphs of a decoder that multiply integers."""
    graphs = [graph for graph in (bundle.model_path, bundle.prompt_path) if graph is not None and bundle.kind == "decoder"]
    return {graph.name: twin for graph in graphs if (twin := float_twin(graph)) is not None}


def behaviour_check(finding: Finding) -> Check:
    return built_in(finding.name, finding.measured, finding.limit, finding.note, not finding.skipped)


def threads(profile: Profile) -> int:
    """As many as the target has, at most what this process may use."""
    return min(profile.threads, usable_cores())


def write_reports(document: Mapping[str, Any], folder: Path) -> None:
    """report.json and report.html. Raises OutputError through `writing`."""
    from compiler.report.document import write_document
    from compiler.report.html import render_html

    (folder / "report.json").write_text(write_document(document), encoding="utf-8")
    (folder / "report.html").write_text(render_html(document), encoding="utf-8")


def validate_bundle(
    bundle: Path, target: str | None, limits: Sequence[str], progress: Progress, max_seconds: float = 0.0, scenarios: Sequence[str] = ()
) -> Outcome:
    """Verify a bundle, let it answer its self-test, measure it here and judge it by its own limits and scenarios with `limits` and `scenarios` laid over.

    Accuracy is taken from the manifest's records: it belongs to the bytes, which were just verified, not to the machine.
    """
    from compiler.recipe import parse_limits, parse_scenarios
    from compiler.report.document import load_document
    from runtimes.bundle import verify_bundle
    from runtimes.selftest import run_selftest

    extra = parse_limits(limits)
    with progress.stage("verify", str(bundle)):
        verify_bundle(bundle)
        run_selftest(bundle)
    manifest = open_bundle(bundle).manifest
    profile = load_profile(target or manifest["target"]["id"])
    built = load_document(bundle / "report.json")
    wanted = {**manifest["limits"], **extra}
    asked = Asked(wanted, max_seconds=max_seconds, scenarios=parse_scenarios(scenarios, manifest.get("scenarios", {}), wanted))
    if not target and manifest["target"]["fingerprint"]:
        profile = replace(profile, fingerprint=manifest["target"]["fingerprint"])
    with progress.stage("measure", "behaviours, latency and memory on this machine"):
        measured, series = measure(bundle, asked, Evaluated.read(built, _evaluated(manifest)), profile, progress)
    verdict = Verdict(profile.id, checks(asked.limits, measured))
    document = {**built, "verdict": verdict.as_dict(), "latency": series, "target": {**built["target"], "id": profile.id, **emulation(measured)}}
    return Outcome(document, verdict.exit_code, bundle, None)


def emulation(measured: Measured) -> dict[str, Any]:
    """What the report says of a machine that another one stood in for; nothing where none did."""
    return {"emulation": measured.emulated} if measured.emulated else {}


def write_folder(document: Mapping[str, Any], folder: Path) -> None:
    """A folder with report.json and report.html. Raises OutputError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_reports(document, folder)


def write_junit(outcomes: Sequence[Outcome], file: Path) -> None:
    """The verdicts as JUnit XML, a suite a target. Raises OutputError."""
    from compiler.report.junit import render_junit

    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(render_junit(*(outcome.document for outcome in outcomes)), encoding="utf-8")


def _evaluated(manifest: Mapping[str, Any]) -> set[str]:
    return {name for record in manifest["records"] if record["stage"] == "evaluate" for name in record["measured"]}
