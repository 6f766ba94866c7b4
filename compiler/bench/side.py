"""`trimtab bench`: bundles and peers side by side. Prepares the peers' models, runs the rounds, keeps results so that a later run can add rounds."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compiler.bench import models
from compiler.bench.accuracy import accuracy
from compiler.bench.peers import System, python_of, systems_of
from compiler.bench.questions import questions
from compiler.bench.roofline import roofline
from compiler.bench.rounds import Entrant, Setting, run
from compiler.bench.rows import OURS, Row, ratios, table
from compiler.errors import BenchError
from compiler.evaluation.data import load_rows
from compiler.progress import Progress
from compiler.store import writing
from runtimes.bundle import Bundle, open_bundle
from targets.machine import fingerprint, usable_cores

SCHEMA = 1
ACCURACY = "accuracy"
TASKS = {"text-generation": "text-generation-with-past"}


@dataclass(frozen=True)
class BenchRequest:
    """What to run. only: names of questions ("0", "512", "8x128", "fresh", "accuracy"); empty for all (accuracy only beside peers)."""

    against: Sequence[str] = ()
    only: Sequence[str] = ()
    rounds: int = 5
    seconds: float = 600.0
    threads: int = 0
    source: str | None = None
    out: Path | None = None
    append: bool = False
    prepare: bool = False


@dataclass
class Results:
    """Everything measured so far, as it is written to disk. `samples` grows; the tables are made from it."""

    conditions: dict[str, Any]
    samples: list[dict[str, Any]] = field(default_factory=list)
    accuracy: list[Row] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    file_mb: dict[str, float] = field(default_factory=dict)
    roofline: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        sizes = [
            {"system": name, "metric": "file_mb", "value": size, "unit": "MB", "low": None, "high": None, "samples": 1} for name, size in self.file_mb.items()
        ]
        return [*table(self.samples), *sizes, *self.accuracy]

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "conditions": self.conditions,
            "systems": self.about,
            "rows": self.rows,
            "ratios": ratios(self.samples),
            "samples": self.samples,
            "accuracy": self.accuracy,
            "file_mb": self.file_mb,
            "roofline": self.roofline,
        }


def bench(folders: Sequence[Path], request: BenchRequest, progress: Progress) -> Results:
    """Measure bundles (the first is the system `trimtab`, others are `trimtab NAME`) beside peers.

    Raises BundleError, BenchError (a peer that is not installed, a system that fails, results of something else in --out).
    """
    bundles = [open_bundle(folder) for folder in folders]
    kinds = {bundle.kind for bundle in bundles}
    if len(kinds) > 1:
        raise BenchError("bundles", expected="bundles of one kind", found=" and ".join(sorted(kinds)), remedy="measure decoders and encoders apart")
    kind = bundles[0].kind
    asked = questions(kind, [name for name in request.only if name != ACCURACY], int(bundles[0].model.get("max_length") or 512))
    rows = systems_of(request.against, kind)
    checkpoint = _prepare(bundles[0], rows, request, progress)
    results = _results(bundles, request)
    if request.prepare:
        return results
    entrants = [_own(bundle, number) for number, bundle in enumerate(bundles)]
    entrants += [Entrant(row, models.make(row.form, checkpoint, _task(bundles[0]), progress.note)) for row in rows if checkpoint]
    for entrant, bundle in zip(entrants, bundles, strict=False):
        results.file_mb[entrant.system.name] = bundle.model_bytes / 1e6
    for entrant in entrants[len(bundles) :]:
        results.file_mb[entrant.system.name] = models.model_bytes(entrant.system.form, entrant.model) / 1e6
    setting = Setting(request.threads or usable_cores(), _text(bundles[0]), request.rounds, request.seconds, 1 + _last_round(results.samples))
    if request.only != (ACCURACY,):
        with progress.stage("bench", f"{len(entrants)} systems, {request.rounds} rounds, {setting.threads} threads"):
            for samples, about in run(entrants, asked, setting, progress.note):
                results.samples += samples
                results.about |= about
                if request.out:
                    _write(results, bundles[0], request.out, pictures=False)  # what a later round breaks must not take this one with it
    if checkpoint and (not request.only or ACCURACY in request.only):
        names = {entrant.system.name for entrant in entrants}
        kept = [row for row in results.accuracy if row["system"] not in names]
        results.accuracy = kept + accuracy(entrants, checkpoint, setting, kind, progress.note)
    results.roofline = roofline(bundles[0].directory, results.rows)
    if not results.roofline:
        progress.note("no roofline: `trimtab targets probe` measures this machine, and the bundle must list its matrices (report.json)")
    if request.out:
        _write(results, bundles[0], request.out)
    return results


def _own(bundle: Bundle, number: int) -> Entrant:
    name = OURS if number == 0 else f"{OURS} {bundle.name}"
    return Entrant(System(name, OURS, bundle.kind, "trimtab_model.py", "", ""), bundle.directory)


def _prepare(bundle: Bundle, rows: Sequence[System], request: BenchRequest, progress: Progress) -> Path | None:
    """The merged weights and every peer's model, made where missing; None when there is no peer."""
    if not rows:
        return None
    for row in rows:
        python_of(row.env)  # all that is missing is told before anything is made
    checkpoint = models.reference(bundle.manifest, request.source, progress.note)
    for row in rows:
        models.make(row.form, checkpoint, _task(bundle), progress.note)
    return checkpoint


