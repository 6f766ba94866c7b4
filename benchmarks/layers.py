"""Output error of every linear weight of a decoder under every quantizer, on text that none of them saw.

    python benchmarks/layers.py [--base DIR] [--text FILE] [--scheme int4-g64] [--methods gptq ...] [--windows 4] [--out benchmarks/results/layers.json]

Error of a weight: E |dW x|^2 over E |W x|^2, x its inputs in the float model. Quantizers that look at inputs see 16 windows of 512 tokens of the built-in
calibration text; errors are taken on windows of --text (by default the built-in evaluation text). Both run through the model block by block, side by side.
By default the base is SmolLM2-135M moved off its 4-bit lattice (`python benchmarks/reference.py`): 210 weights and the head.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compiler.bench.peers import environments
from compiler.checkpoints.resolve import open_checkpoint
from compiler.checkpoints.view import Checkpoint
from compiler.evaluation.data import load_rows
from compiler.quantizers import affine
from compiler.quantizers.calibrate import BlockStream
from compiler.quantizers.methods import METHODS
from compiler.quantizers.moments import output_error
from compiler.quantizers.pack import unpack
from compiler.quantizers.windows import calibration_set, token_windows
from compiler.record import peak_rss_mb
from compiler.scheme import Scheme, parse_scheme

CALIBRATION_WINDOWS, LENGTH = 16, 512


def matrices(checkpoint: Checkpoint, seen: np.ndarray, unseen: np.ndarray) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]]:
    """(weights by name [rows, k] that share their inputs, H of the calibration text, H of the other text), block by block, the head last."""
    streams = [BlockStream(checkpoint, windows) for windows in (seen, unseen)]
    for first, second in zip(*(stream.blocks() for stream in streams), strict=True):
        left, right = first.moments(), second.moments()
        names = {id(module): name for name, module in first.module.named_modules()}
        for matrix, linears in first.linears.items():
            yield {f"{first.name}.{names[id(linear)]}": linear.weight.numpy() for linear in linears}, left[matrix], right[matrix]
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    head = checkpoint.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"].read()
    yield {"lm_head": head}, streams[0].head_moment(), streams[1].head_moment()


def errors(weight: np.ndarray, scheme: Scheme, seen: np.ndarray, unseen: np.ndarray, methods: Sequence[str]) -> dict[str, float]:
    """Method -> relative output error of one weight [rows, k]."""
    whole = output_error(weight, unseen)
    found = {}
    for name, method in ((name, METHODS[name]) for name in methods):
        packed = method.quantize(weight, scheme, seen if method.calibrated else None)
        found[name] = output_error(weight - affine.dequantize(unpack(packed, scheme, weight.shape[1])), unseen) / whole
    return found


def table(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
    """By kind of weight: how often each method beats rounding to nearest, and its error over rounding's (median, worst)."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["metric"].split("@")[1], {})[row["system"]] = row["value"]
    kinds: dict[str, list[str]] = {}
    for name in found:
        kinds.setdefault(name.split(".")[-1], []).append(name)
    lines = [f"{'weight':10s} {'count':>5s}  " + "  ".join(f"{method:>28s}" for method in methods)]
    for kind, names in [*kinds.items(), ("all", list(found))]:
        cells = []
        for method in methods:
            ratios = [found[name][method] / found[name]["rtn"] for name in names]
            cells.append(f"below in {sum(ratio < 1 for ratio in ratios):3d}, {np.median(ratios):.2f} ({max(ratios):.2f})".rjust(28))
        lines.append(f"{kind:10s} {len(names):5d}  " + "  ".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(environments() / "models" / "smollm2-dithered"))
    parser.add_argument("--text", type=Path, help="text that errors are taken on")
    parser.add_argument("--scheme", default="int4-g64")
    parser.add_argument("--methods", nargs="+", choices=[name for name in METHODS if name != "rtn"], default=[name for name in METHODS if name != "rtn"])
    parser.add_argument("--windows", type=int, default=4, help="windows of that text")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layers.json"))
    given = parser.parse_args()
    started, checkpoint, scheme = time.monotonic(), open_checkpoint(given.base), parse_scheme(given.scheme, "--scheme")
    seen = token_windows(calibration_set(None), checkpoint, CALIBRATION_WINDOWS, LENGTH)
    unseen = token_windows(load_rows(given.text), checkpoint, given.windows, LENGTH)
    rows: list[dict[str, Any]] = []
    for weights, left, right in matrices(checkpoint, seen, unseen):
        for name, weight in weights.items():
            found = errors(weight, scheme, left, right, ["rtn", *given.methods])
            facts = {"metric": f"output_error@{name}", "unit": "", "low": None, "high": None}
            rows += [{"system": method, "value": value, **facts} for method, value in found.items()]
            print(f"{time.monotonic() - started:6.0f} s  {name:45s} " + "  ".join(f"{method} {value:.5f}" for method, value in found.items()), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{given.scheme}, {len(seen)} windows seen, {len(unseen)} not; {time.monotonic() - started:.0f} s, peak {peak_rss_mb():.0f} MB")
    print(table(rows, given.methods))


if __name__ == "__main__":
    main()
