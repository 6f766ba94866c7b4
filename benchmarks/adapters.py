"""What leaving a delta unmerged costs: SmolLM2-135M at int4-g32, merged beside attached, decode and prefill, in turn in one process.

    python benchmarks/adapters.py [--rounds 9] [--scheme int4-g32] [--out benchmarks/results/adapters.json]

Two deltas: the one of example 01 (rank 8 on the linears of 10 of 30 layers) and one of rank 16 on all linears with random factors (cost does not depend on
values). A round times every system once; the value is the median over rounds, low and high are the fastest and the slowest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from builders import BASE
from merge import RANK, adapter

from compiler.attached import tenants
from compiler.checkpoints.resolve import open_checkpoint
from compiler.evaluation.run import unpackaged
from compiler.scheme import Schemes, parse_scheme
from compiler.sources import DeltaSource, Mixture, Sources
from compiler.stages import export as export_stage
from runtimes.generate import Generator, Options

EXAMPLE = Path(__file__).parent.parent / "examples" / "01-support-assistant" / "adapter"
DECODE = {"prompt": 32, "new": 49}  # tokens; 48 steps are timed
PREFILL = 256  # tokens: one chunk


def export(sources: Sources, scheme: str, folder: Path) -> tuple[Generator, float]:
    """(the exported model, its bytes on disk / 1e6)."""
    folder.mkdir()
    options = export_stage.resolve_options(sources.merged, Schemes(parse_scheme(scheme)), None, None)
    summary = export_stage.export(sources.merged, options, folder, lambda *_: None, tenants(sources))
    (folder / export_stage.SUMMARY).unlink()
    return Generator(unpackaged(folder, summary["model"])), sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def systems(work: Path, scheme: str) -> tuple[dict[str, tuple[Generator, str]], dict[str, float]]:
    """({name: (model, adapter)}, {name: MB})."""
    adapter(work / "wide", open_checkpoint(BASE))
    deltas = {"example": str(EXAMPLE), f"r{RANK}-all": str(work / "wide")}
    made, sizes = {}, {}
    base, sizes["base alone"] = export(Mixture(BASE).open(), scheme, work / "base")
    made["base alone"] = (base, "")
    for name, path in deltas.items():
        sources = Mixture(BASE, [DeltaSource(path, 1.0, name)], attached=True).open()
        attached, sizes[f"attached {name}"] = export(sources, scheme, work / f"attached-{name}")
        merged, sizes[f"merged {name}"] = export(sources.attached[name], scheme, work / f"merged-{name}")
        made |= {f"merged {name}": (merged, ""), f"attached {name}, not used": (attached, ""), f"attached {name}": (attached, name)}
    return made, sizes


def request(generator: Generator, name: str, ids: list[int]) -> dict[str, float]:
    """Speeds of one prefill and one answer, tokens per second."""
    (long,) = generator.generate([ids[:PREFILL]], Options(max_new_tokens=1, adapter=name))
    (answer,) = generator.generate([ids[: DECODE["prompt"]]], Options(max_new_tokens=DECODE["new"], ignore_eos=True, adapter=name))
    return {f"prefill_tok_s@{PREFILL}": 1e3 * PREFILL / long.ttft_ms, f"decode_tok_s@{DECODE['prompt']}": 1e3 / answer.tpot_ms}


def swap_ms(generator: Generator, name: str) -> float:
    """Milliseconds to bind another adapter that has been read before."""
    loop = generator._take("")
    values = generator.adapters.values(name)
    started = time.perf_counter()
    loop.use(values)
    return (time.perf_counter() - started) * 1e3


def measure(work: Path, scheme: str, rounds: int) -> list[dict[str, Any]]:
    """All rows."""
    made, sizes = systems(work, scheme)
    ids = np.random.default_rng(0).integers(100, 40_000, PREFILL).tolist()
    found: dict[tuple[str, str, str], list[float]] = {}
    for number in range(rounds + 1):
        for name, (generator, tenant) in made.items():
            for metric, value in request(generator, tenant, ids).items():
                if number:  # the first round warms up
                    found.setdefault((name, metric, "tok/s"), []).append(value)
            if number and tenant:
                found.setdefault((name, "swap_ms", "ms"), []).append(swap_ms(generator, tenant))
    for (name, metric, unit), values in list(found.items()):
        if unit == "tok/s" and name.startswith("attached"):
            twin = f"merged {name.split()[1].rstrip(',')}"
            pairs = zip(values, found[twin, metric, unit], strict=True)
            found[name, f"{metric} over merged", "ratio"] = [value / against for value, against in pairs]  # of one round: a slow moment slows both
    found |= {(name, "file_mb", "MB"): [size] for name, size in sizes.items()}
    return [
        {"system": f"{name} {scheme}", "metric": metric, "value": statistics.median(values), "unit": unit, "low": min(values), "high": max(values)}
        for (name, metric, unit), values in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scheme", default="int4-g32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapters.json"))
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="adapters-"))
    try:
        rows = measure(work, arguments.scheme, arguments.rounds)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(f"{row['system']:36s} {row['metric']:18s} {row['value']:10.4g} {row['unit']:6s} [{row['low']:.4g}, {row['high']:.4g}]")


if __name__ == "__main__":
    main()
