"""Profiles: the shipped ones, reading and writing, and every mistake with its place."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from targets.errors import TargetError
from targets.kernels import MATRICES, Case, weight_bytes
from targets.machine import ISA_FLAGS, fingerprint
from targets.profile import (
    SOURCES,
    KernelTime,
    Profile,
    Provenance,
    differences,
    dump_profile,
    here,
    list_profiles,
    load_profile,
    profile_names,
)
from targets.schema import _Profile

GOOD: dict[str, Any] = {
    "id": "bench-7",
    "vendor": "GenuineIntel",
    "uarch": "icelake",
    "isa": ["avx2", "avx512f"],
    "cores": 4,
    "threads": 8,
    "memory_bytes": 1 << 33,
    "provenance": {name: {"source": "datasheet"} for name in ("vendor", "uarch", "isa", "cores", "threads", "memory_bytes")},
}


def write(tmp_path: Path, change: dict[str, Any], drop: tuple[str, ...] = ()) -> Path:
    path = tmp_path / "machine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in {**GOOD, **change}.items() if key not in drop}))
    return path


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_profile_says_where_its_numbers_come_from(name: str) -> None:
    profile = load_profile(name)
    assert profile.id == name and set(profile.isa) <= set(ISA_FLAGS)
    assert {row.source for row in profile.provenance.values()} <= set(SOURCES)
    assert profile.read_gb_s is None or profile.provenance["read_gb_s"].note
    if name != "here":
        assert not profile.fingerprint and not profile.is_here  # a class of machines is nobody's measurement of this one
        assert differences(profile, here())


def test_the_kernel_table_agrees_with_the_figures_beside_it() -> None:
    """Matrices stream their weights about as fast as memory is read (a part stays in the last cache, which they fill twice), and multiply as it does."""
    profile = load_profile("avx512vnni-2core")
    matrices = [(row, Case(row.op, row.bits, row.block, row.k, row.n, row.symmetric)) for row in profile.kernels if row.op in MATRICES]
    streamed = [weight_bytes(case) / row.us / 1e3 for row, case in matrices if row.m == 1]
    assert profile.read_gb_s and 0.7 * profile.read_gb_s < max(streamed) < 2.0 * profile.read_gb_s
    multiplied = [row.gop_s for row, _ in matrices if row.m == 512 and row.bits == 32]
    assert profile.fp32_gflop_s and 0.5 * profile.fp32_gflop_s < max(multiplied) < 1.3 * profile.fp32_gflop_s


def test_here_is_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))  # what `targets probe` kept of this machine would be `here` too
    profile = here()
    assert profile.is_here and profile.fingerprint == fingerprint() and differences(profile, here()) == []
    assert 1 <= profile.cores <= profile.threads and profile.memory_bytes > 1 << 28
    assert load_profile("here") == profile and list_profiles()[0] == profile
    other = replace(profile, fingerprint="0" * 16)
    assert not other.is_here and differences(other, profile) == [f"another machine by fingerprint: {'0' * 16} against {profile.fingerprint}"]


def test_a_round_trip_keeps_everything(tmp_path: Path) -> None:
    row = KernelTime("MatMulNBits", 4, 64, 576, 1536, 32, 2, 12.5)
    profile = replace(here(), id="shop-floor", read_gb_s=31.5, kernels=(row,))
    profile = replace(profile, provenance={**profile.provenance, "read_gb_s": Provenance("measured", "maximum", "2026-11-21", 7, 0.05)})
    path = tmp_path / "shop.yaml"
    path.write_text(dump_profile(profile))
    assert load_profile(path) == profile
    assert row.gop_s == pytest.approx(2 * 32 * 576 * 1536 / 12.5 / 1e3)


def test_schema_and_profile_have_the_same_fields() -> None:

    assert set(_Profile.model_fields) == {entry.name for entry in fields(Profile)}


@pytest.mark.parametrize(
    ("change", "drop", "message"),
    [
        ({"coers": 4}, (), r"machine\.yaml: coers: expected a known key, found 'coers'; did you mean 'cores'\?"),
        ({"kernels": [{"op": "MatMul", "bitz": 4}]}, (), r"kernels\.0"),
        ({"read_gb_s": float("nan")}, (), "read_gb_s: expected input should be"),
        ({"read_gb_s": float("inf")}, (), "read_gb_s: expected input should be a finite number"),
        ({"read_gb_s": -3.0}, (), "read_gb_s: expected input should be greater than 0"),
        ({"cores": 0}, (), "cores: expected input should be greater than or equal to 1, found 0"),
        ({"cores": "four"}, (), "cores: expected input should be a valid integer, found 'four'"),
        ({"cores": True}, (), "cores: expected input should be a valid integer"),
        ({"threads": 2}, (), "threads: expected at least the 4 cores, found 2"),
        ({"isa": ["avx2", "avx512vnni"]}, (), r"isa: expected instruction sets .* found 'avx512vnni'; did you mean 'avx512_vnni'\?"),
        ({"read_gb_s": 20.0}, (), "provenance: expected a source for every field: .* found nothing for read_gb_s"),
        ({"provenance": {**GOOD["provenance"], "coers": {"source": "assumed"}}}, (), r"provenance\.coers: .* did you mean 'cores'"),
        ({"provenance": {"cores": {"source": "guessed"}}}, (), r"provenance\.cores\.source"),
        ({"id": "../x"}, (), "id: expected"),
        ({}, ("memory_bytes",), "memory_bytes: expected field required"),
    ],
)
def test_mistakes_name_their_place(tmp_path: Path, change: dict[str, Any], drop: tuple[str, ...], message: str) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        load_profile(write(tmp_path, change, drop))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id: a\nid: b\n", r":2:1: expected plain YAML, found key 'id' appears twice"),
        ("a: &x [1]\nb: *x\n", "an alias or an explicit tag"),
        ("a: !!python/object/apply:os.system ['true']\n", "an alias or an explicit tag"),
        ("- 1\n", "expected a mapping of keys, found list"),
        ("", "expected a mapping of keys, found NoneType"),
        ("a: [", "expected plain YAML"),
        ("[" * 1000, "expected plain YAML"),
        ("#" * (1 << 20) + "\nx", "expected at most 1048576 bytes"),
    ],
)
def test_yaml_that_is_no_profile(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text(text)
    with pytest.raises(TargetError, match=message):
        load_profile(path)


def test_names_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"target 'rasberry-pi-5': expected a profile's name or a \.yaml file, found neither; did you mean 'raspberry-pi-5'"):
        load_profile("rasberry-pi-5")
    with pytest.raises(TargetError, match="expected a readable profile, found No such file"):
        load_profile(tmp_path / "none.yaml")


def test_looking_at_this_machine_loads_no_heavy_library() -> None:
    heavy = ("numpy", "onnxruntime", "torch", "onnx", "runtimes", "compiler")
    code = f"import sys\nfrom targets.profile import here\nhere()\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
