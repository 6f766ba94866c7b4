"""A bundle on disk: open it, and prove that it is what its manifest says.

manifest.json (schema 1), the part that this module reads:

    {"schema": 1, "name": "support-assistant",
     "model": {"kind": "decoder" | "encoder", "task": ..., "max_length": ..., "labels": [...], "pooling": ..., "normalize": ...},
     "files": [{"path": "model.onnx", "sha256": "<64 hex digits>", "bytes": 123}, ...]}

`files` lists every file of the bundle but manifest.json itself. Opening checks what is cheap (kinds and sizes); `verify_bundle` reads every byte.
A link or a path that leaves the directory is refused by both, before onnxruntime sees it: external data would be read from wherever it points.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from targets.errors import BundleError

MANIFEST = "manifest.json"
SCHEMA = 1
MISSING, EXTRA = "is missing", "is not in the manifest"
KINDS = ("decoder", "encoder")
NEEDED = {"decoder": ("model.onnx", "genai_config.json", "tokenizer.json"), "encoder": ("model.onnx", "tokenizer.json")}
REBUILD = "build it again with `trimtab compile`, or copy it again from where it was built"
_MANIFEST_CAP_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
REPORTS = ("report.html", "report.json", "README.md")  # written for people; no device needs them


@dataclass(frozen=True)
class FileEntry:
    """One row of the manifest's `files`: path with forward slashes, sha256 in hex, size in bytes."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `kind` is "decoder" or "encoder"; `model` is the manifest's section of that name."""

    directory: Path
    manifest: Mapping[str, Any]
    kind: str
    files: tuple[FileEntry, ...]

    @property
    def name(self) -> str:
        return str(self.manifest.get("name", self.directory.name))

    @property
    def model(self) -> Mapping[str, Any]:
        section: Mapping[str, Any] = self.manifest["model"]
        return section

    @property
    def model_path(self) -> Path:
        return self.directory / "model.onnx"

    @property
    def prompt_path(self) -> Path | None:
        """The graph for runs of many tokens (`quantize.prompts`), where there is one."""
        return self.directory / "prompt.onnx" if self.model.get("prompts") else None

    @property
    def size_bytes(self) -> int:
        """Bytes of all files that the manifest lists."""
        return sum(entry.size_bytes for entry in self.files)

    @property
    def device_bytes(self) -> int:
        """Bytes that a device needs: all files that the manifest lists but the reports."""
        return sum(entry.size_bytes for entry in self.files if entry.path not in REPORTS)

    @property
    def model_bytes(self) -> int:
        """Bytes of the graphs and their external data: what a peer's table calls the file size."""
        return sum(entry.size_bytes for entry in self.files if entry.path.split("/")[-1].startswith(("model.onnx", "prompt.onnx")))

    def read_json(self, name: str, *, optional: bool = False) -> dict[str, Any]:
        """The JSON object in file `name`; {} when it is absent and `optional`. Raises BundleError."""
        path = self.directory / name
        if optional and not path.is_file():
            return {}
        return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB. Raises BundleError when it is missing, too big, or no object."""
    try:
        if path.stat().st_size > _MANIFEST_CAP_BYTES:
            raise BundleError(str(path), expected=f"at most {_MANIFEST_CAP_BYTES} bytes", found=f"{path.stat().st_size}", remedy=REBUILD)
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(str(path), expected="a readable file", found=error.strerror or str(error), remedy=REBUILD) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(str(path), expected="a JSON object", found=str(error), remedy=REBUILD, code="MANIFEST") from error
    if not isinstance(value, dict):
        raise BundleError(str(path), expected="a JSON object", found=type(value).__name__, remedy=REBUILD, code="MANIFEST")
    return value


def open_bundle(directory: Path) -> Bundle:
    """Open a bundle and check what costs no reading: manifest, kind, presence, file kinds and sizes. Raises BundleError."""
    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        found = "no such directory" if not directory.exists() else "a file" if directory.is_file() else "none"
        raise BundleError(
            str(directory), expected=f"a bundle: a directory with a {MANIFEST}", found=found, remedy="name the directory that `trimtab compile` wrote"
        )
    manifest = read_json_object(directory / MANIFEST)
    place = str(directory / MANIFEST)
    schema = manifest.get("schema")
    if schema != SCHEMA:
        code = "SCHEMA_NEWER" if isinstance(schema, int) and schema > SCHEMA else "MANIFEST"
        raise BundleError(f"{place}: schema", expected=str(SCHEMA), found=repr(schema), remedy="open it with the version of trimtab that wrote it", code=code)
    model = manifest.get("model")
    kind = model.get("kind") if isinstance(model, dict) else None
    if kind not in KINDS:
        raise BundleError(f"{place}: model.kind", expected=" or ".join(KINDS), found=repr(kind), remedy=REBUILD, code="MANIFEST")
    files = _entries(manifest, place)
    listed = {entry.path for entry in files}
    faults = [f"{name} is not listed" for name in NEEDED[kind] if name not in listed]
    faults += [fault for entry in files if (fault := _shape_fault(directory, entry))]
    if faults:
        raise BundleError(str(directory), expected="every file of its manifest", found="; ".join(faults), remedy=REBUILD, code=_code(faults))
    return Bundle(directory, manifest, kind, files)


def verify_bundle(directory: Path) -> list[FileEntry]:
    """Read every byte of a bundle and compare it with the manifest; returns the files that were proven.

    All faults are told in one BundleError: missing, altered, of another size, not listed, a link, no regular file.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).is_file() or (directory / MANIFEST).is_symlink():
        raise BundleError(str(directory), expected=f"a directory with a {MANIFEST}", found="none", remedy="name the directory that `trimtab compile` wrote")
    files = _entries(read_json_object(directory / MANIFEST), str(directory / MANIFEST))
    faults = []
    for entry in files:
        fault = _shape_fault(directory, entry) or ("" if sha256_of(directory / entry.path) == entry.sha256 else f"{entry.path} is altered (its sha256 differs)")
        if fault:
            faults.append(fault)
    listed = {entry.path for entry in files} | {MANIFEST}
    faults += [f"{path} {EXTRA}" for path in _walk(directory) if path not in listed]
    if faults:
        remedy = f"do not deploy it; {REBUILD}"
        raise BundleError(str(directory), expected="exactly the files of its manifest", found="; ".join(faults), remedy=remedy, code=_code(faults))
    open_bundle(directory)
    return list(files)


