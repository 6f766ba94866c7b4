"""Rows as a decoder reads them: token sequences to score, items that are right or wrong, prompts to answer; with noise where one is named.

Sequences that count in token metrics come first: chats, windows of text, right endings. Behind them stand the wrong choices, which only compete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from compiler.errors import RecipeError
from compiler.evaluation import decoder, statistics
from compiler.evaluation.data import Row
from compiler.evaluation.decoder import Scored, TokenScores
from compiler.evaluation.noise import Noise
from compiler.evaluation.subject import ChatFormat

CONTINUED_PROMPTS, CONTINUED_CONTEXT, CONTINUED_TOKENS = 12, 64, 32  # text without chats: greedy continuations for the first divergence


@dataclass(frozen=True)
class Item:
    """A row with choices, or with one continuation: places of its sequences, in the order of the choices, and the characters of each."""

    row: int
    places: tuple[int, ...]
    gold: int
    characters: tuple[int, ...]

    @property
    def is_choice(self) -> bool:
        return len(self.places) > 1


@dataclass(frozen=True)
class Sheet:
    """rows: with their noise. counted: how many of the sequences count in token metrics; row_of: the row of each of those."""

    rows: tuple[Row, ...]
    sequences: tuple[Scored, ...]
    counted: int
    items: tuple[Item, ...]

    @property
    def chats(self) -> list[Row]:
        return [row for row in self.rows if row.messages]

    def prompts(self, chat: ChatFormat, most: int = 0) -> list[list[int]]:
        """What is answered: chats up to their last message; without chats, beginnings of the text. most: tokens that fit (0: as they are)."""
        if self.chats:
            return [prompt[-most:] for prompt in chat.prompts(self.chats)]
        if self.items:
            return []
        return [one.ids[: one.first][-CONTINUED_CONTEXT:].tolist() for one in self.sequences[:CONTINUED_PROMPTS]]

    def new_tokens(self, chat: ChatFormat) -> int:
        return chat.new_tokens(self.chats) if self.chats else CONTINUED_TOKENS


def prepare(rows: Sequence[Row], chat: ChatFormat, noise: Noise | None = None, seed: int = 0, context: int = 0) -> Sheet:
    """The sheet of some rows. Raises RecipeError for rows that a decoder cannot be asked, and where nothing is long enough to score.

    context: with noise, sequences lose their beginning beyond so many tokens, for every system alike
    """
    made: list[Row] = []
    counted: list[Scored] = []
    endings: list[Scored] = []
    items = []
    for number, row in enumerate(rows):
        if row.pair is not None:
            remedy = "give an encoder, or rows of {messages}, {text}, {context, choices}"
            raise RecipeError("evaluate.data", expected="rows for a decoder", found="pairs of sentences", remedy=remedy)
        row = with_noise(row, noise, seed, number)
        made.append(row)
        if row.messages is not None:
            counted.append(decoder.chat_sequence(row, chat.tokenizer, chat.render, chat.eos_text))
        elif row.text is not None:
            counted += noisy_windows(row.text, chat.tokenizer, noise, seed, number)
        else:
            choices = row.choices or (row.continuation,)
            scored = [decoder.continued(row.context or "", choice, chat.tokenizer) for choice in choices]
            counted.append(scored[row.gold])
            items.append((number, len(counted) - 1, len(endings), row))
            endings += [one for place, one in enumerate(scored) if place != row.gold]
    if not counted:
        raise RecipeError("evaluate.data", expected="at least 16 tokens of text", found="less", remedy="give more text")
    sequences = [cut(one, context) if noise and context else one for one in (*counted, *endings)]
    return Sheet(tuple(made), tuple(sequences), len(counted), tuple(_item(len(counted), *facts) for facts in items))


def _item(counted: int, number: int, right: int, wrong: int, row: Row) -> Item:
    others = iter(range(counted + wrong, counted + wrong + max(len(row.choices) - 1, 0)))
    places = tuple(right if place == row.gold else next(others) for place in range(len(row.choices) or 1))
    return Item(number, places, row.gold, tuple(max(1, len(choice)) for choice in row.choices or (row.continuation,)))


def with_noise(row: Row, noise: Noise | None, seed: int, number: int) -> Row:
    """What a person wrote, with noise: messages of role user, the context of an ending. Plain text changes by window (`noisy_windows`)."""
    if noise is None:
        return row
    if row.messages is not None:
        spoken = [message["role"] == "user" for message in row.messages]
        texts = [noise.apply(message["content"], seed, number) if mine else message["content"] for message, mine in zip(row.messages, spoken, strict=True)]
        return replace(row, messages=tuple({**message, "content": text} for message, text in zip(row.messages, texts, strict=True)))
    if row.context is not None:
        return replace(row, context=noise.apply(row.context, seed, number, continued=True))
    return row


def noisy_windows(text: str, tokenizer: Any, noise: Noise | None, seed: int, number: int) -> list[Scored]:
    """Windows of a text; noise changes their first halves, so that the same tokens are scored with and without."""
    plain = decoder.windows(np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64))
    if noise is None:
        return plain
    made = []
    for place, one in enumerate(plain):
        before = tokenizer.decode(one.ids[: one.first].tolist(), skip_special_tokens=False)
        altered = tokenizer.encode(noise.apply(before, seed, 1000 * number + place, continued=True), add_special_tokens=False).ids or [int(one.ids[0])]
        made.append(Scored(np.concatenate([np.array(altered, np.int64), one.ids[one.first :]]), len(altered)))
    return made


def cut(one: Scored, context: int) -> Scored:
    """The last `context` tokens; at least one in front of what is scored stays."""
    lost = max(0, min(len(one.ids) - context, one.first - 1))
    return Scored(one.ids[lost:], one.first - lost) if lost else one


@dataclass(frozen=True)
class Hits:
    """Right or wrong for each row of one kind of item, by system: {"choice_accuracy": [True, ...]} of the reference and of the other model."""

    reference: Mapping[str, list[bool]]
    bundle: Mapping[str, list[bool]]


def hits_of(sheet: Sheet, scores: TokenScores) -> Hits:
    """What the log-likelihoods say about the items. A likelihood that is not finite is wrong."""
    count = len(sheet.sequences)
    found: list[dict[str, list[bool]]] = []
    for nll, first in ((scores.reference_nll, scores.reference_first), (scores.bundle_nll, scores.bundle_first)):
        likely = likelihoods(scores, nll, count)
        every = np.bincount(scores.groups, ~first, count) == 0
        one: dict[str, list[bool]] = {}
        for item in sheet.items:
            values = likely[list(item.places)]
            sound = bool(np.isfinite(values).all())
            if item.is_choice:
                one.setdefault("choice_accuracy", []).append(sound and int(values.argmax()) == item.gold)
                one.setdefault("choice_accuracy_norm", []).append(sound and int((values / item.characters).argmax()) == item.gold)
            else:
                one.setdefault("completion_accuracy", []).append(sound and bool(every[item.places[0]]))
        found.append(one)
    return Hits(*found)


def likelihoods(scores: TokenScores, nll: np.ndarray, count: int) -> np.ndarray:
    """Log-likelihood of each sequence's scored part, [count], nats."""
    return -np.bincount(scores.groups, nll, count)


def nll_excess(clean: TokenScores, noisy: TokenScores, seed: int) -> dict[str, Any]:
    """Nats a token that noise costs the bundle, less what it costs the reference, on the same scored tokens."""
    count = max(int(clean.groups.max()), int(noisy.groups.max())) + 1
    sums = [np.bincount(one.groups, one.bundle_nll - one.reference_nll, count) for one in (noisy, clean)]
    tokens = np.bincount(clean.groups, minlength=count)
    kept = tokens > 0
    groups = np.repeat(np.arange(count)[kept], tokens[kept])
    values = np.repeat(((sums[0] - sums[1])[kept]) / tokens[kept], tokens[kept])
    return statistics.metric(values.mean(), statistics.cluster_interval(values, groups, seed), len(values))