def _task(bundle: Bundle) -> str:
    task = str(bundle.model["task"])
    return TASKS.get(task, task)


def _text(bundle: Bundle) -> list[int]:
    """The built-in text as the bundle's own tokens."""
    from runtimes.generate import load_tokenizer

    tokenizer = load_tokenizer(bundle)
    return [token for row in load_rows(None).rows for token in tokenizer.encode(row.text, add_special_tokens=False).ids]


def _file(bundle: Bundle, out: Path) -> Path:
    return out / f"{bundle.name}.json"


def _results(bundles: Sequence[Bundle], request: BenchRequest) -> Results:
    """Fresh results, or with `append` those of an earlier run under the same conditions. Raises BenchError when they differ."""
    conditions = {
        "bundles": {bundle.name: {"digest": bundle.manifest.get("digest", ""), "scheme": bundle.model.get("scheme", "")} for bundle in bundles},
        "machine": fingerprint(),
        "threads": request.threads or usable_cores(),
        "kind": bundles[0].kind,
    }
    path = _file(bundles[0], request.out) if request.out else None
    if not (request.append and path and path.is_file()):
        return Results(conditions)
    old: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    found = {key: old["conditions"].get(key) for key in conditions}
    if found != conditions:
        differs = ", ".join(key for key in conditions if found[key] != conditions[key])
        raise BenchError(
            str(path),
            expected="results of the same bundles, machine and threads",
            found=f"other {differs}",
            remedy="leave --append out, or choose another --out",
        )
    return Results(conditions, list(old["samples"]), list(old["accuracy"]), dict(old["systems"]), dict(old["file_mb"]))


def _last_round(samples: Sequence[Mapping[str, Any]]) -> int:
    return max((int(sample["round"]) for sample in samples), default=-1)


def _write(results: Results, bundle: Bundle, out: Path, pictures: bool = True) -> None:
    """NAME.json and with `pictures` NAME.md (the tables) and NAME.svg (the plot), each by rename."""
    from compiler.bench.plot import plot
    from compiler.bench.text import as_markdown

    results.conditions["date"] = datetime.now(UTC).date().isoformat()
    document = results.as_dict()
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=out) as work:
            made = {suffix: Path(work) / f"{bundle.name}.{suffix}" for suffix in ("json", "md", "svg")}
            made["json"].write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            if pictures:
                made["md"].write_text(as_markdown(document), encoding="utf-8")
                plot(document, made["svg"])
            for path in Path(work).iterdir():
                path.replace(out / path.name)
