"""What trust rests on, through the command line: the cache's commands, explain, rebuild, flips in bundles and entries, limits of the system."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest

from compiler import judge
from compiler.store import Store
from runtimes.bundle import verify_bundle
from targets.errors import BundleError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tiny_llama, tiny_lora, tmp_path_factory):
    """(folder with recipe, store and bundle; the bundle's digest)."""
    place = tmp_path_factory.mktemp("trust")
    recipe = {"name": "tiny", "base": str(tiny_llama), "quantize": {"scheme": "int8-g32"}}
    recipe |= {"deltas": [{"path": str(tiny_lora)}], "targets": [{"profile": "here", "limits": {"size_mb": 5}}]}
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "MEASURE_SECONDS", 1.0)
        patch.setattr(judge, "FRESH_PROCESSES", 1)
        patch.setenv("TRIMTAB_CACHE", str(place / "store"))
        from compiler.cli import main

        with pytest.raises(SystemExit) as done:
            main(["compile", str(place / "recipe.yaml"), "--out", str(place / "out")])
        assert done.value.code == 0
    return place, json.loads((place / "out" / "tiny-here" / "manifest.json").read_text())["digest"]


@pytest.fixture
def here(built, trimtab, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(built[0] / "store"))
    return built[0]


def test_cache_commands(here, trimtab):
    rows = json.loads(trimtab("cache", "list", "--json")[1])["entries"]
    assert {row["stage"] for row in rows} == {"export", "evaluate"} and all(row["intact"] is None for row in rows)
    code, stdout, _ = trimtab("cache", "verify")
    assert code == 0 and stdout.count("intact") == 2
    assert json.loads(trimtab("cache", "gc", "--max-gb", "1", "--json")[1])["removed"] == []


def test_explain_names_the_part_that_differs(here, trimtab):
    (plan,) = json.loads(trimtab("explain", here / "recipe.yaml", "--json")[1])
    assert {row["stage"]: row["state"] for row in plan["steps"]}["export"] == "cached"
    (plan,) = json.loads(trimtab("explain", here / "recipe.yaml", "--set", "quantize.scheme=int4-g32", "--json")[1])
    step = next(row for row in plan["steps"] if row["stage"] == "export")
    assert step["differs"] == [{"part": "options.scheme", "here": "int4-g32", "stored": "int8-g32"}]
    code, stdout, _ = trimtab("explain", here / "recipe.yaml", "--set", "quantize.scheme=int4-g32")
    assert code == 0 and "options.scheme: int4-g32 here, int8-g32 in" in stdout


