"""Merge and save: trimtab beside PEFT on SmolLM2-135M, and trimtab's memory on synthetic llamas of 0.3 and 1.1 billion parameters, merged and built to int4.

    python benchmarks/merge.py [--repeats 3] [--only peft|sizes] [--out benchmarks/results/merge.json]

--only runs a piece: `peft` the two systems on SmolLM2, `sizes` the synthetic models; rows of the other piece stay in the file as they were measured.
A LoRA of rank 16 on all linears with random factors (cost does not depend on values), float32 for SmolLM2, bf16 for the
synthetic models. Processes are taken in turn; seconds are wall clock, memory is the peak resident size.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from builders import BASE, PEFT, timed
from safetensors.numpy import save_file

from compiler.checkpoints.resolve import open_checkpoint
from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.checkpoints.write import write_checkpoint

RANK = 16
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Sizes:
    """A llama with an untied head."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000


SYNTHETIC = {"0.3 B": Sizes(1024, 2816, 20, 16, 4), "1.1 B": Sizes(2048, 5632, 22, 32, 4)}


def shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of its tensors."""
    hidden, inner = sizes.hidden, sizes.inner
    kv = hidden // sizes.heads * sizes.kv_heads
    linear = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden), "gate": (inner, hidden), "up": (inner, hidden)}
    yield "model.embed_tokens.weight", (sizes.vocabulary, hidden)
    for layer in range(sizes.layers):
        for module in LINEARS:
            part = module.split(".")[1].removesuffix("_proj")
            yield f"model.layers.{layer}.{module}.weight", linear.get(part, (hidden, inner))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (sizes.vocabulary, hidden)


def synthetic(folder: Path, sizes: Sizes) -> None:
    """A bf16 llama of random weights, written block by block."""

    def view(name: str, shape: tuple[int, ...]) -> TensorView:
        def rows(start: int, stop: int) -> np.ndarray:
            return np.random.default_rng([len(name), start]).standard_normal((stop - start, *shape[1:]), np.float32) * np.float32(0.02)

        return TensorView(name, shape, "BF16", rows)

    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": sizes.vocabulary, "hidden_size": sizes.hidden}
    config |= {"intermediate_size": sizes.inner, "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads}
    config |= {"num_key_value_heads": sizes.kv_heads, "tie_word_embeddings": False}
    tensors = {name: view(name, shape) for name, shape in shapes(sizes)}
    write_checkpoint(Checkpoint(tensors, config, {}, "synthetic", lambda: "synthetic"), folder, dtype="BF16")


def adapter(folder: Path, base: Checkpoint) -> None:
    """A LoRA on all linears of a llama, as PEFT writes it."""
    rng, tensors = np.random.default_rng(0), {}
    for name, view in base.tensors.items():
        if any(module in name for module in LINEARS):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((RANK, view.shape[1]), np.float32) * np.float32(0.02)
            tensors[f"{stem}.lora_B.weight"] = rng.standard_normal((view.shape[0], RANK), np.float32) * np.float32(0.02)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": [module.split(".")[1] for module in LINEARS]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM", "bias": "none", "base_model_name_or_path": "base"}))


def commands(work: Path, only: str | None) -> dict[str, list[str]]:
    """system -> command, its models and adapters written."""
    models: list[str] = []
    made = {}
    if only != "sizes":
        write_checkpoint(open_checkpoint(BASE), work / "smollm2", dtype="F32")
        models.append("smollm2")
        made["PEFT merge and save"] = [sys.executable, "-c", PEFT, str(work / "smollm2"), str(work / "smollm2-lora"), str(work / "out")]
    if only != "peft":
        base = open_checkpoint(BASE)
        for name, sizes in SYNTHETIC.items():
            synthetic(work / name, replace(sizes, vocabulary=int(base.config["vocab_size"])))
            for asset in ("tokenizer.json", "tokenizer_config.json"):  # an export wants one
                (work / name / asset).write_bytes(base.assets[asset])
            models.append(name)
    for name in models:
        adapter(work / f"{name}-lora", open_checkpoint(str(work / name)))
        merge = [sys.executable, "-m", "compiler", "merge", str(work / name), "--delta", str(work / f"{name}-lora"), "--out", str(work / "out")]
        made[f"trimtab merge {name}"] = merge
        if name in SYNTHETIC:
            made[f"trimtab build {name} int4-g64"] = [*merge[:3], "export", *merge[4:], "--scheme", "int4-g64"]
    return made


def measure(work: Path, repeats: int, only: str | None) -> list[dict[str, Any]]:
    """Rows of the piece."""
    costs: dict[str, list[tuple[float, float]]] = {}
    made = commands(work, only)
    for _ in range(repeats):
        for name, command in made.items():
            shutil.rmtree(work / "out", ignore_errors=True)
            costs.setdefault(name, []).append(timed(command))
    rows = []
    for name, values in costs.items():
        what = "build" if " build " in name else "merge"
        for metric, unit, series in (("s", "s", [cost[0] for cost in values]), ("peak_rss", "MB", [cost[1] for cost in values])):
            rows.append(
                {"system": name, "metric": f"{what}_{metric}", "value": statistics.median(series), "unit": unit, "low": min(series), "high": max(series)}
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("peft", "sizes"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/merge.json"))
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="merge-"))
    try:
        rows = measure(work, arguments.repeats, arguments.only)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if arguments.only and arguments.out.is_file():
        measured = {row["system"] for row in rows}
        rows = [row for row in json.loads(arguments.out.read_text()) if row["system"] not in measured] + rows
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(f"{row['system']:28s} {row['metric']:16s} {row['value']:10.4g} {row['unit']}  [{row['low']:.4g}, {row['high']:.4g}]")


if __name__ == "__main__":
    main()
