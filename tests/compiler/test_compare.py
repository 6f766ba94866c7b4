"""`trimtab compare` on two schemes of one tiny model: what differs is said to, what does not is not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiler.checkpoints.resolve import open_checkpoint
from compiler.compare import Ask, changed, compare, mcnemar, ratio_of_rounds
from compiler.errors import BundleError
from compiler.progress import Progress
from compiler.report.comparison import as_lines, render_html, render_markdown
from compiler.scheme import Schemes, parse_scheme
from compiler.stages import export, package


def build(base: Path, scheme: str, folder: Path) -> Path:
    """A bundle without a verdict."""
    checkpoint, exported = open_checkpoint(str(base)), folder.with_suffix(".export")
    exported.mkdir(parents=True)
    export.export(checkpoint, export.resolve_options(checkpoint, Schemes(parse_scheme(scheme)), None, None), exported, lambda *_: None)
    folder.mkdir()
    package.assemble(exported, folder)
    lineage = {"base": {"origin": "tiny", "digest": checkpoint.digest}, "deltas": []}
    facts = {"name": f"tiny-{scheme}", "target": {"id": "here", "fingerprint": ""}, "lineage": lineage, "limits": {}, "records": []}
    package.write_manifest(folder, {**facts, "model": json.loads((exported / export.SUMMARY).read_text())["model"]})
    return folder


@pytest.fixture(scope="module")
def bundles(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    return {scheme: build(tiny_llama, scheme, root / scheme) for scheme in ("fp32", "int8-g32", "int4-g32")}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    chats = [{"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} it is."}]} for n in range(6)]
    choices = [{"context": f"Machine {n} is", "choices": ["running", "a pump"], "answer": n % 2} for n in range(6)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [*chats, *choices]))
    return file


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["metric"]: row for row in found["rows"]}


def test_three_bundles_and_the_first_is_the_reference(bundles: dict[str, Path], rows: Path) -> None:
    before = {path: path.read_bytes() for folder in bundles.values() for path in sorted(folder.iterdir())}
    found = compare(list(bundles.values()), Ask(rows, rounds=0), Progress(quiet=True)).as_dict()
    assert {path: path.read_bytes() for folder in bundles.values() for path in sorted(folder.iterdir())} == before  # bundles are only read
    named = by_name(found)
    kl = named["kl_mean"]["values"]
    assert math.isnan(kl[0]) and 0 <= kl[1] < kl[2]
    size = named["size_mb"]
    assert size["values"][0] > size["values"][1] > size["values"][2] and size["against_first"][1]["ratio"] == size["values"][2] / size["values"][0]
    for metric in ("exact_match", "choice_accuracy", "choice_accuracy_norm"):
        assert named[metric]["samples"] == 6
        for place, other in enumerate(named[metric]["against_first"], 1):
            assert other["low"] <= other["difference"] <= other["high"] and 0 < other["p"] <= 1
            assert other["difference"] == pytest.approx(named[metric]["values"][place] - named[metric]["values"][0])
    assert "ttft_ms" not in named
    for text in ("\n".join(as_lines(found)), render_markdown(found), render_html(found)):
        assert "kl_mean" in text and "C against A" in text and "int4-g32" in text


def test_speed_is_paired_by_round_and_the_command_writes_reports(
    trimtab: Callable[..., tuple[int, str, str]], bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compiler import compare as module

    short = module.BenchOptions
    monkeypatch.setattr(module, "REQUESTS", 2)
    monkeypatch.setattr(module, "BenchOptions", lambda **given: short(**{**given, "prompt_tokens": 16, "new_tokens": 4}))
    code, stdout, stderr = trimtab("compare", bundles["int8-g32"], bundles["int8-g32"], "--rounds", 3, "--report", tmp_path / "report", "--json")
    assert code == 0, stderr
    named = by_name(json.loads(stdout))
    for metric in ("ttft_ms", "decode_tok_s", "peak_rss_mb", "load_s"):
        assert named[metric]["samples"] <= 3 and len(named[metric]["values"]) == 2
    assert named["kl_mean"]["values"][1] == pytest.approx(0, abs=1e-9) and named["unchanged_answers"]["values"][1] == 1
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["compare.html", "compare.json", "compare.md"]
    assert json.loads((tmp_path / "report" / "compare.json").read_text())["rows"][0]["metric"] == "size_mb"


def test_what_cannot_be_compared(trimtab: Callable[..., tuple[int, str, str]], bundles: dict[str, Path], tmp_path: Path) -> None:
    code, _, stderr = trimtab("compare", bundles["fp32"])
    assert code == 2 and "expected at least two bundles, found 1" in stderr
    other = tmp_path / "other"
    other.mkdir()
    for path in bundles["fp32"].iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["model"]["task"] = "feature-extraction"
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"expected a decoder for text-generation as .* found task 'feature-extraction'"):
        compare([bundles["fp32"], other], Ask(rounds=0), Progress(quiet=True))


def test_paired_statistics_by_hand() -> None:
    assert changed([True, True, False, False], [True, False, True, True]) == (1, 2)
    assert mcnemar(0, 0) == 1 and mcnemar(0, 6) == pytest.approx(2 * 0.5**6) and mcnemar(3, 3) == 1
    twice = ratio_of_rounds([10.0, 20.0, 40.0], [20.0, 40.0, 80.0])
    assert twice["ratio"] == pytest.approx(2) and twice["low"] == pytest.approx(2) == twice["high"] and twice["p"] < 1e-6
    noisy = ratio_of_rounds([10.0, 10.0, 10.0, 10.0], [9.0, 11.0, 10.5, 9.5])
    assert noisy["low"] < 1 < noisy["high"] and noisy["p"] > 0.3
    assert ratio_of_rounds([10.0], [20.0])["low"] is None


def test_only_what_is_shown_to_differ_is_named() -> None:
    row = {"metric": "decode_tok_s", "unit": "tok/s", "values": [10.0, 12.0], "samples": 5, "note": ""}
    one = {"folder": "a", "name": "a", "target": "here", "digest": "0" * 64, "scheme": "int4-g64", "base": "b", "deltas": []}
    for low, said in ((1.1, True), (0.9, False)):
        document = {
            "bundles": [one, {**one, "name": "b"}],
            "rows": [{**row, "against_first": [{"ratio": 1.2, "low": low, "high": 1.3, "p": 0.01}]}],
            "samples": [],
        }
        text = render_html({**document, "machine": "x"})
        assert ("writing speed 1.2 times" in text) == said and ("no difference shown" in text) == (not said)
