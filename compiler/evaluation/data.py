"""Evaluation rows: plain text, chats with an expected answer, or labelled texts.

JSONL, one object a line:
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}   scored on the last message
    {"text": ..., "label": ...}                                                                classification
    {"text": ...}                                                                              language modelling, or sentences
Any other file is read as one plain text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from compiler.errors import RecipeError

ROW_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Row:
    """One evaluation row; exactly one of `messages` and `text` is set."""

    text: str | None = None
    messages: Sequence[Mapping[str, str]] | None = None
    label: str | None = None

    @property
    def answer(self) -> str:
        """The expected last message of a chat."""
        return self.messages[-1]["content"] if self.messages else ""


@dataclass(frozen=True)
class EvaluationSet:
    """Rows and the digest of the file they came from."""

    rows: Sequence[Row]
    digest: str
    origin: str


def builtin_text() -> bytes:
    """The text that evaluates a decoder when the recipe names no data; written for this project."""
    return resources.files("compiler").joinpath("data/builtin.txt").read_bytes()


def load_rows(path: Path | None, limit: int | None = None, place: str = "evaluate.data") -> EvaluationSet:
    """Rows of a file, or of the built-in text. Raises RecipeError with the line of the first bad row."""
    if path is None:
        data, origin = builtin_text(), "builtin"
    else:
        try:
            data, origin = path.read_bytes(), path.name
        except OSError as error:
            raise RecipeError(f"{place}: {path}", expected="a readable file", found=error.strerror or "an error", remedy="check the path") from error
    digest = hashlib.sha256(data + f"|{limit}".encode()).hexdigest()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{place}: {path}", expected="UTF-8 text", found=f"a bad byte at {error.start}", remedy="convert it", code="DATA_TEXT") from error
    if path is None or path.suffix not in (".jsonl", ".json"):
        return EvaluationSet((Row(text=text),), digest, origin)
    rows = [_row(line, f"{path.name}:{number}") for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not rows:
        raise RecipeError(f"{place}: {path}", expected="at least one row", found="none", remedy="write one JSON object a line", code="DATA_EMPTY")
    return EvaluationSet(tuple(rows[:limit]), digest, origin)


def _row(line: str, place: str) -> Row:
    def bad(found: str) -> RecipeError:
        return RecipeError(place, expected='{"messages": [...]} or {"text": ..., "label": ...}', found=found, remedy="see docs/evaluation.md", code="DATA_TEXT")

    if len(line) > ROW_LIMIT_BYTES:
        raise bad(f"a line of {len(line)} characters")
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise bad("no JSON") from error
    if not isinstance(value, dict):
        raise bad(type(value).__name__)
    messages = value.get("messages")
    if messages is not None:
        if not (isinstance(messages, list) and len(messages) >= 2 and all(_is_message(item) for item in messages)):
            raise bad("messages without role and content, or fewer than two")
        if messages[-1]["role"] != "assistant":
            raise bad(f"a last message of role {messages[-1]['role']!r}")
        return Row(messages=tuple(messages))
    if not isinstance(value.get("text"), str):
        raise bad(f"keys {sorted(value)}")
    label = value.get("label")
    return Row(text=value["text"], label=None if label is None else str(label))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
