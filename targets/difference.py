"""What tells two profiles apart: their fields, and the speed of each kernel that both have measured."""

from __future__ import annotations

import math
from typing import Any

from targets.profile import KernelTime, Profile, known_fields

PASSED_OVER = ("description", "provenance", "kernels")


def difference(one: Profile, other: Profile) -> list[dict[str, Any]]:
    """Rows {name, one, other, ratio}: fields that differ (ratio: other / one, of numbers), then kernels by operator, bits, block and tokens.

    A kernel's ratio is the geometric mean of time in `one` over time in `other` at the sizes both have: 2 means twice as fast.
    """
    rows = []
    for name in known_fields():
        a, b = getattr(one, name), getattr(other, name)
        if name not in PASSED_OVER and a != b:
            numbers = isinstance(a, (int, float)) and isinstance(b, (int, float)) and a > 0
            rows.append({"name": name, "one": _text(a), "other": _text(b), "ratio": b / a if numbers else None})
    known = {_place(row): row.us for row in one.kernels}
    logs: dict[str, list[float]] = {}
    for row in other.kernels:
        if _place(row) in known:
            kind = f"{row.op} {row.bits} bit" + (f" block {row.block}" if row.block else "") + ("" if row.symmetric else " asym")
            logs.setdefault(f"{kind}, {row.m} tokens", []).append(math.log(known[_place(row)] / row.us))
    return rows + [{"name": name, "one": "", "other": f"{len(values)} sizes", "ratio": math.exp(sum(values) / len(values))} for name, values in logs.items()]


def _place(row: KernelTime) -> tuple[object, ...]:
    return row.op, row.bits, row.block, row.symmetric, row.k, row.n, row.m, row.context, row.layers


def _text(value: Any) -> Any:
    return " ".join(value) if isinstance(value, tuple) else value
