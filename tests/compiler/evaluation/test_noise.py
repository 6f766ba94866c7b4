"""Every kind of noise: seeded, real, and kind to what must stay."""

from __future__ import annotations

import pytest

from compiler.evaluation.noise import LONG_CHARACTERS, NOISES

TEXT = "The hydraulic press on line 4 loses pressure after an hour, and the operator's display shows error E-17 again."


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("continued", [False, True])
def test_the_same_seed_gives_the_same_text_and_another_row_another(name: str, continued: bool) -> None:
    rows = [NOISES[name].apply(TEXT, 3, row, continued) for row in range(20)]
    assert rows == [NOISES[name].apply(TEXT, 3, row, continued) for row in range(20)]
    assert sum(row != TEXT for row in rows) >= 15 and len(set(rows)) >= 3 and all(rows)
    assert [NOISES[name].apply(TEXT, 4, row, continued) for row in range(20)] != rows


def test_what_each_kind_keeps() -> None:
    for row in range(30):
        typed, spaced, cased = (NOISES[name].apply(TEXT, 0, row) for name in ("typos", "spacing", "casing"))
        assert len(typed.split(" ")) == len(TEXT.split(" ")) and abs(len(typed) - len(TEXT)) <= len(TEXT.split(" "))
        assert "".join(spaced.split()) == "".join(TEXT.split())
        assert cased.lower() == TEXT.lower()
        assert TEXT.startswith(NOISES["truncation"].apply(TEXT, 0, row)) and TEXT.endswith(NOISES["truncation"].apply(TEXT, 0, row, continued=True))
        assert NOISES["long"].apply(TEXT, 0, row).startswith(TEXT) and NOISES["long"].apply(TEXT, 0, row, continued=True).endswith(TEXT)
        assert len(NOISES["long"].apply(TEXT, 0, row)) == len(TEXT) + 2 + LONG_CHARACTERS


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("text", ["", "a", "電子回路。", " "])
def test_short_and_foreign_texts_do_not_break_it(name: str, text: str) -> None:
    for row in range(10):
        for continued in (False, True):
            assert isinstance(NOISES[name].apply(text, 0, row, continued), str)
