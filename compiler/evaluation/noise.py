"""Noise that people and other programs put into inputs: one row of `NOISES` each, one function each, seeded.

A function takes a text and a `random.Random` and gives the changed text. `context` replaces it where the text is what the scored tokens continue: there the
end must stay. A new noise is one function and one row.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources

Change = Callable[[str, random.Random], str]

TYPO_SHARE = 0.15  # of words of at least four letters
SPACE_SHARE, GLYPH_SHARE = 0.25, 0.1
KEPT = (0.7, 0.9)  # share of the characters that truncation leaves
LONG_CHARACTERS = 1500
ROWS_OF_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
LOOKALIKES = {"a": "а", "e": "е", "o": "о", "c": "с", "p": "р", "x": "х", "i": "і", "'": "’", '"': "”", "-": "‑", " ": "\u00a0"}


@dataclass(frozen=True)
class Noise:
    """One kind of noise."""

    name: str
    meaning: str
    alter: Change
    context: Change | None = None

    def apply(self, text: str, seed: int, row: int, continued: bool = False) -> str:
        """The text of row number `row` with noise: the same for the same seed, row and text. continued: scored tokens follow right behind it."""
        change = self.context if continued and self.context else self.alter
        return change(text, random.Random(f"{seed}:{self.name}:{row}"))


def typos(text: str, rng: random.Random) -> str:
    """In some words two letters swapped, one lost, one doubled, or one replaced by a neighbour on the keyboard."""
    return " ".join(_mistyped(word, rng) if len(word) >= 4 and rng.random() < TYPO_SHARE else word for word in text.split(" "))


def _mistyped(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word) - 1)
    kind = rng.choice(("swap", "lose", "double", "neighbour"))
    if kind == "swap":
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind == "lose":
        return word[:at] + word[at + 1 :]
    if kind == "double":
        return word[: at + 1] + word[at:]
    row = next((keys for keys in ROWS_OF_KEYS if word[at].lower() in keys), "")
    place = row.find(word[at].lower())
    near = row[max(0, place - 1) : place] + row[place + 1 : place + 2]
    return word[:at] + rng.choice(near or word[at]) + word[at + 1 :]


def casing(text: str, rng: random.Random) -> str:
    """The whole text in capitals, without any, with each word capitalised, or with caps lock left on."""
    return rng.choice((str.upper, str.lower, str.title, str.swapcase))(text)


def spacing(text: str, rng: random.Random) -> str:
    """Some spaces doubled, lost, or turned into a tab or a line break; white space around the text."""
    made = [rng.choice(("  ", "", "\t", "\n", "   ")) if letter == " " and rng.random() < SPACE_SHARE else letter for letter in text]
    return f"{rng.choice(('', ' ', '  '))}{''.join(made)}{rng.choice(('', ' ', chr(10)))}"


def truncation(text: str, rng: random.Random) -> str:
    """The end is missing, as in a form with a short field."""
    return text[: max(1, round(len(text) * rng.uniform(*KEPT)))]


def beginning_lost(text: str, rng: random.Random) -> str:
    """The beginning is missing."""
    return text[len(text) - max(1, round(len(text) * rng.uniform(*KEPT))) :]


def unicode_noise(text: str, rng: random.Random) -> str:
    """Some characters as look-alikes, full width, decomposed, or with a zero-width space behind them: what copying from other programs leaves."""
    return "".join(_foreign(letter, rng) if rng.random() < GLYPH_SHARE else letter for letter in text)


def _foreign(letter: str, rng: random.Random) -> str:
    wide = chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter
    return rng.choice((LOOKALIKES.get(letter, letter), wide, unicodedata.normalize("NFD", letter), letter + "\u200b"))


def long_after(text: str, rng: random.Random) -> str:
    """Other text behind it, as a quoted thread or a signature."""
    return f"{text}\n\n{_filler(rng)}"


def long_before(text: str, rng: random.Random) -> str:
    """Other text before it."""
    return f"{_filler(rng)}\n\n{text}"


def _filler(rng: random.Random) -> str:
    """Whole paragraphs of the calibration text from a drawn place on, about LONG_CHARACTERS characters."""
    paragraphs = _paragraphs()
    start, made = rng.randrange(len(paragraphs)), ""
    for step in range(len(paragraphs)):
        made += ("\n\n" if made else "") + paragraphs[(start + step) % len(paragraphs)]
        if len(made) >= LONG_CHARACTERS:
            break
    return made[:LONG_CHARACTERS]


@cache
def _paragraphs() -> tuple[str, ...]:
    text = resources.files("compiler").joinpath("data/calibration.txt").read_text(encoding="utf-8")
    return tuple(part.strip() for part in text.split("\n\n") if part.strip())


NOISES = {
    row.name: row
    for row in (
        Noise("typos", "letters swapped, lost, doubled or from the next key in some words", typos),
        Noise("casing", "capitals everywhere, nowhere, on each word, or inverted", casing),
        Noise("spacing", "spaces doubled, lost, or turned into tabs and line breaks", spacing),
        Noise("truncation", "the end is missing", truncation, beginning_lost),
        Noise("unicode", "look-alikes, full width, decomposed letters, zero-width spaces", unicode_noise),
        Noise("long", "much other text around it", long_after, long_before),
    )
}
