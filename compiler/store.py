"""`Store`: results of steps, found again by what they were made from.

A key is sha256 over named parts (contents, parameters, library versions; never paths or times). An entry is a folder
that is written beside its place, closed with `entry.json` (its key, its parts, every file's sha256 and size, and its own), synced, and
renamed: it is there whole or not at all. What is read is verified first; a damaged entry is removed and made again. Failures
are never stored.

Processes share a store without harm: one makes a key while the others wait for it (an exclusive lock on `locks/KEY`), and who uses
an entry holds a shared lock on its `entry.json`, so that `gc` leaves it alone. The kernel releases both when a process dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compiler.errors import OutputError
from targets.machine import cache_folder

ENTRY = "entry.json"
SCHEMA = 3  # of entry.json
MAKING = "making-"
SCRATCH, IN_USE = "scratch", ".in-use"


def cache_key(parts: Mapping[str, Any]) -> str:
    """sha256 (hex) over named parts, as canonical JSON. {"a": 1, "b": 2} and {"b": 2, "a": 1} have one key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what the system says about a failed write into an OutputError that names the place."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        full = error.errno in (28, 122)
        remedy = "free some space" if full else "check the folder and its permissions"
        raise OutputError(str(place), expected="a place to write", found=reason, remedy=remedy, code="DISK_FULL" if full else "") from error


def sync_tree(directory: Path) -> None:
    """fsync every file and folder below, so that the rename that follows publishes what was written."""
    for path in [*sorted(directory.rglob("*")), directory]:
        sync(path)


