"""Measure a bundle: load time, time to first token, time per output token, encode latency, peak memory.

    python -m runtimes.bench BUNDLE --json [--limit ttft_p95_ms=400]... [--prompt-tokens 128] [--new-tokens 32] [--prefill-chunk 256]
                             [--batch 1] [--length 128] [--threads 0] [--least 20] [--most 10000] [--seconds 120] [--seed 0] [--adapter NAME] [--progress]
                             [--slow-spell 1.25] [--scene single|batch|server|cold] [--rate-per-s 2] [--concurrency 1] [--cores 1] [--memory-bytes 2000000000]

The protocol of the child process (`measure_in_child` is its other end). One JSON object on stdout, nothing else:

    {"schema": 1, "kind": "decoder", "conditions": {"prompt_tokens": 128, "new_tokens": 32, "threads": 2, ...},
     "load_s": 0.41, "peak_rss_mb": 210.3, "load_peak_rss_mb": 160.2, "size_mb": 78.2, "emulated": "",
     "series": {"ttft_ms": [...], "tpot_ms": [...], "prefill_tok_s": [...], "decode_tok_s": [...]}     (encoders: {"encode_ms": [...]})
     "dropped": 3, "windows": 40, "disturbed": 2, "spin_ms": 0.9, "seconds": 31.0, "looks": 1,
     "tests": [{"name": "ttft_p95_ms", "series": "ttft_ms", "outcome": "PASS", "samples": 104, "misses": 0, "false_pass": 0.0048,
                "percentile": 95, "limit": 400, "confidence": 0.995, "estimate": ..., "lower": ..., "upper": ...}],
     "environment": {"cpu": ..., "onnxruntime": ..., "fingerprint": ..., ...}, "crowded": ""}

Exit code 0. A user's mistake: {"error": {"kind": "BundleError", "code", "place", "expected", "found", "remedy"}} and exit code 1. With --progress, lines of
JSON {"samples", "most", "seconds"} go to stderr, at most four a second. The verdict is the caller's: the exit code does not tell about limits.

How it is measured. A request is one prompt of random token ids (seeded) and `new_tokens` greedy tokens, stop tokens ignored; it gives one sample of each
series, because tokens of one request are not independent: TTFT, and TPOT = (t_last - t_first) / (n - 1). Peak memory is that of this fresh process, in which
nothing but the runtime is loaded (VmHWM: what getrusage calls ru_maxrss begins with the memory of the parent that started us). load_s has the
library already imported and the files most likely in the system's cache; load_peak_rss_mb is the peak when the session is ready.

Scenes. single: requests follow each other. batch: the same with `batch` requests at once; series "batch.latency_ms" and so on. server: `runtimes.openloop`.
cold: one request of a process that has just begun, timed from before it began (`started`, on the system's monotonic clock) to its first token or vector, with
the bundle's files dropped from the system's cache where the system allows; series "cold_start_ms". cores and memory_bytes: `runtimes.confine`;
emulated is then what was imposed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from runtimes.bundle import Bundle, drop_from_cache, open_bundle
from runtimes.collect import SLOW_SPELL, Budget, Call, Limit, Samples, collect, named_limit
from runtimes.confine import Confinement, clean
from runtimes.confine import command as confined
from runtimes.decode import PREFILL_CHUNK
from runtimes.openloop import Load, open_loop
from runtimes.session import SessionSettings
from targets.errors import BundleError, TrimtabError
from targets.machine import fingerprint
from targets.spin import Spin

SCHEMA = 1
SCENES = ("single", "batch", "server", "cold")
REPORT_EVERY_S = 0.25


@dataclass(frozen=True)
class BenchOptions:
    """Conditions of a measurement. limits: name -> number, as `collect.named_limit` reads them. batch and length are an encoder's, the rest a decoder's.

    seconds caps the time of samples that count, max_seconds that of all sampling, disturbed windows included (0: three times `seconds`).
    slow_spell  requests that slow spells of the machine are taken to last on average, however few come (`runtimes.metrics.spell_effect`)
    adapter  the unmerged adapter that answers, "" for none
    spin_ms  what the reference kernel takes when this machine is quiet, by its profile; 0 where nobody knows
    """

    prompt_tokens: int = 128
    new_tokens: int = 32
    prefill_chunk: int = PREFILL_CHUNK
    batch: int = 1
    length: int = 128
    threads: int = 0
    seed: int = 0
    least: int = 20
    most: int = 10_000
    seconds: float = 120.0
    max_seconds: float = 0.0
    slow_spell: float = SLOW_SPELL
    adapter: str = ""
    spin_ms: float = 0.0
    scene: str = "single"
    rate_per_s: float = 0.0
    concurrency: int = 1
    started: float = 0.0
    cores: int = 0
    core_threads: int = 0
    memory_bytes: int = 0
    emulated: str = ""
    limits: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lows = {"prompt_tokens": 1, "new_tokens": 2, "prefill_chunk": 0, "batch": 1, "length": 1, "threads": 0, "seed": 0, "slow_spell": 1}
        for name, low in lows.items():
            if not getattr(self, name) >= low:
                raise TrimtabError(name, expected=f"a number >= {low}", found=str(getattr(self, name)), remedy="change the option")
        if self.scene not in SCENES:
            raise TrimtabError("scene", expected=f"one of {', '.join(SCENES)}", found=repr(self.scene), remedy="change the option")
        self.parsed_limits()

    def parsed_limits(self) -> list[Limit]:
        """The limits as questions. Raises TrimtabError for a name that is not one, and for NaN."""
        return [named_limit(name, value) for name, value in self.limits.items()]

    def arguments(self) -> list[str]:
        """The same as a command line."""
        given = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in ("limits", "started", "emulated")}
        words = [word for name, value in given.items() if value != "" for word in (f"--{name.replace('_', '-')}", str(value))]
        return words + [word for name, value in self.limits.items() for word in ("--limit", f"{name}={value!r}")]


@dataclass(frozen=True)
class BenchResult:
    """One measurement, as the child tells it (see the head of this file)."""

    kind: str
    conditions: Mapping[str, Any]
    load_s: float
    peak_rss_mb: float
    size_mb: float
    series: Mapping[str, Sequence[float]]
    dropped: int
    windows: int
    disturbed: int
    spin_ms: float
    seconds: float
    looks: int
    tests: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any]
    load_peak_rss_mb: float = 0.0
    emulated: str = ""
    crowded: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def measure(directory: Path, options: BenchOptions, report: Callable[[int, int, float], None] | None = None, *, alone: bool = False) -> BenchResult:
    """Measure in this process; `alone`: it does nothing else, so denormals may be flushed as in serving.

    peak_rss_mb is then this process's: for a bundle's own, use `measure_in_child`. Raises BundleError, TrimtabError.
    """
    import onnxruntime  # noqa: F401  (imported before the clock starts: load_s is the bundle's, not Python's)
    import tokenizers  # noqa: F401

    bundle = open_bundle(directory)
    settings = SessionSettings(threads=options.threads, flush_denormals=alone)
    started = time.perf_counter()
    call = (_decoder_call if bundle.kind == "decoder" else _encoder_call)(bundle, settings, options)
    load_s, load_peak = time.perf_counter() - started, peak_rss_bytes()
    samples, seen = _sampled(call, options, settings, report)
    return BenchResult(
        kind=bundle.kind,
        conditions={**_conditions(bundle.kind, options), **seen, "threads": settings.resolved_threads()},
        load_s=load_s,
        peak_rss_mb=peak_rss_bytes() / 1e6,
        size_mb=bundle.model_bytes / 1e6,
        series=samples.values,
        dropped=samples.dropped,
        windows=samples.windows,
        disturbed=samples.disturbed,
        spin_ms=samples.spin_ms,
        seconds=samples.seconds,
        looks=samples.looks,
        tests=_tests(list(options.limits), samples),
        environment=environment(),
        load_peak_rss_mb=load_peak / 1e6,
        emulated=options.emulated,
        crowded=samples.crowded,
    )


def _sampled(call: Call, options: BenchOptions, settings: SessionSettings, report: Callable[[int, int, float], None] | None) -> tuple[Samples, dict[str, Any]]:
    """What the scene gives, and what it found out about its own conditions."""
    if options.scene == "cold":
        call()
        took = (time.monotonic() - options.started) * 1e3
        return Samples({"cold_start_ms": (took,)}, 0, 1, 0, 0.0, took / 1e3, 0, ()), {}
    limits = options.parsed_limits()
    caps = {"seconds": options.seconds, "max_seconds": options.max_seconds, "slow_spell": options.slow_spell}
    budget = Budget(least=options.least, most=max(options.most, options.least), **caps)
    with Spin(settings.resolved_threads(), known_ms=options.spin_ms) as spin:
        if options.scene == "server":
            samples, utilisation = open_loop(call, Load(options.rate_per_s, options.concurrency, options.seed), limits, budget, spin, report)
            return samples, {"utilisation": round(utilisation, 3)}
        return collect(call, limits, budget, spin, report), {}


def measure_in_child(directory: Path, options: BenchOptions, report: Callable[[int, int, float], None] | None = None) -> BenchResult:
    """Measure in a fresh process with nothing but the runtime loaded. Raises what the child reports; BundleError when it dies."""
    command = [sys.executable, "-m", "runtimes.bench", str(Path(directory).resolve()), "--json", "--progress", *options.arguments()]
    if options.scene == "cold":
        drop_from_cache(Path(directory))
        command += ["--started", repr(time.monotonic())]
    command = confined(Confinement(options.cores, options.core_threads, options.memory_bytes), command)
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *(path for path in [os.environ.get("PYTHONPATH", "")] if path)]
    noise = []
    # The answer goes to a file: a pipe that nobody reads while stderr is followed would fill and stop the child.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as answer_file:
        with subprocess.Popen(
            command, stdout=answer_file, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        ) as child:
            try:
                for line in child.stderr or ():
                    if line.startswith("{") and report is not None:
                        step = json.loads(line)
                        report(step["samples"], step["most"], step["seconds"])
                    elif not line.startswith("{"):
                        noise.append(line.strip())
            except BaseException:  # interrupted or terminated: a child that measures on would be nobody's
                child.kill()
                raise
        answer_file.seek(0)
        text = answer_file.read()
    if options.memory_bytes:
        clean()
    if child.returncode not in (0, 1) or not text.startswith("{"):
        found = f"exit code {child.returncode}: {' '.join(noise[-3:])[:300]}"
        raise BundleError(
            f"measuring {directory}", expected="a process that runs the bundle", found=found, remedy="check its memory limit and run `trimtab verify`"
        )
    answer = json.loads(text)
    if "error" in answer:
        fault = answer["error"]
        kind = BundleError if fault.pop("kind") == "BundleError" else TrimtabError
        raise kind(fault.pop("place"), **fault)
    return BenchResult(**{entry.name: answer[entry.name] for entry in fields(BenchResult)})


def peak_rss_bytes() -> int:
    """Most resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    import psutil

    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(getattr(memory, "peak_wset"))  # noqa: B009  (psutil's types know one platform)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment() -> dict[str, Any]:
    """Facts that a reader needs to judge the figures: machine, versions, load, governor."""
    import numpy
    import onnxruntime

    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "fingerprint": fingerprint(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "onnxruntime": onnxruntime.__version__,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "governor": governor.read_text().strip() if governor.exists() else None,
    }


