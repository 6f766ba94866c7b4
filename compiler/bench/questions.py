"""What is asked of each system, and which metrics an answer gives: rows of data.

decode_tok_s@C   tokens a second over NEW - 1 tokens after a prompt of C tokens (1 token for @0) and a first token
prefill_tok_s@C  prompt tokens a second: C / time to the first token
ttft_ms@C        time to the first token of a prompt of C tokens
encode_ms@BxL    one batch of B texts of L tokens each, without padding; the median of a few calls
load_s           from the imported library to a model that answers, files in the system's cache
peak_rss_mb      VmHWM of a fresh process that loaded the model and answered one question: all resident pages, also those of mapped files. What counts.
anonymous_mb     of what is resident after that answer, pages that only this process can hold; file_mb_mapped: pages of mapped files, which the system may drop
runtime_mb       resident before the model was loaded: the interpreter and the peer's libraries
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compiler.errors import BenchError

CONTEXTS = (0, 512, 2048)
BATCHES = ((1, 32), (1, 128), (8, 128), (32, 256))
NEW = 64
UNITS = {"tok_s": "tok/s", "ms": "ms", "s": "s", "mb": "MB"}
HIGHER = ("decode_tok_s", "prefill_tok_s", "top1_agreement", "cosine")
FRESH = "fresh"


def unit_of(metric: str) -> str:
    """tok/s, ms, s or MB, from the metric's last word. `decode_tok_s@512` -> tok/s"""
    name = metric.split("@")[0]
    return next(unit for ending, unit in UNITS.items() if name.endswith(ending))


def higher_is_better(metric: str) -> bool:
    return metric.startswith(HIGHER)


@dataclass(frozen=True)
class Question:
    """One turn of one system. context >= 0: a prompt; else batch x length texts. fresh: in a new process, for load time and memory."""

    context: int = -1
    batch: int = 0
    length: int = 0
    fresh: bool = False

    @property
    def name(self) -> str:
        return FRESH if self.fresh else str(self.context) if self.context >= 0 else f"{self.batch}x{self.length}"


def questions(kind: str, only: Sequence[str], longest: int) -> list[Question]:
    """All questions for a kind of model, or those that `only` names ("0", "512", "8x128", "fresh"); longer ones than the model takes are left out.

    Raises BenchError for a name that is none.
    """
    if kind == "decoder":
        rows = [Question(context=context) for context in CONTEXTS if context + NEW <= longest]
        rows.append(Question(context=min(512, longest - NEW), fresh=True))
    else:
        rows = [Question(batch=batch, length=length) for batch, length in BATCHES if length <= longest]
        rows.append(Question(batch=8, length=min(128, longest), fresh=True))
    names = [row.name for row in rows]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise BenchError("--only", expected=f"one of {', '.join(names)} for this model", found=unknown[0], remedy="change the option")
    return [row for row in rows if not only or row.name in only]


def metrics(question: Question, answer: dict[str, Any]) -> dict[str, float]:
    """Metric -> value of a live answer. {"first_s": 1.0, "rest_s": 0.63} at 512 -> decode 100 tok/s, prefill 512 tok/s, TTFT 1000 ms."""
    if question.context < 0:
        seconds = sorted(answer["seconds"])
        return {f"encode_ms@{question.name}": 1e3 * seconds[len(seconds) // 2]}
    found = {f"decode_tok_s@{question.context}": (NEW - 1) / answer["rest_s"]}
    if question.context:
        found[f"prefill_tok_s@{question.context}"] = question.context / answer["first_s"]
        found[f"ttft_ms@{question.context}"] = 1e3 * answer["first_s"]
    return found


def fresh_metrics(loaded: dict[str, Any], after: dict[str, float]) -> dict[str, float]:
    """Metric -> value of a fresh process: its load answer and its memory after one question."""
    found = {"load_s": loaded["load_s"]}
    if after:
        found |= {"peak_rss_mb": after["peak"], "anonymous_mb": after["anonymous"], "mapped_file_mb": after["file"]}
        found["runtime_mb"] = loaded["before"]["resident"]
    return found
