"""Run as a smaller machine would: fewer cores, less memory. What is measured so is an emulation, and says so wherever it is told.

cores    affinity: the process and its threads stay on so many physical cores (all threads of each where the target has more threads than cores)
memory   a control group of its own where one may be made (resident pages, files included); else RLIMIT_DATA, which counts private writable memory whether
         it was touched or not, and so stops a process a little early

    python -m runtimes.confine CORES THREADS BYTES COMMAND...

imposes it on itself and becomes COMMAND with what was imposed as its last argument, so that every page of COMMAND counts from the beginning.

Caches, clocks, memory bandwidth and instruction sets stay those of the machine: a figure so measured is no verdict about the target.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from targets.errors import TargetError
from targets.machine import usable_cores, usable_memory
from targets.profile import Profile

CPUS = Path("/sys/devices/system/cpu")
GROUPS = Path("/sys/fs/cgroup")
PREFIX = "trimtab-"


@dataclass(frozen=True)
class Confinement:
    """What to impose: physical cores (0: all), logical processors of them (0: one a core), bytes of memory (0: all)."""

    cores: int = 0
    threads: int = 0
    memory_bytes: int = 0

    @property
    def needed(self) -> bool:
        return bool(self.cores or self.memory_bytes)

    @property
    def told(self) -> str:
        """ "1 core, 2.1 GB of memory"."""
        parts = [f"{self.cores} core{'s' if self.cores > 1 else ''}" if self.cores else "", f"{self.memory_bytes / 1e9:.3g} GB" if self.memory_bytes else ""]
        return ", ".join(part for part in parts if part)


def confinement(profile: Profile) -> Confinement:
    """What makes this machine as small as the profile, where it is larger; nothing where it is not, or where the profile is this machine."""
    if profile.is_here:
        return Confinement()
    cores = profile.cores if 0 < profile.cores < usable_cores() else 0
    memory = profile.memory_bytes if 0 < profile.memory_bytes < usable_memory() else 0
    return Confinement(cores, profile.threads if cores else 0, memory)


def impose(asked: Confinement) -> list[str]:
    """Confine this process, before it opens anything. Returns what was done, in words. Raises TargetError where the system cannot."""
    done = []
    if asked.cores:
        if not hasattr(os, "sched_setaffinity"):
            remedy = "measure on Linux, or on the target itself"
            raise TargetError("emulation", expected="a system that binds processes to cores", found=os.name, remedy=remedy)
        chosen = processors(siblings(os.sched_getaffinity(0)), asked.cores, asked.threads)
        os.sched_setaffinity(0, chosen)
        done.append(f"{asked.cores} core{'s' if asked.cores > 1 else ''} by affinity ({len(chosen)} processor{'s' if len(chosen) > 1 else ''})")
    if asked.memory_bytes:
        done.append(f"{asked.memory_bytes / 1e9:.3g} GB of memory by {_limit_memory(asked.memory_bytes)}")
    return done


def processors(cores: Sequence[Sequence[int]], wanted: int, threads: int) -> list[int]:
    """Logical processors of `wanted` cores: [[0, 4], [1, 5]], 1, 2 -> [0, 4]; with 1 thread -> [0]. The first thread of each core comes first."""
    picked = list(cores[:wanted])
    order = [core[level] for level in range(max(map(len, picked), default=0)) for core in picked if level < len(core)]
    return order[: max(threads, len(picked))]


def siblings(allowed: set[int], root: Path = CPUS) -> list[list[int]]:
    """The logical processors that this process may use, by physical core; each its own core where the system does not say."""
    groups: dict[str, list[int]] = {}
    for number in sorted(allowed):
        file = root / f"cpu{number}" / "topology" / "thread_siblings_list"
        groups.setdefault(file.read_text().strip() if file.is_file() else str(number), []).append(number)
    return list(groups.values())


def _limit_memory(size: int) -> str:
    group = own_group(size)
    if group is not None:
        return "a control group"
    try:
        import resource
    except ImportError as error:
        raise TargetError("emulation", expected="a system that limits memory", found=os.name, remedy="measure on Linux, or on the target itself") from error
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    return "RLIMIT_DATA"


def own_group(size: int, root: Path = GROUPS) -> Path | None:
    """A control group that limits memory, this process in it; None where none may be made."""
    clean(root)
    for folder, known, limit in _controllers(root):
        if not known.is_file():
            continue
        group = folder / f"{PREFIX}{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(size))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:  # not ours to make: the caller has another way
            _remove(group)
            continue
        return group
    return None


def _controllers(root: Path) -> tuple[tuple[Path, Path, str], ...]:
    """Folder, a file that shows that it is one, and the file of the limit: control groups of version 2, then 1."""
    old = root / "memory"
    return (root, root / "cgroup.controllers", "memory.max"), (old, old / "memory.limit_in_bytes", "memory.limit_in_bytes")


def clean(root: Path = GROUPS) -> None:
    """Remove groups of processes that have ended."""
    for folder, _, _ in _controllers(root):
        for old in folder.glob(f"{PREFIX}*"):
            if not Path(f"/proc/{old.name.removeprefix(PREFIX)}").exists():
                _remove(old)


def _remove(group: Path) -> None:
    try:
        group.rmdir()
    except OSError:  # never made, or still in use
        return


def command(asked: Confinement, words: Sequence[str]) -> list[str]:
    """The command line that runs `words` so confined; itself where nothing is asked."""
    if not asked.needed:
        return list(words)
    return [sys.executable, "-m", "runtimes.confine", str(asked.cores), str(asked.threads), str(asked.memory_bytes), *words, "--emulated"]


def main(words: Sequence[str]) -> None:
    """Become the confined command."""
    cores, threads, size, *rest = words
    try:
        done = impose(Confinement(int(cores), int(threads), int(size)))
    except TargetError as error:
        print(json.dumps({"error": {"kind": "TargetError", "place": error.place, "expected": error.expected, "found": error.found, "remedy": error.remedy}}))
        sys.exit(error.exit_code)
    os.execv(rest[0], [*rest, "; ".join(done)])


if __name__ == "__main__":
    main(sys.argv[1:])
