"""A llama of 1.1 billion random parameters beside llama.cpp: does the order of the small model hold where weights no longer fit a cache?

    python benchmarks/synthetic.py --prepare          checkpoint (bf16), our bundles, llama.cpp's files: about 12 GB of disk
    python benchmarks/synthetic.py [--rounds 5]       results/side-by-side/synthetic-1.1b-*.json

Shapes of TinyLlama with SmolLM2's tokenizer and vocabulary. Random weights cost what trained ones cost; accuracy means nothing here and is not measured.
llama.cpp's own converter writes its file from the same checkpoint.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from builders import BASE
from merge import SYNTHETIC, synthetic
from side_by_side import HERE, bundle, end_with_children

from compiler.bench.peers import environments
from compiler.bench.side import BenchRequest, bench
from compiler.bench.text import as_text
from compiler.checkpoints.resolve import open_checkpoint
from compiler.progress import Progress

SIZE = "1.1 B"
NAME = "synthetic-1.1b"
SCHEMES = ("int4-g64", "int8-g32")
QUESTIONS = ("0", "512", "fresh")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def checkpoint() -> Path:
    """The random llama as a checkpoint with a tokenizer."""
    place = environments() / "models" / NAME
    if not (place / "config.json").is_file():
        base = open_checkpoint(BASE)
        synthetic(place, replace(SYNTHETIC[SIZE], vocabulary=int(base.config["vocab_size"])))
        for name in TOKENIZER:
            (place / name).write_bytes(base.assets[name])
        config = json.loads((place / "config.json").read_text())
        tokens = {name: base.config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (place / "config.json").write_text(json.dumps({**config, **tokens}))
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--against", default="llama.cpp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1800.0)
    given = parser.parse_args()
    end_with_children()
    base = str(checkpoint())
    places = [environments() / "bundles" / f"{NAME}-{scheme}" for scheme in SCHEMES]
    if given.prepare or not all(place.is_dir() for place in places):
        places = [bundle(NAME, base, scheme) for scheme in SCHEMES]
    only = tuple(filter(None, given.only.split(","))) or QUESTIONS
    out = HERE / "results" / "side-by-side"
    request = BenchRequest(given.against.split(","), only, given.rounds, given.seconds, out=out, append=given.append, prepare=given.prepare)
    results = bench(places, request, Progress())
    if not given.prepare:
        print(as_text(results.as_dict()))


if __name__ == "__main__":
    main()
