"""Scales before and after tuning: KL of the exported graph to the fp32 model.

    python benchmarks/tune.py [--base DIR] [--text FILE] [--scheme int4-g64-asym-s16] [--head int5-g64-s16] [--method gptq] [--windows 6]

Quantizes and tunes on the built-in calibration text (`quantize: {tune: scales}` in a recipe), and scores both graphs on windows of 512 tokens of --text
(by default the built-in evaluation text), second halves, in onnxruntime. --codes keeps what the quantizer made, for the next run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from compiler.bench.peers import environments
from compiler.checkpoints.resolve import open_checkpoint
from compiler.evaluation import decoder
from compiler.evaluation.data import Row, load_rows
from compiler.evaluation.run import ChatFormat
from compiler.quantizers.windows import calibration_set
from compiler.record import peak_rss_mb
from compiler.reference import reference_model
from compiler.scheme import Schemes, parse_scheme
from compiler.stages import export
from compiler.stages.keep import codes_for
from compiler.stages.quantize import quantize_matrices, resolve_method
from compiler.stages.tune import resolve_tuning, tune_scales


class Scorer:
    """KL of an exported folder to the float model."""

    def __init__(self, checkpoint: Any, text: Path | None, windows: int) -> None:
        chat = ChatFormat(checkpoint)
        self.sequences = decoder.scored_sequences(load_rows(text).rows, chat.tokenizer, None, chat.eos_text)[:windows]
        model = decoder.merged_logits(reference_model(checkpoint, "text-generation"))
        self.known = {id(sequence.ids): model([sequence.ids])[0] for sequence in self.sequences}

    def score(self, folder: Path) -> dict[str, Any]:
        bundle = decoder.bundle_logits(decoder.open_all_logits(folder))
        scores = decoder.score(self.sequences, lambda ids: [self.known[id(one)] for one in ids], bundle, quiet)
        found: dict[str, Any] = decoder.token_metrics(scores, 0)["kl_mean"]
        return found


def quiet(*_: Any) -> None:
    """No progress."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(environments() / "models" / "smollm2-dithered"))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--scheme", default="int4-g64-asym-s16")
    parser.add_argument("--head", default="int5-g64-s16")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--characters", type=int, help="tune on so many characters of the calibration text, for a shorter run")
    parser.add_argument("--codes", type=Path, help="folder for the quantizer's codes; used again where it holds any")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tune.json"))
    given = parser.parse_args()
    checkpoint, text = open_checkpoint(given.base), calibration_set(None)
    schemes = Schemes(parse_scheme(given.scheme), {"lm_head": parse_scheme(given.head)})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tune-") as folder:
        work = Path(folder)
        codes = given.codes or work / "codes"
        codes.mkdir(parents=True, exist_ok=True)
        params = resolve_method(checkpoint, schemes, {"*": given.method}, text)
        if params is not None and not any(codes.iterdir()):
            quantize_matrices(checkpoint, params, text, codes, quiet)
        scaled, started = work / "tuned", time.monotonic()
        scaled.mkdir()

        def said(item: str, done: int, total: int) -> None:
            print(f"{time.monotonic() - started:6.0f} s  {done}/{total} {item}", flush=True)

        shorter = replace(text, rows=(Row(text=(text.rows[0].text or "")[: given.characters]),))
        tuning = resolve_tuning(checkpoint, schemes, shorter, 0)
        tuned = tune_scales(checkpoint, tuning, codes_for(checkpoint, schemes, codes), shorter, scaled, said)
        print(f"held-out windows: KL {tuned.before:.4f} -> {tuned.after:.4f}; {time.monotonic() - started:.0f} s, peak {peak_rss_mb():.0f} MB", flush=True)
        scorer = Scorer(checkpoint, given.text, given.windows)
        for name, place in ((given.method, codes), (f"{given.method}, scales tuned", scaled)):
            out = work / name.replace(", ", "-").replace(" ", "-")
            out.mkdir()
            export.export(checkpoint, export.resolve_options(checkpoint, schemes, None, None), out, quiet, place)
            size = sum(path.stat().st_size for path in out.glob("model.onnx*")) / 1e6
            found = scorer.score(out)
            rows.append({"system": name, "metric": "kl_mean", "value": found["value"], "unit": "nats", "low": found["low"], "high": found["high"]})
            rows.append({"system": name, "metric": "file_mb", "value": size, "unit": "MB", "low": None, "high": None})
            print(f"{name:24s} {size:8.2f} MB   KL {found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
