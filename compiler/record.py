"""`Record`: what one step read, wrote and measured. The manifest is the list of them."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtimes.bench import peak_rss_bytes

TOOLS = ("trimtab", "numpy", "onnxruntime", "onnx-ir", "torch", "transformers", "gguf", "safetensors", "tokenizers", "peft")


def versions(names: Sequence[str] = TOOLS) -> dict[str, str]:
    """Installed versions by distribution name; absent ones are left out."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, MB (1e6 bytes)."""
    return peak_rss_bytes() / 1e6


@dataclass(frozen=True)
class Record:
    """One step's account. `seconds`, `cpu_seconds`, `peak_rss_mb` and `bytes` describe this run and stay out of the bundle's digest.

    cpu_seconds  processor time of this process and the ones that it started, all cores together: what energy follows
    bytes        written by the step, where it wrote files
    """

    stage: str
    key: str
    read: Sequence[str]
    wrote: Sequence[str]
    measured: Mapping[str, Any]
    cached: bool = False
    seconds: float = 0.0
    peak_rss_mb: float = 0.0
    versions: Mapping[str, str] = field(default_factory=versions)
    cpu_seconds: float = 0.0
    bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


RUN_FACTS = ("seconds", "cpu_seconds", "peak_rss_mb", "bytes", "cached")  # of a Record: they differ from run to run


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start, self._cpu = time.perf_counter(), _cpu_seconds()

    @property
    def cpu_seconds(self) -> float:
        """Processor time of this process and of those that it started and that have ended."""
        return _cpu_seconds() - self._cpu

    @property
    def account(self) -> dict[str, Any]:
        """What a Record says of this run."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "peak_rss_mb": peak_rss_mb()}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def tree_bytes(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
