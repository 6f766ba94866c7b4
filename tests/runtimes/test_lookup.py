"""Prompt lookup: drafts, the pace that decides about them, and answers that do not change."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from runtimes.generate import Generator, Options
from runtimes.lookup import FIRST_PAUSE, FIRST_STEPS, MIN_RUNS, Lookup, Pace
from runtimes.sampling import Sampling
from runtimes.session import SessionSettings
from targets.errors import TrimtabError


def test_a_draft_is_what_followed_the_longest_match() -> None:
    assert Lookup([1, 2, 3, 4, 1, 2]).draft(2) == [3, 4]
    assert Lookup([7, 1, 2, 8, 9, 1, 2, 5, 7, 1, 2]).draft(2) == [8, 9]  # three tokens match there, two at the later place


def test_the_latest_place_counts_and_a_loop_is_drafted_whole() -> None:
    assert Lookup([1, 2, 3, 9, 1, 2, 4, 9, 1, 2]).draft(1) == [4]
    assert Lookup([5, 6, 5, 6]).draft(5) == [5, 6, 5, 6, 5]


def test_nothing_known_gives_nothing() -> None:
    assert Lookup([1, 2, 3]).draft(4) == []
    assert Lookup([1]).draft(4) == []
    assert Lookup([1, 2, 1, 2]).draft(0) == []


def test_drafts_that_cost_more_than_steps_stop_and_are_tried_again_later() -> None:
    pace = Pace()
    assert pace.draft_length == 0
    for _ in range(FIRST_STEPS):
        pace.stepped(1.0)
    assert pace.draft_length > 0
    for _ in range(MIN_RUNS):
        pace.checked(2, 0, 1.5)  # one token in 1.5 s
    assert pace.draft_length == 0 and pace.pauses == [FIRST_PAUSE]
    for _ in range(FIRST_PAUSE):
        pace.stepped(1.0)
    assert pace.draft_length > 0
    for _ in range(MIN_RUNS):
        pace.checked(2, 0, 1.5)
    assert pace.pauses == [FIRST_PAUSE, 2 * FIRST_PAUSE]


def test_drafts_that_pay_grow() -> None:
    pace = Pace(waiting=0, step_s=1.0)
    for _ in range(10):
        pace.checked(pace.draft_length, pace.draft_length, 2.0)
    assert pace.draft_length == 7 and not pace.pauses and pace.accepted == pace.drafted


@pytest.fixture(scope="module", params=["directory", "directory_all"])
def generator(request: pytest.FixtureRequest, decoder: SimpleNamespace) -> Generator:
    return Generator.open(getattr(decoder, request.param), SessionSettings(threads=1))


def test_answers_are_those_of_single_steps(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts that are right for some tokens and then wrong: what is chosen must not change."""
    monkeypatch.setattr("runtimes.lookup.MIN_RUNS", 10**6)  # never pause: timing must not decide what is tested
    prompt, options = np.random.default_rng(0).integers(5, 250, 40).tolist(), {"max_new_tokens": 60, "ignore_eos": True}
    (plain,) = generator.generate([prompt], Options(**options))

    class Oracle(Lookup):
        def draft(self, most: int) -> list[int]:
            done = len(self._tokens) - len(prompt)
            right = [int(token) for token in plain.token_ids[done : done + most]]
            return [*right[:-1], right[-1] ^ 1] if right and done % 3 else right

    monkeypatch.setattr("runtimes.generate.Lookup", Oracle)
    (drafted,) = generator.generate([prompt], Options(**options, lookup=True))
    assert drafted.token_ids == plain.token_ids and drafted.text == plain.text and drafted.finish == "length"
    assert generator.pace.drafted > generator.pace.accepted > 15
    (again,) = generator.generate([prompt], Options(**options))
    assert again.token_ids == plain.token_ids  # single steps go on as before


def test_logits_of_a_checked_draft_are_those_of_steps(generator: Generator) -> None:
    loop = generator._take("")
    ids = [9, 30, 31, 32, 33]
    stepped = [loop.start([ids[:1]])[0].copy()] + [loop.step([token])[0].copy() for token in ids[1:]]
    loop.start([ids[:1]])
    assert np.allclose(loop.check(ids[1:]), stepped[1:], atol=1e-3)
    loop.forget(2)
    assert loop.lengths.tolist() == [3]
    assert np.allclose(loop.step([32])[0], stepped[3], atol=1e-3)


def test_the_limit_and_the_context_hold(generator: Generator) -> None:
    prompt = [5, 6, 7] * ((generator.context_length - 10) // 3)
    (answer,) = generator.generate([prompt], Options(max_new_tokens=50, ignore_eos=True, lookup=True))
    assert len(prompt) + len(answer.token_ids) == generator.context_length
    (answer,) = generator.generate([[5, 6, 7] * 8], Options(max_new_tokens=9, ignore_eos=True, lookup=True))
    assert len(answer.token_ids) == 9


def test_what_cannot_be_drafted_is_refused(generator: Generator) -> None:
    with pytest.raises(TrimtabError, match="lookup: expected greedy"):
        Options(lookup=True, sampling=Sampling(temperature=1.0))
    with pytest.raises(TrimtabError, match="found 2 prompts"):
        generator.generate([[5, 6], [7, 8]], Options(lookup=True))
