"""Cost and return of a build: what each stage took, and what the bundle saves against a stated alternative.

Seconds, processor seconds, memory and bytes are measured. Everything else (power, prices, fleet, alternative) stands in the recipe under `cost`; a row whose
inputs are not all there is left out. Nothing is assumed: each row names its formula and its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from compiler.scenarios import Part

if TYPE_CHECKING:
    from compiler.recipe import Recipe

JOULES_PER_KWH = 3.6e6
BYTES_FP32 = 4


class Alternative(Part):
    """What would be done without the bundle; its figures are the user's own."""

    name: str
    size_mb: float | None = Field(default=None, gt=0)
    peak_rss_mb: float | None = Field(default=None, gt=0)
    request_ms: float | None = Field(default=None, gt=0)


class Cost(Part):
    """Inputs of the table of savings. watts: power of the machine while it works."""

    watts: float | None = Field(default=None, gt=0)
    price_per_kwh: float | None = Field(default=None, ge=0)
    currency: str = Field(default="", max_length=8)
    requests_per_day: float | None = Field(default=None, gt=0)
    devices: int | None = Field(default=None, ge=1)
    tenants: int | None = Field(default=None, ge=1)
    alternative: Alternative | None = None

    @property
    def asked(self) -> bool:
        return self != Cost()


def stage_rows(records: Sequence[Mapping[str, Any]], watts: float | None) -> list[dict[str, Any]]:
    """What each stage took. energy_wh = watts x seconds / 3600, where the recipe states watts; cached stages took no work in this run."""
    rows = []
    for record in records:
        seconds = float(record.get("seconds") or 0.0)
        row = {key: record.get(key) for key in ("stage", "cached", "seconds", "cpu_seconds", "peak_rss_mb", "bytes")}
        rows.append({**row, "energy_wh": watts * seconds / 3600 if watts else None})
    return rows


def saving_rows(cost: Cost, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows {what, alternative, bundle, unit, formula}; the saving is the first less the second.

    facts  measured: size_mb, peak_rss_mb, request_ms (median), parameters, delta_mb
    """
    made: list[dict[str, Any]] = []
    other, size = cost.alternative, facts.get("size_mb")

    def add(what: str, alternative: float, bundle: float, unit: str, formula: str) -> None:
        made.append({"what": what, "alternative": alternative, "bundle": bundle, "unit": unit, "formula": formula})

    if facts.get("parameters") and size:
        full = BYTES_FP32 * facts["parameters"] / 1e6
        add("Weights in fp32 against the bundle", full, size, "MB", "4 bytes x parameters")
        if cost.tenants and facts.get("delta_mb"):
            tuned, deltas = cost.tenants * full, full + cost.tenants * facts["delta_mb"]
            add(
                f"{cost.tenants} full fine-tunes against one base and {cost.tenants} deltas",
                tuned,
                deltas,
                "MB",
                "tenants x fp32 weights; base + tenants x delta",
            )
    if other:
        made += _against(cost, other, facts)
    return made


def _against(cost: Cost, other: Alternative, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(what: str, key: str, factor: float, unit: str, formula: str) -> None:
        stated, measured = getattr(other, key), facts.get(key)
        if stated is not None and measured:
            rows.append({"what": f"{what}: {other.name}", "alternative": factor * stated, "bundle": factor * measured, "unit": unit, "formula": formula})

    add("Size", "size_mb", 1.0, "MB", "as stated; as measured")
    if cost.devices:
        add(f"Shipping one release to {cost.devices:,} devices", "size_mb", cost.devices / 1e3, "GB", "size x devices")
    add("Peak memory", "peak_rss_mb", 1.0, "MB", "as stated; as measured")
    add("Time of one request", "request_ms", 1.0, "ms", "as stated; median as measured")
    if cost.watts:
        joules = cost.watts / 1e3
        add("Energy of one request", "request_ms", joules, "J", "watts x time of one request")
        if cost.requests_per_day:
            per_day = joules * cost.requests_per_day / JOULES_PER_KWH
            add("Energy of a day", "request_ms", per_day, "kWh", "energy of one request x requests a day")
            if cost.price_per_kwh is not None:
                add("Electricity of a year", "request_ms", 365 * per_day * cost.price_per_kwh, cost.currency, "energy of a day x 365 x price")
    return rows


def economics(cost: Cost, document: Mapping[str, Any], delta_bytes: int) -> dict[str, Any]:
    """The section `economics` of a report document."""
    checks = {row["name"]: row["measured"] for row in document["verdict"]["checks"]}
    request = checks.get("encode_p50_ms")
    if "ttft_p50_ms" in checks and "tpot_p50_ms" in checks:
        from runtimes.bench import BenchOptions

        request = checks["ttft_p50_ms"] + (BenchOptions().new_tokens - 1) * checks["tpot_p50_ms"]
    facts = {
        "size_mb": checks.get("size_mb"),
        "peak_rss_mb": checks.get("peak_rss_mb"),
        "request_ms": request,
        "parameters": document["model"].get("parameters"),
        "delta_mb": delta_bytes / 1e6,
    }
    inputs = cost.model_dump(mode="json", exclude_none=True)
    return {"stages": stage_rows(document["records"], cost.watts), "savings": saving_rows(cost, facts), "inputs": inputs if cost.asked else {}}


def delta_bytes(recipe: Recipe) -> int:
    """Bytes of the largest delta's weights; 0 where there is none, or none lies on this machine under its path."""
    sizes = [0]
    for item in recipe.deltas.items:
        place = recipe.folder / item.path
        files = [place] if place.is_file() else place.glob("*.safetensors") if place.is_dir() else []
        sizes.append(sum(path.stat().st_size for path in files))
    return max(sizes)
