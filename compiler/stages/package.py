"""Package: exported files + records + reports -> a bundle, whole or not at all.

The bundle is put together in a folder beside its place, measured and judged there, closed with a manifest that lists
every file, synced, and renamed. What is published is byte for byte what was measured.
"""

from __future__ import annotations

import ctypes
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from compiler.errors import OutputError
from compiler.stages.export import SUMMARY
from compiler.store import ENTRY, file_digest, locked, read_entry, sync, sync_tree, writing
from runtimes.bundle import REPORTS

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
NOT_IN_DIGEST = frozenset((*REPORTS, "selftest.json"))


@contextmanager
def staging(place: Path) -> Iterator[Path]:
    """A folder beside `place` that is gone afterwards, unless `publish` has moved it. Raises OutputError.

    It is locked for as long as this process lives; what processes that died left of the same place is removed on the way in.
    """
    with ExitStack() as held:
        with writing(place.parent):
            place.parent.mkdir(parents=True, exist_ok=True)
            with locked(place.parent):
                _sweep(place)
                work = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
                held.callback(shutil.rmtree, work, ignore_errors=True)
                held.enter_context(locked(work))
        yield work


def _sweep(place: Path) -> None:
    """Staging folders of `place` that no process holds."""
    for leftover in place.parent.glob(f".{glob.escape(place.name)}-????????"):
        with locked(leftover, wait=False) as free:
            if free:
                shutil.rmtree(leftover, ignore_errors=True)


def require_writable(folder: Path) -> None:
    """Make the folder and a file in it, before heavy work whose result could not be kept. Raises OutputError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def assemble(exported: Path, work: Path) -> None:
    """Copy the exported files into the staging folder. The store keeps its own copy, so a bundle may be edited without harm to it.

    Raises OutputError, also for a copy that is not what the store wrote.
    """
    known = read_entry(exported).get("files", {})
    with writing(work):
        for path in sorted(exported.iterdir()):
            if path.name not in (SUMMARY, ENTRY):
                shutil.copyfile(path, work / path.name)
                if path.name in known and file_digest(work / path.name) != known[path.name][1]:
                    raise OutputError(
                        str(path), expected="the file that was stored", found="other bytes", remedy="check the disk, then run again", code="CACHE"
                    )


def write_manifest(work: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """manifest.json over every file in the folder; `facts` are name, target, model, lineage and records. Returns the manifest.

    digest  sha256 over the sorted (path, sha256) of what determines answers: graph, weights, tokenizer, template, configs
    """
    with writing(work):
        files = [
            {"path": path.name, "sha256": file_digest(path), "bytes": path.stat().st_size} for path in sorted(work.iterdir()) if path.name != "manifest.json"
        ]
        manifest = {"schema": 1, **facts, "digest": content_digest(files), "files": files}
        (work / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return manifest


def content_digest(files: list[dict[str, Any]]) -> str:
    """The identity of a bundle's behaviour; reports, README and canaries stay out."""
    import hashlib

    rows = sorted((row["path"], row["sha256"]) for row in files if row["path"] not in NOT_IN_DIGEST)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def device_bytes(work: Path) -> int:
    """Bytes that a device needs: all but reports and the manifest."""
    return sum(path.stat().st_size for path in work.iterdir() if path.name not in REPORTS and path.name != "manifest.json")


def publish(work: Path, place: Path) -> None:
    """Rename the finished folder to its place. An older bundle there is replaced in one step; anything else is an OutputError."""
    with writing(place):
        work.chmod(0o755)
        sync_tree(work)
        with locked(place.parent):
            if not (place.exists() or place.is_symlink()):
                work.rename(place)
            elif not (place / "manifest.json").is_file():
                raise OutputError(str(place), expected="nothing, or an older bundle", found="something else", remedy="move it away or choose another --out")
            else:
                _exchange(work, place)
            sync(place.parent)


def _exchange(new: Path, old: Path) -> None:
    """Both names at once: whoever looks finds the older bundle or the new one. `new` then names what was there before.

    Python has no call for it; where the system has none either (not Linux, or a file system without it), there is a moment in which the place is empty.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0:
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{old.name}-", dir=old.parent))
    old.rename(aside / "bundle")
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)