def _code(faults: list[str]) -> str:
    """The gravest: what was changed, then what is gone, then what was added."""
    if any(not fault.endswith((MISSING, EXTRA)) for fault in faults):
        return "BUNDLE_DIGEST"
    return "BUNDLE_MISSING" if any(fault.endswith(MISSING) for fault in faults) else "BUNDLE_EXTRA"


def sha256_of(path: Path) -> str:
    """sha256 of a regular file in hex. A link is not followed. Raises BundleError."""
    digest = hashlib.sha256()
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise BundleError(str(path), expected="a readable regular file", found=error.strerror or str(error), remedy=REBUILD) from error
    return digest.hexdigest()


def _entries(manifest: Mapping[str, Any], place: str) -> tuple[FileEntry, ...]:
    rows = manifest.get("files")
    if not isinstance(rows, list) or not rows:
        raise BundleError(f"{place}: files", expected="a list of {path, sha256, bytes}", found=repr(rows)[:60], remedy=REBUILD, code="MANIFEST")
    entries = [_entry(row, f"{place}: files[{index}]") for index, row in enumerate(rows)]
    folded = [entry.path.casefold() for entry in entries]
    twice = sorted({path for path in folded if folded.count(path) > 1})
    if twice:
        raise BundleError(f"{place}: files", expected="each path once", found=f"{', '.join(twice)} twice", remedy=REBUILD, code="MANIFEST")
    return tuple(entries)


def _entry(row: Any, place: str) -> FileEntry:
    if not isinstance(row, dict) or not isinstance(row.get("path"), str):
        raise BundleError(place, expected="{path, sha256, bytes}", found=repr(row)[:60], remedy=REBUILD, code="MANIFEST")
    path, digest, size = row["path"], row.get("sha256"), row.get("bytes")
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path or "\0" in path or PurePosixPath(path).as_posix() != path:
        raise BundleError(
            place, expected="a path inside the bundle", found=repr(path), remedy="do not open it: it names a file that is not its own", code="BUNDLE_PATH"
        )
    if not isinstance(digest, str) or len(digest) != 64 or not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise BundleError(place, expected="a sha256 of 64 hex digits and a size in bytes", found=f"{digest!r}, {size!r}", remedy=REBUILD, code="MANIFEST")
    return FileEntry(path, digest.lower(), size)


def _shape_fault(directory: Path, entry: FileEntry) -> str:
    """What is wrong with a listed file short of reading it; "" when nothing is."""
    current = directory
    for part in entry.path.split("/"):
        current = current / part
        if current.is_symlink():
            return f"{entry.path} is a link or lies behind one"
    try:
        status = os.lstat(current)
    except (FileNotFoundError, NotADirectoryError):
        return f"{entry.path} {MISSING}"
    if not stat.S_ISREG(status.st_mode):
        return f"{entry.path} is not a regular file"
    return "" if status.st_size == entry.size_bytes else f"{entry.path} has {status.st_size} bytes, not {entry.size_bytes}"


def _walk(directory: Path) -> Iterator[str]:
    """Paths of everything below `directory` that is not a directory, with forward slashes, sorted; links are not followed."""
    for folder, names, files in os.walk(directory, followlinks=False):
        names.sort()
        links = [name for name in names if (Path(folder) / name).is_symlink()]
        for name in sorted(files + links):
            yield (Path(folder) / name).relative_to(directory).as_posix()


def drop_from_cache(directory: Path) -> None:
    """Ask the system to forget a folder's files, so that they are read from storage again. Advice: a system without it leaves them cached."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in (path for path in directory.iterdir() if path.is_file()):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
