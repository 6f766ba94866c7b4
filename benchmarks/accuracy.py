"""Accuracy per byte: KL to the fp32 reference at given sizes, ours beside llama.cpp with an importance matrix, in one run.

    python benchmarks/accuracy.py --model HF_FOLDER --text SCORED.txt --calibration OTHER.txt [--llama ENVIRONMENT] [--out benchmarks/results/accuracy]

Scored as in many papers' tables: windows of 512 tokens, the first half context, the second half scored; mean over tokens of KL(reference || model) in nats.
Ours are the exported graphs in onnxruntime. Peers are quantized here from the same weights, their importance matrix from the same calibration text, and run by
llama-cpp-python, in an environment made by benchmarks/peers.py (without --llama there are no peers). Scored and calibration text must differ.

Writes OUT.json (rows {system, metric, value, unit, low, high}), OUT.png (size against KL) and prints, for each size, the best of ours and of the peers of at
most that size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compiler.checkpoints.resolve import open_checkpoint
from compiler.checkpoints.view import Checkpoint
from compiler.evaluation import decoder
from compiler.evaluation.data import load_rows
from compiler.evaluation.run import ChatFormat
from compiler.evaluation.statistics import cluster_interval
from compiler.quantizers.windows import calibration_set
from compiler.reference import reference_model
from compiler.scheme import Schemes, parse_scheme
from compiler.stages import export as export_stage
from compiler.stages.quantize import quantize_matrices, resolve_method
from runtimes.metrics import log_softmax

SIZES_MB = (77, 92, 105, 112, 136, 145)
PEERS = ("Q4_0", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
WITHOUT_IMATRIX = ("Q8_0",)  # takes none
HALF = decoder.WINDOW // 2
# Runs inside the peer's environment: numpy and llama_cpp only.
CHILD = """
import json, sys
import numpy as np
from llama_cpp import Llama
model, windows, reference, half = sys.argv[1], np.load(sys.argv[2]), np.load(sys.argv[3], mmap_mode="r"), int(sys.argv[4])
llama = Llama(model_path=model, n_ctx=windows.shape[1], n_batch=windows.shape[1], logits_all=True, n_threads=2, verbose=False)
kl, same = [], []
for window, left in zip(windows, reference):
    llama.reset()
    llama.eval(window.tolist())
    logits = llama.scores[half : len(window) - 1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    right = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    kl.append((np.exp(left.astype(np.float64)) * (left - right)).sum(-1))
    same.append(left.argmax(-1) == right.argmax(-1))
print(json.dumps({"kl": np.concatenate(kl).tolist(), "same": np.concatenate(same).tolist()}))
"""


@dataclass(frozen=True)
class Ours:
    """One point of ours: a default scheme, overrides by matrix pattern, a method."""

    scheme: str
    layers: Mapping[str, str]
    method: str = "gptq"

    def __str__(self) -> str:
        rest = "".join(f", {pattern} {scheme}" for pattern, scheme in self.layers.items())
        return f"trimtab {self.method} {self.scheme}{rest}"


POINTS = (
    Ours("int4-g64-asym-s16", {"lm_head": "int5-g64-s16"}),
    Ours("int5-g64-s16", {}),
    Ours("int6-g64-s16", {"lm_head": "int5-g64-s16"}),
    Ours("int6-g32-s16", {}),
    Ours("int7-g32-s16", {}),
    Ours("int8-g32-s16", {}),
)


@dataclass(frozen=True)
class Reference:
    """Token windows and the fp32 model's log-probabilities of each one's second half, on disk."""

    checkpoint: Checkpoint
    windows: np.ndarray
    windows_file: Path
    file: Path


def make_reference(checkpoint: Checkpoint, text: Path, count: int, work: Path) -> Reference:
    """Score `count` windows of a text by eager transformers in float32."""
    ids = np.array(ChatFormat(checkpoint).tokenizer.encode(load_rows(text).rows[0].text or "", add_special_tokens=False).ids, np.int64)
    windows = ids[: len(ids) // decoder.WINDOW * decoder.WINDOW].reshape(-1, decoder.WINDOW)[:count]
    forward = decoder.merged_logits(reference_model(checkpoint, "text-generation"))
    shape = (len(windows), decoder.WINDOW - HALF - 1, int(checkpoint.config["vocab_size"]))
    file = work / "reference.npy"
    stored = np.lib.format.open_memmap(file, "w+", np.float32, shape)
    for number, window in enumerate(windows):
        stored[number] = log_softmax(forward([window])[0][HALF:-1])
    stored.flush()
    np.save(work / "windows.npy", windows)
    return Reference(checkpoint, windows, work / "windows.npy", file)


def result(system: str, size_mb: float, kl: np.ndarray, same: np.ndarray, windows: int) -> dict[str, Any]:
    groups = np.repeat(np.arange(windows), len(kl) // windows)
    low, high = cluster_interval(kl, groups)
    return {"system": system, "file_mb": size_mb, "kl_mean": float(kl.mean()), "low": low, "high": high, "top1_agreement": float(same.mean())}


def measure_ours(point: Ours, reference: Reference, calibration: Path | None, work: Path) -> dict[str, Any]:
    """Quantize, export, and score the exported graph."""
    schemes = Schemes(parse_scheme(point.scheme), {pattern: parse_scheme(text) for pattern, text in point.layers.items()})
    text = calibration_set(calibration)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        codes, out = Path(folder) / "codes", Path(folder) / "out"
        codes.mkdir()
        out.mkdir()
        params = resolve_method(reference.checkpoint, schemes, {"*": point.method}, text)
        if params is not None:
            quantize_matrices(reference.checkpoint, params, text, codes, quiet)
        options = export_stage.resolve_options(reference.checkpoint, schemes, None, None)
        export_stage.export(reference.checkpoint, options, out, quiet, codes if params else None)
        size = sum(path.stat().st_size for path in out.glob("model.onnx*")) / 1e6
        loop = decoder.open_all_logits(out)
        stored, kl, same = np.load(reference.file, mmap_mode="r"), [], []
        for window, left in zip(reference.windows, stored, strict=True):
            right = log_softmax(np.asarray(loop.all_logits(window[None]))[0][HALF:-1])
            kl.append((np.exp(left) * (left - right)).sum(axis=-1, dtype=np.float64))
            same.append(left.argmax(-1) == right.argmax(-1))
    return result(str(point), size, np.concatenate(kl), np.concatenate(same), len(stored))


def full_gguf(llama: Path, model: Path, work: Path) -> Path:
    """The reference as a float32 GGUF, by llama.cpp's own converter."""
    full = work / "f32.gguf"
    run([sys.executable, llama / "convert" / "convert_hf_to_gguf.py", model, "--outtype", "f32", "--outfile", full], PYTHONPATH=str(llama / "convert"))
    return full


def measure_peers(llama: Path, full: Path, reference: Reference, calibration: Path, work: Path) -> list[dict[str, Any]]:
    """llama.cpp's types, each quantized here from the same weights and an importance matrix of the same text."""
    tools, matrix = llama / "tools", work / "imatrix.gguf"
    run([tools / "llama-imatrix", "-m", full, "-f", calibration, "-o", matrix, "-t", "2"])
    rows = []
    for kind in PEERS:
        file = work / f"{kind}.gguf"
        weighted = [] if kind in WITHOUT_IMATRIX else ["--imatrix", matrix]
        run([tools / "llama-quantize", *weighted, full, file, kind, "2"])
        answer = run([llama / "bin" / "python", "-c", CHILD, file, reference.windows_file, reference.file, str(HALF)])
        found = json.loads(answer.splitlines()[-1])
        name = f"llama.cpp {kind}" + (" imatrix" if weighted else "")
        rows.append(result(name, file.stat().st_size / 1e6, np.array(found["kl"]), np.array(found["same"]), len(reference.windows)))
        file.unlink()
    return rows


def run(command: Sequence[Any], **environment: str) -> str:
    """stdout of a process. Raises RuntimeError with its last words when it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:5]))} exited {done.returncode}: {done.stderr[-800:]}")
    return done.stdout


def quiet(*_: Any) -> None:
    """No progress."""


def table(rows: Sequence[Mapping[str, Any]], sizes: Sequence[float]) -> str:
    """For each size the best of ours and of the peers that fit, and their ratio (below 1: ours loses less)."""
    lines = [f"{'at most':>8}  {'ours KL':>9} {'MB':>6}  {'peer KL':>9} {'MB':>6}  ratio"]
    for size in sizes:
        fit = [row for row in rows if row["file_mb"] <= size]
        best = [min((row for row in fit if row["system"].startswith("trimtab") is own), key=lambda row: row["kl_mean"], default=None) for own in (True, False)]
        shown = [f"{row['kl_mean']:9.4f} {row['file_mb']:6.1f}" if row else f"{'none':>9} {'':6}" for row in best]
        ratio = f"{best[0]['kl_mean'] / best[1]['kl_mean']:.2f}" if best[0] and best[1] else ""
        lines.append(f"{size:8g}  {shown[0]}  {shown[1]}  {ratio}")
    lines.append("")
    for row in sorted(rows, key=lambda row: row["file_mb"]):
        spread = f"[{row['low']:.4f}, {row['high']:.4f}]"
        lines.append(f"{row['file_mb']:7.2f} MB  KL {row['kl_mean']:.4f} {spread}  top-1 {row['top1_agreement']:.1%}  {row['system']}")
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Size against KL, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for own, colour, label in ((True, "tab:blue", "trimtab"), (False, "tab:orange", "llama.cpp")):
        points = sorted((row["file_mb"], row["kl_mean"], row["system"]) for row in rows if row["system"].startswith("trimtab") is own)
        if points:
            axes.plot([point[0] for point in points], [point[1] for point in points], "o-", color=colour, label=label)
            for size, kl, name in points:
                axes.annotate(name.split(",")[0].removeprefix(label).strip(), (size, kl), fontsize=7, xytext=(3, 4), textcoords="offset points")
    axes.set(yscale="log", xlabel="file, MB", ylabel="mean KL to the fp32 reference, nats")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the fp32 reference as a Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True, help="plain text that is scored")
    parser.add_argument("--calibration", type=Path, required=True, help="other plain text, for our calibration and the peers' importance matrix")
    parser.add_argument("--llama", type=Path, help="environment of llama.cpp, made by benchmarks/peers.py")
    parser.add_argument("--gguf", type=Path, help="the same weights as a float32 GGUF, for a tokenizer that llama.cpp's converter does not read")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--points", type=int, nargs="*", default=list(range(len(POINTS))), help="which of our points, by number")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy"))
    arguments = parser.parse_args()
    if arguments.text.read_bytes() == arguments.calibration.read_bytes():
        parser.error("scored and calibration text are the same")
    with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
        work = Path(folder)
        reference = make_reference(open_checkpoint(str(arguments.model)), arguments.text, arguments.windows, work)
        rows: list[dict[str, Any]] = []
        if arguments.llama:
            full = arguments.gguf or full_gguf(arguments.llama, arguments.model, work)
            rows = measure_peers(arguments.llama, full, reference, arguments.calibration, work)
        for number in arguments.points:
            rows.append(measure_ours(POINTS[number], reference, arguments.calibration, work))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    flat = [{"system": row["system"], "metric": "file_mb", "value": row["file_mb"], "unit": "MB", "low": None, "high": None} for row in rows]
    flat += [{"system": row["system"], "metric": "kl_mean", "value": row["kl_mean"], "unit": "nats", "low": row["low"], "high": row["high"]} for row in rows]
    arguments.out.with_suffix(".json").write_text(json.dumps(flat, indent=1) + "\n")
    plot(rows, arguments.out.with_suffix(".png"))
    print(table(rows, SIZES_MB))


if __name__ == "__main__":
    main()
