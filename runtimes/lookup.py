"""Prompt lookup: draft the next tokens from what the text said before, check them in one run, and stop drafting while that does not pay.

An answer that quotes its prompt, or repeats itself, is there already: the tokens that followed the last ones where they stood before are a guess that costs
nothing. A run over the last token and k drafted ones gives the logits after each; the guess is right as far as greedy choice agrees with it, and the
logits after the last right token give one token more. What is chosen is what single steps would choose, up to the rounding of kernels that take several tokens.

A run over k + 1 tokens costs more than a step, on a small processor twice as much for k = 3. Whether drafts pay depends on text and machine, so `Pace` measures
both ways in seconds a token: after MIN_RUNS checked drafts that took longer a token than steps do, it waits 32 tokens, then 64, up to 1024.

Source: prompt lookup decoding (Saxena 2023), a case of speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) for greedy choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LONGEST_MATCH, SHORTEST_MATCH = 3, 2
LONGEST_DRAFT = 7
FIRST_STEPS = 3  # single steps before the first draft: what they cost must be known
MIN_RUNS = 3
FIRST_PAUSE, LONGEST_PAUSE = 32, 1024
FORGET = 0.8  # weight of what was known when something new is measured


class Lookup:
    """What followed each run of SHORTEST_MATCH to LONGEST_MATCH tokens when it last occurred.

    Lookup([1, 2, 3, 4, 1, 2]).draft(2) -> [3, 4]
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self.push(tokens)

    def push(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for size in range(SHORTEST_MATCH, LONGEST_MATCH + 1):
                if len(self._tokens) >= size:
                    self._after[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the longest match, [] without one. A draft that reaches the end goes on with itself: a loop is drafted whole."""
        for size in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
            at = self._after.get(tuple(self._tokens[-size:])) if len(self._tokens) >= size else None
            if at is not None:
                known = self._tokens[at : at + most]
                return [known[index % len(known)] for index in range(max(most, 0))]
        return []


@dataclass
class Pace:
    """Seconds a token with drafts and without, and what follows from them. draft_length is how many tokens the next draft should have; 0: a single step."""

    length: int = 2
    pause: int = FIRST_PAUSE
    waiting: int = FIRST_STEPS
    step_s: float = 0.0
    spent_s: float = 0.0
    gained: float = 0.0
    runs: int = 0
    drafted: int = 0
    accepted: int = 0
    pauses: list[int] = field(default_factory=list)

    @property
    def draft_length(self) -> int:
        return 0 if self.waiting > 0 else self.length

    def stepped(self, seconds: float) -> None:
        """A single step took so long."""
        self.step_s = seconds if not self.step_s else FORGET * self.step_s + (1 - FORGET) * seconds
        self.waiting = max(self.waiting - 1, 0)

    def checked(self, drafted: int, accepted: int, seconds: float) -> None:
        """A run over a draft took so long; accepted + 1 tokens came of it."""
        self.drafted, self.accepted, self.runs = self.drafted + drafted, self.accepted + accepted, self.runs + 1
        self.spent_s, self.gained = FORGET * self.spent_s + seconds, FORGET * self.gained + accepted + 1
        self.length = min(drafted + 2, LONGEST_DRAFT) if accepted == drafted else max(accepted, 1)
        if self.runs < MIN_RUNS:
            return
        if self.spent_s < self.gained * self.step_s:
            self.pause = FIRST_PAUSE
            return
        self.pauses.append(self.pause)
        self.waiting, self.pause = self.pause, min(2 * self.pause, LONGEST_PAUSE)
        self.spent_s, self.gained, self.runs, self.length = 0.0, 0.0, 0, 2
