"""Evaluation rows: plain text, chats with an expected answer, labelled texts, choices, completions, pairs of sentences.

JSONL, one object a line; a row of `FORMS` each:
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}   scored on the last message
    {"text": ..., "label": ...}                                                                classification
    {"text": ...}                                                                              language modelling, or sentences
    {"context": ..., "choices": [...], "answer": 1}                                            multiple choice, by log-likelihood
    {"question": ..., "choices": {"text": [...], "label": ["A", ...]}, "answerKey": "B"}       as ARC has it (or "question": {"stem", "choices"})
    {"query": ..., "choices": [...], "gold": 1}                                                the same as MosaicML's gauntlet writes it
    {"question": ..., "choice0": ..., "choice1": ..., "label": 1}                              the same as JCommonsenseQA writes it
    {"context": ..., "continuation": ...}                                                      LAMBADA: every token must be the most likely one
    {"sentence1": ..., "sentence2": ..., "score": 3.5}                                         similarity (`label` in place of `score`, too)
Any other file is read as one plain text.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from compiler.errors import RecipeError

ROW_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Row:
    """One evaluation row: one of `text`, `messages`, `pair` and `context`; a context has `choices` or a `continuation`.

    gold   place of the right choice
    score  how alike people found both texts of a pair
    raw    the object as it was written, for metrics of the user's own
    """

    text: str | None = None
    messages: Sequence[Mapping[str, str]] | None = None
    label: str | None = None
    context: str | None = None
    choices: Sequence[str] = ()
    gold: int = 0
    continuation: str = ""
    pair: tuple[str, str] | None = None
    score: float = 0.0
    raw: Mapping[str, Any] = field(default_factory=dict)

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
        expected = '{"messages": [...]}, {"text": ..., "label": ...} or another form'
        return RecipeError(place, expected=expected, found=found, remedy="see docs/evaluation.md", code="DATA_TEXT")

    if len(line) > ROW_LIMIT_BYTES:
        raise bad(f"a line of {len(line)} characters")
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise bad("no JSON") from error
    if not isinstance(value, dict):
        raise bad(type(value).__name__)
    read = next((read for keys, read in FORMS if keys <= set(value)), None)
    if read is None:
        raise bad(f"keys {sorted(value)}")
    try:
        return replace(read(value), raw=value)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise bad(str(error) if type(error) is ValueError else f"keys {sorted(value)} with values of another type") from error


def _chat(value: Mapping[str, Any]) -> Row:
    messages = value["messages"]
    if not (isinstance(messages, list) and len(messages) >= 2 and all(_is_message(item) for item in messages)):
        raise ValueError("messages without role and content, or fewer than two")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"a last message of role {messages[-1]['role']!r}")
    return Row(messages=tuple(messages))


def _text(value: Mapping[str, Any]) -> Row:
    label = value.get("label")
    return Row(text=_string(value["text"]), label=None if label is None else str(label))


def _choice(context: str, choices: Sequence[Any], gold: int) -> Row:
    if len(choices) < 2 or isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"{len(choices)} choices and answer {gold!r}")
    return Row(context=context, choices=tuple(_string(choice) for choice in choices), gold=gold)


def _arc(value: Mapping[str, Any]) -> Row:
    """ARC as its authors publish it (question with stem and choices), or with choices as two lists."""
    question = value["question"]
    if isinstance(question, dict):
        choices = question["choices"]
        texts, labels, stem = [one["text"] for one in choices], [one["label"] for one in choices], question["stem"]
    else:
        texts, labels, stem = value["choices"]["text"], value["choices"]["label"], question
    if value["answerKey"] not in labels:
        raise ValueError(f"answerKey {value['answerKey']!r} among {labels}")
    return _choice(_asked(stem), texts, labels.index(value["answerKey"]))


def _numbered(value: Mapping[str, Any]) -> Row:
    choices = [value[f"choice{number}"] for number in range(len(value)) if f"choice{number}" in value]
    return _choice(_asked(value["question"]), choices, value["label"])


def _asked(question: Any) -> str:
    """A bare question as a prompt: the form of the ARC task in EleutherAI's lm-evaluation-harness."""
    return f"Question: {_string(question)}\nAnswer:"


def _completion(value: Mapping[str, Any]) -> Row:
    if not _string(value["continuation"]).strip():
        raise ValueError("an empty continuation")
    return Row(context=_string(value["context"]), continuation=value["continuation"])


def _pair(value: Mapping[str, Any]) -> Row:
    score = float(value["score"] if "score" in value else value["label"])
    if not math.isfinite(score):
        raise ValueError(f"score {score}")
    return Row(pair=(_string(value["sentence1"]), _string(value["sentence2"])), score=score)


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    return value


# Keys that a row must have, and what reads it; the first that fits.
FORMS: tuple[tuple[set[str], Callable[[Mapping[str, Any]], Row]], ...] = (
    ({"messages"}, _chat),
    ({"question", "answerKey"}, _arc),
    ({"query", "choices", "gold"}, lambda value: _choice(f"{_string(value['query'])}\nAnswer:", value["choices"], value["gold"])),
    ({"question", "choice0", "label"}, _numbered),
    ({"context", "choices", "answer"}, lambda value: _choice(_string(value["context"]), value["choices"], value["answer"])),
    ({"context", "continuation"}, _completion),
    ({"sentence1", "sentence2", "score"}, _pair),
    ({"sentence1", "sentence2", "label"}, _pair),
    ({"text"}, _text),
)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
