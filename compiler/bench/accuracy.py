"""How far each system is from eager transformers in float32 on the same weights and the same tokens.

Decoders: windows of 512 tokens of the built-in text, second halves scored: mean KL (nats) and agreement of the most likely token, 95 % intervals over
windows. Encoders: cosine of sentence vectors, mean and least. Each system answers in a process of its own; logits travel through a file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compiler.bench.child import Child
from compiler.bench.peers import System
from compiler.bench.rounds import Entrant, Setting
from compiler.bench.rows import Row
from compiler.evaluation.decoder import MAX_WINDOWS, WINDOW
from compiler.evaluation.statistics import cluster_interval
from runtimes.metrics import log_softmax

TEXTS, TEXT_TOKENS = 64, 64
Say = Callable[[str], None]


def accuracy(entrants: Sequence[Entrant], checkpoint: Path, setting: Setting, kind: str, say: Say) -> list[Row]:
    """Rows of the accuracy metrics of every system. Raises BenchError when a system fails."""
    eager = System("torch eager", "torch", kind, "torch_model.py", "", "checkpoint")
    measure = _decoders if kind == "decoder" else _encoders
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as folder:
        return measure(entrants, Entrant(eager, checkpoint), setting, Path(folder), say)


def _decoders(entrants: Sequence[Entrant], eager: Entrant, setting: Setting, folder: Path, say: Say) -> list[Row]:
    count = min(MAX_WINDOWS, len(setting.text) // WINDOW)
    windows = [list(setting.text[at * WINDOW : (at + 1) * WINDOW]) for at in range(count)]
    references = _logits(eager, windows, setting, folder, "reference")
    rows: list[Row] = []
    for entrant in entrants:
        say(f"accuracy of {entrant.system.name}")
        found = _logits(entrant, windows, setting, folder, "system")
        kl, same, groups = [], [], []
        for number, (theirs, true) in enumerate(zip(found, references, strict=True)):
            left, right = log_softmax(np.load(true)), log_softmax(np.load(theirs))
            kl.append((np.exp(left) * (left - right)).sum(axis=-1, dtype=np.float64))
            same.append((left.argmax(-1) == right.argmax(-1)).astype(float))
            groups.append(np.full(len(left), number))
        for metric, unit, values in (("kl_mean", "nats", kl), ("top1_agreement", "share", same)):
            joined, places = np.concatenate(values), np.concatenate(groups)
            low, high = cluster_interval(joined, places)
            rows.append(_row(entrant, metric, unit, float(joined.mean()), low, high, len(joined)))
    return rows


def _logits(entrant: Entrant, windows: Sequence[list[int]], setting: Setting, folder: Path, prefix: str) -> list[Path]:
    """Files [tokens scored, vocab], one per window."""
    files = [folder / f"{prefix}-{number}.npy" for number in range(len(windows))]
    with Child(entrant.system) as child:
        child.load(entrant.model, setting.threads, WINDOW)
        for window, file in zip(windows, files, strict=True):
            child.ask("logits", ids=window, first=WINDOW // 2 - 1, out=str(file))
    return files


def _encoders(entrants: Sequence[Entrant], eager: Entrant, setting: Setting, folder: Path, say: Say) -> list[Row]:
    batch = [setting.prompt(TEXT_TOKENS, place) for place in range(TEXTS)]
    rows: list[Row] = []
    vectors: dict[str, Any] = {}
    for entrant in (eager, *entrants):
        say(f"accuracy of {entrant.system.name}")
        with Child(entrant.system) as child:
            child.load(entrant.model, setting.threads, TEXTS * TEXT_TOKENS)
            child.ask("encode", ids=batch, seconds=0.001, out=str(folder / "vectors.npy"))
        true = vectors.setdefault("reference", np.load(folder / "vectors.npy"))
        cosines = (true * np.load(folder / "vectors.npy")).sum(axis=1) if len(vectors) else None
        if entrant is not eager and cosines is not None:
            low, high = cluster_interval(cosines, np.arange(TEXTS))
            rows.append(_row(entrant, "cosine_mean", "cosine", float(cosines.mean()), low, high, TEXTS))
            rows.append(_row(entrant, "cosine_min", "cosine", float(cosines.min()), None, None, TEXTS))
    return rows


def _row(entrant: Entrant, metric: str, unit: str, value: float, low: float | None, high: float | None, samples: int) -> Row:
    return {"system": entrant.system.name, "metric": metric, "value": value, "unit": unit, "low": low, "high": high, "samples": samples}
