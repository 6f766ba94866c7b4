"""Measuring bundles in a child process: figures that fit together, limits that are judged, mistakes that come back as themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from runtimes import bench
from runtimes.bench import BenchOptions, measure_in_child
from targets.errors import BundleError, TrimtabError
from targets.machine import fingerprint

SHORT = {"prompt_tokens": 16, "new_tokens": 5, "least": 4, "most": 60, "seconds": 8.0, "threads": 1}


def test_a_decoder_in_a_fresh_process(decoder: SimpleNamespace) -> None:
    steps: list[tuple[int, int, float]] = []
    limits = {"ttft_p50_ms": 60_000.0, "tpot_p95_ms": 1e-6}
    result = measure_in_child(decoder.directory, BenchOptions(**SHORT, limits=limits), lambda *step: steps.append(step))  # type: ignore[arg-type]
    assert result.kind == "decoder" and set(result.series) == {"ttft_ms", "tpot_ms", "prefill_tok_s", "decode_tok_s"}
    assert len({len(row) for row in result.series.values()}) == 1
    np.testing.assert_allclose(result.series["decode_tok_s"], 1e3 / np.array(result.series["tpot_ms"]))
    np.testing.assert_allclose(result.series["prefill_tok_s"], 16e3 / np.array(result.series["ttft_ms"]))
    outcomes = {test["name"]: test["outcome"] for test in result.tests}
    assert set(outcomes) == set(limits) and outcomes["tpot_p95_ms"] in ("FAIL", "INCONCLUSIVE") and outcomes["ttft_p50_ms"] in ("PASS", "INCONCLUSIVE")
    if result.dropped == 0 and len(result.series["ttft_ms"]) > 10:
        assert outcomes == {"ttft_p50_ms": "PASS", "tpot_p95_ms": "FAIL"}
    assert result.load_s > 0 and result.size_mb == pytest.approx(sum(path.stat().st_size for path in decoder.directory.glob("model.onnx*")) / 1e6)
    assert result.conditions["prompt_tokens"] == 16 and result.conditions["threads"] == 1
    assert result.environment["fingerprint"] == fingerprint()
    assert steps and steps[-1][1] == 60


def test_peak_memory_is_the_childs_and_not_ours(decoder: SimpleNamespace) -> None:
    """ru_maxrss would begin with this process's size: after allocating 400 MB here a child of it still reports its own."""
    ballast = np.ones(50_000_000)
    result = measure_in_child(decoder.directory, BenchOptions(**{**SHORT, "least": 1, "most": 1}))  # type: ignore[arg-type]
    assert ballast.nbytes / 1e6 > 390 and 20 < result.peak_rss_mb < 250


def test_an_encoder(encoder_bundle: Callable[..., Path]) -> None:
    folder = encoder_bundle("sentence_embedding", pooled=True, max_length=32)
    options = BenchOptions(batch=2, length=16, least=5, most=2000, seconds=4.0, threads=1, limits={"encode_p50_ms": 1e4})
    result = bench.measure(folder, options)
    assert list(result.series) == ["encode_ms"] and result.conditions == {"batch": 2, "length": 16, "seed": 0, "slow_spell": 1.25, "threads": 1}
    with pytest.raises(TrimtabError, match="length: expected at most 32 tokens"):
        bench.measure(folder, BenchOptions(length=33))
    with pytest.raises(TrimtabError, match="limits: expected series among encode_ms, found ttft_ms"):
        bench.measure(folder, BenchOptions(length=8, limits={"ttft_p50_ms": 1.0}))


def test_options_survive_the_command_line() -> None:
    options = BenchOptions(prompt_tokens=7, seconds=1.5, limits={"ttft_p95_ms": 0.1 + 0.2, "encode_p99.9_ms": 3.0})
    parsed: dict[str, object] = {}
    words = iter(options.arguments())
    limits = {}
    for word in words:
        value = next(words)
        if word == "--limit":
            name, number = bench._limit(value)
            limits[name] = number
        else:
            parsed[word] = value
    assert limits == dict(options.limits) and parsed["--prompt-tokens"] == "7" and parsed["--seconds"] == "1.5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "found no such directory"),
        (["nowhere", "--limit", "ttft_p95_ms=nan"], "limit ttft_p95_ms: expected ttft, tpot or encode"),
        (["nowhere", "--limit", "speed=1"], "limit speed"),
        (["nowhere", "--limit", "ttft_p95_ms"], "--limit: expected NAME=NUMBER"),
        (["nowhere", "--new-tokens", "1"], "new_tokens: expected a number >= 2"),
    ],
)
def test_mistakes_are_told_in_json(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*arguments, "--json"]) == 1
    fault = json.loads(capsys.readouterr().out)["error"]
    assert message in f"{fault['place']}: expected {fault['expected']}, found {fault['found']}"


def test_the_childs_mistakes_are_raised_here(tmp_path: Path, decoder: SimpleNamespace) -> None:
    with pytest.raises(BundleError, match="found no such directory; name the directory"):
        measure_in_child(tmp_path / "nowhere", BenchOptions())
    with pytest.raises(TrimtabError, match=r"prompt-tokens \+ new-tokens: expected at most 384, found 400 \+ 32"):
        measure_in_child(decoder.directory, BenchOptions(prompt_tokens=400))


def test_a_child_that_dies_is_an_error_and_not_a_result(monkeypatch: pytest.MonkeyPatch, decoder: SimpleNamespace) -> None:
    monkeypatch.setattr(bench.sys, "executable", "/bin/false" if Path("/bin/false").exists() else "/usr/bin/false")
    with pytest.raises(BundleError, match="expected a process that runs the bundle, found exit code 1"):
        measure_in_child(decoder.directory, BenchOptions())


def test_the_child_prints_one_json_object_and_nothing_else(encoder_bundle: Callable[..., Path]) -> None:
    folder = encoder_bundle("sentence_embedding", pooled=True)
    command = [sys.executable, "-m", "runtimes.bench", str(folder), "--json", "--least", "2", "--most", "2", "--length", "4", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(bench.__file__).parent.parent)
    assert json.loads(done.stdout)["schema"] == 1 and done.stdout.count("\n") == 1 and done.stderr == ""
