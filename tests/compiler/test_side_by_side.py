"""Side-by-side benchmarks: rows and ratios from known samples, and one tiny bundle measured beside eager torch for real."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from compiler.bench import child, models, peers, questions, roofline, rounds, rows, text
from compiler.bench.peers import SYSTEMS, System
from compiler.errors import BenchError
from compiler.scheme import Schemes, parse_scheme
from compiler.sources import Mixture
from compiler.stages import export, package
from targets.kernels import Case, Point
from targets.predict import Operator, Workload
from targets.profile import here


def samples(system, metric, values):
    return [{"round": number, "system": system, "metric": metric, "value": value} for number, value in enumerate(values)]


def test_ratios_are_taken_within_rounds_and_turned_in_our_favour():
    """The machine halves its speed in round 1: ratios of medians would say 1.5 or 0.75, pairs say 1.5 in every round."""
    data = [*samples("trimtab", "decode_tok_s@0", [300, 150, 300]), *samples("peer", "decode_tok_s@0", [200, 100, 200])]
    data += [*samples("trimtab", "ttft_ms@512", [10, 20, 10]), *samples("peer", "ttft_ms@512", [20, 40, 20])]
    data += samples("late", "decode_tok_s@0", [])
    speed, wait = rows.ratios(data)
    assert (speed["against"], speed["metric"], speed["ratio"], speed["low"], speed["high"], speed["rounds"]) == ("peer", "decode_tok_s@0", 1.5, 1.5, 1.5, 3)
    assert wait["ratio"] == 2.0


def test_a_round_that_only_one_system_saw_makes_no_pair():
    data = [*samples("trimtab", "load_s", [1.0]), {"round": 5, "system": "peer", "metric": "load_s", "value": 2.0}]
    assert rows.ratios(data) == []


def test_rows_say_median_interval_and_unit():
    few, many = rows.table([*samples("a", "peak_rss_mb", [3.0, 1.0, 2.0]), *samples("a", "encode_ms@1x32", [1.0, 1.0, 1.0, 1.0, 1.0, 50.0])])
    assert few == {"system": "a", "metric": "peak_rss_mb", "value": 2.0, "unit": "MB", "low": 1.0, "high": 3.0, "samples": 3}
    assert many["value"] == 1.0 and many["unit"] == "ms" and many["low"] == 1.0 and many["high"] < 50  # one bad round of six moves no median far


@pytest.mark.parametrize(
    ("metric", "unit"), [("decode_tok_s@512", "tok/s"), ("ttft_ms@512", "ms"), ("load_s", "s"), ("mapped_file_mb", "MB"), ("encode_ms@8x128", "ms")]
)
def test_units(metric, unit):
    assert questions.unit_of(metric) == unit


def test_questions_fit_the_model_and_unknown_ones_are_refused():
    assert [question.name for question in questions.questions("decoder", (), 1024)] == ["0", "512", "fresh"]
    assert [question.name for question in questions.questions("encoder", ("1x128",), 512)] == ["1x128"]
    with pytest.raises(BenchError, match=r"--only: expected one of 0, 512, fresh for this model, found 2048"):
        questions.questions("decoder", ("2048",), 1024)


def test_metrics_of_an_answer():
    found = questions.metrics(questions.Question(context=512), {"first_s": 2.0, "rest_s": 0.63})
    assert found == {"decode_tok_s@512": pytest.approx(100), "prefill_tok_s@512": 256.0, "ttft_ms@512": 2000.0}
    assert questions.metrics(questions.Question(batch=2, length=8), {"seconds": [0.3, 0.001, 0.002]}) == {"encode_ms@2x8": 2.0}


def test_every_round_has_another_prompt_and_every_system_the_same():
    setting = rounds.Setting(2, range(5000), 5, 10.0)
    assert setting.prompt(64, 1) == setting.prompt(64, 1) != setting.prompt(64, 2)
    assert len(setting.prompt(12_000, 3)) == 12_000


def test_a_peer_that_is_not_installed_names_the_script(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIMTAB_BENCH_ENVS", str(tmp_path))
    with pytest.raises(BenchError, match=r"peer llama.cpp: expected an environment in .*, found none; run `python benchmarks/peers.py llama.cpp`"):
        peers.python_of("llama.cpp")
    (tmp_path / "openvino").mkdir()
    with pytest.raises(BenchError, match="found one that is not complete"):
        peers.python_of("openvino")
    with pytest.raises(BenchError, match=r"--against vllm: expected a peer that runs a decoder \(llama.cpp, openvino, ort-genai, torch\)"):
        peers.systems_of(["vllm"], "decoder")


def test_every_system_has_its_adapter_and_its_form():
    for row in SYSTEMS:
        assert (peers.ADAPTERS / row.adapter).is_file() and row.form in models.FORMS
        assert row.env == models.FORMS[row.form].env or row.form == models.CHECKPOINT


def test_a_child_that_dies_is_told_in_its_own_words(monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("import sys\nsys.exit('no such library')\n")
    monkeypatch.setattr(child, "ADAPTERS", tmp_path)
    with child.Child(System("broken", "broken", "decoder", "broken.py", "", "")) as broken, pytest.raises(BenchError, match="exit code 1: no such library"):
        broken.ask("memory")


def test_what_a_library_prints_is_no_answer_and_an_error_is_told(monkeypatch, tmp_path):
    adapter = "import sys\nimport protocol\ndef load(question):\n    print('chatter')\n    raise ValueError('bad model')\n"
    (tmp_path / "loud.py").write_text(adapter + "protocol.serve(load)\n")
    (tmp_path / "protocol.py").write_text((peers.ADAPTERS / "protocol.py").read_text())
    monkeypatch.setattr(child, "ADAPTERS", tmp_path)
    with child.Child(System("loud", "loud", "decoder", "loud.py", "", "")) as loud, pytest.raises(BenchError, match="found ValueError: bad model"):
        loud.load(tmp_path, 1, 8)


def test_text_stands_in_columns():
    shown = text.aligned(text.grid(rows.table(samples("a", "load_s", [1.0, 2.0, 4.0])), "system", "value"))
    assert shown.splitlines() == ["   load_s", "a  2 [1, 4]"]
    assert text.figure(1234.5) == "1234" and text.figure(0.04567) == "0.0457"


def test_roofline_of_one_matrix_and_one_cache():
    """1000 x 1000 floats are 4 MB: 1 ms at 4 GB/s for one token; for 512 tokens 1.024 Gop: 10.24 ms at 100 GFLOP/s."""
    profile = replace(here(), read_gb_s=4.0, fp32_gflop_s=100.0, int8_gop_s=200.0)
    work = Workload("decoder", (Operator(Case("MatMul", 32, 0, 1000, 1000)),), 0, 0)
    one, many = (roofline.bound(work, profile, "x", Point(tokens), 20.0) for tokens in (1, 512))
    assert (one.bound_by, one.bound_ms, one.share) == ("bytes", 1.0, 0.05)
    assert (many.bound_by, many.bound_ms, many.share) == ("operations", pytest.approx(10.24), pytest.approx(0.512))
    attention = Workload("decoder", (Operator(Case("GroupQueryAttention", 32, 64, 128, 64), 3),), 0, 0)
    assert roofline.bound(attention, profile, "x", Point(1, 999), 1.0).megabytes == pytest.approx(3 * 2 * 4 * 64 * 1000 / 1e6)


@pytest.fixture(scope="module")
def tiny_bundle(tiny_llama, tmp_path_factory):
    """tiny_llama as a float32 bundle with its lineage, without validation."""
    sources = Mixture(str(tiny_llama)).open()
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    folder.mkdir()
    options = export.resolve_options(sources.merged, Schemes(parse_scheme("fp32")), None, None)
    summary = export.export(sources.merged, options, folder, lambda *_: None)
    package.write_manifest(folder, {"name": "tiny", "model": summary["model"], "lineage": sources.lineage})
    return folder


def test_a_bundle_beside_eager_torch(trimtab, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_BENCH_ENVS", str(tmp_path / "envs"))
    common = ("bench", tiny_bundle, "--rounds", 2, "--threads", 1, "--out", tmp_path / "out")
    code, out, err = trimtab(*common, "--against", "torch eager", "--only", "0,fresh,accuracy", "--json")
    assert code == 0, err
    found = {(row["system"], row["metric"]): row for row in json.loads(out)}
    for system in ("trimtab", "torch eager"):
        assert found[system, "decode_tok_s@0"]["value"] > 0 and found[system, "decode_tok_s@0"]["samples"] == 2
        assert found[system, "file_mb"]["value"] == pytest.approx(0.73, abs=0.2)
        assert found[system, "kl_mean"]["value"] < 1e-5 and found[system, "top1_agreement"]["value"] > 0.999
    if sys.platform == "linux":
        assert 30 < found["trimtab", "peak_rss_mb"]["value"] < found["torch eager", "peak_rss_mb"]["value"]
    code, out, err = trimtab(*common, "--only", "0", "--append", "--json")
    rounds_seen = {row["system"]: row["samples"] for row in json.loads(out) if row["metric"] == "decode_tok_s@0"}
    assert code == 0 and rounds_seen == {"trimtab": 4, "torch eager": 2}, err
    saved = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert saved["ratios"][0]["against"] == "torch eager" and str(tmp_path) not in json.dumps(saved)
    code, _, err = trimtab(*common, "--only", "0", "--append", "--threads", 2)
    assert code == 1 and "expected results of the same bundles, machine and threads, found other threads" in err
