"""Reading files by position, and the digest of their contents.

Positioned reads instead of a memory map: mapped pages count as resident memory, so a map of a large checkpoint would
grow the peak with the model, and a file cut short under a map is a crash instead of an error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compiler.errors import CheckpointError

HASH_CHUNK_BYTES = 4 << 20


def read_at(path: Path, offset: int, count: int) -> np.ndarray:
    """`count` bytes of `path` from `offset`: uint8 [count]. Raises CheckpointError when the file is shorter or gone."""
    data = np.empty(count, np.uint8)
    filled = 0
    try:
        with path.open("rb", buffering=0) as file:
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


def unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        str(path), expected="a file that can be read", found=error.strerror or type(error).__name__, remedy="check the path and its permissions"
    )


def file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`. `what` names the file's part for the message. Raises CheckpointError."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        raise CheckpointError(str(path), expected=f"{what} in JSON", found=str(error), remedy="restore the file from where the model came from") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            str(path), expected=f"{what}: a JSON object", found=f"a {type(value).__name__}", remedy="restore the file from where the model came from"
        )
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
