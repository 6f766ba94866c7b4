"""Accuracy per byte: KL to the fp32 reference at given sizes, ours beside llama.cpp with an importance matrix and OpenVINO, in one run.

    python benchmarks/accuracy.py --text FILE [--calibration OTHER] [--model HF_FOLDER --gguf FILE] [--peers llama.cpp openvino] [--out OUT]
    python benchmarks/accuracy.py --text FILE --calibration OTHER --sizes --uniform --peers --tuned 77 --tune-text THIRD

Scored as in many papers' tables: windows of 512 tokens, the first half context, the second half scored; mean over tokens of KL(reference || model) in nats.
Ours are the exported graphs in onnxruntime: uniform schemes, and `scheme: auto` at each size. Peers are quantized here from the same weights, llama.cpp's
importance matrix from the same calibration text, and run in environments made by benchmarks/peers.py. The calibration text is another text; without one, the
second half of FILE, of which only the first half is scored then. Without --model: SmolLM2-135M moved off its 4-bit lattice (benchmarks/reference.py).

Every system's row is written to OUT.json (rows {system, metric, value, unit, low, high}) when it is measured, and systems that stand there already
are not measured again (delete the file to start anew; two processes may fill one file, each with systems of its own). Then OUT.png (size against KL),
for each size the best of ours and of the peers of at most that size, and ours of about the same size against each other, window by window.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from compiler import auto
from compiler.bench.peers import environments, python_of
from compiler.checkpoints.resolve import open_checkpoint
from compiler.checkpoints.view import Checkpoint
from compiler.evaluation import decoder
from compiler.evaluation.data import load_rows
from compiler.evaluation.run import ChatFormat
from compiler.evaluation.statistics import cluster_interval
from compiler.quantizers.smooth import smoothed, smoothing
from compiler.quantizers.windows import calibration_set, token_windows
from compiler.record import peak_rss_mb
from compiler.reference import reference_model
from compiler.scheme import Schemes, parse_scheme
from compiler.stages import export as export_stage
from compiler.stages import smooth as smooth_stage
from compiler.stages.keep import codes_for
from compiler.stages.quantize import quantize_matrices, resolve_method
from compiler.stages.tune import resolve_tuning, tune
from compiler.store import Store
from runtimes.metrics import log_softmax
from targets.profile import load_profile

SIZES_MB = (77, 92, 105, 112, 136, 145)
IMATRIX_CHUNKS = 60  # of 512 tokens
LLAMA_TYPES = ("Q4_0", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
WITHOUT_IMATRIX = ("Q8_0",)  # takes none
HALF = decoder.WINDOW // 2
# These run inside the peers' environments: numpy and the peer only.
COMPARE = """
    logits -= logits.max(-1, keepdims=True)
    right = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    kl.append((np.exp(left.astype(np.float64)) * (left - right)).sum(-1))
    same.append(left.argmax(-1) == right.argmax(-1))
print(json.dumps({"kl": np.concatenate(kl).tolist(), "same": np.concatenate(same).tolist()}))
"""
LLAMA = """
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
"""
OPENVINO = """
import json, sys
import numpy as np
import openvino
model, windows, reference, half = sys.argv[1], np.load(sys.argv[2]), np.load(sys.argv[3], mmap_mode="r"), int(sys.argv[4])
request = openvino.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 2}).create_infer_request()
names = {name for port in request.model_inputs for name in port.names}
kl, same = [], []
for window, left in zip(windows, reference):
    request.reset_state()
    feeds = {"input_ids": window[None], "attention_mask": np.ones((1, len(window)), np.int64)}
    feeds |= {"position_ids": np.arange(len(window))[None], "beam_idx": np.zeros(1, np.int32)}
    logits = request.infer({name: value for name, value in feeds.items() if name in names})["logits"][0, half:-1].astype(np.float64)
