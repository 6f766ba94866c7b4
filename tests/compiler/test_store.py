import errno

import pytest

from compiler.errors import OutputError
from compiler.store import Store, cache_key, writing


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def fill(store, key, text="content"):
    with store.make(key) as work:
        (work / "sub").mkdir()
        (work / "sub" / "file.txt").write_text(text)


def test_key_depends_on_parts_not_on_their_order():
    assert cache_key({"a": 1, "b": [1, 2]}) == cache_key({"b": [1, 2], "a": 1})
    assert cache_key({"a": 1}) != cache_key({"a": 2}) != cache_key({"b": 1})


def test_an_entry_is_found_again(store):
    assert store.get("k") is None
    fill(store, "k")
    assert (store.get("k") / "sub" / "file.txt").read_text() == "content"


def test_a_failure_is_never_stored(store):
    with pytest.raises(RuntimeError), store.make("k") as work:
        (work / "file").write_text("half")
        raise RuntimeError
    assert store.get("k") is None
    assert list((store.root / "entries").iterdir()) == []


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "listing"])
def test_a_damaged_entry_is_made_again(store, harm):
    fill(store, "k")
    file = store.place("k") / "sub" / "file.txt"
    if harm == "flip":
        file.write_text("c0ntent")
    elif harm == "truncate":
        file.write_text("")
    elif harm == "remove":
        file.unlink()
    else:
        (store.place("k") / "entry.json").write_text("{")
    assert store.get("k") is None
    fill(store, "k")
    assert store.get("k") is not None


def test_two_makers_of_one_key_agree(store):
    with store.make("k") as first:
        (first / "file").write_text("same")
        fill(store, "k", "same")
    assert store.get("k") is not None and len(list((store.root / "entries").iterdir())) == 1


def test_no_space_left_is_told_in_one_line(store):
    with pytest.raises(OutputError, match=r"expected a place to write, found No space left on device; free some space"), store.make("k"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list((store.root / "entries").iterdir()) == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "store").write_text("")
    with pytest.raises(OutputError, match="check the folder"), Store(tmp_path / "store").make("k"):
        pass


def test_writing_leaves_other_errors_alone(tmp_path):
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError
