"""What a student is asked, and what it should have said: `TokenLesson` for decoders, `TextLesson` for encoders. Training (`training`) knows neither.

A lesson is a number of items (windows of tokens, texts), of which some are held out: every HELD-th, at most MOST_HELD of them. `learn` adds gradients of the
objectives over some items; `held_loss` is what the student is judged by, the same whatever the objectives: mean KL to the teacher in nats a token (decoders,
classifiers), 1 - mean cosine to its vectors (encoders).

Only the student is rounded where training runs under autocast: the teacher answers in float32 (`exact`), and losses are of float32 logits.

Logits exist for CHUNK tokens at a time: 256 x 49,152 x 4 bytes are 50 MB, a few times over. The teacher's last states are kept (float16 [length, width]), from
which its logits are made again where they are needed; or, with top_k, its likeliest tokens alone, which is a tenth of that for a wide model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from compiler.checkpoints.view import Checkpoint
from compiler.distil.objectives import OBJECTIVES, STATES, distribution_loss, hidden, kl, relations, vector_loss
from compiler.distil.teacher import Answers, top
from compiler.reference import reference_model

HELD = 8
MOST_HELD = 16  # windows
MOST_HELD_TEXTS = 512
CHUNK = 256  # tokens
BLOCK = 64  # texts whose vectors are kept in one file


def exact() -> Any:
    """Without the autocast of training."""
    return torch.autocast("cpu", enabled=False)


class Lesson(Protocol):
    """Items by number. measure: what `held_loss` is, with its unit. lengths: tokens of each item, none where all are alike."""

    trained: Sequence[int]
    held: Sequence[int]
    measure: str
    lengths: Sequence[int]

    def learn(self, student: Any, places: Sequence[int]) -> float:
        """Mean loss over some items; its gradients are added."""
        ...

    def held_loss(self, student: Any) -> float:
        """What the student is judged by."""
        ...


def split(count: int, most: int) -> tuple[list[int], list[int]]:
    """(trained, held out) of `count` items: every HELD-th is held out, from the middle of its stretch; at most `most`, evenly. 16 -> [4, 12] held."""
    held = list(range(HELD // 2, count, HELD))
    if len(held) > most:
        held = [held[place] for place in np.linspace(0, len(held) - 1, most).round().astype(int)]
    kept = set(held)
    return [place for place in range(count) if place not in kept], held


@dataclass
class TokenLesson:
    """Windows of tokens int64 [count, length] for a decoder. weights: objective -> its share. top_k: 0 for whole distributions."""

    teacher: Checkpoint
    windows: np.ndarray
    weights: Mapping[str, float]
    folder: Path
    temperature: float = 1.0
    top_k: int = 0
    measure: str = "KL to the teacher, nats a token"
    lengths: Sequence[int] = ()
    trained: Sequence[int] = field(init=False)
    held: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        self.trained, self.held = split(len(self.windows), MOST_HELD)
        self.answers = Answers(self.folder, self._ask)

    @cached_property
    def model(self) -> Any:
        return reference_model(self.teacher, "text-generation")

    @cached_property
    def head(self) -> Any:
        """The teacher's head: what makes logits of kept states."""
        return self.model.lm_head

    def _ask(self, place: int) -> dict[str, np.ndarray]:
        with torch.inference_mode(), exact():
            states = self.model.model(input_ids=torch.from_numpy(self.windows[place])[None]).last_hidden_state[0]
            if not self.top_k:
                return {"states": states.half().numpy()}
            parts = [top(self.finished(self.head(chunk)).numpy(), self.top_k) for chunk in states.split(CHUNK)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def finished(self, logits: Any) -> Any:
        """What a family does to its logits after the head."""
        logits, scaling, cap = logits.float(), self.teacher.config.get("logits_scaling") or 1.0, self.teacher.config.get("final_logit_softcapping")
        logits = logits if scaling == 1 else logits / float(scaling)  # 50 MB are divided only for a reason
        return logits if not cap else cap * torch.tanh(logits / cap)

    def learn(self, student: Any, places: Sequence[int]) -> float:
        total = 0.0
        for place in places:
            ids = torch.from_numpy(self.windows[place])
            states = student.model(input_ids=ids[None]).last_hidden_state[0]
            inputs = states.detach().requires_grad_()
            for start in range(0, len(ids), CHUNK):
                mine = self.finished(student.lm_head(inputs[start : start + CHUNK]))
                loss = self._loss(place, start, mine, ids[start + 1 : start + 1 + len(mine)]) / (len(ids) * len(places))
                loss.backward()
                total += float(loss.detach())
            states.backward(inputs.grad)
        return total

    def _loss(self, place: int, start: int, mine: Any, next_ids: Any) -> Any:
        told = self._told(place, start)
        if not self.top_k:
            return distribution_loss(self.weights, told, mine, next_ids, self.temperature)
        shares = {name: weight for name, weight in self.weights.items() if name == "cross-entropy"}
        return distribution_loss(shares, None, mine, next_ids, 1.0) + self.weights.get("kl", 0.0) * top_kl(told, mine).sum()

    def _told(self, place: int, start: int) -> Any:
        """What the teacher says of CHUNK tokens: logits, or its likeliest tokens."""
        kept = self.answers.of(place)
        if self.top_k:
            return {name: torch.from_numpy(value[start : start + CHUNK]) for name, value in kept.items()}
        with torch.no_grad(), exact():
            return self.finished(self.head(torch.from_numpy(kept["states"][start : start + CHUNK]).float()))

    def held_loss(self, student: Any) -> float:
        total = []
        with torch.inference_mode():
            for place in self.held:
                ids = torch.from_numpy(self.windows[place])
                states = student.model(input_ids=ids[None]).last_hidden_state[0]
                for start in range(0, len(ids), CHUNK):
                    mine, told = self.finished(student.lm_head(states[start : start + CHUNK])), self._told(place, start)
                    total.append(top_kl(told, mine) if self.top_k else kl(told.log_softmax(-1), mine.log_softmax(-1)))
        return float(torch.cat(total).mean())


def top_kl(told: Mapping[str, Any], student: Any) -> Any:
    """KL over the kept tokens and one class for all others: at most the whole KL. logits [n, classes] -> nats [n]."""
    q = student.log_softmax(-1)
    kept = told["log_p"].float()
    mine = q.gather(-1, told["ids"].long())
    mine_rest = torch.log1p(-mine.exp().sum(-1).clamp(max=1 - 1e-6))
    rest = told["log_rest"]
    return (kept.exp() * (kept - mine)).sum(-1) + rest.exp() * (rest - mine_rest)


@dataclass(frozen=True)
class Pooling:
    """How states become a vector; kind "" for a model that answers logits."""

    kind: str = "mean"
    normalize: bool = False

    def of(self, output: Any, mask: Any) -> Any:
        """[batch, length, width] -> [batch, width], by the modes of `graph.encoder_pooling`."""
        if not self.kind:
            return output.logits
        states, weights = output.last_hidden_state, mask[..., None].to(output.last_hidden_state.dtype)
        if self.kind == "cls":
            pooled = states[:, 0]
        elif self.kind == "max":
            pooled = states.masked_fill(weights == 0, float("-inf")).max(dim=1).values
        elif self.kind == "lasttoken":
            pooled = states[torch.arange(len(states)), mask.sum(dim=1) - 1]
        else:
            pooled = (states * weights).sum(dim=1) / weights.sum(dim=1)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


@dataclass
class TextLesson:
    """Texts as token ids for an encoder. pooling: how vectors are made; logits are compared where it says so."""

    teacher: Checkpoint
    task: str
    texts: Sequence[Sequence[int]]
    weights: Mapping[str, float]
    folder: Path
    pooling: Pooling
    temperature: float = 1.0
    measure: str = field(init=False)
    lengths: Sequence[int] = field(init=False)
    trained: Sequence[int] = field(init=False)
    held: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = [len(text) for text in self.texts]
        self.trained, self.held = split(len(self.texts), MOST_HELD_TEXTS)
        self.answers = Answers(self.folder, self._ask)
        self.measure = "1 - cosine to the teacher" if self.pooling.kind else "KL to the teacher, nats a text"
        self._known: dict[int, np.ndarray] = {}

    @cached_property
    def model(self) -> Any:
        return reference_model(self.teacher, self.task)

    @property
    def of_states(self) -> list[str]:
        return [name for name in self.weights if OBJECTIVES[name].over == STATES]

    def feed(self, places: Sequence[int]) -> dict[str, Any]:
        """Right-padded {input_ids, attention_mask}."""
        rows = [self.texts[place] for place in places]
        ids = torch.full((len(rows), max(map(len, rows))), int(self.teacher.config.get("pad_token_id") or 0))
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
        return {"input_ids": ids, "attention_mask": mask}

    def _ask(self, block: int) -> dict[str, np.ndarray]:
        feed = self.feed(range(block * BLOCK, min((block + 1) * BLOCK, len(self.texts))))
        with torch.inference_mode(), exact():
            return {"outputs": self.pooling.of(self.model(**feed), feed["attention_mask"]).numpy()}

    def wanted(self, places: Sequence[int]) -> Any:
        """The teacher's vectors or logits of some texts, [n, width]."""
        for block in {place // BLOCK for place in places} - self._known.keys():
            self._known[block] = self.answers.of(block)["outputs"]
        return torch.from_numpy(np.stack([self._known[place // BLOCK][place % BLOCK] for place in places]))

    def learn(self, student: Any, places: Sequence[int]) -> float:
        feed, wanted = self.feed(places), self.wanted(places)
        with projections(student if "relations" in self.weights else None) as mine:
            output = student(**feed)
        made = self.pooling.of(output, feed["attention_mask"]).float()
        if self.pooling.kind:
            loss = vector_loss(self.weights, made, wanted)
        else:
            loss = distribution_loss(self.weights, wanted, made, None, self.temperature) / len(places)
        if self.of_states:
            loss = loss + self._states(feed, output, mine)
        loss.backward()
        return float(loss.detach())

    def _states(self, feed: Mapping[str, Any], output: Any, mine: Sequence[Any]) -> Any:
        mask, total = feed["attention_mask"].bool(), 0.0
        with torch.no_grad(), exact(), projections(self.model if "relations" in self.weights else None) as theirs:
            told = self.model(**feed)
        if "hidden" in self.weights:
            total = total + self.weights["hidden"] * hidden(output.last_hidden_state.float(), told.last_hidden_state, mask)
        if "relations" in self.weights:
            each = [relations(x.float(), y, mask) for x, y in zip(mine, theirs, strict=True)]
            total = total + self.weights["relations"] * sum(each) / len(each)
        return total

    def held_loss(self, student: Any) -> float:
        total = []
        with torch.inference_mode():
            for start in range(0, len(self.held), BLOCK):
                places = self.held[start : start + BLOCK]
                feed, wanted = self.feed(places), self.wanted(places)
                made = self.pooling.of(student(**feed), feed["attention_mask"])
                if self.pooling.kind:
                    total.append(1 - torch.nn.functional.cosine_similarity(made, wanted, dim=-1))
                else:
                    total.append(kl(wanted.log_softmax(-1), made.log_softmax(-1)))
        return float(torch.cat(total).mean())


ENDINGS = (("query", "q_proj", "q_lin", ".q"), ("key", "k_proj", "k_lin", ".k"), ("value", "v_proj", "v_lin", ".v"))


@contextmanager
def projections(model: Any) -> Iterator[list[Any]]:
    """What the last layer's query, key and value matrices give in a forward pass inside; nothing for None."""
    linears = [] if model is None else [(name, part) for name, part in model.named_modules() if hasattr(part, "in_features")]
    last = [] if model is None else [[part for name, part in linears if name.endswith(endings)][-1] for endings in ENDINGS]
    found: list[Any] = []
    handles = [part.register_forward_hook(lambda module, args, output: found.append(output)) for part in last]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