def _decoder_call(bundle: Bundle, settings: SessionSettings, options: BenchOptions) -> Call:
    import numpy as np

    from runtimes.generate import Generator, Options

    generator = Generator(bundle, settings)
    if options.prompt_tokens + options.new_tokens > generator.context_length:
        found = f"{options.prompt_tokens} + {options.new_tokens} tokens"
        raise TrimtabError("prompt-tokens + new-tokens", expected=f"at most {generator.context_length}", found=found, remedy="measure with fewer tokens")
    allowed = np.array([token for token in range(generator.layout.vocab_size) if token not in generator.stop_ids])
    rng = np.random.default_rng(options.seed)
    new_tokens = 1 if options.scene == "cold" else options.new_tokens
    how = Options(max_new_tokens=new_tokens, ignore_eos=True, prefill_chunk=options.prefill_chunk, adapter=options.adapter)
    generator.adapters.values(options.adapter)  # read before the clock runs
    one_at_a_time = threading.Lock()  # numpy's generators are not for several threads

    def request() -> dict[str, float]:
        with one_at_a_time:
            prompt = rng.choice(allowed, options.prompt_tokens).tolist()
        answer = generator.generate([prompt] * options.batch, how)[0]
        if options.scene == "server":
            return {"latency_ms": answer.token_ms[-1], "ttft_ms": answer.ttft_ms}
        if options.scene == "batch":
            took = answer.token_ms[-1]
            tokens = options.batch * (options.prompt_tokens + options.new_tokens)
            return {"batch.latency_ms": took, "batch.ttft_ms": answer.ttft_ms, "batch.tok_s": 1e3 * tokens / took}
        if options.scene == "cold":
            return {}
        return {
            "ttft_ms": answer.ttft_ms,
            "tpot_ms": answer.tpot_ms,
            "prefill_tok_s": 1e3 * options.batch * options.prompt_tokens / answer.ttft_ms,
            "decode_tok_s": 1e3 * options.batch / answer.tpot_ms,
        }

    return request


