"""The child's end of a side-by-side benchmark: JSON lines in, JSON lines out. Needs the standard library only, so that every peer's environment can run it.

    {"op": "load", "model": PATH, "threads": 2, "context": 640, ...}         -> {"load_s", "before": MEMORY, "memory": MEMORY, "about": {...}}
    {"op": "generate", "prompt": [ids], "new": 64}                           -> {"first_s", "rest_s", "tokens": [ids]}     greedy, stop tokens ignored
    {"op": "encode", "ids": [[ids], ...], "seconds": 0.2, "out": FILE.npy}   -> {"seconds": [...]}    again until `seconds` are over; vectors to FILE if named
    {"op": "logits", "ids": [ids], "first": 255, "out": FILE.npy}            -> {}                                        logits after tokens first..n-2
    {"op": "memory"} -> MEMORY      {"op": "quit"}      a failure -> {"error": text}

MEMORY in MB: `peak` (VmHWM), `resident`, `anonymous`, `file` (pages of mapped files, which the system may take back).
A model is an object with the methods of `Model` that its kind has.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, Protocol

NAMES = {"peak": "VmHWM", "resident": "VmRSS", "anonymous": "RssAnon", "file": "RssFile"}


class Model(Protocol):
    about: dict[str, Any]

    def generate(self, prompt: list[int], new: int) -> tuple[float, float, list[int]]: ...

    def encode(self, ids: list[list[int]]) -> tuple[float, Any]: ...

    def logits(self, ids: list[int], first: int) -> Any: ...


def memory() -> dict[str, float]:
    """Memory of this process in MB, from the system's own account; empty where there is no /proc."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    found = {name: re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE) for name, field in NAMES.items()}
    return {name: int(match[1]) * 1024 / 1e6 for name, match in found.items() if match}


def serve(open_model: Any) -> None:
    """Answer questions until `quit` or the end of the input. open_model(question) -> Model; libraries are imported by then."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not look like an answer
    model: Any = None
    for line in sys.stdin:
        question = json.loads(line)
        if question["op"] == "quit":
            return
        try:
            if question["op"] == "load":
                before, started = memory(), time.perf_counter()
                model = open_model(question)
                answer = {"load_s": time.perf_counter() - started, "before": before, "memory": memory(), "about": model.about}
            else:
                answer = ask(model, question)
        except Exception as error:  # told to the parent, which stops: nothing carries on
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
        answers.write(json.dumps(answer) + "\n")


def ask(model: Model, question: dict[str, Any]) -> dict[str, Any]:
    """One question to a loaded model."""
    op = question["op"]
    if op == "memory":
        return memory()
    if op == "generate":
        first_s, rest_s, tokens = model.generate(question["prompt"], question["new"])
        return {"first_s": first_s, "rest_s": rest_s, "tokens": tokens}
    if op == "encode":
        seconds: list[float] = []
        vectors: Any = None
        while sum(seconds) < question["seconds"]:
            took, vectors = model.encode(question["ids"])
            seconds.append(took)
        if question.get("out"):
            save(question["out"], vectors)
        return {"seconds": seconds}
    if op == "logits":
        save(question["out"], model.logits(question["ids"], question["first"]))
        return {}
    raise ValueError(f"no question {op}")


def save(path: str, array: Any) -> None:
    import numpy as np

    np.save(path, np.asarray(array, np.float32))
