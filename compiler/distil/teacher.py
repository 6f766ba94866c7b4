"""What the teacher says, asked once: arrays in files of their own, by number, under a folder that belongs to one teacher on one data set.

Written beside and renamed, so a file is there whole or not at all; a run that was killed finds what it had asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compiler.store import writing

Ask = Callable[[int], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Answers:
    """`of(3)`: from the folder, or asked now and kept. ask: number -> arrays by name."""

    folder: Path
    ask: Ask

    def of(self, number: int) -> dict[str, np.ndarray]:
        """Raises OutputError where an answer cannot be kept."""
        file = self.folder / f"{number:06d}.npz"
        if file.is_file():
            try:
                with np.load(file) as stored:
                    return {name: stored[name] for name in stored.files}
            except (OSError, ValueError, EOFError):  # a disk that failed: ask again
                file.unlink(missing_ok=True)
        told = self.ask(number)
        with writing(file):
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = file.with_suffix(".writing.npz")
            np.savez(beside, **told)  # type: ignore[arg-type]  # numpy's own `allow_pickle` is not among the names
            beside.rename(file)
        return told


def top(logits: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """[n, classes] -> the `count` likeliest: ids int32 [n, count], log-probabilities float16, and what all others have together, float32 [n]."""
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argpartition(-log_p, count - 1, axis=-1)[:, :count].astype(np.int32)
    kept = np.take_along_axis(log_p, ids, axis=-1)
    rest = np.clip(1 - np.exp(kept).sum(-1), 1e-9, 1)
    return {"ids": ids, "log_p": kept.astype(np.float16), "log_rest": np.log(rest).astype(np.float32)}
