"""Where a build stands among the others: one point for each build of the same models on the same data, kept in the store.

A point is size against loss (mean KL of a decoder, 1 - mean cosine of an encoder), both properties of the bytes, and the latency that this machine measured.
Builds that are not smaller and not better than another one are dominated; those that are not make the front.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compiler.report.verdict import Check
from compiler.store import Store, cache_key, locked, writing

LOSSES = {"kl_mean": lambda value: value, "cosine_mean": lambda value: 1.0 - value}
LATENCIES = ("tpot_p50_ms", "encode_p50_ms")
MOST = 200  # points kept of one family of builds, the latest


@dataclass(frozen=True)
class Point:
    """One build. export: the key of its exported files, which tells it from others; machine: fingerprint of where latency_ms was measured."""

    export: str
    scheme: str
    size_mb: float
    metric: str
    loss: float
    latency_ms: float | None
    machine: str


def point_of(export: str, scheme: str, checks: Sequence[Check], machine: str) -> Point | None:
    """The point of a judged build; None where its loss was not measured (an attached build has one loss a tenant)."""
    found = {check.name: check.measured for check in checks}
    metric = next((name for name in LOSSES if name in found), None)
    if metric is None or found.get("size_mb") is None:
        return None
    latency = next((found[name] for name in LATENCIES if name in found), None)
    return Point(export, scheme, found["size_mb"], metric, LOSSES[metric](found[metric]), latency if latency == latency else None, machine)


def family_key(identity: Mapping[str, Any], data: str) -> str:
    """Builds are comparable when they come from the same base and deltas and were scored on the same data."""
    return cache_key({"sources": dict(identity), "data": data})


def remember(store: Store, family: str, point: Point) -> list[Point]:
    """Put a point among those of its family; returns all of them, this one last. A file that is no such list is begun anew. Raises OutputError."""
    place = store.root / "builds" / f"{family}.json"
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place.parent):  # else two builds that end at once would each drop the other's point
            known = [other for other in _read(place) if other.export != point.export][-MOST + 1 :]
            points = [*known, point]
            work = place.with_suffix(".new")
            work.write_text(json.dumps([asdict(one) for one in points]))
            work.rename(place)
    return points


def _read(place: Path) -> list[Point]:
    try:
        return [Point(**row) for row in json.loads(place.read_text())]
    except (OSError, ValueError, TypeError):
        return []


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in size and in loss, by size."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda one: (one.size_mb, one.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept


def position(points: Sequence[Point], machine: str) -> dict[str, Any]:
    """The section `position` of a report: every build, which of them lie on the front, and this one (the last)."""
    best = {one.export for one in front(points)}
    rows = [
        {
            "scheme": one.scheme,
            "size_mb": one.size_mb,
            "loss": one.loss,
            "latency_ms": one.latency_ms if one.machine == machine else None,
            "front": one.export in best,
            "this": one is points[-1],
        }
        for one in points
    ]
    return {"metric": points[-1].metric, "builds": rows}
