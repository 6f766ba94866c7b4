"""What a decode step costs under other settings, in another graph, and with more tokens in it: variants in one process, in turn.

    python benchmarks/steps.py [--rounds 12] [--contexts 0,512] [--out benchmarks/results/steps.json]
    python benchmarks/steps.py --profile 512          milliseconds a step by operator, from onnxruntime's profiler (which slows every node by some microseconds)

Systems: `trimtab` (SmolLM2-135M int4-g64, as `trimtab run` opens it), the same with one setting changed, the graph of onnxruntime-genai's builder in our loop,
and `draft k`: a run over the last token and k drafted ones (runtimes.lookup). The ratio is a variant's time over trimtab's of the same round: its median, and
the quartiles. Each turn is a block of steps of which the first are not counted: another session's threads still spin.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import SUBJECTS, bundle

from compiler.bench.models import contents, home
from compiler.bench.peers import environments
from compiler.sources import Mixture
from compiler.store import cache_key
from runtimes.decode import DecodeLoop, read_layout
from runtimes.session import SessionSettings, open_session

HERE = Path(__file__).resolve().parent
STEPS, SKIPPED = 24, 8
CAPACITY = 4096
VARIANTS = {
    "trimtab": SessionSettings(flush_denormals=True),
    "dynamic_block_base 4": SessionSettings(flush_denormals=True, entries=(("session.dynamic_block_base", "4"),)),
    "spin 10 ms": SessionSettings(flush_denormals=True, entries=(("session.intra_op.spin_duration_us", "10000"),)),
}
DRAFTS = (1, 3, 7)
Block = Callable[[], float]


def ours() -> Path:
    """The bundle, made anew: code may have changed since the last run."""
    subject = SUBJECTS[0]
    return bundle(f"{subject.name}-steps", subject.base, subject.schemes[0])


def opened(folder: Path, settings: SessionSettings) -> DecodeLoop:
    session = open_session(folder / "model.onnx", settings)
    return DecodeLoop(session, read_layout(session, json.loads((folder / "genai_config.json").read_text()), str(folder)), CAPACITY)


def step_block(loop: DecodeLoop, context: int, draft: int = 0) -> Block:
    """A function that runs a block of steps after `context` tokens: mean seconds a run. The cache's contents do not matter."""

    def block() -> float:
        loop.seek(max(context, 1))
        taken = []
        for _ in range(STEPS):
            began = time.perf_counter()
            if draft:
                loop.check([5] * (draft + 1))
                loop.forget(draft)
            else:
                loop.step([5])
            taken.append(time.perf_counter() - began)
        return float(np.mean(taken[SKIPPED:]))

    return block


def measured(blocks: dict[str, Block], context: int, rounds: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    names, taken = list(blocks), {name: list[float]() for name in blocks}
    for _ in range(rounds):
        for name in rng.permutation(names):
            taken[name].append(blocks[name]())
    rows = []
    for name, values in taken.items():
        ratios = [value / base for value, base in zip(values, taken["trimtab"], strict=True)]
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        print(f"{context:5d} {name:28s} {1e3 * np.median(values):7.2f} ms   ratio {middle:.2f} [{low:.2f}, {high:.2f}]")
        rows.append({"system": name, "metric": f"step_ratio@{context}", "value": middle, "unit": "", "low": low, "high": high, "samples": rounds})
        rows.append({"system": name, "metric": f"step_ms@{context}", "value": 1e3 * float(np.median(values)), "unit": "ms", "low": None, "high": None})
    return rows


def profile(context: int) -> None:
    """Print milliseconds a step by operator."""
    loop = opened(ours(), SessionSettings(flush_denormals=True, profile_prefix=str(environments() / "steps")))
    block = step_block(loop, context)
    block()
    path = Path(loop._session.end_profiling())
    events = json.loads(path.read_text())
    path.unlink()
    spent: dict[str, float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] = spent.get(event["args"]["op_name"], 0.0) + event["dur"] / 1e3 / STEPS
    for name, ms in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{name:36s} {ms:7.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--contexts", default="0,512")
    parser.add_argument("--profile", type=int, metavar="CONTEXT")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "steps.json")
    given = parser.parse_args()
    if given.profile is not None:
        profile(given.profile)
        return
    place = ours()
    loops = {name: opened(place, settings) for name, settings in VARIANTS.items()}
    genai = _genai()
    if genai.is_dir():
        loops["onnxruntime-genai's graph"] = opened(genai, VARIANTS["trimtab"])
    rows = []
    for context in map(int, given.contexts.split(",")):
        blocks = {name: step_block(loop, context) for name, loop in loops.items()}
        blocks |= {f"draft {size}": step_block(loops["trimtab"], context, size) for size in DRAFTS}
        rows += measured(blocks, context, given.rounds)
    given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _genai() -> Path:
    """The model that onnxruntime-genai's builder made for the side-by-side runs."""
    return home(cache_key(contents(Mixture(SUBJECTS[0].base).open().lineage))) / "genai-int4"


if __name__ == "__main__":
    main()
