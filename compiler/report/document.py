"""The report document: everything a report says, as plain data (`report.json`). Renderers only read it.

`validate` and `package` build a plain dict; `read_document` checks it and gives a frozen `Report`. Its JSON schema is
published beside the templates (`templates/report.schema.json`); a test keeps both alike. Rules:

1. Every section may be missing or empty. Unknown keys are kept and never an error: a newer trimtab may say more.
2. The verdict must be the worst of its checks; a document that contradicts itself is refused.
3. JSON has no NaN: `write_document` writes "NaN", "Infinity" and "-Infinity" as words, and `read_document` takes them.
4. Model outputs and names are untrusted. Control characters, terminal escapes and bidirectional overrides become
   U+FFFD here, once, so that no renderer can forget it. `write_document` keeps the original text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from compiler.errors import BundleError
from compiler.report.parts import Distil, Economics, EffectRow, Number, Part, Position, RobustnessRow
from compiler.report.verdict import FAIL, INCONCLUSIVE, INFO, PASS

SCHEMA = 1
SCHEMA_FILE = Path(__file__).parent / "templates" / "report.schema.json"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]


class CheckRow(Part):
    """One `compiler.report.verdict.Check`, field for field."""

    name: str
    measured: Number
    unit: str = ""
    limit: Number | None = None
    outcome: Literal["PASS", "FAIL", "INCONCLUSIVE", "INFO"] = "INFO"
    samples: int = 1
    low: Number | None = None
    high: Number | None = None
    confidence: float | None = None
    false_pass: float | None = None
    stage: str | None = None
    note: str = ""
    kind: str = "limit"  # or "behaviour"


class VerdictRow(Part):
    """`Verdict.as_dict()`. Raises ValueError when the outcome is not the worst of the checks (rule 2)."""

    target: str = ""
    outcome: Outcome = "PASS"
    checks: tuple[CheckRow, ...] = ()

    @model_validator(mode="after")
    def outcome_follows_from_checks(self) -> VerdictRow:
        outcomes = {check.outcome for check in self.checks}
        worst = next((bad for bad in (FAIL, INCONCLUSIVE) if bad in outcomes), PASS)
        if worst != self.outcome:
            raise ValueError(f"the checks give {worst}, the verdict says {self.outcome}")
        return self

    @property
    def limits(self) -> list[CheckRow]:
        """What the recipe asked for: checks that decide, but for behaviours."""
        return [check for check in self.checks if check.outcome != INFO and check.kind != "behaviour"]

    @property
    def behaviours(self) -> list[CheckRow]:
        """What every bundle must do; those that could not be tried are INFO."""
        return [check for check in self.checks if check.kind == "behaviour"]

    @property
    def told(self) -> list[CheckRow]:
        """What a short table shows: everything but the behaviours that hold."""
        return [check for check in self.checks if check.kind != "behaviour" or check.outcome in (FAIL, INCONCLUSIVE)]

    @property
    def notes(self) -> list[CheckRow]:
        """Checks that only inform."""
        return [check for check in self.checks if check.outcome == INFO and check.kind != "behaviour"]


class TargetRow(Part):
    """The machine the numbers belong to. `isa` is a name, or a list or mapping of instruction sets."""

    id: str = ""
    cores: int | None = None
    isa: Any = None
    fingerprint: str | None = None
    emulation: str = ""  # what was imposed on another machine to make it as small as this one


class ModelRow(Part):
    """What was compiled; `parameters` counts the merged model's weights."""

    kind: str = ""
    family: str = ""
    parameters: int | None = None
    task: str | None = None


class BaseRow(Part):
    """Where the base checkpoint came from."""

    origin: str = ""
    digest: str = ""


class DeltaRow(Part):
    """One delta; `touched` counts the tensors it changes."""

    origin: str = ""
    kind: str = ""
    weight: float | None = None
    digest: str = ""
    touched: int | None = None


class Lineage(Part):
    """Base, deltas, resolved recipe, tool versions, and what the merge did beyond adding: untied, overridden, selected."""

    base: BaseRow | None = None
    deltas: tuple[DeltaRow, ...] = ()
    recipe: dict[str, Any] = Field(default_factory=dict)
    tools: dict[str, Any] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


class FileRow(Part):
    """One file of the bundle."""

    path: str
    bytes: int | None = None
    sha256: str = ""


class RecordRow(Part):
    """One step of the build. `seconds` of a cached step is what it cost when it last ran, or what the look-up took."""

    stage: str
    seconds: Number | None = None
    peak_rss_mb: Number | None = None
    cached: bool = False
    cpu_seconds: Number | None = None
    bytes: int | None = None
    read: Any = ()
    wrote: Any = ()
    measured: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, Any] = Field(default_factory=dict)


class LayerRow(Part):
    """One stored matrix: shape [out, in], bytes as stored, error = rms(w_hat - w) / rms(w) or None.

    Where auto chose its scheme: kl, the nats it is expected to cost, and slope, nats per squared output error.
    """

    name: str
    shape: tuple[int, ...] = ()
    scheme: str = ""
    bytes: int | None = None
    error: Number | None = None
    kl: Number | None = None
    slope: Number | None = None


