"""`Record`: what one step read, wrote and measured. The manifest is the list of them."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
    """One step's account. `seconds` and `peak_rss_mb` describe this run and stay out of the bundle's digest."""

    stage: str
    key: str
    read: Sequence[str]
    wrote: Sequence[str]
    measured: Mapping[str, Any]
    cached: bool = False
    seconds: float = 0.0
    peak_rss_mb: float = 0.0
    versions: Mapping[str, str] = field(default_factory=versions)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
