"""`Profile`: what a machine is, and where each number comes from.

A number measured on one machine is never a verdict about another. So a profile carries for every field whether it was measured, taken from a data
sheet or assumed; and a fingerprint when it was measured, which says on which machine.

Units stand in the names. GB/s and GOP/s are 1e9; one multiply-add is two operations.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from targets.errors import TargetError
from targets.machine import cache_folder, fingerprint, onnxruntime_version, this_machine

__all__ = [
    "KernelTime",
    "Profile",
    "Provenance",
    "differences",
    "dump_profile",
    "fingerprint",
    "here",
    "list_profiles",
    "load_profile",
    "measured_here",
    "measured_place",
    "profile_from",
    "profile_names",
]

HERE = "here"
PROFILES = Path(__file__).parent / "profiles"
SOURCES = ("measured", "datasheet", "assumed")
IDENTITY = ("id", "description", "fingerprint", "kernels", "provenance")  # fields that need no source of their own
SIZE_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Provenance:
    """Where a field's value comes from. date: YYYY-MM-DD. spread: (highest - lowest) / median of the samples, for measured ones."""

    source: str
    note: str = ""
    date: str = ""
    samples: int = 0
    spread: float | None = None


@dataclass(frozen=True)
class KernelTime:
    """One row of the kernel table: `op` on [m, k] x [k, n] took `us`. bits and block: of the weights (32 and 0 for fp32, 8 and 0 for one scale per column).

    `targets.kernels` says what the columns hold for attention, norms and activations. context: tokens in the cache before these m. layers: of a chain, of
    which `us` is one.
    """

    op: str
    bits: int
    block: int
    k: int
    n: int
    m: int
    threads: int
    us: float
    symmetric: bool = True
    context: int = 0
    layers: int = 1

    @property
    def gop_s(self) -> float:
        return 2e-3 * self.m * self.k * self.n / self.us


