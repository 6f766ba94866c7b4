"""Measure a bundle here and judge it: what `compile` does before it publishes, and all that `trimtab validate` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compiler.attached import heaviest
from compiler.limits import PERCENTILE, plain
from compiler.progress import Progress
from compiler.report.verdict import Verdict
from compiler.stages import package
from compiler.stages.validate import Measured, checks
from compiler.store import writing
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


def measure(
    bundle: Path, limits: Mapping[str, float], accuracy: Mapping[str, Any], profile: Profile, progress: Progress, metrics: Sequence[str] = ()
) -> tuple[Measured, dict[str, Any]]:
    """Latency, memory and load time of a bundle folder in fresh processes, and the raw series for the report.

    metrics  accuracy metrics to report besides those that are limited; empty for all
    Of several unmerged adapters the one with the largest products answers: the others take less time and memory.
    """
    from runtimes.bench import BenchOptions, measure_in_child
    from runtimes.bundle import open_bundle

    timed = {name: value for name, value in limits.items() if PERCENTILE.fullmatch(name) and value > 0}
    options = BenchOptions(limits=timed, seconds=MEASURE_SECONDS, threads=threads(profile), adapter=heaviest(open_bundle(bundle).model))
    result = measure_in_child(bundle, options, lambda done, most, _: progress.update("requests", done, most))
    short = replace(options, limits={}, least=3, most=3, seconds=10.0)
    again = [measure_in_child(bundle, short) for _ in range(FRESH_PROCESSES)]
    here = profile.fingerprint == fingerprint()
    conditions = ", ".join(f"{key} {value}" for key, value in result.conditions.items() if key != "seed")
    series = {name.removesuffix("_ms"): values for name, values in result.series.items() if name.endswith("_ms")}
    shown = {name: metric for name, metric in accuracy.items() if not metrics or plain(name) in (*metrics, *limits)}
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


def threads(profile: Profile) -> int:
    """As many as the target has, at most what this process may use."""
    return min(profile.threads, usable_cores())


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