"""


UNIFORM = (
    *("int4-g64-asym-s16", "int4-g32-asym-s16", "int5-g64-s16", "int5-g32-s16", "int6-g64-s16", "int6-g32-s16"),
    *("int7-g64-s16", "int7-g32-s16", "int8-g64-s16", "int8-g32-s16"),
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


def result(size_mb: float, kl: np.ndarray, same: np.ndarray, windows: int) -> dict[str, Any]:
    groups = np.repeat(np.arange(windows), len(kl) // windows)
    low, high = cluster_interval(kl, groups)
    by_window = kl.reshape(windows, -1).mean(axis=1).tolist()
    return {"file_mb": size_mb, "kl_mean": float(kl.mean()), "low": low, "high": high, "top1_agreement": float(same.mean()), "kl_by_window": by_window}


@dataclass(frozen=True)
class Bench:
    """What all measurements share. rows: what OUT.json holds, filled as systems are measured. smooth: whether ours fold loud inputs into weights first.

    tune_text: what codes and scales are tuned on.
    """

    reference: Reference
    calibration: Path
    tune_text: Path
    method: str
    smooth: bool
    work: Path
    out: Path
    rows: list[dict[str, Any]]

    def add(self, system: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a system unless its row is there, and write the rows: with those that another process has written to OUT.json meanwhile."""
        if any(row["system"] == system for row in self.rows):
            return
        made = measure() | {"system": system}
        self.rows[:] = [*stored_rows(self.out.with_suffix(".json")), made]
        print(json.dumps(self.rows[-1]), file=sys.stderr, flush=True)
        units = {"file_mb": "MB", "kl_mean": "nats", "top1_agreement": "share", "kl_by_window": "nats"}
        flat = []
        for row in self.rows:
            for metric, unit in ((metric, unit) for metric, unit in units.items() if metric in row):
                low, high = (row["low"], row["high"]) if metric == "kl_mean" else (None, None)
                flat.append({"system": row["system"], "metric": metric, "value": row[metric], "unit": unit, "low": low, "high": high})
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.with_suffix(".json").write_text(json.dumps(flat, indent=1) + "\n")

    def checkpoint(self, schemes: Schemes) -> Checkpoint:
        """What is rounded: the model, smoothed where that is asked for, as `quantize.smooth` does."""
        checkpoint = self.reference.checkpoint
        if not self.smooth:
            return checkpoint
        windows = token_windows(calibration_set(self.calibration), checkpoint, smooth_stage.WINDOWS)
        return smoothed(checkpoint, smoothing(checkpoint, windows, schemes, self.method, quiet))

    def uniform(self, scheme: str) -> dict[str, Any]:
        schemes = Schemes(parse_scheme(scheme))
        return self.ours(self.checkpoint(schemes), schemes)

    @cached_property
    def under_auto(self) -> Checkpoint:
        return self.checkpoint(Schemes(parse_scheme(smooth_stage.UNDER_AUTO)))

    def auto(self, size_mb: float, tuned: str | None = None) -> dict[str, Any]:
        """`scheme: auto` for the weights and graph of a size: the limit is that and what is not of the graph, the tokenizer. tuned: `quantize.tune`."""
        checkpoint, rows = self.under_auto, calibration_set(self.calibration)
        step = auto.sensitivity_step({"base": checkpoint.digest}, self.method, rows.digest)
        started = time.perf_counter()
        found = auto.measured_sensitivity(checkpoint, step, rows, Store.default(), quiet)
        print(f"sensitivities: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        assets = sum(len(content) for content in checkpoint.assets.values()) / 1e6
        aimed = size_mb + assets
        for _ in range(auto.ROUNDS):
            chosen = auto.Chooser(checkpoint, found, load_profile("here"), {"size_mb": aimed}).choose()
            print(f"auto, {size_mb:g} MB: {chosen.counts()}; expected KL {chosen.expected['kl_mean']:.4f}", file=sys.stderr, flush=True)
            made = self.ours(self.checkpoint(chosen.schemes), chosen.schemes, tuned)
            if made["file_mb"] <= size_mb:
                break
            aimed -= made["file_mb"] - size_mb + 0.01  # as `compile` chooses again when the check of its size disagrees
        return made

    def ours(self, checkpoint: Checkpoint, schemes: Schemes, tuned: str | None = None) -> dict[str, Any]:
        """Quantize, export, and score the exported graph."""
        text = calibration_set(self.calibration)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            codes, scaled, out = (Path(folder) / part for part in ("codes", "scaled", "out"))
            for part in (codes, scaled, out):
                part.mkdir()
            started = time.perf_counter()
            params = resolve_method(checkpoint, schemes, {"*": self.method}, text)
            if params is not None:
                quantize_matrices(checkpoint, params, text, codes, quiet)
            print(f"quantized in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            if tuned:
                started, text = time.perf_counter(), calibration_set(self.tune_text)
                asked = resolve_tuning(checkpoint, schemes, text, 0, tuned)
                told = tune(checkpoint, asked, codes_for(checkpoint, schemes, codes), text, scaled, Path(folder) / "state", quiet)
                print(f"tuned in {time.perf_counter() - started:.0f} s, {told}; {peak_rss_mb():.0f} MB", file=sys.stderr, flush=True)
            options = export_stage.resolve_options(checkpoint, schemes, None, None)
            export_stage.export(checkpoint, options, out, quiet, scaled if tuned else codes if params else None)
            size = sum(path.stat().st_size for path in out.glob("model.onnx*")) / 1e6
            loop = decoder.open_all_logits(out)
            stored, kl, same = np.load(self.reference.file, mmap_mode="r"), [], []
            for window, left in zip(self.reference.windows, stored, strict=True):
                right = log_softmax(np.asarray(loop.all_logits(window[None]))[0][HALF:-1])
                kl.append((np.exp(left) * (left - right)).sum(axis=-1, dtype=np.float64))
                same.append(left.argmax(-1) == right.argmax(-1))
        return result(size, np.concatenate(kl), np.concatenate(same), len(stored))

    def peer(self, python: Path, program: str, model: Path, size_mb: float) -> dict[str, Any]:
        answer = run([python, "-c", program + COMPARE, model, self.reference.windows_file, self.reference.file, str(HALF)])
        found = json.loads(answer.splitlines()[-1])
        return result(size_mb, np.array(found["kl"]), np.array(found["same"]), len(self.reference.windows))

    def llama(self, python: Path, full: Path, kind: str) -> dict[str, Any]:
        """A type of llama.cpp, quantized here with an importance matrix of the calibration text."""
        tools, matrix, file = environments() / "llama.cpp" / "tools", self.work / "imatrix.gguf", self.work / f"{kind}.gguf"
        if not matrix.is_file():
            run([tools / "llama-imatrix", "-m", full, "-f", self.calibration, "-o", matrix, "-t", "2", "--chunks", str(IMATRIX_CHUNKS)])
        run([tools / "llama-quantize", *([] if kind in WITHOUT_IMATRIX else ["--imatrix", matrix]), full, file, kind, "2"])
        found = self.peer(python, LLAMA, file, file.stat().st_size / 1e6)
        file.unlink()
        return found

    def openvino(self, python: Path, model: Path, form: str) -> dict[str, Any]:
        """A form of optimum-intel's, which takes no calibration: int8, or int4 in groups of 64."""
        out = self.work / f"openvino-{form}"
        groups = ["--group-size", "64", "--ratio", "1.0"] if form == "int4" else []
        words = ["export", "openvino", "--model", model, "--task", "text-generation-with-past", "--weight-format", form, *groups, out]
        run([python, "-m", "optimum.commands.optimum_cli", *words], HF_HUB_OFFLINE="1")
        return self.peer(python, OPENVINO, out / "openvino_model.xml", (out / "openvino_model.bin").stat().st_size / 1e6)


def run(command: Sequence[Any], **environment: str) -> str:
    """stdout of a process. Raises RuntimeError with its last words when it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:5]))} exited {done.returncode}: {done.stderr[-800:]}")
    return done.stdout


def quiet(*_: Any) -> None:
    """No progress."""


def table(rows: Sequence[Mapping[str, Any]], sizes: Sequence[float]) -> str:
    """For each size the best that fits: `auto`, our uniform schemes, the peers; and ours over the peers' (below 1: ours loses less)."""
    kinds = {"auto": lambda name: name.startswith("trimtab auto"), "uniform": lambda name: name.startswith("trimtab ") and "auto" not in name}
    kinds["peers"] = lambda name: not name.startswith("trimtab")
    lines = [f"{'at most':>8}  " + "  ".join(f"{kind:>8} {'MB':>7}" for kind in kinds) + "  ours / peers"]
    for size in sizes:
        fit = [row for row in rows if row["file_mb"] <= size]
        best = [min((row for row in fit if is_one(row["system"])), key=lambda row: row["kl_mean"], default=None) for is_one in kinds.values()]
        shown = [f"{row['kl_mean']:8.4f} {row['file_mb']:7.2f}" if row else f"{'none':>8} {'':7}" for row in best]
        ours = min((row["kl_mean"] for row in best[:2] if row), default=None)
        lines.append(f"{size:8g}  {'  '.join(shown)}  " + (f"{ours / best[2]['kl_mean']:.2f}" if ours is not None and best[2] else ""))
    lines.append("")
    for row in sorted(rows, key=lambda row: row["file_mb"]):
        spread = f"[{row['low']:.4f}, {row['high']:.4f}]"
        lines.append(f"{row['file_mb']:7.2f} MB  KL {row['kl_mean']:.4f} {spread}  top-1 {row['top1_agreement']:.1%}  {row['system']}")
    return "\n".join(lines)


def paired(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tuned against `auto`, and both against uniform schemes, each of at least its size and at most 1 % more: mean difference of the windows' KL (below 0: the
    first loses less), and in how many it does."""
    own = [row for row in rows if row["system"].startswith("trimtab ") and "kl_by_window" in row]
    rank = {row["system"]: ("auto" in row["system"]) + ("tuned" in row["system"]) for row in own}
    lines = []
    for first in own:
        for other in own:
            if rank[other["system"]] >= rank[first["system"]] or not first["file_mb"] <= other["file_mb"] <= 1.01 * first["file_mb"]:
                continue
            difference = np.array(first["kl_by_window"]) - np.array(other["kl_by_window"])
            low, high = cluster_interval(difference, np.arange(len(difference)))
            won = f"lower in {np.mean(difference < 0):.0%} of {len(difference)} windows"
            lines.append(f"{difference.mean():+.5f} [{low:+.5f}, {high:+.5f}]  {won}  {first['system']} against {other['system']}")
    return "\n".join(lines)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as docs/quantization.md has them, by size; `auto` in bold."""
    lines = ["| | MB | mean KL, nats | same top-1 |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row["file_mb"], row["system"])):
        how, _, rest = row["system"].removeprefix("trimtab ").rpartition(", smooth")
        name = row["system"].replace(" imatrix", ", imatrix")
        if how.startswith("auto"):
            tuned, _, size = rest.strip(", ").removeprefix("tuned ").rpartition(" ")[0].rpartition(" ")
            name = f"**`auto`, {size} MB{f', tuned {tuned}' if tuned else ''}**"
        elif how:
            name = f"`{rest.strip()}`, {how}"
        lines.append(f"| {name} | {row['file_mb']:.1f} | {row['kl_mean']:.4f} [{row['low']:.4f}, {row['high']:.4f}] | {100 * row['top1_agreement']:.1f} % |")
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Size against KL, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for colour, label in (("tab:blue", "trimtab auto"), ("tab:cyan", "trimtab"), ("tab:orange", "llama.cpp"), ("tab:green", "OpenVINO")):
        auto_row = "trimtab auto"
        mine = [row for row in rows if row["system"].startswith(label) and (label == auto_row or not row["system"].startswith(auto_row))]
        points = sorted((row["file_mb"], row["kl_mean"], row["system"]) for row in mine)
        if points:
            axes.plot([point[0] for point in points], [point[1] for point in points], "o-", color=colour, label=label)
            for size, kl, name in points:
                axes.annotate(name.split(",")[0].removeprefix(label).strip(), (size, kl), fontsize=7, xytext=(3, 4), textcoords="offset points")
    axes.set(yscale="log", xlabel="file, MB", ylabel="mean KL to the fp32 reference, nats")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def stored_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run, as `result` gives them."""
    rows: dict[str, dict[str, Any]] = {}
    for one in json.loads(file.read_text()) if file.is_file() else []:
        row = rows.setdefault(one["system"], {"system": one["system"]})
        row[one["metric"]] = one["value"]
        if one["low"] is not None:
            row |= {"low": one["low"], "high": one["high"]}
    return list(rows.values())


def halves(text: Path, work: Path) -> tuple[Path, Path]:
    """The two halves of a text, cut at a line."""
    lines = text.read_text().splitlines(keepends=True)
    scored, other = work / "scored.txt", work / "calibration.txt"
    scored.write_text("".join(lines[: len(lines) // 2]))
    other.write_text("".join(lines[len(lines) // 2 :]))
    return scored, other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="plain text that is scored")
    parser.add_argument("--calibration", type=Path, help="other plain text, for our calibration and llama.cpp's importance matrix")
    parser.add_argument("--model", type=Path, help="the fp32 reference as a Hugging Face folder")
    parser.add_argument("--gguf", type=Path, help="the same weights as a float32 GGUF, for llama.cpp")
    parser.add_argument("--peers", nargs="*", choices=("llama.cpp", "openvino"), default=("llama.cpp", "openvino"))
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--smooth", action=argparse.BooleanOptionalAction, default=True, help="fold loud inputs into weights first")
    parser.add_argument("--uniform", nargs="*", default=UNIFORM, help="our uniform schemes")
    parser.add_argument("--sizes", type=float, nargs="*", default=SIZES_MB, help="sizes in MB for scheme: auto")
    parser.add_argument("--tuned", type=float, nargs="*", default=(), help="sizes in MB for scheme: auto with --tune")
    parser.add_argument("--tune", choices=("codes", "scales"), default="codes", help="quantize.tune of --tuned")
    parser.add_argument("--tune-text", type=Path, help="plain text to tune on; the calibration text if not given")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy"))
    parser.add_argument("--markdown", action="store_true", help="measure nothing: print the rows that stand in OUT.json as the docs have them")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(stored_rows(arguments.out.with_suffix(".json"))))
        return
    if arguments.text is None:
        parser.error("--text is needed")
    if arguments.model is None:
        arguments.model = environments() / "models" / "smollm2-dithered"
        arguments.gguf = arguments.model.with_name(f"{arguments.model.name}-f32.gguf")
        subprocess.run([sys.executable, str(Path(__file__).with_name("reference.py")), "--out", str(arguments.model)], check=True)
    if "llama.cpp" in arguments.peers and arguments.gguf is None:
        parser.error("llama.cpp needs --gguf: the weights of --model as a float32 GGUF (its convert_hf_to_gguf.py writes one)")
    pythons = {peer: python_of(peer) for peer in arguments.peers}
    with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
        work = Path(folder)
        scored, calibration = (arguments.text, arguments.calibration) if arguments.calibration else halves(arguments.text, work)
        if scored.read_bytes() == calibration.read_bytes():
            parser.error("scored and calibration text are the same")
        reference = make_reference(open_checkpoint(str(arguments.model)), scored, arguments.windows, work)
        stored = stored_rows(arguments.out.with_suffix(".json"))
        bench = Bench(reference, calibration, arguments.tune_text or calibration, arguments.method, arguments.smooth, work, arguments.out, stored)
        how = f"{bench.method}{', smooth' if bench.smooth else ''}"
        for size in arguments.sizes:
            bench.add(f"trimtab auto {how} {size:g} MB", lambda size=size: bench.auto(size))
        for size in arguments.tuned:
            bench.add(f"trimtab auto {how}, tuned {arguments.tune} {size:g} MB", lambda size=size: bench.auto(size, arguments.tune))
        for kind in LLAMA_TYPES if "llama.cpp" in pythons else ():
            name = f"llama.cpp {kind}" + ("" if kind in WITHOUT_IMATRIX else " imatrix")
            bench.add(name, lambda kind=kind: bench.llama(pythons["llama.cpp"], arguments.gguf, kind))
        for form in ("int8", "int4") if "openvino" in pythons else ():
            bench.add(f"OpenVINO {form}", lambda form=form: bench.openvino(pythons["openvino"], arguments.model, form))
        for scheme in arguments.uniform:
            bench.add(f"trimtab {how} {scheme}", lambda scheme=scheme: bench.uniform(scheme))
    plot(bench.rows, arguments.out.with_suffix(".png"))
    print(table(bench.rows, SIZES_MB))
    print(paired(bench.rows))


if __name__ == "__main__":
    main()