@dataclass(frozen=True)
class Profile:
    """A machine. None: not known. isa: names that onnxruntime's kernels dispatch on (`targets.machine.ISA_FLAGS`)."""

    id: str
    vendor: str
    uarch: str
    isa: tuple[str, ...]
    cores: int
    threads: int
    memory_bytes: int
    description: str = ""
    system: str = ""
    model: str = ""
    read_gb_s: float | None = None  # all threads, from memory
    read_1_gb_s: float | None = None  # one thread
    fp32_gflop_s: float | None = None
    int8_gop_s: float | None = None
    storage_read_mb_s: float | None = None
    open_mb_s: float | None = None  # weights that a session makes ready a second, with the file in the system's cache
    parallel_us: float | None = None  # starting and joining all threads once, inside an operator
    run_us: float | None = None  # one run of a session, beside its operators
    step_us: float | None = None  # what a step of generation does beside the layers and the head
    gpu: str = ""
    gpu_memory_bytes: int | None = None
    gpu_read_gb_s: float | None = None  # device memory
    gpu_fp32_gflop_s: float | None = None
    gpu_fp16_gflop_s: float | None = None
    gpu_copy_gb_s: float | None = None  # host to device and back
    spin_ms: float | None = None
    onnxruntime: str = ""
    fingerprint: str = ""
    kernels: tuple[KernelTime, ...] = ()
    provenance: Mapping[str, Provenance] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data without empty fields: what the YAML file holds."""
        from targets.schema import as_plain

        return as_plain(self)

    @property
    def is_here(self) -> bool:
        """Whether this profile was measured on the machine that this process runs on, under the same limits."""
        return bool(self.fingerprint) and self.fingerprint == fingerprint()


def here() -> Profile:
    """This machine, without measuring: its facts as the system tells them. For speeds, `targets.probe.probe`."""
    machine = this_machine()
    told = Provenance("measured", "read from the system and this process's limits")
    facts = ("vendor", "uarch", "isa", "cores", "threads", "memory_bytes", "system", "model", "onnxruntime")
    return Profile(
        id=HERE,
        vendor=machine.vendor,
        uarch=machine.uarch,
        isa=machine.isa,
        cores=machine.cores,
        threads=machine.threads,
        memory_bytes=machine.memory_bytes,
        description="the machine that this process runs on",
        system=machine.system,
        model=machine.model,
        onnxruntime=onnxruntime_version(),
        fingerprint=fingerprint(),
        provenance=dict.fromkeys(facts, told),
    )


def measured_place(machine: str) -> Path:
    """Where the probe keeps the profile of a machine, by its fingerprint: a change that moves latencies makes it forgotten."""
    return cache_folder() / "profiles" / f"{machine}.yaml"


def measured_here() -> Profile | None:
    """This machine as `trimtab targets probe` measured it last; None before that. Raises TargetError when the file is damaged."""
    place = measured_place(fingerprint())
    return load_profile(place) if place.is_file() else None


def profile_names() -> list[str]:
    """Names that `load_profile` knows: "here", then the shipped ones in order."""
    return [HERE, *sorted(path.stem for path in PROFILES.glob("*.yaml"))]


def list_profiles() -> list[Profile]:
    """The profiles behind `profile_names`."""
    return [load_profile(name) for name in profile_names()]


def load_profile(name_or_path: str | Path) -> Profile:
    """A profile by its shipped name, "here" (with its speeds once they were probed), or a YAML file.

    Raises TargetError with the path inside the file and the nearest key.
    """
    text = str(name_or_path)
    if text == HERE:
        return measured_here() or here()
    path = Path(text)
    if path.suffix not in (".yaml", ".yml"):
        if text not in profile_names():
            raise TargetError(f"target {text!r}", expected="a profile's name or a .yaml file", found="neither", remedy=_nearest(text, profile_names()))
        path = PROFILES / f"{text}.yaml"
    return profile_from(_read_yaml(path), str(path))


def profile_from(raw: Mapping[str, Any], place: str) -> Profile:
    """A profile from the mapping of a YAML file, checked. Raises TargetError."""
    from targets.schema import parse

    return parse(raw, place)


def dump_profile(profile: Profile) -> str:
    """The YAML text of a profile; `load_profile` reads it back equal."""
    import yaml

    plain = profile.as_dict()
    rows = plain.pop("kernels", [])
    text: str = yaml.safe_dump(plain, sort_keys=False, width=160, allow_unicode=True)
    if rows:  # one line a row
        text += "kernels:\n" + "".join(f"- {yaml.safe_dump(row, sort_keys=False, width=1000, default_flow_style=True)}" for row in rows)
    return text


def differences(profile: Profile, machine: Profile) -> list[str]:
    """Why a number measured on `machine` says nothing about `profile`, one sentence a reason; [] when it does.

    A profile with a fingerprint is that machine or it is not. One without (a class of machines, from data sheets) never is: nobody measured it.
    """
    reasons = [f"{profile.id} has {name}, {machine.id} has not" for name in profile.isa if name not in machine.isa]
    reasons += [
        f"{name}: {getattr(profile, name)} against {getattr(machine, name)}"
        for name in ("uarch", "cores", "threads")
        if getattr(profile, name) != getattr(machine, name)
    ]
    if profile.fingerprint and profile.fingerprint == machine.fingerprint:
        return []
    if profile.fingerprint:
        return reasons or [f"another machine by fingerprint: {profile.fingerprint} against {machine.fingerprint}"]
    return reasons or [f"{profile.id} describes a class of machines and was never measured"]


def with_measured(profile: Profile, values: Mapping[str, tuple[Any, Provenance]]) -> Profile:
    """The profile with fields replaced, each with its source: {"read_gb_s": (31.5, Provenance("measured", ...))}."""
    fields = {name: value for name, (value, _) in values.items()}
    sources = {name: source for name, (_, source) in values.items()}
    return replace(profile, **fields, provenance={**profile.provenance, **sources})


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _read_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file: no duplicate keys, aliases or tags. Raises TargetError with line and column."""
    import yaml

    from targets.schema import StrictLoader

    try:
        data = path.read_bytes()
    except OSError as error:
        raise TargetError(
            str(path), expected="a readable profile", found=error.strerror or type(error).__name__, remedy="`trimtab targets list` names the shipped ones"
        ) from error
    if len(data) > SIZE_LIMIT_BYTES:
        raise TargetError(str(path), expected=f"at most {SIZE_LIMIT_BYTES} bytes", found=f"{len(data)} bytes", remedy="this is no profile")
    try:
        value = yaml.load(data, StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        found = (getattr(error, "problem", None) or str(error) or type(error).__name__).splitlines()[0]
        raise TargetError(where, expected="plain YAML", found=found, remedy="correct the file") from error
    if not isinstance(value, dict):
        raise TargetError(str(path), expected="a mapping of keys", found=type(value).__name__, remedy="begin with `id: my-machine`")
    return value


def known_fields() -> Sequence[str]:
    """Names of a profile's fields."""
    from dataclasses import fields

    return [entry.name for entry in fields(Profile)]
