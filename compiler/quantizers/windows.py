"""Calibration data: rows of text or chats to token windows of one length."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import numpy as np

from compiler.checkpoints.view import Checkpoint
from compiler.errors import RecipeError
from compiler.evaluation.data import EvaluationSet, Row, load_rows

WINDOW = 512  # tokens
WINDOWS = 32  # at most; 16k tokens already fix a second moment of 1536 inputs within the damping


def calibration_set(path: Path | None, place: str = "quantize.calibration") -> EvaluationSet:
    """Rows to calibrate on: a file (text, or JSONL of chats or texts), or the built-in set. Raises RecipeError as `load_rows` does.

    The built-in set is other text than the built-in evaluation text: a score on what was calibrated on would flatter.
    """
    if path is not None:
        return load_rows(path, place=place)
    data = resources.files("compiler").joinpath("data/calibration.txt").read_bytes()
    return EvaluationSet((Row(text=data.decode()),), hashlib.sha256(data).hexdigest(), "builtin")


def unscored_rows(path: Path | None, scored: int | None) -> tuple[EvaluationSet, str]:
    """`calibration: recipe`: the rows of the evaluation's file beyond the first `scored`, and "" or what to tell the user.

    Of 100 rows with 60 scored the last 40. None scored is all: then all rows, and the score flatters. Raises RecipeError without a file of the recipe's own.
    """
    if path is None:
        raise RecipeError("quantize.calibration", expected="evaluate.data to calibrate on", found="the built-in text, which is scored", remedy="choose builtin")
    whole = load_rows(path, place="evaluate.data")
    rest = whole.rows[scored:] if scored else ()
    if not rest:
        return whole, "calibrated on the rows that are scored, which flatters the scores; evaluate.limit_rows would leave some for calibration alone"
    return EvaluationSet(tuple(rest), hashlib.sha256(f"{whole.digest}|from {scored}".encode()).hexdigest(), whole.origin), ""


def token_windows(rows: EvaluationSet, checkpoint: Checkpoint, count: int = WINDOWS, length: int = WINDOW) -> np.ndarray:
    """int64 [at most count, at most length]: all rows tokenized (chats in full, as the template writes them), joined by the end token, cut, thinned evenly.

    Raises RecipeError when there is less than one window of 64 tokens, or for chats without a template.
    """
    from compiler.evaluation.run import ChatFormat

    chat = ChatFormat(checkpoint)
    render, ids = chat.render, []
    for row in rows.rows:
        if row.messages is not None and render is None:
            raise RecipeError("quantize.calibration", expected="plain text", found="chats, and a model without a chat template", remedy="give rows of {text}")
        text = row.text if row.messages is None or render is None else render(row.messages, add_generation_prompt=False)
        ids += [*chat.tokenizer.encode(text or "", add_special_tokens=False).ids, *chat.eos_ids[:1]]
    length = min(length, len(ids), int(checkpoint.config.get("max_position_embeddings") or length))
    if length < 64:
        raise RecipeError("quantize.calibration", expected="at least 64 tokens of text", found=f"{length}", remedy="give more text", code="DATA_EMPTY")
    windows = np.array(ids[: len(ids) // length * length], np.int64).reshape(-1, length)
    return windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int)]
