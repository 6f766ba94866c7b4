"""Facts about the machine this process runs on, without measuring: what is here, what this process may use, and who it is.

Three sources, the nearest to the truth first: the process's own limits (affinity, control groups), the system (psutil, /proc), archspec's names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# The instruction sets that onnxruntime's kernels (MLAS) dispatch on, by the name used in profiles, with their names in /proc/cpuinfo.
ISA_FLAGS = {
    "avx2": ("avx2",),
    "fma": ("fma",),
    "f16c": ("f16c",),
    "avx_vnni": ("avx_vnni",),
    "avx512f": ("avx512f",),
    "avx512bw": ("avx512bw",),
    "avx512dq": ("avx512dq",),
    "avx512vl": ("avx512vl",),
    "avx512_vnni": ("avx512_vnni", "avx512vnni"),
    "avx512_bf16": ("avx512_bf16",),
    "amx_int8": ("amx_int8",),
    "amx_bf16": ("amx_bf16",),
    "asimd": ("asimd", "neon"),
    "asimddp": ("asimddp",),
    "i8mm": ("i8mm",),
    "bf16": ("bf16",),
    "sve": ("sve",),
    "sve2": ("sve2",),
    "sme2": ("sme2",),
}
# With one of them a product of uint8 and int8 is added in 32 bits (vpdpbusd, tdpbusd, umlal, usdot); x86 without takes two in 16 (vpmaddubsw), and saturates.
ISA_OF_WIDE_SUMS = ("avx_vnni", "avx512_vnni", "amx_int8", "asimd")
CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as a number near 2**63


@dataclass(frozen=True)
class Machine:
    """cores: physical cores that this process may use; threads: logical ones. memory_bytes: what it may use, the machine's or the control group's."""

    vendor: str
    model: str
    uarch: str
    isa: tuple[str, ...]
    cores: int
    threads: int
    memory_bytes: int
    system: str

    @property
    def memory_class(self) -> float:
        """Memory in steps of half a power of two: the same for a machine that reports a few MB more after an update."""
        return round(2 * math.log2(max(self.memory_bytes, 1) / 2**30)) / 2


def sums_in_32_bits(isa: Iterable[str]) -> bool:
    """Whether onnxruntime's products of 8-bit integers cannot saturate on a processor with these instruction sets, whatever the weights are."""
    return not set(ISA_OF_WIDE_SUMS).isdisjoint(isa)


def this_machine() -> Machine:
    """Read the facts; takes some milliseconds."""
    import archspec.cpu

    host = archspec.cpu.host()
    details = _cpuinfo(Path("/proc/cpuinfo"))
    flags = set(details.get("flags", details.get("Features", "")).split()) or set(host.features)
    vendor = details.get("vendor_id") or str(host.vendor)
    model = details.get("model name") or platform.processor() or platform.machine()
    numbers = [details[key] for key in ("cpu family", "model", "CPU implementer", "CPU part") if key in details]
    threads = usable_threads()
    return Machine(
        vendor=vendor,
        model=" ".join([model, *(f"[{'/'.join(numbers)}]" for _ in numbers[:1])]),
        uarch=str(host.name),
        isa=tuple(name for name, known in ISA_FLAGS.items() if flags.intersection(known)),
        cores=usable_cores(),
        threads=threads,
        memory_bytes=usable_memory(),
        system=f"{platform.system()}/{platform.machine()}",
    )


def usable_threads(root: Path = CGROUP) -> int:
    """Logical processors that this process may use: its affinity, and the control group's quota rounded up."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return max(1, own if quota is None else min(own, math.ceil(quota)))


def usable_cores(root: Path = CGROUP) -> int:
    """Physical cores that this process may use: two threads of one core share what matrix kernels need."""
    return max(1, min(usable_threads(root), _physical_cores()))


def usable_memory(root: Path = CGROUP) -> int:
    """Bytes that this process may use: the machine's memory, or the control group's limit when that is less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limits = [int(text) for name in ("memory.max", "memory/memory.limit_in_bytes") for text in _group_values(root, name) if text.isdigit()]
    return min([total, *(limit for limit in limits if limit < _UNLIMITED_BYTES)])


def cpu_quota(root: Path = CGROUP) -> float | None:
    """Processors that the control group grants, e.g. 1.5; None without a quota."""
    quotas = []
    for text in _group_values(root, "cpu.max"):  # "150000 100000" or "max 100000"
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit():
            quotas.append(int(quota) / int(period))
    for quota, period in zip(_group_values(root, "cpu/cpu.cfs_quota_us"), _group_values(root, "cpu/cpu.cfs_period_us"), strict=False):
        if quota.isdigit() and period.isdigit():  # "-1" is no quota
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def fingerprint() -> str:
    """Who this machine is, for "was this number measured here?": the same after a reboot, another after a change that moves latencies.

    Over: processor (vendor, model, instruction sets), cores and memory class that this process may use, system, version of onnxruntime.
    """
    machine = this_machine()
    parts = {
        "vendor": machine.vendor,
        "model": machine.model,
        "isa": sorted(machine.isa),
        "cores": machine.cores,
        "threads": machine.threads,
        "memory_class": machine.memory_class,
        "system": machine.system,
        "onnxruntime": onnxruntime_version(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def onnxruntime_version() -> str:
    """The installed version, read without importing it; "" when there is none."""
    try:
        return metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:
        return ""


def cache_folder() -> Path:
    """Where trimtab keeps what it can make again: $TRIMTAB_CACHE, or trimtab in the user's cache folder."""
    named = os.environ.get("TRIMTAB_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"


def _physical_cores() -> int:
    import psutil

    return int(psutil.cpu_count(logical=False) or os.cpu_count() or 1)


def _cpuinfo(path: Path) -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo; {} where there is no such file."""
    if not path.exists():
        return {}
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() not in found:
            found[name.strip()] = value.strip()
    return found


def _group_values(root: Path, name: str) -> list[str]:
    """A control-group file's first line, at the mount and in this process's own groups up to it."""
    own = Path("/proc/self/cgroup")
    groups = [line.split(":", 2)[2].strip("/") for line in own.read_text().splitlines() if line.count(":") >= 2] if own.exists() else []
    controller, _, leaf = name.rpartition("/")
    folders = {root / controller}
    for group in groups:
        folder = root / controller / group
        folders.update(path for path in (folder, *folder.parents) if path.is_relative_to(root / controller))
    values = []
    for folder in sorted(folders):
        try:
            values.append((folder / leaf).read_text().strip())
        except OSError:  # not there, or not ours to read: no limit that we can know
            continue
    return values
