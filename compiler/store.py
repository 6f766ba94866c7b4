"""`Store`: results of steps, found again by what they were made from.

A key is sha256 over named parts (contents, parameters, library versions; never paths or times). An entry is a folder
that is written beside its place, closed with `entry.json` (every file's sha256 and size), synced, and renamed: it is
there whole or not at all. What is read is verified first; a damaged entry is removed and made again. Failures are
never stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiler.errors import OutputError
from targets.machine import cache_folder

ENTRY = "entry.json"


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
        remedy = "free some space" if error.errno in (28, 122) else "check the folder and its permissions"
        raise OutputError(str(place), expected="a place to write", found=reason, remedy=remedy) from error


def sync_tree(directory: Path) -> None:
    """fsync every file and folder below, so that the rename that follows publishes what was written."""
    for path in [*sorted(directory.rglob("*")), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True)
class Store:
    """A folder of entries. `Store.default()` is $TRIMTAB_CACHE, or trimtab in the user's cache folder."""

    root: Path

    @staticmethod
    def default() -> Store:
        return Store(cache_folder())

    def place(self, key: str) -> Path:
        return self.root / "entries" / key

    def get(self, key: str) -> Path | None:
        """The entry's folder, verified, or None. A damaged entry is removed: it will be made again."""
        place = self.place(key)
        if not place.is_dir():
            return None
        if self._intact(place):
            return place
        shutil.rmtree(place, ignore_errors=True)
        return None

    @contextmanager
    def make(self, key: str) -> Iterator[Path]:
        """A folder to fill; on leaving without an error it becomes the entry. Raises OutputError."""
        place = self.place(key)
        with writing(place.parent):
            place.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix="making-", dir=place.parent))
        try:
            with writing(work):
                yield work
                rows = {str(path.relative_to(work)): [path.stat().st_size, file_digest(path)] for path in sorted(work.rglob("*")) if path.is_file()}
                (work / ENTRY).write_text(json.dumps(rows, sort_keys=True))
                sync_tree(work)
                try:
                    work.rename(place)
                except OSError:
                    if self.get(key) is None:  # not another process that made the same entry first
                        raise
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _intact(self, place: Path) -> bool:
        try:
            rows = json.loads((place / ENTRY).read_text())
            return all((place / name).stat().st_size == size and file_digest(place / name) == digest for name, (size, digest) in rows.items())
        except (OSError, ValueError):
            return False
