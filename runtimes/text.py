"""From token ids to text, piece by piece: no broken characters, no lost spaces, no half stop strings.

A token is a piece of bytes, not of text: an emoji may need four tokens, and a SentencePiece decoder drops the first space of whatever it is given. So each
step decodes a short window twice, with and without the new token, and emits the difference once it does not end in an unfinished character.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "�"
CONTEXT_TOKENS = 6


class Detokenizer:
    """Streams text for one sequence. The pieces joined are the text that follows the prompt.

    Tokens "▁Hello", "▁world" after a prompt -> " Hello", " world": the prompt's last tokens are the left context, so the space between is kept.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._start, self._read = 0, len(self._ids)

    def push(self, token_id: int) -> str:
        """The text that became certain with this token, "" when none did."""
        self._ids.append(token_id)
        text = self._pending()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        """What is left at the end, without an unfinished character."""
        text = self._pending().rstrip(REPLACEMENT)
        self._advance()
        return text

    def _pending(self) -> str:
        known = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(known) :]

    def _advance(self) -> None:
        self._start, self._read = max(self._start, min(self._read, len(self._ids) - 1)), len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class StopStrings:
    """Cuts a stream of text at the first stop string, and holds back what may become one.

    stops ["END"]: push("say E") -> "say ", push("ND now") -> "" and `hit` is "END".
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.hit = ""

    def push(self, text: str) -> str:
        """The part of the text so far that no stop string can claim any more."""
        if self.hit or not self._stops:
            return "" if self.hit else text
        self._held += text
        found = [(at, -len(stop), stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, _, self.hit = min(found)
            text, self._held = self._held[:at], ""
            return text
        keep = max(self._overlap(stop) for stop in self._stops)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
