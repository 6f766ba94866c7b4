"""Deltas that stay unmerged: what `deltas: {mode: attached}` changes between sources and report.

One base is exported, each delta becomes an adapter file beside it, and each is measured against its merged twin: the model
that merging this delta alone would give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler.deltas.attach import products
from compiler.deltas.base import wrong_delta
from compiler.errors import RecipeError
from compiler.graph.adapters import Tenant
from compiler.scheme import matrix_name
from compiler.sources import Sources
from compiler.stages import package
from runtimes.bench import BenchOptions, measure_in_child

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS = 3  # fresh processes per system, in turn: what disturbs one round disturbs all systems of it
MORE_ROUNDS = 6  # where a system had no quiet moment in any of them
REQUESTS = 4  # of one process
COSTS = ("ttft_ms", "tpot_ms", "prefill_tok_s", "decode_tok_s")


def tenants(sources: Sources) -> tuple[Tenant, ...]:
    """The adapters of a build. Raises DeltaError for a delta that is no low-rank product of linear weights."""
    made = []
    for name, one in sources.attached.items():
        (delta,) = one.merge.deltas
        if one.merge.growth and (one.merge.growth.rows or one.merge.growth.tokenizer):
            expected = "a delta without added tokens: attached ones share the base's tables and tokenizer"
            raise wrong_delta(delta.origin, expected, "; ".join(one.merge.growth.notes), "merge it: leave deltas.mode out, in a recipe of its own")
        made.append(Tenant(name, products(one.merge.base, delta, one.merge.bound), delta.digest))
    return tuple(made)


def check(sources: Sources, options: Mapping[str, Any]) -> None:
    """Raises RecipeError for attached deltas on the encoder road, DeltaError as `tenants` does: both before any work."""
    if sources.attached and options["road"] != "decoder":
        remedy = "merge it: leave deltas.mode out, and write one recipe for each delta"
        raise RecipeError("deltas.mode", expected="merged for an encoder: only decoders serve unmerged adapters", found="attached", remedy=remedy)
    if sources.attached and "prompts" in options:
        expected = "merged deltas: the graph for prompts holds no adapters"
        raise RecipeError("quantize.prompts", expected=expected, found="deltas.mode attached", remedy="remove one of them")
    tenants(sources)


def predicted_bytes(sources: Sources) -> int:
    """Bytes of all adapter files, but for their headers: A [k, r] and B [r, n] in float32, by tensor."""
    return sum(4 * sum(side.size for side in product()) for tenant in tenants(sources) for product in tenant.products.values())


def ranks(sources: Sources) -> dict[str, int]:
    """Fused matrix -> rank of the products beside it, of the tenant with the largest products; {} where all deltas are merged."""
    found: list[tuple[int, dict[str, int]]] = []
    for tenant in tenants(sources):
        size, beside = 0, dict[str, int]()
        for tensor, product in tenant.products.items():
            left, right = product()
            name = matrix_name(tensor, sources.merged.config) or tensor.removesuffix(".weight")
            size, beside[name] = size + left.size + right.size, beside.get(name, 0) + right.shape[0]
        found.append((size, beside))
    return max(found, key=lambda row: row[0])[1] if found else {}


def heaviest(model: Mapping[str, Any]) -> str:
    """The tenant whose products are the largest, "" where there is none: what holds for it in time and memory holds for the others."""
    rows = model.get("adapters") or ()
    return max(rows, key=lambda row: row["parameters"])["name"] if rows else ""


def cost_rows(bundle: Path, merged: Path, adapter: str, threads: int, update: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """What leaving a delta unmerged costs: rows {system, metric, value, low, high, samples} of latency (medians) and size.

    merged  the same delta merged into the same base at the same schemes, as a folder that the runtime opens
    low, high are the medians of the fastest and the slowest process.
    """
    options = BenchOptions(threads=threads, least=REQUESTS, most=REQUESTS, seconds=20.0)
    systems = {
        f"merged {adapter}": (merged, options),
        "attached, no adapter": (bundle, options),
        f"attached, {adapter}": (bundle, replace(options, adapter=adapter)),
    }
    found: dict[str, list[Mapping[str, Sequence[float]]]] = {name: [] for name in systems}
    number = 0
    while number < ROUNDS or (number < ROUNDS + MORE_ROUNDS and not all(map(_seen, found.values()))):
        for name, (folder, how) in systems.items():
            found[name].append(measure_in_child(folder, how).series)
        number += 1
        update("rounds of merged and attached", number, max(number, ROUNDS))
    rows = [row for name, rounds in found.items() for row in _medians(name, rounds)]
    sizes = {f"merged {adapter}": package.device_bytes(merged), "attached, all adapters": package.device_bytes(bundle)}
    return rows + [{"system": name, "metric": "size_mb", "value": size / 1e6, "low": None, "high": None, "samples": 1} for name, size in sizes.items()]


def _seen(rounds: Sequence[Mapping[str, Sequence[float]]]) -> bool:
    """Whether any process of a system had a quiet moment."""
    return any(len(values) for series in rounds for values in series.values())


def _medians(system: str, rounds: Sequence[Mapping[str, Sequence[float]]]) -> Iterator[dict[str, Any]]:
    for metric in COSTS:
        each = [float(np.median(series[metric])) for series in rounds if len(series[metric])]
        if each:
            samples = sum(len(series[metric]) for series in rounds)
            yield {"system": system, "metric": metric, "value": float(np.median(each)), "low": min(each), "high": max(each), "samples": samples}