def test_rebuild_proves_the_digest(here, built, trimtab):
    bundle = here / "out" / "tiny-here"
    code, stdout, stderr = trimtab("rebuild", bundle, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["rebuilt"] == built[1]


def test_rebuild_from_other_sources_is_refused(here, trimtab, tmp_path, tiny_llama):
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_llama.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    code, stdout, _ = trimtab("rebuild", here / "out" / "tiny-here", "--base", other, "--json")
    assert code == 1 and json.loads(stdout)["error"]["code"] == "REBUILD_SOURCE"


def test_what_the_digest_covers_holds_no_path_and_no_time(here, built):
    bundle = here / "out" / "tiny-here"
    marks = [str(here).encode(), str(ROOT).encode(), b"2026-", b"2025-"]
    for path in bundle.iterdir():
        if path.name not in ("manifest.json", "report.html", "report.json", "README.md", "selftest.json"):
            assert not [mark for mark in marks if mark in path.read_bytes()], path.name


def test_every_flipped_byte_of_a_bundle_is_found(here):
    """Eight places of every file that the manifest lists, one bit each. The manifest itself is what they are held to: its signature holds it."""
    bundle, tried = here / "out" / "tiny-here", 0
    for path in sorted(path for path in bundle.iterdir() if path.name != "manifest.json"):
        whole = path.read_bytes()
        for at in sorted({len(whole) * part // 8 for part in range(8)}):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(BundleError) as caught:
                verify_bundle(bundle)
            assert caught.value.code == "BUNDLE_DIGEST", (path.name, at)
            tried += 1
        path.write_bytes(whole)
    verify_bundle(bundle)
    assert tried > 80


def test_a_flipped_byte_in_the_store_is_found_and_made_again(here, built, trimtab, monkeypatch, tmp_path):
    monkeypatch.setattr(judge, "MEASURE_SECONDS", 1.0)
    monkeypatch.setattr(judge, "FRESH_PROCESSES", 1)
    store = Store(here / "store")
    entry = next(entry for entry in store.entries() if entry.stage == "export")
    place = store.place(entry.key)
    for path in sorted(place.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
        assert not next(one for one in store.entries(verify=True) if one.key == entry.key).intact, path.name
        path.write_bytes(whole)
    weights = place / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    code, _, stderr = trimtab("compile", here / "recipe.yaml", "--out", tmp_path / "out")
    assert code == 0, stderr
    assert json.loads((tmp_path / "out" / "tiny-here" / "manifest.json").read_text())["digest"] == built[1]


FEW_FILES = "import resource, sys\nimport compiler.pipeline, compiler.judge, runtimes.generate, onnx_ir\n"
FEW_FILES += "resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))\nfrom compiler.cli import main\nmain(sys.argv[1:])"


def test_few_open_files(tiny_llama, tmp_path):
    """Either it gets by with them, or it says so in one line; nothing half-written is left."""
    command = [sys.executable, "-c", FEW_FILES, "export", str(tiny_llama), "--scheme", "int8-g32", "--out", str(tmp_path / "out" / "onnx")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    left = sorted(path.name for path in (tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else []
    assert left == (["onnx"] if done.returncode == 0 else [])
    if done.returncode:
        assert done.stderr.splitlines()[-1].startswith("trimtab: ")


def test_a_place_that_cannot_be_written_is_told_before_work(here, trimtab, tmp_path):
    (tmp_path / "file").write_text("")
    code, stdout, stderr = trimtab("compile", here / "recipe.yaml", "--out", tmp_path / "file" / "out", "--json")
    assert code == 1 and json.loads(stdout)["error"]["code"] == "OUTPUT", stderr


def test_too_little_memory_is_told_before_anything_is_made(trimtab, tiny_llama, tmp_path, monkeypatch) -> None:
    """The floor with its terms, and nothing made."""
    from compiler import memory

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: x\nbase: {tiny_llama}\ntargets: [{{profile: here, limits: {{size_mb: 50}}}}]\n")
    monkeypatch.setattr(memory, "available_bytes", lambda: (200_000_000, "that this process may use"))
    code, stdout, stderr = trimtab("compile", recipe, "--out", tmp_path / "out", "--json")
    assert code == 1 and json.loads(stdout)["error"]["code"] == "MEMORY"
    assert "GB = 0.30 (libraries) + 0.00 (float model of 0." in stderr and "found 0.20 GB that this process may use" in stderr
    assert not (tmp_path / "out").exists()


def test_a_student_in_the_making_counts_with_gradients_and_teacher() -> None:
    from types import SimpleNamespace

    from compiler import memory

    def model(weights: int) -> SimpleNamespace:
        return SimpleNamespace(parameter_count=weights)

    sources = SimpleNamespace(reference=model(100_000_000), merged=model(80_000_000))
    judged, trained = (sum(memory.needed_bytes(sources, 50_000_000, trains).values()) for trains in (False, True))
    assert judged == memory.LIBRARIES + 400e6 + 50e6
    assert trained == memory.LIBRARIES + 16 * 80e6 + 400e6


def test_what_may_be_used_is_the_least_of_the_limits() -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
    command = [sys.executable, "-c", limited + "from compiler.memory import available_bytes; print(*available_bytes())"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(maxsplit=1)
    assert 1 << 30 < int(said[0]) <= 3 << 30 and said[1].strip() == "that `ulimit -v` leaves"


def test_large_blocks_are_kept_for_the_next_inside_and_given_back_after() -> None:
    """Page faults of touching 40 MB anew: none while blocks are kept, one for every 4 KiB or 2 MiB otherwise."""
    faults = """
import ctypes, resource
from compiler.memory import large_blocks_kept
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes, libc.memset.argtypes = ctypes.c_void_p, [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def touched():
    before, block = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, libc.malloc(40 << 20)
    libc.memset(block, 1, 40 << 20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touched()
outside = touched()
with large_blocks_kept():
    touched()
    inside = touched()
print(outside, inside, touched())
"""
    outside, inside, after = map(int, subprocess.run([sys.executable, "-c", faults], capture_output=True, text=True, check=True).stdout.split())
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this C library has no mallopt")
    assert inside < 4 <= min(outside, after)
