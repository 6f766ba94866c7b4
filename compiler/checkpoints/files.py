"""Reading files by position, and the digest of their contents.

Positioned reads instead of a memory map: mapped pages count as resident memory, so a map of a large checkpoint would
grow the peak with the model, and a file cut short under a map is a crash instead of an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compiler.errors import CheckpointError

HASH_CHUNK_BYTES = 4 << 20
JSON_LIMIT_BYTES = 64 << 20
RESTORE = "restore the file from where the model came from"


Stamp = tuple[int, int, int]  # inode, bytes, modified (ns)


def stamp(path: Path) -> Stamp:
    """What changes when a file is replaced, cut or written to. Raises CheckpointError."""
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_at(path: Path, offset: int, count: int, seen: Stamp | None = None) -> np.ndarray:
    """`count` bytes of `path` from `offset`: uint8 [count]. Raises CheckpointError when the file is shorter or gone, or no longer the one that was `seen`."""
    data = np.empty(count, np.uint8)
    filled = 0
    try:
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if seen is not None and seen != (status.st_ino, status.st_size, status.st_mtime_ns):
                raise _changed(path, count, offset, status.st_size)
            file.seek(offset)
            while filled < count:
                got = file.readinto(data[filled:].data)
                if not got:
                    break
                filled += got
    except OSError as error:
        raise unreadable(path, error) from error
    if filled < count:
        raise CheckpointError(
            str(path), expected=f"{count} bytes at {offset}", found=f"{filled}: the file is truncated", remedy="copy or download the file again"
        )
    return data


def _changed(path: Path, count: int, offset: int, size: int) -> CheckpointError:
    found = f"{size}: the file is truncated" if size < offset + count else "a file that changed since its header was read"
    again = "copy or download the file again" if size < offset + count else "leave the file alone while it is compiled, then run again"
    return CheckpointError(str(path), expected=f"{count} bytes at {offset}", found=found, remedy=again, code="INPUT_CHANGED")


def unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        str(path), expected="a file that can be read", found=error.strerror or type(error).__name__, remedy="check the path and its permissions"
    )


def file_size(path: Path) -> int:
    """Bytes of a regular file, asked before it is opened: opening a pipe would wait for its writer. Raises CheckpointError."""
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(str(path), expected="a file", found="a folder, pipe or device", remedy="name the model's own files", code="FILE_KIND")
    return status.st_size


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`, of at most 64 MiB. `what` names the file's part for the message. Raises CheckpointError (`plain_json`)."""
    size = file_size(path)
    if size > JSON_LIMIT_BYTES:
        raise CheckpointError(str(path), expected=f"{what} of at most {JSON_LIMIT_BYTES} bytes", found=f"{size}", remedy=RESTORE, code="CONFIG_JSON")
    try:
        return plain_json(path.read_bytes(), str(path), what)
    except OSError as error:
        raise unreadable(path, error) from error


def plain_json(data: bytes, place: str, what: str) -> dict[str, Any]:
    """A JSON object without what JSON libraries read in different ways: a key twice, NaN and infinity. Raises CheckpointError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError(f"key {next(key for key, _ in pairs if [name for name, _ in pairs].count(key) > 1)!r} twice")
        return result

    def finite(word: str) -> float:
        raise ValueError(f"{word}, which is no JSON")

    try:
        value = json.loads(data, object_pairs_hook=once, parse_constant=finite)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        raise CheckpointError(place, expected=f"{what} in JSON", found=str(error), remedy=RESTORE, code="CONFIG_JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(place, expected=f"{what}: a JSON object", found=f"a {type(value).__name__}", remedy=RESTORE, code="CONFIG_JSON")
    return value


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(HASH_CHUNK_BYTES)
            while got := file.readinto(buffer):
                digest.update(memoryview(buffer)[:got])
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def sha256_parts(parts: Mapping[str, str]) -> str:
    """One digest over named digests, in name order: `{"config.json": "ab..", ...}` -> hex."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name}\0{parts[name]}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class FolderAssets(Mapping[str, bytes]):
    """Small files of a folder, read when asked for. names: relative paths with `/`."""

    folder: Path
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> bytes:
        if name not in self.names:
            raise KeyError(name)
        path = self.folder / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise unreadable(path, error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def beside(path: Path, tag: str) -> Path:
    """A name for a temporary sibling of `path`, on the same file system so that a rename publishes it."""
    return path.with_name(f".{path.name}.{tag}-{os.getpid()}")
