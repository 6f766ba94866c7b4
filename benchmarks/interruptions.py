"""Interrupt the compile of a tiny model at every call that changes a file, and look at what is left.

    python benchmarks/interruptions.py [--sweeps kill,full:20,...] [--most N] [--json FILE]

Needs Linux and a C compiler. `interruptions.c` is preloaded, counts those calls (Python's, C++'s and Rust's) below one folder that holds the store and the
bundle's place, and acts at the k-th. Each case is a process of its own, forked from one that has everything imported; a cold store each time, in every
other case with an older bundle at the place. Rows of SWEEPS say what is done; each is repeated for k = 1, 2, 3, ... to the end, or for N evenly spaced k
(kill:20).

After each case: the place holds nothing, the older bundle, or the new one, whole (every hash); every entry of the store is whole; a process that was not killed
told its fault in one line and left nothing beside the place. Then the same compile runs undisturbed: exit code 0, the same digest, nothing left over.

What evaluates, measures and tries the tokenizer writes no file; its results are recorded once from a real run and given back, so that all of this takes
minutes. `events` interrupts the real evaluation and measurement at N points spread over the reports of progress.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COUNT, KILL, FAIL, SHORT = range(4)
LIMITS = {"size_mb": 5}


@dataclass(frozen=True)
class Sweep:
    """What happens at the k-th call. forever: also at every later one. allowed: exit codes that keep the promise."""

    mode: int
    error: int = 0
    forever: bool = False
    allowed: tuple[int, ...] = (1,)
    signal: int = 0  # sent at the k-th report of progress instead
    real: bool = False  # with the real evaluation and measurement


SWEEPS = {
    "kill": Sweep(KILL, allowed=(-signal.SIGKILL,)),
    "full": Sweep(FAIL, errno.ENOSPC, forever=True),
    "full-once": Sweep(FAIL, errno.ENOSPC, allowed=(0, 1)),
    "broken": Sweep(FAIL, errno.EIO, forever=True),
    "broken-once": Sweep(FAIL, errno.EIO, allowed=(0, 1)),
    "short": Sweep(SHORT, allowed=(0,)),
    "interrupt": Sweep(COUNT, allowed=(130,), signal=signal.SIGINT),
    "terminate": Sweep(COUNT, allowed=(143,), signal=signal.SIGTERM),
    "events": Sweep(COUNT, allowed=(-signal.SIGKILL,), signal=signal.SIGKILL, real=True),
}


@dataclass
class Done:
    """One process. calls, events: how many were seen."""

    code: int
    stderr: str
    calls: int
    events: int


class Bench:
    """A tiny model, two recipes of it, and the numbers of a real run."""

    shim: Any  # the preloaded library

    def __init__(self, place: Path, base: Path, delta: Path) -> None:
        self.place, self.shim = place, ctypes.CDLL(None)
        self.recorded: dict[str, Any] = {}
        write_recipes(place, base, delta)
        self.digests = {}
        for name in ("new", "old"):
            done = self.run(name, place / name, record=name == "new")
            assert done.code == 0, done
            self.digests[name] = digest_of(place / name)
            if name == "new":
                self.recorded, self.events = pickle.loads((place / "recorded").read_bytes()), done.events

    def run(self, recipe: str, work: Path, sweep: Sweep | None = None, k: int = 0, record: bool = False) -> Done:
        """`trimtab compile` in a forked process: store and bundle below `work`."""
        told = work.with_name(work.name + ".stderr")
        reading, sending = os.pipe()
        pid = os.fork()
        if pid:
            os.close(sending)
            with os.fdopen(reading) as pipe:
                seen = json.loads(pipe.read() or "[0, 0]")
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            return Done(code, told.read_text(errors="replace") if told.exists() else "", *seen)
        try:
            code = self._child(recipe, work, sweep, k, record, told)
            os.write(sending, json.dumps([self.shim.shim_count(), self.seen]).encode())
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            code = 98
        finally:
            os._exit(code)

    def _child(self, recipe: str, work: Path, sweep: Sweep | None, k: int, record: bool, told: Path) -> int:
        from compiler.cli import main

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with Ctrl-C ignored
        with told.open("w") as file, Path(os.devnull).open("w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ["TRIMTAB_CACHE"] = str(work / "cache")
        self._patch(record, bool(sweep and sweep.real))
        self._count_events(sweep, k)
        if sweep and not sweep.signal:
            self.shim.shim_arm(sweep.mode, ctypes.c_long(k), sweep.error, int(sweep.forever), str(work).encode())
        try:
            main(["compile", str(self.place / f"{recipe}.yaml"), "--out", str(work / "out"), "--json"])
        except SystemExit as done:
            code = int(done.code or 0)
        if record:
            (self.place / "recorded").write_bytes(pickle.dumps(self.recorded))
        return code

    def _patch(self, record: bool, real: bool) -> None:
        """Keep what evaluation and measurement find, or give it back."""
        from compiler import judge
        from compiler.pipeline import Run
        from compiler.stages import export

        judge.MEASURE_SECONDS, judge.FRESH_PROCESSES = 1.0, 1
        for owner, name in ((Run, "_answers"), (judge, "measure"), (export, "try_small_files")):
            found = getattr(owner, name)

            def kept(*given: Any, found: Callable[..., Any] = found, name: str = name) -> Any:
                if not record and not real:
                    return self.recorded[name]
                return self.recorded.setdefault(name, found(*given)) if record else found(*given)

            setattr(owner, name, kept)

    def _count_events(self, sweep: Sweep | None, k: int) -> None:
        from compiler.progress import Progress

        self.seen = 0

        def counted(_progress: Any, *_given: Any) -> None:
            self.seen += 1
            if sweep and sweep.signal and self.seen == k:
                os.kill(os.getpid(), sweep.signal)

        say = Progress._say
        Progress.update = counted  # type: ignore[method-assign]
        Progress._say = lambda self, *given, **named: (counted(self), say(self, *given, **named))[1]  # type: ignore[method-assign,assignment,misc]

    def case(self, sweep: Sweep, k: int, older: bool) -> list[str] | None:
        """Interrupt, look, run again, look; the promises that were broken. None where this run told its progress less than k times: nothing was done to it."""
        work = Path(tempfile.mkdtemp(prefix="case-", dir=self.place))
        try:
            if older:
                (work / "out").mkdir()
                shutil.copytree(self.place / "old" / "out" / "tiny-here", work / "out" / "tiny-here")
            done = self.run("new", work, sweep, k)
            if sweep.signal and done.code == 0 and done.events < k:
                return None
            faults = self._faults(done, work, sweep, older)
            again = self.run("new", work)
            if again.code or digest_of(work) != self.digests["new"] or leftovers(work):
                faults.append(f"run again: exit {again.code}, digest {digest_of(work)}, left {leftovers(work)}: {again.stderr[-300:]}")
            return faults
        finally:
            shutil.rmtree(work, ignore_errors=True)
            work.with_name(work.name + ".stderr").unlink(missing_ok=True)

    def _faults(self, done: Done, work: Path, sweep: Sweep, older: bool) -> list[str]:
        from compiler.store import Store

        faults, digest = [], digest_of(work)
        if done.code not in sweep.allowed:
            faults.append(f"exit code {done.code}: {done.stderr[-300:]}")
        allowed = {self.digests["new"], self.digests["old"] if older else ""}
        if digest not in allowed or (done.code == 0 and digest != self.digests["new"]):
            faults.append(f"the place holds {digest!r} after exit code {done.code}")
        damaged = [entry.key for entry in Store(work / "cache").entries(verify=True) if not entry.intact]
        if damaged:
            faults.append(f"entries {damaged} are damaged")
        if done.code > 0 and (leftovers(work) or "Traceback" in done.stderr or done.stderr.count("\n") != 1):
            faults.append(f"left {leftovers(work)}, told {done.stderr[-300:]!r}")
        return faults


def digest_of(work: Path) -> str:
    """Digest of the bundle at its place, read byte by byte; "" for none, "torn: ..." for half of one."""
    from runtimes.bundle import verify_bundle
    from targets.errors import BundleError

    place = work / "out" / "tiny-here"
    if not place.exists():
        return ""
    try:
        verify_bundle(place)
    except BundleError as error:
        return f"torn: {error}"
    return str(json.loads((place / "manifest.json").read_text())["digest"])


def leftovers(work: Path) -> list[str]:
    """What stands beside the bundle, and folders in the making in the store."""
    beside = [path.name for path in (work / "out").glob("*") if path.name != "tiny-here"] if (work / "out").exists() else []
    return beside + [path.name for path in (work / "cache" / "entries").glob("making-*")]


def counted(bench: Bench, sweep: Sweep, older: bool) -> int:
    """Calls of an undisturbed run that this sweep can act at."""
    if sweep.signal:
        return bench.events if sweep.real else bench.run("new", bench.place / f"events-{older}").events
    work = Path(tempfile.mkdtemp(prefix="count-", dir=bench.place))
    if older:
        (work / "out").mkdir()
        shutil.copytree(bench.place / "old" / "out" / "tiny-here", work / "out" / "tiny-here")
    found = bench.run("new", work, Sweep(COUNT, forever=sweep.mode == KILL)).calls
    shutil.rmtree(work)
    return found


def run_sweep(bench: Bench, name: str, most: int) -> dict[str, Any]:
    """One row of the result: points there are, points tried, cases that broke a promise."""
    sweep, started, broken, missed = SWEEPS[name], time.monotonic(), [], 0
    total, fresh = counted(bench, sweep, older=True), counted(bench, sweep, older=False)
    tried = sorted({1 + round(i * (total - 1) / max(most - 1, 1)) for i in range(most)}) if most and most < total else list(range(1, total + 1))
    for number, k in enumerate(tried):
        older = k > fresh or number % 2 == 0
        faults = bench.case(sweep, k, older)
        missed += faults is None
        for fault in faults or ():
            broken.append({"k": k, "older": older, "fault": fault})
            print(f"{name} {k}: {fault}", file=sys.stderr, flush=True)
        if number % 20 == 0:
            print(f"{name}: {number + 1} of {len(tried)}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return {"sweep": name, "forever": sweep.forever, "points": total, "tried": len(tried) - missed, "broken": broken}


def write_recipes(place: Path, base: Path, delta: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} it is."}]} for n in range(4)]
    (place / "eval.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    parts = {"name": "tiny", "base": str(base), "deltas": [{"path": str(delta)}], "evaluate": {"data": "eval.jsonl"}}
    for name, scheme in (("new", "int8-g32"), ("old", "int4-g32")):
        recipe = {**parts, "quantize": {"scheme": scheme}, "targets": [{"profile": "here", "limits": LIMITS}]}
        (place / f"{name}.yaml").write_text(json.dumps(recipe))


def recorded_recipe(place: Path, base: Path, delta: Path) -> Path:
    """A recipe, with what its real evaluation and measurement found in `recorded` beside it: for benchmarks/trust.py."""
    write_recipes(place, base, delta)
    bench = Bench.__new__(Bench)
    bench.place, bench.recorded, bench.shim = place, {}, _NoShim()
    done = bench.run("new", place / "recording", record=True)
    assert done.code == 0, done
    return place / "new.yaml"


class _NoShim:
    def shim_count(self) -> int:
        return 0


def tiny(place: Path) -> tuple[Path, Path]:
    """The tiny model of the tests, and its LoRA."""
    spec = importlib.util.spec_from_file_location("tests_conftest", HERE.parent / "tests" / "conftest.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("base", "delta"):
        (place / name).mkdir()
    module.make_tiny_llama(place / "base")
    module.make_tiny_lora(place / "base", place / "delta")
    return place / "base", place / "delta"


def preloaded(place: Path) -> None:
    """Start again with the shim, which is compiled into `place`."""
    shim = place / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", shim, HERE / "interruptions.c", "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(shim), "TRIMTAB_INTERRUPTIONS": str(place), "OMP_NUM_THREADS": "1"}
    code = subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=environment).returncode
    shutil.rmtree(place, ignore_errors=True)
    sys.exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", default=",".join(SWEEPS))
    parser.add_argument("--most", type=int, default=0, help="points of a sweep, evenly spaced; 0: all (events: 24)")
    parser.add_argument("--base", type=Path, help="a tiny model and a delta of it; default: those of the tests")
    parser.add_argument("--delta", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if "TRIMTAB_INTERRUPTIONS" not in os.environ:
        preloaded(Path(tempfile.mkdtemp(prefix="interruptions-")).resolve())
    place = Path(os.environ["TRIMTAB_INTERRUPTIONS"])
    base, delta = (given.base.resolve(), given.delta.resolve()) if given.base else tiny(place)
    import transformers.models.llama.modeling_llama  # noqa: F401  (imported here once, not in every case)

    import compiler.evaluation.run
    import compiler.pipeline
    import compiler.report.html  # noqa: F401

    bench = Bench(place, base, delta)
    rows = []
    for name in given.sweeps.split(","):
        name, _, most = name.partition(":")
        rows.append(run_sweep(bench, name, int(most or given.most or (24 if SWEEPS[name].real else 0))))
        print(f"{name:12s} {rows[-1]['tried']:5d} of {rows[-1]['points']} points tried, {len(rows[-1]['broken'])} broke a promise", flush=True)
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if any(row["broken"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
