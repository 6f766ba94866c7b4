"""Samples -> rows of the table, and ratios pair by pair.

value      the median over rounds
low, high  the central 95 % of medians of resampled rounds (bootstrap, seeded); with fewer than FEW rounds the least and the largest sample
ratio      ours over the peer's within each round, turned so that above 1 is in our favour; then the same median and interval over rounds
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from compiler.bench.questions import higher_is_better, unit_of

OURS = "trimtab"
FEW = 5
RESAMPLES = 2000
Row = dict[str, Any]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of samples. [1, 2, 9] -> (2, 1, 9): too few to resample."""
    data = np.asarray(values, float)
    if len(data) < FEW:
        return float(np.median(data)), float(data.min()), float(data.max())
    drawn = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.quantile(np.median(data[drawn], axis=1), [0.025, 0.975])
    return float(np.median(data)), float(low), float(high)


def table(samples: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row per system and metric, in the order of their first samples by metric."""
    return [
        {"system": system, "metric": metric, "value": value, "unit": unit_of(metric), "low": low, "high": high, "samples": len(values)}
        for (metric, system), values in _grouped(samples).items()
        for value, low, high in [interval(list(values.values()))]
    ]


def ratios(samples: Iterable[Mapping[str, Any]], ours: str = OURS) -> list[Row]:
    """For each metric and each other system: how many times better we are, from the rounds that hold both."""
    grouped, rows = _grouped(samples), []
    for (metric, system), theirs in grouped.items():
        mine = grouped.get((metric, ours), {})
        shared = sorted(set(mine) & set(theirs))
        if system == ours or not shared or not all(mine[number] > 0 and theirs[number] > 0 for number in shared):
            continue
        better = [mine[number] / theirs[number] for number in shared]
        value, low, high = interval(better if higher_is_better(metric) else [1 / ratio for ratio in better])
        rows.append({"system": ours, "against": system, "metric": metric, "ratio": value, "low": low, "high": high, "rounds": len(shared)})
    return rows


def _grouped(samples: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], dict[int, float]]:
    """(metric, system) -> round -> value."""
    grouped: dict[tuple[str, str], dict[int, float]] = {}
    for sample in samples:
        grouped.setdefault((sample["metric"], sample["system"]), {})[sample["round"]] = sample["value"]
    return grouped
