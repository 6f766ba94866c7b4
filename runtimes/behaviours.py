"""Behaviours that every bundle must have, whatever its limits say: equal questions get equal answers, and bad ones an error.

A row of DECODER or ENCODER is one named check. It gives a figure that must not exceed its tolerance; figures of the first three kinds are

    max |a - b| / std(a)       over the logits of one position, or one vector

KIND        TOLERANCE  what is compared, and why this much is allowed
exact       1e-3       the same mathematics in float32 (`SessionSettings.exact`). Sums in another order differ by 1e-5 to 3e-5 (SmolLM2-135M, int4 and int8,
                       Zen 3); a wrong mask, position or cache differs by more than 1e-2.
same        0          the same bytes, kernels and threads in another process.
rounding    0.5        root mean square, shipped graph against `exact`: what 8-bit activations cost (SmolLM2-135M: 0.07 for int4, 0.11 for int8). Unrelated
                       answers give 1.4.
count       0          faults counted.

8-bit activations turn the last bit of a sum into a step, so the shipped graph may differ from itself by 0.3 between a prompt read at once and read token by
token. Each comparison of kind exact is therefore made on the shipped graph first; where that differs, on the exact twin, and the note tells both. A graph
with DynamicQuantizeMatMul has one activation scale a call and no exact twin: what stands beside a text changes its vector, and `rounding` is allowed.

    python -m runtimes.behaviours BUNDLE       one JSON object: the answers of this process, for `second_process`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.adapters import Adapters
from runtimes.bundle import Bundle, open_bundle
from runtimes.decode import PROMPT_TOKENS, DecodeLoop, Floats, open_graphs, read_layout
from runtimes.encode import Encoder
from runtimes.session import ACCURACY, SessionSettings, open_session
from targets.errors import TrimtabError
from targets.machine import usable_cores

TOLERANCES = {"exact": 1e-3, "same": 0.0, "rounding": 0.5, "count": 0.0}
LENGTHS = (24, 9, 1)  # tokens of the probes
CHUNK = 7
MOST_CACHE_BYTES = 1 << 30
SHIPPED, EXACT = SessionSettings(spinning=False), SessionSettings(spinning=False, exact=True)
Run = Callable[[SessionSettings], tuple[Floats, Floats]]  # what must be equal, under the given settings


@dataclass(frozen=True)
class Finding:
    """The result of one behaviour: `measured` must be at most `limit`. kind: a row of TOLERANCES; skipped: why it could not be tried here."""

    name: str
    kind: str
    measured: float
    limit: float
    note: str = ""
    skipped: bool = False

    @property
    def holds(self) -> bool:
        return self.measured <= self.limit  # NaN is not


def difference(left: Floats, right: Floats) -> float:
    """Largest of max |a - b| / std(a) over rows: [n, width] twice -> a number; NaN where either has one."""
    a, b = np.atleast_2d(np.asarray(left, np.float64)), np.atleast_2d(np.asarray(right, np.float64))
    return float((np.abs(a - b).max(-1) / np.maximum(a.std(-1), 1e-30)).max())


def probes(vocab: int, lengths: Sequence[int] = LENGTHS, avoid: Sequence[int] = ()) -> list[list[int]]:
    """Token ids that reach over the whole vocabulary, its first and last entry included; the same for every bundle of that vocabulary."""
    allowed = np.setdiff1d(np.arange(vocab), avoid)
    picked = allowed[np.linspace(0, len(allowed) - 1, sum(lengths)).round().astype(int)]
    shuffled = np.random.default_rng(0).permutation(picked).tolist()
    ends = np.cumsum(lengths)
    return [shuffled[end - length : end] for end, length in zip(ends, lengths, strict=True)]


class Subject:
    """A bundle under test; sessions are opened once per setting.

    twins  graph file -> the same graph with float32 activations, for graphs of which a setting of the session makes none: products of 8-bit integers
    """

    def __init__(self, bundle: Bundle, threads: int = 0, twins: Mapping[str, bytes] | None = None) -> None:
        self.bundle, self.threads, self.twins = bundle, threads or usable_cores(), twins or {}
        graph = bundle.model_path.read_bytes()
        self.twin = ACCURACY in graph or bundle.model_path.name in self.twins  # a graph without MatMulNBits is its own exact twin
        self.rounds = self.twin or any(name in graph for name in (b"DynamicQuantizeMatMul", b"MatMulIntegerToFloat"))
        self._open = cache(self._opened)

    def opened(self, settings: SessionSettings) -> Any:
        """DecodeLoop or Encoder."""
        exact = settings.exact and self.twin
        return self._open(replace(settings, exact=exact, threads=settings.threads or self.threads))

    def _opened(self, settings: SessionSettings) -> Any:
        if self.bundle.kind == "encoder":
            return Encoder(self.bundle, settings)
        if settings.exact and self.bundle.model_path.name in self.twins:
            return self._loop(open_session(self.bundle.model_path, settings, self.twins[self.bundle.model_path.name]))
        return self._loop(*open_graphs(self.bundle, settings))

    def _loop(self, session: Any, prompts: Any = None) -> DecodeLoop:
        genai = self.bundle.read_json("genai_config.json")
        loop = DecodeLoop(session, read_layout(session, genai, str(self.bundle.directory)), int(genai["model"]["context_length"]), prompts)
        adapters = Adapters(self.bundle, session)
        loop.use(adapters.values(adapters.names[0] if adapters.names else ""))  # of several unmerged adapters the first answers
        return loop

    @property
    def vocab(self) -> int:
        tool = self.opened(SHIPPED)
        return int(tool.tokenizer.get_vocab_size()) if isinstance(tool, Encoder) else int(tool.layout.vocab_size)

    @property
    def prompts(self) -> list[list[int]]:
        tool = self.opened(SHIPPED)
        encodes = isinstance(tool, Encoder)
        most = tool.max_length if encodes else tool.context_length - 1
        return probes(self.vocab, [min(length, most) for length in LENGTHS], [tool.pad_id] if encodes else [])

    def answers(self, settings: SessionSettings, rows: Sequence[Sequence[int]], chunk: int = 0) -> Floats:
        """Last-token logits [rows, vocab], or the encoder's output of each row's first token or vector [rows, width]."""
        tool = self.opened(settings)
        if isinstance(tool, DecodeLoop):
            return tool.start(rows, chunk=chunk).copy()
        width = max(map(len, rows))
        ids, mask = np.full((len(rows), width), tool.pad_id, np.int64), np.zeros((len(rows), width), np.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)], mask[place, : len(row)] = row, 1
        output = tool.run(tool.feeds(ids, mask, np.zeros_like(ids)))
        return output[:, 0] if output.ndim == 3 else output

    def unrounded(self, row: Sequence[int]) -> Floats:
        """Last-token logits [1, vocab] or the vector of a row as the graph that reads it gives them with float32 activations."""
        prompt = self.bundle.prompt_path
        if prompt is None or len(row) < PROMPT_TOKENS or prompt.name not in self.twins:
            return self.answers(EXACT, [row])
        return self._loop(open_session(prompt, replace(EXACT, threads=self.threads), self.twins[prompt.name])).start([row])

    def compare(self, name: str, run: Run, settings: SessionSettings = SHIPPED) -> Finding:
        """A finding of kind exact, or rounding where no exact twin exists (see the head of this file)."""
        shipped = difference(*run(settings))
        limit = TOLERANCES["exact"]
        if shipped <= limit or not self.rounds:
            return Finding(name, "exact", shipped, limit, "as shipped")
        if not self.twin:
            return Finding(name, "rounding", shipped, 2 * TOLERANCES["rounding"], "one activation scale a call: equal only up to rounding")
        exact = difference(*run(replace(settings, exact=True)))
        note = f"without the rounding of activations; {shipped:.2g} with it"
        return Finding(name, "exact", exact, limit, note)


def finite_outputs(subject: Subject) -> Finding:
    answers = np.concatenate([subject.answers(SHIPPED, [row]) for row in subject.prompts])
    return count("finite_outputs", int((~np.isfinite(answers)).sum()), f"numbers that are NaN or infinite, of {answers.size}")


def batch_invariance(subject: Subject) -> Finding:
    """Rows of one length, alone and in a batch, and the batch turned round."""
    first, second = subject.prompts[0][:8], subject.prompts[0][8:16]

    def run(settings: SessionSettings) -> tuple[Floats, Floats]:
        alone = np.concatenate([subject.answers(settings, [row]) for row in (first, second)])
        together = subject.answers(settings, [second, first])[::-1]
        return alone, together

    return subject.compare("batch_invariance", run)


def padding_invariance(subject: Subject) -> Finding:
    """Short rows beside a long one, against the same rows alone."""
    rows = subject.prompts

    def run(settings: SessionSettings) -> tuple[Floats, Floats]:
        return np.concatenate([subject.answers(settings, [row]) for row in rows]), subject.answers(settings, rows)

    return subject.compare("padding_invariance", run)


def cache_equals_recompute(subject: Subject) -> Finding:
    """The last two tokens as steps on the cache, against the prompt read at once."""
    row = subject.prompts[0]

    def run(settings: SessionSettings) -> tuple[Floats, Floats]:
        whole = subject.answers(settings, [row])
        loop = subject.opened(settings)
        loop.start([row[:-2]])
        loop.step([row[-2]])
        return whole, loop.step([row[-1]]).copy()

    return subject.compare("cache_equals_recompute", run)


def chunked_prompt(subject: Subject) -> Finding:
    row = subject.prompts[0]
    return subject.compare("chunked_prompt", lambda settings: (subject.answers(settings, [row]), subject.answers(settings, [row], chunk=CHUNK)))


def under(name: str, **changes: Any) -> Callable[[Subject], Finding]:
    """A behaviour: the same answers under other settings of the session."""

    def check(subject: Subject) -> Finding:
        row = [subject.prompts[0]]
        if changes.get("threads", 1) > usable_cores():
            return Finding(name, "exact", 0.0, TOLERANCES["exact"], f"not tried: this process may use {usable_cores()} core(s)", skipped=True)
        return subject.compare(name, lambda settings: (subject.answers(settings, row), subject.answers(replace(settings, **changes), row)))

    return check


def second_process(subject: Subject) -> Finding:
    command = [sys.executable, "-m", "runtimes.behaviours", str(subject.bundle.directory.resolve()), "--threads", str(subject.threads)]
    paths = [str(Path(__file__).resolve().parent.parent), *(path for path in [os.environ.get("PYTHONPATH", "")] if path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
    limit = TOLERANCES["same"]
    if done.returncode:
        return Finding("second_process", "same", float("nan"), limit, f"the process ended with {done.returncode}: {' '.join(done.stderr.split())[-200:]}")
    there = np.array(json.loads(done.stdout), np.float32)
    return Finding("second_process", "same", difference(subject.answers(SHIPPED, subject.prompts[:1]), there), limit, "same threads, same kernels")


def activation_rounding(subject: Subject) -> Finding:
    """The shipped kernels against float32 activations: prompt and step."""
    row, limit = subject.prompts[0], TOLERANCES["rounding"]
    if not subject.twin:
        return Finding("activation_rounding", "rounding", 0.0, limit, "no twin in float32 to compare with" if subject.rounds else "no 8-bit activations")
    rms = []
    for tokens in (row, row[:1]):
        exact, shipped = (answer.astype(np.float64) for answer in (subject.unrounded(tokens), subject.answers(SHIPPED, [tokens])))
        rms.append(float(np.sqrt(np.square(exact - shipped).mean()) / exact.std()))
    return Finding("activation_rounding", "rounding", max(rms), limit, f"root mean square: a prompt {rms[0]:.2g}, one token {rms[1]:.2g}")


def length_1(subject: Subject) -> Finding:
    answer = subject.answers(SHIPPED, [subject.prompts[2]])
    return count("length_1", int((~np.isfinite(answer)).sum()), "numbers that are NaN or infinite")


def length_max(subject: Subject) -> Finding:
    """The last position that the model has."""
    tool, token = subject.opened(SHIPPED), subject.prompts[2][0]
    if isinstance(tool, Encoder):
        answer = subject.answers(SHIPPED, [[token] * tool.max_length])
        return count("length_max", int((~np.isfinite(answer)).sum()), f"a text of {tool.max_length} tokens")
    if tool.layout.cache_bytes_per_token * tool.context_length > MOST_CACHE_BYTES:
        note = f"not tried: a cache of {tool.context_length} tokens needs {tool.layout.cache_bytes_per_token * tool.context_length / 1e9:.1f} GB"
        return replace(count("length_max", 0, note), skipped=True)
    tool.seek(tool.context_length - 1)
    return count("length_max", int((~np.isfinite(tool.step([token]))).sum()), f"token {tool.context_length}, after as many with empty keys")


def length_over(subject: Subject) -> Finding:
    """One token more than the model has positions for: refused with an error (decoders), or cut and answered (encoders)."""
    tool = subject.opened(SHIPPED)
    if isinstance(tool, Encoder):
        text = "a " * (tool.max_length + 1)
        fine = len(tool.tokenizer.encode(text).ids) <= tool.max_length and bool(np.isfinite(tool.run_text(text)).all())
        return count("length_over", int(not fine), "a longer text is cut to the model's length")
    return refused("length_over", lambda: tool.start([[subject.prompts[2][0]] * (tool.context_length + 1)]))


def empty_input(subject: Subject) -> Finding:
    tool = subject.opened(SHIPPED)
    if not isinstance(tool, Encoder):
        return refused("empty_input", lambda: tool.start([[]]))
    try:
        answer = tool.run_text("")
    except TrimtabError:
        return count("empty_input", 0, "refused with an error")
    return count("empty_input", int((~np.isfinite(answer)).sum()), "answered: the tokenizer adds its own tokens")


def refused(name: str, act: Callable[[], Any]) -> Finding:
    try:
        act()
    except TrimtabError:
        return count(name, 0, "refused with an error")
    return count(name, 1, "was answered, though the model has no such position" if name == "length_over" else "was answered")


def count(name: str, faults: int, note: str) -> Finding:
    return Finding(name, "count", float(faults), TOLERANCES["count"], note)


COMMON: tuple[Callable[[Subject], Finding], ...] = (
    finite_outputs,
    batch_invariance,
    padding_invariance,
    length_1,
    length_max,
    length_over,
    empty_input,
    under("optimization_basic", optimization="basic"),
    under("optimization_none", optimization="none"),
    under("threads_1", threads=1),
    under("threads_2", threads=2),
    second_process,
    activation_rounding,
)
ROWS = {"decoder": (*COMMON, cache_equals_recompute, chunked_prompt), "encoder": COMMON}


def behaviours(
    bundle: Bundle, threads: int = 0, report: Callable[[str, int, int], None] | None = None, twins: Mapping[str, bytes] | None = None
) -> list[Finding]:
    """Every behaviour of the bundle's kind. twins: as `Subject` takes them. Raises BundleError when it does not load or run at all."""
    subject, found = Subject(bundle, threads, twins), []
    for row in ROWS[bundle.kind]:
        found.append(row(subject))
        if report is not None:
            report(found[-1].name, len(found), len(ROWS[bundle.kind]))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The second process: print the answer to the first probe."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m runtimes.behaviours", description="Print a bundle's answer to the first probe as JSON.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args(arguments)
    subject = Subject(open_bundle(given.bundle), given.threads)
    answers: NDArray[Any] = subject.answers(SHIPPED, subject.prompts[:1])
    print(json.dumps(answers.astype(float).tolist()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
