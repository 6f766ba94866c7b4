"""The run: every round asks every system every question, in an order drawn anew, so that what drifts drifts for all.

Each round has new processes, opened in an order drawn anew: two processes of one system, asked in turn, were seen to differ by 20 % for as long as they
lived, and with one process a system that luck would stand in every round and in no interval.

A sample is {"round", "system", "metric", "value"}; ratios are taken within a round (see `rows`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiler.bench.child import Child
from compiler.bench.peers import System
from compiler.bench.questions import NEW, Question, fresh_metrics, metrics

SETTLE_S = 0.05  # after a process was stopped, before the next is asked
ENCODE_S = 0.15  # calls of an encoder in one turn: about this long, at least one
Say = Callable[[str], None]
Sample = dict[str, Any]


@dataclass(frozen=True)
class Entrant:
    """A system with its model on disk."""

    system: System
    model: Path


@dataclass(frozen=True)
class Setting:
    """What is the same for all: threads, the text as token ids, and how the rounds are drawn."""

    threads: int
    text: Sequence[int]
    rounds: int
    seconds: float  # no round begins after this many
    first_round: int = 0
    seed: int = 0

    def prompt(self, tokens: int, place: int) -> list[int]:
        """`tokens` ids of the text, from another place for each `place`: no system may answer from what it saw before."""
        start = (place * 911) % len(self.text)
        turned = [*self.text[start:], *self.text[:start]]
        return (turned * (tokens // len(turned) + 1))[:tokens]

    def batch(self, question: Question, place: int) -> list[list[int]]:
        return [self.prompt(question.length, place + row) for row in range(question.batch)]


def run(entrants: Sequence[Entrant], questions: Sequence[Question], setting: Setting, say: Say) -> Iterator[tuple[list[Sample], dict[str, Any]]]:
    """Round by round, its samples and what each system says about itself. Raises BenchError when a system fails."""
    live = [question for question in questions if not question.fresh]
    fresh = [question for question in questions if question.fresh]
    about: dict[str, Any] = {}
    started = time.perf_counter()
    for number in range(setting.first_round, setting.first_round + setting.rounds):
        if time.perf_counter() - started > setting.seconds:
            break
        order = random.Random(1000 * setting.seed + number)
        samples = _round(entrants, live, setting, number, order, about) if live else []
        for question in fresh:
            for entrant in order.sample(list(entrants), len(entrants)):
                samples += _samples(entrant.system.name, number, _fresh(entrant, question, setting, number))
        yield samples, about
        say(f"round {number + 1} after {time.perf_counter() - started:.0f} s")


def _round(entrants: Sequence[Entrant], live: Sequence[Question], setting: Setting, number: int, order: random.Random, about: dict[str, Any]) -> list[Sample]:
    """Samples of one round, from processes that live for it."""
    context = max((question.context + NEW for question in live if question.context >= 0), default=0)
    context = max([context, *(question.batch * question.length for question in live)])
    samples: list[Sample] = []
    with ExitStack() as stack:
        children = []
        for entrant in order.sample(list(entrants), len(entrants)):
            child = stack.enter_context(Child(entrant.system))
            about[entrant.system.name] = child.load(entrant.model, setting.threads, context)["about"]
            for question in live:
                _answer(child, question, setting, -1)  # warm: the first call of a shape compiles, allocates, pages in
            children.append(child)
        for question in order.sample(live, len(live)):
            for child in order.sample(children, len(children)):
                time.sleep(SETTLE_S)
                samples += _samples(child.system.name, number, metrics(question, _answer(child, question, setting, number)))
    return samples


def _answer(child: Child, question: Question, setting: Setting, number: int) -> dict[str, Any]:
    place = 1 + number
    if question.context >= 0:
        return child.ask("generate", prompt=setting.prompt(max(question.context, 1), place), new=NEW)
    return child.ask("encode", ids=setting.batch(question, place), seconds=ENCODE_S)


def _fresh(entrant: Entrant, question: Question, setting: Setting, number: int) -> dict[str, float]:
    """Load time and memory of a new process that answers one question."""
    needed = question.context + NEW if question.context >= 0 else question.batch * question.length
    with Child(entrant.system) as child:
        loaded = child.load(entrant.model, setting.threads, needed)
        _answer(child, question, setting, number)
        return fresh_metrics(loaded, child.ask("memory"))


def _samples(system: str, number: int, values: Mapping[str, float]) -> list[Sample]:
    return [{"round": number, "system": system, "metric": metric, "value": value} for metric, value in values.items()]
