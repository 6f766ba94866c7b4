"""Checks a profile's YAML (pydantic: outside text) and turns it into the frozen `Profile`. Imported only when one is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from targets.errors import TargetError
from targets.machine import ISA_FLAGS
from targets.profile import IDENTITY, KernelTime, Profile, Provenance, _nearest, known_fields

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Count = Annotated[int, Field(ge=1)]
KERNEL_DEFAULTS = (("symmetric", True), ("context", 0), ("layers", 1))
Speed = Annotated[float, Field(gt=0)]


class StrictLoader(yaml.SafeLoader):
    """Safe YAML without what surprises: duplicate keys, aliases, explicit tags."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="an alias or an explicit tag", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} appears twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class _Source(_Part):
    source: Literal["measured", "datasheet", "assumed"]
    note: str = ""
    date: str = ""
    samples: int = Field(default=0, ge=0)
    spread: float | None = Field(default=None, ge=0)


class _Kernel(_Part):
    op: str
    bits: Count
    block: int = Field(ge=0)
    k: Count
    n: Count
    m: Count
    threads: Count
    us: Speed
    symmetric: bool = True
    context: int = Field(default=0, ge=0)
    layers: Count = 1


class _Profile(_Part):
    id: Name
    vendor: str
    uarch: str
    isa: list[str]
    cores: Count
    threads: Count
    memory_bytes: Count
    description: str = ""
    system: str = ""
    model: str = ""
    read_gb_s: Speed | None = None
    read_1_gb_s: Speed | None = None
    fp32_gflop_s: Speed | None = None
    int8_gop_s: Speed | None = None
    storage_read_mb_s: Speed | None = None
    open_mb_s: Speed | None = None
    parallel_us: Speed | None = None
    run_us: Speed | None = None
    step_us: Speed | None = None
    gpu: str = ""
    gpu_memory_bytes: Count | None = None
    gpu_read_gb_s: Speed | None = None
    gpu_fp32_gflop_s: Speed | None = None
    gpu_fp16_gflop_s: Speed | None = None
    gpu_copy_gb_s: Speed | None = None
    spin_ms: Speed | None = None
    onnxruntime: str = ""
    fingerprint: str = ""
    kernels: list[_Kernel] = Field(default_factory=list)
    provenance: dict[str, _Source] = Field(default_factory=dict)


def parse(raw: Mapping[str, Any], place: str) -> Profile:
    """A checked profile. Raises TargetError: the first fault, with its path, and for an unknown key the nearest known one.

    Rules: 1. keys and types as in `Profile`; 2. numbers finite and positive; 3. instruction sets that exist; 4. at least as many threads as cores;
    5. every field that has a value says where it comes from.
    """
    try:
        checked = _Profile.model_validate(dict(raw))
    except ValidationError as error:
        raise _fault(error, place) from error
    for name in checked.isa:
        if name not in ISA_FLAGS:
            raise TargetError(f"{place}: isa", expected="instruction sets that onnxruntime dispatches on", found=repr(name), remedy=_nearest(name, ISA_FLAGS))
    if checked.threads < checked.cores:
        raise TargetError(f"{place}: threads", expected=f"at least the {checked.cores} cores", found=str(checked.threads), remedy="correct one of the two")
    unsourced = [name for name in known_fields() if name not in IDENTITY and getattr(checked, name) not in (None, "", []) and name not in checked.provenance]
    if unsourced:
        found = f"nothing for {', '.join(unsourced)}"
        raise TargetError(
            f"{place}: provenance", expected="a source for every field: measured, datasheet or assumed", found=found, remedy="add them, or leave the fields out"
        )
    for name in checked.provenance:
        if name not in known_fields():
            raise TargetError(f"{place}: provenance.{name}", expected="a profile's field", found=repr(name), remedy=_nearest(name, known_fields()))
    plain = checked.model_dump()
    kernels = tuple(KernelTime(**row) for row in plain.pop("kernels"))
    sources = {name: Provenance(**row) for name, row in plain.pop("provenance").items()}
    return Profile(**{**plain, "isa": tuple(plain["isa"])}, kernels=kernels, provenance=sources)


def as_plain(profile: Profile) -> dict[str, Any]:
    """The profile as YAML writes it: no empty fields, lists for tuples."""
    values = {name: value for name, value in asdict(profile).items() if value not in (None, "", (), {})}
    values["isa"] = list(profile.isa)
    if profile.kernels:
        values["kernels"] = [{key: value for key, value in asdict(row).items() if (key, value) not in KERNEL_DEFAULTS} for row in profile.kernels]
    if profile.provenance:
        values["provenance"] = {
            name: {key: value for key, value in asdict(row).items() if value not in (None, "") and (key, value) != ("samples", 0)}
            for name, row in profile.provenance.items()
        }
    return values


def _fault(error: ValidationError, place: str) -> TargetError:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        parts: dict[str, type[_Part]] = {"kernels": _Kernel, "provenance": _Source}
        known = parts.get(str(first["loc"][0]), _Profile)
        remedy = _nearest(str(first["loc"][-1]), known.model_fields)
        return TargetError(f"{place}: {path}", expected="a known key", found=repr(first["loc"][-1]), remedy=remedy)
    return TargetError(f"{place}: {path}", expected=first["msg"].lower(), found=repr(first.get("input"))[:80], remedy="correct the profile")
