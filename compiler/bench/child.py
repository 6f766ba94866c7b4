"""The parent's end of a side-by-side benchmark: one process per system, spoken to in JSON lines, stopped while others are timed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from compiler.bench.peers import ADAPTERS, ROOT, System, python_of
from compiler.errors import BenchError

LAST_WORDS = 400


class Child:
    """A system in its own process. Stopped (SIGSTOP) but while it answers, so that nobody's idle threads spin on another's cores."""

    def __init__(self, system: System) -> None:
        self.system = system
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the child)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        if system.env:
            environment.pop("PYTHONPATH", None)
        else:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH", ""))))
        command = [str(python_of(system.env)), str(ADAPTERS / system.adapter)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def ask(self, op: str, **question: Any) -> dict[str, Any]:
        """One question, one answer. Raises BenchError with the child's own words when it fails or dies."""
        assert self._process.stdin and self._process.stdout
        self._signal("SIGCONT")
        try:
            self._process.stdin.write(json.dumps({"op": op, **question}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: Mapping[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise BenchError(
                f"{self.system.name}: {op}", expected="an answer", found=str(answer["error"]), remedy="leave this system out, or make its model again"
            )
        self._signal("SIGSTOP")
        return dict(answer)

    def load(self, model: Path, threads: int, context: int) -> dict[str, Any]:
        """Load a model: {"load_s", "before", "memory", "about"}."""
        options = {"embeddings": self.system.kind == "encoder", **self.system.options}
        return self.ask("load", model=str(model), threads=threads, context=context, **options)

    def close(self) -> None:
        """End the process; a second call does nothing."""
        if self._process.poll() is None:
            self._process.kill()  # it holds nothing worth saving, and a stopped process hears nothing else
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # an unread question to a dead process
                    stream.close()

    def _signal(self, name: str) -> None:
        if hasattr(signal, name) and self._process.poll() is None:
            self._process.send_signal(getattr(signal, name))

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        return f"exit code {self._process.returncode}: {' '.join(self._log.read().decode(errors='replace').split())[-LAST_WORDS:]}"


def file_bytes(model: Path, patterns: Sequence[str]) -> int:
    """Bytes of the files of a model: one file, or those in a folder that match."""
    if model.is_file():
        return model.stat().st_size
    return sum(path.stat().st_size for path in {path for pattern in patterns for path in model.glob(pattern)})
