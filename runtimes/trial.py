"""Try a stranger's chat template and tokenizer in a process that may not take much: `try_files` is the parent, `python -m runtimes.trial` the child.

A template is a program and a tokenizer holds regular expressions. The sandbox (`runtimes.chat`) bounds what it can see; memory that a filter takes and time
within one expression it cannot see, and the system can: the child has SECONDS of processor time, MEMORY_BYTES of addresses, and may write no file.
What behaves here may misbehave on other messages: a trial is no proof.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from targets.errors import BundleError

SECONDS = 5
MEMORY_BYTES = 2 << 30
CONVERSATIONS = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}],
)
TEXTS = ("The pump on line 4 stopped.", "a" * 4000, " " * 4000, "1" * 4000, "a!" * 2000, "価格は 1,280 円です。🙂 " * 100)
REMEDY = "do not use this model, or take its tokenizer files from where it was published"


def try_files(template: str, variables: Mapping[str, Any], tokenizer: str, place: str) -> None:
    """Render conversations and encode texts in a limited process. template, tokenizer: contents, "" for none.

    Raises BundleError: TEMPLATE_UNSAFE, TEMPLATE (no conversation renders), TEMPLATE_LIMIT, TOKENIZER_JSON or TOKENIZER_LIMIT; MEMORY
    where this machine's own limits let no such process start.
    """
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join([root, *(path for path in [os.environ.get("PYTHONPATH", "")] if path)])
    asked = json.dumps({"template": template, "variables": dict(variables), "tokenizer": tokenizer})
    limits = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "runtimes.trial"]
    done = subprocess.run(command, input=asked.encode(), capture_output=True, env={**os.environ, **limits})
    stages = [line for line in done.stdout.decode(errors="replace").splitlines() if line]
    if done.returncode == 0:
        return
    if not stages:  # it read nothing of the model yet
        last = (done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        expected, remedy = f"a process of up to {MEMORY_BYTES >> 30} GiB of addresses", "raise the limit on a process's memory (ulimit -v)"
        raise BundleError("trial of template and tokenizer", expected=expected, found=f"none could start: {last}", remedy=remedy, code="MEMORY")
    if stages[-1].startswith("{"):
        fault = json.loads(stages[-1])
        raise BundleError(f"{place}: {fault.pop('place')}", **fault)
    found = f"a process that ended with {done.returncode} in its {stages[-1]}"
    code = "TEMPLATE_LIMIT" if stages[-1] == "template" else "TOKENIZER_LIMIT"
    raise BundleError(place, expected=f"{SECONDS} s and {MEMORY_BYTES >> 30} GiB to suffice for short texts", found=found, remedy=REMEDY, code=code)


def main() -> int:
    """The child: the stage's name on stdout before it begins, then an error as JSON, or nothing."""
    import resource

    import tokenizers  # noqa: F401  # both before anything of the model is read

    import runtimes.chat  # noqa: F401

    asked = json.loads(sys.stdin.buffer.read())
    for limit, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        given = resource.getrlimit(limit)[1]  # may be less already, and cannot be raised
        most = most if given == resource.RLIM_INFINITY else min(most, given)
        resource.setrlimit(limit, (most, most))
    try:
        if asked["template"]:
            print("template", flush=True)
            _render(asked["template"], asked["variables"])
        if asked["tokenizer"]:
            print("tokenizer", flush=True)
            _encode(asked["tokenizer"])
    except BundleError as error:
        print(json.dumps(error.as_dict()), flush=True)
        return 1
    except MemoryError:
        return 2
    return 0


def _render(template: str, variables: Mapping[str, Any]) -> None:
    """Raises what is unsafe or without measure at once; a template may refuse some conversations, not all."""
    from runtimes.chat import render_chat

    refused = []
    for messages in CONVERSATIONS:
        try:
            render_chat(template, messages, variables=variables)
        except BundleError as error:
            if error.code != "TEMPLATE":
                raise
            refused.append(error)
    if len(refused) == len(CONVERSATIONS):
        raise refused[0]


def _encode(content: str) -> None:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises a bare Exception
        found = " ".join(str(error).split())[:200]
        raise BundleError("tokenizer.json", expected="a tokenizer of the tokenizers library", found=found, remedy=REMEDY, code="TOKENIZER_JSON") from error
    for text in TEXTS:
        tokenizer.encode(text)


if __name__ == "__main__":
    sys.exit(main())