class FrontierPoint(Part):
    """The least loss at a size, as expected before anything is built."""

    size_mb: Number
    kl_mean: Number
    tpot_ms: Number | None = None
    ttft_ms: Number | None = None


class Allocation(Part):
    """What `scheme: auto` chose: the point it expected, and the frontier that it lies on."""

    expected: FrontierPoint
    curve: tuple[FrontierPoint, ...] = ()


class StageLoss(Part):
    """The same evaluation after a stage: `value` is the metric of the model as it stands after `stage`."""

    stage: str
    metric: str
    value: Number


class TaskRow(Part):
    """A task metric of one system; low and high bound it."""

    system: str
    metric: str
    value: Number
    low: Number | None = None
    high: Number | None = None
    samples: int | None = None


class SampleRow(Part):
    """One prompt and what came out. reference = merged fp32 model, bundle = what ships, with the unmerged `adapter` where one is named."""

    prompt: str = ""
    expected: str | None = None
    reference: str | None = None
    bundle: str | None = None
    adapter: str | None = None


class Report(Part):
    """A checked report document."""

    schema_version: Literal[1] = Field(1, alias="schema")
    name: str = "model"
    verdict: VerdictRow | None = None
    target: TargetRow = TargetRow()
    model: ModelRow = ModelRow()
    lineage: Lineage = Lineage()
    files: tuple[FileRow, ...] = ()
    records: tuple[RecordRow, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    allocation: Allocation | None = None
    distil: Distil | None = None
    latency: dict[str, tuple[Number, ...] | dict[str, int] | int] = Field(default_factory=dict)
    stages: tuple[StageLoss, ...] = ()
    task: tuple[TaskRow, ...] = ()
    samples: tuple[SampleRow, ...] = ()
    adapters: tuple[TaskRow, ...] = ()
    robustness: tuple[RobustnessRow, ...] = ()
    side_effects: tuple[EffectRow, ...] = ()
    position: Position | None = None
    economics: Economics | None = None

    @property
    def target_id(self) -> str:
        """The machine's name, from the profile or else from the verdict."""
        return self.target.id or (self.verdict.target if self.verdict else "")

    @property
    def series(self) -> dict[str, list[float]]:
        """Latency samples in ms by name, finite ones only; empty series are left out."""
        rows = {name: [x for x in samples if math.isfinite(x)] for name, samples in self.latency.items() if isinstance(samples, tuple)}
        return {name: samples for name, samples in rows.items() if samples}

    def dropped(self, series: str) -> int | None:
        """Samples dropped from a disturbed window: of this series, or of all when the document has one count only."""
        counts = self.latency.get("dropped")
        if isinstance(counts, Mapping):
            return counts.get(series)
        return counts if isinstance(counts, int) else None


def read_document(document: Mapping[str, Any] | Report, place: str = "report.json") -> Report:
    """A plain dict -> a checked `Report` (rules 1-4). Raises BundleError that names the first wrong field."""
    if isinstance(document, Report):
        return document
    try:
        return Report.model_validate({key: cleaned(value) for key, value in document.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise BundleError(
            f"{place}: {where}",
            expected=f"a report of schema {SCHEMA}",
            found=f"{first['msg']} ({len(error.errors())} faults in all)",
            remedy="build it with `trimtab validate`, or compare it with report.schema.json",
        ) from error


def write_document(document: Mapping[str, Any]) -> str:
    """A plain dict -> the text of report.json: strict JSON, key order kept, the same bytes for the same content (rule 3)."""
    return json.dumps(worded(document), ensure_ascii=True, allow_nan=False, indent=1) + "\n"


def load_document(path: Path) -> dict[str, Any]:
    """report.json -> the plain dict, checked. Raises BundleError when it is missing, no JSON, or no report."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(str(path), expected="a report document", found=str(error), remedy="build it with `trimtab validate`") from error
    if not isinstance(document, dict):
        raise BundleError(str(path), expected="a JSON object", found=type(document).__name__, remedy="build it with `trimtab validate`")
    read_document(document, str(path))
    return document


def document_schema() -> dict[str, Any]:
    """The JSON schema of report.json (draft 2020-12)."""
    schema = Report.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """The content of `SCHEMA_FILE`. To renew it: `python -c "from compiler.report.document import *; SCHEMA_FILE.write_text(schema_text())"`."""
    return json.dumps(document_schema(), indent=1) + "\n"


def cleaned(value: Any) -> Any:
    """Replace unsafe characters in every string of a nested value by U+FFFD (rule 4)."""
    if isinstance(value, str):
        return UNSAFE.sub("\ufffd", value.replace("\r\n", "\n"))
    if isinstance(value, Mapping):
        return {cleaned(str(key)): cleaned(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [cleaned(item) for item in value]
    return value


def worded(value: Any) -> Any:
    """Replace numbers that JSON cannot hold by their words (rule 3)."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): worded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [worded(item) for item in value]
    return value
