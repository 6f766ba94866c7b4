"""The document: what is accepted, what is refused with which words, and that the published schema is the true one."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from compiler import limits
from compiler.errors import BundleError
from compiler.report import words
from compiler.report.document import SCHEMA_FILE, CheckRow, load_document, read_document, schema_text, write_document
from compiler.report.verdict import FAIL, INCONCLUSIVE, PASS, Check


def test_published_schema_is_the_models_schema() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), "renew it as the docstring of schema_text says"


def test_check_row_has_the_fields_of_check() -> None:
    assert list(CheckRow.model_fields) == [field.name for field in dataclasses.fields(Check)]


def test_example_is_accepted_and_keeps_unknown_keys(document: dict[str, Any]) -> None:
    report = read_document(document | {"energy": {"joule": 3}})
    assert report.verdict is not None and len(report.verdict.limits) == 6
    assert report.extras() == {"energy": {"joule": 3}}
    assert report.target.extras()["memory_mb"] == 24576
    assert report.dropped("ttft_ms") == 11
    assert list(report.series) == ["ttft_ms", "tpot_ms"]


def test_documents_match_the_published_schema_and_broken_ones_do_not(document, failed, full, breaks_schema) -> None:
    for made in (document, failed, full):
        assert breaks_schema(json.loads(write_document(made))) == []
    for key, value in (
        ("robustness", [{"noise": "typos"}]),
        ("files", [{"path": 3}]),
        ("schema", 2),
        ("position", {"builds": []}),
        ("latency", {"ttft_ms": ["fast"]}),
    ):
        assert breaks_schema({**json.loads(write_document(document)), key: value}), key


@pytest.mark.parametrize("partial", [{}, {"name": "m"}, {"schema": 1, "verdict": None, "layers": [], "latency": {"ttft_ms": [], "dropped": 3}}])
def test_every_section_may_be_missing(partial: dict[str, Any]) -> None:
    report = read_document(partial)
    assert report.series == {} and report.target_id == ""


@pytest.mark.parametrize(
    ("change", "place", "found"),
    [
        ({"schema": 2}, "schema", "Input should be 1"),
        ({"files": [{"bytes": 3}]}, "files.0.path", "Field required"),
        ({"latency": {"ttft_ms": ["soon"]}}, "latency.ttft_ms", "valid number"),
        ({"verdict": {"target": "here", "outcome": "MAYBE", "checks": []}}, "verdict.outcome", "INCONCLUSIVE"),
    ],
)
def test_refusal_names_the_place(document: dict[str, Any], change: dict[str, Any], place: str, found: str) -> None:
    with pytest.raises(BundleError, match="report of schema 1") as caught:
        read_document(document | change)
    assert place in caught.value.place and found in caught.value.found


def test_a_verdict_that_contradicts_its_checks_is_refused(failed: dict[str, Any]) -> None:
    failed["verdict"]["outcome"] = PASS
    with pytest.raises(BundleError, match="the checks give FAIL, the verdict says PASS"):
        read_document(failed)


def test_control_characters_and_bidirectional_overrides_become_visible() -> None:
    report = read_document({"name": "a\x1b[31m\u202eb\r\nc\ud800", "samples": [{"prompt": "tab\there\x00"}]})
    assert report.name == "a\ufffd[31m\ufffdb\nc\ufffd"
    assert report.samples[0].prompt == "tab\there\ufffd"


def test_written_document_is_strict_json_and_comes_back(document: dict[str, Any], tmp_path: Path) -> None:
    document["verdict"]["checks"][1] |= {"measured": math.nan, "high": math.inf, "outcome": FAIL}
    document["verdict"]["outcome"] = FAIL
    text = write_document(document)
    assert text == write_document(json.loads(text))
    assert json.loads(text, parse_constant=pytest.fail)["verdict"]["checks"][1]["measured"] == "NaN"
    (tmp_path / "report.json").write_text(text)
    check = read_document(load_document(tmp_path / "report.json")).verdict.checks[1]  # type: ignore[union-attr]
    assert math.isnan(check.measured) and check.high == math.inf


@pytest.mark.parametrize(("content", "found"), [("{", "Expecting"), ("[1]", "list"), ('{"records": [{}]}', "Field required")])
def test_load_names_the_file(tmp_path: Path, content: str, found: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(BundleError, match=r"report\.json") as caught:
        load_document(tmp_path / "report.json")
    assert found in caught.value.found


def row(name: str, measured: float = 1.0, limit: float | None = 2.0, outcome: str = PASS, unit: str = "") -> CheckRow:
    return CheckRow(name=name, measured=measured, limit=limit, outcome=outcome, unit=unit)  # type: ignore[arg-type]


def test_every_limit_has_words_and_its_direction() -> None:
    for quantity in limits.ROWS:
        assert words.metric_of(quantity.name) is not None, quantity.name
        assert words.better(row(quantity.name)) == (words.LOWER if quantity.at_most else words.HIGHER), quantity.name


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (row("ttft_p95_ms"), words.LOWER),
        (row("macro_f1"), words.HIGHER),
        (row("f1_drop"), words.LOWER),
        (row("serve_tok_s"), words.HIGHER),
        (row("brand_new", 3.0, 2.0, PASS), words.HIGHER),
        (row("brand_new", 3.0, 2.0, FAIL), words.LOWER),
        (row("brand_new", 3.0, 2.0, INCONCLUSIVE), words.LOWER),
    ],
)
def test_direction(check: CheckRow, expected: str) -> None:
    assert words.better(check) == expected


@pytest.mark.parametrize(
    ("value", "against", "expected"),
    [
        (104.6, 105.0, "104.6"),
        (104.6, None, "105"),
        (105.0000001, 105.0, "105.0000001"),
        (1234567.0, None, "1,234,567"),
        (0.04321, None, "0.0432"),
        (-0.5, None, "-0.5"),
        (0.0, None, "0"),
        (100.0, None, "100"),
        (1e-15, None, "1.00e-15"),
        (math.nan, 1.0, "not a number"),
        (-math.inf, None, "-∞"),
        (None, None, "–"),
    ],
)
def test_numbers(value: float | None, against: float | None, expected: str) -> None:
    assert words.number(value, against=against) == expected


def test_other_words() -> None:
    assert [words.size(n) for n in (None, 12, 1500, 86412345, 3 * 10**9)] == ["–", "12 B", "1.5 kB", "86.4 MB", "3 GB"]
    assert [words.seconds(s) for s in (0.034, 7.42, 431.0)] == ["34 ms", "7.42 s", "7 min 11 s"]
    assert [words.percent(p) for p in (0.99, 0.0098, 0.999, 1.0, 0.0, 3e-9)] == ["99 %", "0.98 %", "99.9 %", "100 %", "0 %", "< 1e-06 %"]
    assert [words.ordinal(p) for p in ("1", "2", "3", "95", "11", "99.9")] == ["1st", "2nd", "3rd", "95th", "11th", "99.9th"]
    assert words.label("ttft_p50_ms") == "Time to first token, median"
    assert words.label("encode_p95_ms@8x128") == "Time to encode, 95th percentile (8x128)"
    assert words.label("brand_new") == "brand new"


def test_headlines(document: dict[str, Any], failed: dict[str, Any], unproven: dict[str, Any]) -> None:
    top = words.headline(read_document(document | {"target": {"id": "edge-4"}}))
    assert (top.outcome, top.title) == (PASS, "Yes: support-assistant may go on edge-4.")
    assert top.sentence == "All 6 limits hold. If one were really missed, the chance of this pass would be at most 1 %."
    top = words.headline(read_document(failed))
    assert top.title == "No: support-assistant must not go on the machine it was compiled on."
    assert top.sentence == "1 of 6 limits is missed: size on disk is 112 MB, allowed is at most 105 MB. 1 more is not proven."
    top = words.headline(read_document(unproven))
    assert top.outcome == INCONCLUSIVE and "time to first token, 95th percentile is 391 ms, allowed is at most 400 ms" in top.sentence


def test_no_limits_is_never_a_yes(document: dict[str, Any]) -> None:
    for verdict in (
        None,
        {"target": "here", "outcome": PASS, "checks": []},
        {"target": "here", "outcome": PASS, "checks": [document["verdict"]["checks"][-1]]},
    ):
        top = words.headline(read_document(document | {"verdict": verdict}))
        assert top.outcome == "NONE" and top.title.startswith(("No verdict", "No decision"))
