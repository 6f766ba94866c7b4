"""Package: exported files + records + reports -> a bundle, whole or not at all.

The bundle is put together in a folder beside its place, measured and judged there, closed with a manifest that lists
every file, synced, and renamed. What is published is byte for byte what was measured.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compiler.errors import OutputError
from compiler.stages.export import SUMMARY
from compiler.store import ENTRY, file_digest, sync_tree, writing
from runtimes.bundle import REPORTS

NOT_IN_DIGEST = frozenset((*REPORTS, "selftest.json"))


@contextmanager
def staging(place: Path) -> Iterator[Path]:
    """A folder beside `place` that is gone afterwards, unless `publish` has moved it. Raises OutputError."""
    with writing(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def assemble(exported: Path, work: Path) -> None:
    """Copy the exported files into the staging folder. The store keeps its own copy, so a bundle may be edited without harm to it."""
    with writing(work):
        for path in sorted(exported.iterdir()):
            if path.name not in (SUMMARY, ENTRY):
                shutil.copyfile(path, work / path.name)


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
    """Rename the finished folder to its place. An older bundle there is replaced; anything else is an OutputError."""
    with writing(place):
        work.chmod(0o755)
        sync_tree(work)
        if place.exists() or place.is_symlink():
            if not (place / "manifest.json").is_file():
                raise OutputError(str(place), expected="nothing, or an older bundle", found="something else", remedy="move it away or choose another --out")
            old = Path(tempfile.mkdtemp(prefix=f".{place.name}-old-", dir=place.parent))
            place.rename(old / "bundle")
            work.rename(place)
            shutil.rmtree(old, ignore_errors=True)
        else:
            work.rename(place)