def _encoder_call(bundle: Bundle, settings: SessionSettings, options: BenchOptions) -> Call:
    import numpy as np

    from runtimes.encode import Encoder

    encoder = Encoder(bundle, settings)
    if options.length > encoder.max_length:
        raise TrimtabError("length", expected=f"at most {encoder.max_length} tokens", found=str(options.length), remedy="measure with shorter texts")
    rng = np.random.default_rng(options.seed)
    shape = (options.batch, options.length)
    mask, types = np.ones(shape, np.int64), np.zeros(shape, np.int64)
    vocabulary = encoder.tokenizer.get_vocab_size()

    one_at_a_time = threading.Lock()

    def request() -> dict[str, float]:
        with one_at_a_time:
            feeds = encoder.feeds(rng.integers(0, vocabulary, shape), mask, types)
        started = time.perf_counter()
        encoder.run(feeds)
        took = (time.perf_counter() - started) * 1e3
        if options.scene == "batch":
            return {"batch.latency_ms": took, "batch.texts_s": 1e3 * options.batch / took}
        return {"latency_ms" if options.scene == "server" else "encode_ms": took}

    return request


def _conditions(kind: str, options: BenchOptions) -> dict[str, Any]:
    names = ("prompt_tokens", "new_tokens", "prefill_chunk", "batch", "seed") if kind == "decoder" else ("batch", "length", "seed")
    asked = {"server": ("rate_per_s", "concurrency")}.get(options.scene, ())
    scene = {} if options.scene == "single" else {"scene": options.scene}
    others = [*(["adapter"] if options.adapter else []), *(["slow_spell"] if options.scene != "cold" else [])]  # a verdict says what it assumes
    return {**scene, **{name: getattr(options, name) for name in (*names, *asked, *others)}}


