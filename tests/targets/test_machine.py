"""Facts of the machine, and the limits of control groups, from files written for the purpose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from targets import machine
from targets.machine import cpu_quota, this_machine, usable_memory, usable_threads


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
    ],
)
def test_processor_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    root = put(tmp_path, files)
    assert cpu_quota(root) == quota
    if quota is not None:
        assert usable_threads(root) <= max(1, round(quota + 0.5))


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"memory.max": "536870912"}, 536870912),
        ({"memory.max": "max"}, None),
        ({"memory/memory.limit_in_bytes": "268435456"}, 268435456),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
)
def test_memory_limit(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    free = usable_memory(tmp_path / "nothing")
    assert usable_memory(put(tmp_path, files)) == (free if limit is None else limit)


def test_the_fingerprint_holds_still_and_moves_with_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    real = this_machine()
    own = machine.fingerprint()
    assert own == machine.fingerprint() and len(own) == 16

    def of(**changes: object) -> str:
        monkeypatch.setattr(machine, "this_machine", lambda: replace(real, **changes))  # type: ignore[arg-type]
        return machine.fingerprint()

    assert of() == own
    assert of(isa=tuple(reversed(real.isa))) == own
    assert own != of(cores=real.cores + 1) and own != of(isa=(*real.isa, "amx_int8")) and own != of(memory_bytes=real.memory_bytes * 2)
    monkeypatch.setattr(machine, "onnxruntime_version", lambda: "9.9.9")
    assert of() != own


def test_memory_classes_ignore_small_change() -> None:
    real = this_machine()
    size = 24 << 30
    assert replace(real, memory_bytes=size).memory_class == replace(real, memory_bytes=size - (200 << 20)).memory_class
    assert replace(real, memory_bytes=size).memory_class != replace(real, memory_bytes=size // 2).memory_class
