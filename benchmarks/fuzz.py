"""Coverage-guided fuzzing of every loader: the targets of tests/test_fuzz_loaders.py under atheris (libFuzzer), each in a process of its own.

    python benchmarks/fuzz.py [TARGET ...] [--seconds 60] [--json benchmarks/results/fuzz.json]

A target may answer any bytes with a result or with a TrimtabError of a documented code; anything else ends the run, with the bytes in --crashes and exit
code 1. Each begins with the good file of its loader. The counts stand in SECURITY.md (`python benchmarks/trust.py --table`).

atheris instruments Python's bytecode of trimtab's own packages; the libraries below them (safetensors, orjson, tokenizers) run as they are. It is installed
on the first run into a folder of its own under TRIMTAB_BENCH_ENVS (or benchmarks/.envs): it is no dependency of trimtab's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests" / "test_fuzz_loaders.py"
ROOT = Path(os.environ.get("TRIMTAB_BENCH_ENVS") or HERE / ".envs") / "atheris"
ATHERIS = "atheris==3.0.0"
PACKAGES = ["compiler", "runtimes", "targets"]
DONE, COVERED = re.compile(r"Done (\d+) runs in (\d+) second"), re.compile(r"cov: (\d+)")


def installed() -> Mapping[str, str]:
    """The environment in which atheris can be imported."""
    if not (ROOT / "atheris").is_dir():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(ROOT), ATHERIS], check=True)
    paths = [str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def targets() -> ModuleType:
    spec = importlib.util.spec_from_file_location(TESTS.stem, TESTS)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def child(name: str, work: Path, options: Sequence[str]) -> None:
    """Fuzz one target until libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=PACKAGES):
        known = targets()
        from targets.codes import CODES
        from targets.errors import TrimtabError
    file, good, read = known.TARGETS[name]
    corpus, place = work / "corpus", work / "input"
    corpus.mkdir()
    place.mkdir()
    (corpus / "good").write_bytes(good)

    def one(content: bytes) -> None:
        (place / file).write_bytes(content)
        try:
            read(place / file)
        except TrimtabError as error:
            if error.code not in CODES or not str(error).isprintable():
                raise AssertionError(f"code {error.code!r}, line {str(error)!r}") from error

    atheris.Setup([name, *options, str(corpus)], one)
    atheris.Fuzz()


def fuzz(name: str, seconds: int, crashes: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """One target for about `seconds`: {"target", "runs", "seconds", "covered", "outcome"}; outcome is "" or the last words of what went wrong."""
    options = [f"-max_total_time={seconds}", "-max_len=4096", "-timeout=10", "-rss_limit_mb=4096", f"-artifact_prefix={crashes}/{name}-"]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", name, folder, *options]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=dict(environment), cwd=folder)
    counted, covered = DONE.search(done.stderr), COVERED.findall(done.stderr)
    outcome = "" if done.returncode == 0 and counted else done.stderr[-2000:]
    runs, took = (int(counted[1]), int(counted[2])) if counted else (0, 0)
    return {"target": name, "runs": runs, "seconds": took, "covered": int(covered[-1]) if covered else 0, "outcome": outcome}


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(targets().TARGETS)
    parser.add_argument("target", nargs="*", help=f"of {', '.join(known)}; all when none is named")
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "fuzz.json")
    parser.add_argument("--crashes", type=Path, default=HERE / ".crashes")
    given = parser.parse_args()
    unknown = sorted(set(given.target) - set(known))
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(known)}")
    given.crashes.mkdir(parents=True, exist_ok=True)
    environment, rows = installed(), []
    for name in given.target or known:
        rows.append(fuzz(name, given.seconds, given.crashes.resolve(), environment))
        row = rows[-1]
        print(f"{name:12s} {row['runs']:9,d} inputs  {row['seconds']:4d} s  {row['covered']:6d} edges  {row['outcome'] or 'nothing found'}", flush=True)
    given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["outcome"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
