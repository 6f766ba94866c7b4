import json

import pytest

from compiler.errors import RecipeError
from compiler.evaluation.data import load_rows

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
        return path

    return write


def test_builtin_text_is_long_enough_for_several_windows():
    (row,) = load_rows(None).rows
    assert len(row.text) > 20_000


def test_rows_of_each_form(write):
    rows = load_rows(write(CHAT, {"text": "t", "label": 3}, "", {"text": "plain"})).rows
    assert (rows[0].answer, rows[1].label, rows[2].text) == ("a", "3", "plain")


def test_limit_is_part_of_the_digest(write):
    path = write(CHAT, CHAT)
    assert len(load_rows(path, 1).rows) == 1
    assert load_rows(path, 1).digest != load_rows(path).digest


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"messages": []}', '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}', '{"label": 1}']
)
def test_bad_rows_name_their_line(write, line):
    with pytest.raises(RecipeError, match=r"rows.jsonl:2: expected"):
        load_rows(write(CHAT, line))


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(RecipeError, match="expected a readable file"):
        load_rows(tmp_path / "none.jsonl")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="expected UTF-8"):
        load_rows(tmp_path / "x.txt")
