"""Streaming text: whatever the tokens, the pieces joined are the text, and no piece holds half a character."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.text import Detokenizer, StopStrings


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """A tokenizer of the Llama kind: ▁ for spaces, whose decoder drops the first one, and bytes for what it does not know."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", "▁Hello", "▁world", "lo", "▁", "!", *[f"<0x{value:02X}>" for value in range(256)]]
    tokenizer = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def stream(tokenizer: Any, ids: list[int], prompt: list[int]) -> list[str]:
    words = Detokenizer(tokenizer, prompt)
    return [*[words.push(token) for token in ids], words.flush()]


def test_no_space_is_lost_between_prompt_and_answer(sentencepiece: Any) -> None:
    hello, world = sentencepiece.token_to_id("▁Hello"), sentencepiece.token_to_id("▁world")
    assert sentencepiece.decode([world, world]) == "world world"  # what a naive stream would begin with
    assert stream(sentencepiece, [world, world, hello], [1, hello]) == [" world", " world", " Hello", ""]
    assert stream(sentencepiece, [hello, world], []) == ["Hello", " world", ""]


def test_special_tokens_in_between_leave_no_trace(sentencepiece: Any) -> None:
    hello, world = sentencepiece.token_to_id("▁Hello"), sentencepiece.token_to_id("▁world")
    assert "".join(stream(sentencepiece, [hello, 2, world], [])) == "Hello world"


@pytest.mark.parametrize("text", ["🙂", "価格は 1,280 円です。", "naïve\n\tcafé  x", "a🚀b", " leading"])
def test_a_character_comes_whole_or_not_yet(byte_tokenizer: Any, text: str) -> None:
    ids = byte_tokenizer.encode(text).ids
    pieces = stream(byte_tokenizer, ids, [])
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_left_out(sentencepiece: Any) -> None:
    first = sentencepiece.token_to_id("<0xF0>")
    assert stream(sentencepiece, [sentencepiece.token_to_id("!"), first], []) == ["!", "", ""]


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40), cut=st.integers(0, 40))
def test_pieces_joined_are_the_text(byte_tokenizer: Any, text: str, cut: int) -> None:
    ids = byte_tokenizer.encode(text).ids
    whole = byte_tokenizer.decode(ids, skip_special_tokens=True)
    prompt, rest = ids[:cut], ids[cut:]
    known = byte_tokenizer.decode(prompt, skip_special_tokens=True)
    if not known.endswith("�"):  # prompts are texts: they do not end within a character
        assert known + "".join(stream(byte_tokenizer, rest, prompt)) == whole


def cut_at_first(text: str, stops: list[str]) -> str:
    """The slow twin: the text up to the first stop string."""
    return text[: min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text("abc", max_size=4), max_size=12), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_as_if_the_text_were_whole(pieces: list[str], stops: list[str]) -> None:
    stop = StopStrings(stops)
    out = "".join(stop.push(piece) for piece in pieces) + stop.flush()
    text = "".join(pieces)
    # A stream ends at the first stop string to be complete; a whole text can hold an earlier start of a longer one. Both begin alike.
    expected = cut_at_first(text, stops)
    assert text.startswith(out) and len(out) >= len(expected)
    assert bool(stop.hit) == (expected != text or any(text.endswith(word) for word in stops))
    if len(stops) < 2:
        assert out == expected


def test_text_is_held_back_only_while_it_may_be_a_stop() -> None:
    stop = StopStrings(["END"])
    assert [stop.push(piece) for piece in ("say E", "Nough", " EN", "D more", "x")] == ["say ", "ENough", " ", "", ""]
    assert stop.hit == "END" and stop.flush() == ""
