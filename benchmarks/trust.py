"""The figures of SECURITY.md, and their table in it.

    python benchmarks/trust.py            one digest over 16 ways to build, 8 builds at once, changed bytes; about two minutes; then the table
    python benchmarks/trust.py --table    only write the table, from results/trust.json, results/interruptions.json and results/fuzz.json

    python benchmarks/interruptions.py --json benchmarks/results/interruptions.json     another part, about half an hour
    python benchmarks/fuzz.py                                                           and another, a minute a loader

A tiny llama with a LoRA, int8-g32. Each build is a process of its own; what evaluates and measures is recorded once and given back, as in interruptions.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "SECURITY.md"
PLACES = 200  # changed bytes tried of each file
AT_ONCE = 8


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made
    spec.loader.exec_module(made)
    return made


def child(recipe: str, work: str) -> int:
    """One build, with what was recorded; `made` in `work` gets a line for each export that was really done."""
    from compiler import judge
    from compiler.cli import main
    from compiler.pipeline import Run
    from compiler.stages import export

    found = pickle.loads((Path(recipe).parent / "recorded").read_bytes())
    Run._answers = lambda *_: found["_answers"]  # type: ignore[method-assign]
    judge.measure = lambda *_: found["measure"]  # type: ignore[assignment]
    done = export.export

    def counted(*given: Any, **named: Any) -> Any:
        with (Path(work) / "made").open("a") as file:
            file.write("made\n")
        return done(*given, **named)

    export.export = counted
    os.environ["TRIMTAB_CACHE"] = str(Path(work) / "cache")
    main(["compile", recipe, "--out", str(Path(work) / "out"), "--json"])


def started(recipe: Path, work: Path, **environment: str) -> subprocess.Popen[bytes]:
    work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--child", str(recipe), str(work)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **environment})


def one_digest(recipe: Path, place: Path, digest_of: Any) -> dict[str, Any]:
    """2 hash seeds x 2 folders x 1 or 2 threads x cold and warm."""
    digests, codes = [], []
    for seed, folder, threads, _warm in itertools.product("01", ("a", "deeper/folder with spaces"), "12", (False, True)):
        work = place / folder / f"{seed}-{threads}"
        process = started(recipe, work, PYTHONHASHSEED=seed, OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads)
        process.communicate()
        codes.append(process.returncode)
        digests.append(digest_of(work))
    return {"builds": len(digests), "exit_0": codes.count(0), "digests": len(set(digests))}


def at_once(recipe: Path, work: Path, digest_of: Any) -> dict[str, Any]:
    processes = [started(recipe, work) for _ in range(AT_ONCE)]
    codes = [process.wait() for process in processes]
    made = len((work / "made").read_text().splitlines())
    return {"builds": AT_ONCE, "exit_0": codes.count(0), "digests": len({digest_of(work)} - {""}), "exports": made}


def flips(bundle: Path, entry: Path) -> dict[str, Any]:
    """One bit in each of PLACES bytes of every file that a manifest lists, and of every file of a store's entry."""
    from compiler.store import intact
    from runtimes.bundle import verify_bundle
    from targets.errors import BundleError

    def refused(folder: Path) -> bool:
        try:
            verify_bundle(folder)
        except BundleError:
            return True
        return False

    told = {}
    for name, folder, found in (("bundle", bundle, refused), ("entry", entry, lambda folder: not intact(folder))):
        tried = detected = 0
        for path in sorted(path for path in folder.iterdir() if path.name != "manifest.json"):
            whole = path.read_bytes()
            for at in sorted({len(whole) * part // PLACES for part in range(PLACES)}):
                path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
                tried, detected = tried + 1, detected + found(folder)
            path.write_bytes(whole)
        told[name] = {"tried": tried, "detected": detected}
    return told


def measured() -> dict[str, Any]:
    from compiler.store import Store

    interruptions = module(HERE / "interruptions.py")
    with tempfile.TemporaryDirectory(prefix="trust-") as folder:
        place = Path(folder).resolve()
        base, delta = interruptions.tiny(place)
        recipe = interruptions.recorded_recipe(place, base, delta)
        store = Store(place / "first" / "cache")
        assert started(recipe, place / "first").wait() == 0
        entry = store.place(next(entry.key for entry in store.entries() if entry.stage == "export"))
        return {
            "matrix": one_digest(recipe, place / "matrix", interruptions.digest_of),
            "at_once": at_once(recipe, place / "once", interruptions.digest_of),
            "flips": flips(place / "first" / "out" / "tiny-here", entry),
        }


def table() -> str:
    """Markdown from what is in results/ and the tables of the tests."""
    told = json.loads((RESULTS / "trust.json").read_text())
    matrix, once, changed = told["matrix"], told["at_once"], told["flips"]
    cases = module(HERE.parent / "tests" / "test_bad_inputs_table.py").CASES
    rows = [
        ("bad inputs by code", f"{len(cases)} cases, each with its code", "tests/test_bad_inputs_table.py"),
        ("builds over hash seeds, folders, threads, cold and warm store", f"{matrix['builds']} builds, {matrix['digests']} digest", "benchmarks/trust.py"),
        (
            "builds of one recipe at once",
            f"{once['builds']} builds, {once['exit_0']} exits 0, {once['digests']} digest, {once['exports']} export done",
            "benchmarks/trust.py",
        ),
        ("one bit changed in a file of a bundle", f"{changed['bundle']['detected']} of {changed['bundle']['tried']} detected", "benchmarks/trust.py"),
        ("one bit changed in a file of a stored result", f"{changed['entry']['detected']} of {changed['entry']['tried']} detected", "benchmarks/trust.py"),
    ]
    words = {
        "kill": "killed at a call that changes a file",
        "full": "disk full from the k-th call on",
        "full-once": "disk full at the k-th call",
        "broken": "I/O error from the k-th call on",
        "broken-once": "I/O error at the k-th call",
        "short": "a write that takes half",
        "interrupt": "SIGINT",
        "terminate": "SIGTERM",
        "events": "killed while really evaluating and measuring",
    }
    if (RESULTS / "interruptions.json").exists():
        for row in json.loads((RESULTS / "interruptions.json").read_text()):
            found = f"{row['tried']} of {row['points']} points tried, {len({one['k'] for one in row['broken']})} broke a promise"
            rows.append((words[row["sweep"]], found, "benchmarks/interruptions.py"))
    if (RESULTS / "fuzz.json").exists():
        for row in json.loads((RESULTS / "fuzz.json").read_text()):
            found = "nothing found" if not row["outcome"] else "a fault found"
            rows.append((f"fuzzing `{row['target']}` by coverage", f"{row['runs']:,} inputs, {row['covered']} edges, {found}", "benchmarks/fuzz.py"))
    return "| what was tried | outcome | command |\n|---|---|---|\n" + "".join(f"| {what} | {found} | `{command}` |\n" for what, found, command in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--child", nargs=2)
    given = parser.parse_args()
    if given.child:
        return child(*given.child)
    if not given.table:
        (RESULTS / "trust.json").write_text(json.dumps(measured(), indent=1) + "\n")
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split("<!-- figures: python benchmarks/trust.py -->\n")
    PAGE.write_text(f"{head}<!-- figures: python benchmarks/trust.py -->\n{table()}<!-- end -->{rest.split('<!-- end -->')[1]}", encoding="utf-8")
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