def sync(path: Path) -> None:
    """fsync one file or folder: a rename lasts once the folder that holds the name is synced."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """An exclusive lock on a file or folder, made as a file where there is none; whether it was got (always, unless `wait` is off)."""
    handle = os.open(path, os.O_RDONLY if path.exists() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Entry:
    """One row of a store. parts: what its key is made of, `{}` for a damaged entry. in_use: some process reads it now."""

    key: str
    stage: str
    size_bytes: int
    used: float  # seconds since the epoch, of the last use
    in_use: bool
    intact: bool | None  # None: not looked at
    parts: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Store:
    """A folder of entries. `Store.default()` is $TRIMTAB_CACHE, or trimtab in the user's cache folder."""

    root: Path
    _pins: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        weakref.finalize(self, _close_all, self._pins)

    @staticmethod
    def default() -> Store:
        return Store(cache_folder())

    def place(self, key: str) -> Path:
        return self.root / "entries" / key

    def get(self, key: str) -> Path | None:
        """The entry's folder, verified and in use from now on, or None. A damaged entry is removed: it will be made again."""
        place = self.place(key)
        if not place.is_dir():
            return None
        self._pin(key)
        if intact(place):
            with suppress(OSError):  # a store that is only read keeps no time of use
                os.utime(place / ENTRY)
            return place
        self._release(key)
        shutil.rmtree(place, ignore_errors=True)
        return None

    def obtain(self, key: str, fill: Callable[[Path], object], parts: Mapping[str, Any] | None = None) -> Path:
        """The entry's folder, filled by `fill` unless it is there. Of several processes that ask at once one fills it, the others wait.

        Raises OutputError, and what `fill` raises.
        """
        found = self.get(key)
        if found is not None:
            return found
        with ExitStack() as held:
            with writing(self.root):
                held.enter_context(self._locked(key))
            found = self.get(key)
            if found is not None:
                return found
            for leftover in (self.root / "entries").glob(f"{MAKING}{key}-*"):  # of a process that died: the key is ours now
                shutil.rmtree(leftover, ignore_errors=True)
            with self.make(key, parts) as work:
                fill(work)
            made = self.get(key)
        if made is None:
            place = str(self.place(key))
            raise OutputError(place, expected="the entry that was written", found="none, or a damaged one", remedy="check the disk, then run again")
        return made

    @contextmanager
    def make(self, key: str, parts: Mapping[str, Any] | None = None) -> Iterator[Path]:
        """A folder to fill; on leaving without an error it becomes the entry. Raises OutputError."""
        place = self.place(key)
        with writing(place.parent):
            place.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f"{MAKING}{key}-", dir=place.parent))
        try:
            with writing(work):
                yield work
                rows = {str(path.relative_to(work)): [path.stat().st_size, file_digest(path)] for path in sorted(work.rglob("*")) if path.is_file()}
                entry = {"schema": SCHEMA, "key": key, "parts": dict(parts or {}), "files": rows}
                (work / ENTRY).write_text(sealed(entry))
                sync_tree(work)
                try:
                    work.rename(place)
                except OSError:
                    if self.get(key) is None:  # not another process that made the same entry first
                        raise
                sync(place.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    @contextmanager
    def scratch(self, key: str) -> Iterator[Path]:
        """A folder for what a step keeps on its way, to go on from when it is killed; in use while inside, so that `collect` leaves it."""
        folder = self.root / SCRATCH / key
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / IN_USE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
            yield folder
        finally:
            os.close(handle)

    def forget(self, key: str) -> None:
        """Remove a scratch folder: the step is done."""
        shutil.rmtree(self.root / SCRATCH / key, ignore_errors=True)

    def entries(self, verify: bool = False) -> list[Entry]:
        """Every entry, the last used first; `verify` reads every byte. Changes nothing."""
        folder = self.root / "entries"
        places = [place for place in sorted(folder.iterdir()) if not place.name.startswith(MAKING)] if folder.is_dir() else []
        return sorted((self._entry(place, verify) for place in places), key=lambda entry: -entry.used)

    def collect(self, most_bytes: int) -> list[Entry]:
        """Remove damaged entries, leftovers of processes that died, and the least used entries until `most_bytes` are left. What is in use stays.

        Returns what was removed.
        """
        for leftover in (self.root / "entries").glob(f"{MAKING}*"):
            key = leftover.name.removeprefix(MAKING).rpartition("-")[0]
            with writing(self.root), self._locked(key, wait=False) as mine:
                if mine:
                    shutil.rmtree(leftover, ignore_errors=True)
        found = self.entries(verify=True)
        held, removed = sum(entry.size_bytes for entry in found), []
        for folder in (self.root / SCRATCH).glob("*"):
            size = sum(path.lstat().st_size for path in folder.rglob("*"))
            with locked(folder / IN_USE, wait=False) as free:
                if free and held + size > most_bytes:
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    held += size
        for entry in sorted(found, key=lambda entry: (bool(entry.intact), entry.used)):
            if (entry.intact and held <= most_bytes) or not self._remove(entry):
                continue
            held -= entry.size_bytes
            removed.append(entry)
        return removed

    def _entry(self, place: Path, verify: bool) -> Entry:
        told = read_entry(place)
        size = sum(path.lstat().st_size for path in place.rglob("*") if not path.is_dir())
        used = (place / ENTRY).stat().st_mtime if told else 0.0
        parts = told.get("parts", {})
        return Entry(place.name, str(parts.get("stage", "?")), size, used, bool(told) and self._in_use(place), intact(place) if verify else None, parts)

    def _in_use(self, place: Path) -> bool:
        with locked(place / ENTRY, wait=False) as free:
            return not free

    def _remove(self, entry: Entry) -> bool:
        place = self.place(entry.key)
        if not (place / ENTRY).is_file():
            shutil.rmtree(place, ignore_errors=True)
            return not place.exists()
        with locked(place / ENTRY, wait=False) as free:
            if free:  # renamed first: who looks for it now finds no entry, not half of one
                gone = place.with_name(f"{MAKING}{entry.key}-gone")
                with writing(place):
                    place.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
            return free

    @contextmanager
    def _locked(self, key: str, wait: bool = True) -> Iterator[bool]:
        (self.root / "locks").mkdir(parents=True, exist_ok=True)
        with locked(self.root / "locks" / key, wait) as mine:
            yield mine

    def _pin(self, key: str) -> None:
        """Hold a shared lock on the entry as long as this store object lives."""
        with suppress(OSError):
            while True:
                self._release(key)
                handle = os.open(self.place(key) / ENTRY, os.O_RDONLY)
                self._pins[key] = handle
                fcntl.flock(handle, fcntl.LOCK_SH)
                if os.path.samestat(os.fstat(handle), (self.place(key) / ENTRY).stat()):
                    return  # else it was removed, and perhaps made again, before the lock was ours

    def _release(self, key: str) -> None:
        handle = self._pins.pop(key, None)
        if handle is not None:
            os.close(handle)


def _close_all(pins: dict[str, int]) -> None:
    while pins:
        os.close(pins.popitem()[1])


def sealed(entry: Mapping[str, Any]) -> str:
    """Text of entry.json, which holds the sha256 of itself without that. {"key": "k"} -> {"key": "k", "seal": "..."}"""
    text = json.dumps(entry, sort_keys=True)
    return f'{text[:-1]}, "seal": "{hashlib.sha256(text.encode()).hexdigest()}"}}'


def read_entry(place: Path) -> dict[str, Any]:
    """entry.json of an entry, {} when a byte of it is another, or it is none for this folder's key."""
    try:
        text = (place / ENTRY).read_text()
        told = json.loads(text)
        told.pop("seal")
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return {}
    return told if text == sealed(told) and told["schema"] == SCHEMA and told["key"] == place.name else {}


def intact(place: Path) -> bool:
    """Whether an entry is what its entry.json says: its own key, exactly these files, no links, every byte."""
    told = read_entry(place)
    if not told:
        return False
    try:
        there = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_symlink() or not path.is_dir()}
        if there != {*told["files"], ENTRY} or any((place / name).is_symlink() for name in there):
            return False
        return all((place / name).stat().st_size == size and file_digest(place / name) == digest for name, (size, digest) in told["files"].items())
    except (OSError, ValueError, TypeError):
        return False