def _tests(names: Sequence[str], samples: Samples) -> list[dict[str, Any]]:
    return [{"name": name, "series": limit.series, **test.to_json()} for name, (limit, test) in zip(names, samples.tests, strict=True)]


def _progress() -> Callable[[int, int, float], None]:
    told = -REPORT_EVERY_S

    def report(samples: int, most: int, seconds: float) -> None:
        nonlocal told
        if seconds - told >= REPORT_EVERY_S:
            told = seconds
            print(json.dumps({"samples": samples, "most": most, "seconds": round(seconds, 2)}), file=sys.stderr, flush=True)

    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """The child process. Returns its exit code."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m runtimes.bench", description="Measure a bundle in this process and print one JSON object.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON (the only format; the flag says so)")
    parser.add_argument("--progress", action="store_true", help="tell progress on stderr, one JSON object a line")
    parser.add_argument(
        "--limit", action="append", default=[], metavar="NAME=NUMBER", help="e.g. ttft_p95_ms=400, decode_tok_s=90; sampling goes on until decided"
    )
    for entry in fields(BenchOptions):
        if entry.name != "limits":
            parser.add_argument(f"--{entry.name.replace('_', '-')}", type=type(entry.default), default=entry.default)
    given = vars(parser.parse_args(arguments))
    bundle, progress = given.pop("bundle"), given.pop("progress")
    given.pop("json")
    try:
        limits = dict(_limit(text) for text in given.pop("limit"))
        result = measure(bundle, BenchOptions(**given, limits=limits), _progress() if progress else None, alone=True)
    except TrimtabError as error:
        kind = "BundleError" if isinstance(error, BundleError) else "TrimtabError"
        print(json.dumps({"error": {"kind": kind, **error.as_dict()}}))
        return error.exit_code
    print(json.dumps(result.to_json()))
    return 0


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise TrimtabError("--limit", expected="NAME=NUMBER, e.g. ttft_p95_ms=400", found=text, remedy="change the option") from error


if __name__ == "__main__":
    sys.exit(main())
