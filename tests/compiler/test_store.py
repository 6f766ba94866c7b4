import errno
import os
import signal
import time

import pytest

from compiler.errors import OutputError
from compiler.explain import difference
from compiler.stages import package
from compiler.store import Store, cache_key, intact, writing


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


def test_every_flipped_bit_of_a_listing_is_found(store):
    with store.make("k", {"stage": "export", "rate": 1e-05}) as work:
        (work / "file").write_text("content")
    listing = store.place("k") / "entry.json"
    whole = listing.read_bytes()
    for place in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        listing.write_bytes(changed)
        assert not intact(store.place("k")), bytes(changed)
    listing.write_bytes(whole)
    assert intact(store.place("k"))


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


# what processes do to each other


def run_children(count, work):
    """Fork `count` processes that run `work(number)` and return its exit code; the codes."""
    children = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = work(number) or 0
            finally:
                os._exit(code)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def test_one_of_eight_processes_does_the_work(store, tmp_path):
    def work(number):
        def make(folder):
            (tmp_path / f"made-{number}").touch()
            time.sleep(0.05)
            (folder / "file").write_text("same")

        return 0 if (Store(store.root).obtain("k", make) / "file").read_text() == "same" else 1

    assert run_children(8, work) == [0] * 8
    assert len(list(tmp_path.glob("made-*"))) == 1


def test_a_killed_maker_leaves_a_key_free_and_its_folder_is_swept(store):
    def killed(_number):
        def make(folder):
            (folder / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)

        Store(store.root).obtain("k", make)

    assert run_children(1, killed) == [-signal.SIGKILL]
    assert [path.name[:7] for path in (store.root / "entries").iterdir()] == ["making-"]
    assert store.get("k") is None
    place = store.obtain("k", lambda folder: (folder / "file").write_text("whole"))
    assert [path.name for path in (store.root / "entries").iterdir()] == ["k"] and (place / "file").read_text() == "whole"


def test_obtain_does_not_store_what_failed_and_lets_go_of_the_key(store):
    def fail(folder):
        (folder / "half").write_text("x")
        raise ValueError

    with pytest.raises(ValueError):
        store.obtain("k", fail)
    assert store.get("k") is None
    assert store.obtain("k", lambda folder: (folder / "file").write_text("whole")).is_dir()


def test_an_entry_of_another_key_is_none_of_this(store):
    fill(store, "a")
    store.place("a").rename(store.place("b"))
    assert store.get("b") is None


@pytest.mark.parametrize("harm", ["extra", "link"])
def test_an_entry_holds_exactly_its_files(store, harm, tmp_path):
    fill(store, "k")
    if harm == "extra":
        (store.place("k") / "more").write_text("")
    else:
        file = store.place("k") / "sub" / "file.txt"
        (tmp_path / "content").write_text(file.read_text())
        file.unlink()
        file.symlink_to(tmp_path / "content")
    assert store.get("k") is None


def test_gc_keeps_what_is_used_last_and_what_is_in_use(store):
    for number, key in enumerate("abc"):
        fill(store, key, key * 1000)
        os.utime(store.place(key) / "entry.json", (number, number))
    one = store.entries()[0].size_bytes
    user = Store(store.root)
    assert user.get("a") is not None
    os.utime(store.place("a") / "entry.json", (0, 0))
    assert [entry.key for entry in store.entries() if entry.in_use] == ["a"]
    assert [entry.key for entry in store.collect(2 * one)] == ["b"]
    assert [entry.key for entry in store.collect(0)] == ["c"]
    del user
    assert [entry.key for entry in store.collect(0)] == ["a"] and list((store.root / "entries").iterdir()) == []


def test_gc_removes_damaged_entries_and_leftovers_first(store):
    for key in "ab":
        fill(store, key)
    (store.place("a") / "sub" / "file.txt").write_text("harmed")
    (store.root / "entries" / "making-b-12345678").mkdir()
    assert [entry.intact for entry in sorted(store.entries(verify=True), key=lambda entry: entry.key)] == [False, True]
    assert [entry.key for entry in store.collect(1 << 40)] == ["a"]
    assert [path.name for path in (store.root / "entries").iterdir()] == ["b"]


def test_a_store_that_can_only_be_read_still_answers(store):
    fill(store, "k")
    done = run_children(1, lambda _: read_only(store))
    assert done == [0]


def read_only(store):
    """As a user who may read only, which root cannot be."""
    for path in [store.root, *store.root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for path in store.root.parents:
        if path.stat().st_uid == os.getuid() and path != path.parent:
            path.chmod(0o755)
    if os.getuid() == 0:
        os.setuid(65534)
    reader = Store(store.root)
    found = reader.get("k")
    try:
        reader.obtain("other", lambda folder: os._exit(3))
    except OutputError as error:
        return 0 if found and "Permission denied" in str(error) else 4
    return 5


def test_publishing_replaces_an_older_bundle_in_one_step(tmp_path):
    place = tmp_path / "out" / "bundle"
    for text in ("old", "new"):
        with package.staging(place) as work:
            (work / "manifest.json").write_text(text)
            package.publish(work, place)
    assert (place / "manifest.json").read_text() == "new" and [path.name for path in place.parent.iterdir()] == ["bundle"]


def test_staging_sweeps_what_a_killed_process_left_but_not_what_another_holds(tmp_path):
    place = tmp_path / "out" / "bundle"

    def killed(_number):
        with package.staging(place) as work:
            (work / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_children(1, killed) == [-signal.SIGKILL] and len(list(place.parent.iterdir())) == 1
    with package.staging(place) as first, package.staging(place) as second:
        assert sorted(place.parent.iterdir()) == sorted([first, second])
    assert list(place.parent.iterdir()) == []


def test_difference_names_the_part():
    here, stored = {"a": {"b": 1, "c": [1, 2]}, "d": "x"}, {"a": {"b": 2, "c": [1]}, "d": "x"}
    assert difference(here, stored) == [{"part": "a.b", "here": 1, "stored": 2}, {"part": "a.c.1", "here": 2, "stored": "nothing"}]
