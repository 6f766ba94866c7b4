"""Terminal, Markdown, model card and JUnit: right words, and no text of the document becomes an instruction."""

from __future__ import annotations

import ast
import io
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from compiler.report.junit import render_junit
from compiler.report.markdown import code, escaped, model_card, render_markdown
from compiler.report.summary import print_report, summary_line

HOSTILE = "x](http://evil) <img src=x> | `a` @team #1 **b** \x1b[31m [red]c[/red]\n# d"


def printed(document: dict[str, Any], *, terminal: bool, width: int = 120) -> str:
    stream = io.StringIO()
    print_report(document, Console(file=stream, force_terminal=terminal, width=width, color_system="standard" if terminal else None))
    return stream.getvalue()


def test_summary_is_one_line(document: dict[str, Any], failed: dict[str, Any]) -> None:
    assert summary_line(document) == (
        "PASS support-assistant on here: All 6 limits hold. If one were really missed, the chance of this pass would be at most 1 %."
    )
    assert summary_line(failed).startswith("FAIL support-assistant on here: 1 of 6 limits is missed: size on disk is 112 MB")
    assert summary_line({"name": "a\nb"}).startswith("NO VERDICT a b on the target: ")


def test_pipe_gets_plain_aligned_lines_that_are_never_cut(failed: dict[str, Any]) -> None:
    text = printed(failed, terminal=False, width=40)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].startswith("No: support-assistant")
    rows = [line for line in lines if line.startswith(("PASS", "FAIL", "INCONCLUSIVE", "INFO"))]
    assert len(rows) == 7 and len({line.index(name) for line, name in zip(rows, ("size_mb", "kl_mean", "top1_agreement"), strict=False)}) == 1
    assert "112 MB" in rows[0] and "≤ 105 MB" in rows[0] and "31 %" in rows[3]
    assert lines[-1] == "built in 2 min 27 s: merge 30 ms, quantize 2.91 s (cached), export 1.12 s, validate 2 min 23 s"


def test_terminal_gets_colour_and_fits_a_narrow_window(failed: dict[str, Any]) -> None:
    wide, narrow = printed(failed, terminal=True), printed(failed, terminal=True, width=80)
    assert "\x1b[1;31mFAIL" in wide and "false pass" in wide
    plain = re.sub(r"\x1b\[[0-9;]*m", "", narrow)
    assert "false pass" not in plain and "top1_agreement" in plain
    assert max(len(line) for line in plain.splitlines()) <= 80


def test_console_markup_and_escapes_of_the_document_stay_text(document: dict[str, Any]) -> None:
    document["verdict"]["checks"][0]["name"] = HOSTILE
    for terminal in (True, False):
        text = printed(document | {"name": HOSTILE}, terminal=terminal)
        assert "\x1b[31m" not in text and "[red]c[/red]" in text


def test_markdown_holds_the_verdict_and_folds_the_rest(failed: dict[str, Any]) -> None:
    text = render_markdown(failed)
    assert text.startswith("## ❌ No: support-assistant must not go on")
    assert "| ❌ FAIL | Size on disk `size_mb` | 112 MB | ≤ 105 MB | exact | 1 | – | – |" in text
    assert text.count("<details>") == text.count("</details>") == 6
    widths = {line.count("|") for block in text.split("\n\n") for line in block.splitlines()[:1] if line.startswith("| result")}
    assert widths == {9}


def test_every_form_says_that_a_machine_was_emulated(full: dict[str, Any], document: dict[str, Any]) -> None:
    words = "another machine stood in for the target (1 core by affinity"
    for made in (render_markdown, lambda report: printed(report, terminal=False), lambda report: printed(report, terminal=True)):
        assert words.split(" (")[0] in " ".join(made(full).split()) and "stood in" not in made(document)
    assert 'name="emulation" value="1 core' in render_junit(full) and "emulation" not in render_junit(document)


def test_markdown_holds_noise_side_effects_and_savings(full: dict[str, Any]) -> None:
    text = render_markdown(full)
    for line in ("| `typos` | Exact match | 0.86 → 0.8 | 0.84 → 0.7 | +0.08 (0.01 to 0.15) |", "| 538 MB | 86.4 MB | 6.2 × |", "| the deltas |"):
        assert line in text, line
    assert "<now>" not in text


def test_markdown_text_cannot_act(document: dict[str, Any]) -> None:
    document["samples"] = [{"prompt": HOSTILE, "expected": None, "reference": HOSTILE, "bundle": HOSTILE}]
    document["lineage"]["base"]["origin"] = HOSTILE
    for text in (render_markdown(document | {"name": HOSTILE}), model_card(document | {"name": HOSTILE})):
        assert "<img" not in text and "](http" not in text and "@team" not in text and "http://" not in text and "\n# d" not in text
        assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)
        rows = [line for line in text.splitlines() if line.startswith("| x&#93;")]
        assert all(line.count("|") == 5 for line in rows)


def test_escaping_leaves_plain_names_readable() -> None:
    assert escaped("avx512_vnni a-b 3.5") == "avx512_vnni a-b 3.5"
    assert escaped("_a_ b_") == "&#95;a&#95; b&#95;"
    assert code("adapters/support_v2") == "`adapters/support_v2`"
    assert "`" not in code("a`b") and "|" not in code("a|b")


def test_model_card_of_a_decoder(document: dict[str, Any]) -> None:
    card = model_card(document)
    assert card.startswith('---\nlicense: "unknown"\nlibrary_name: onnx\npipeline_tag: text-generation\n')
    assert "with 1 trained delta merged in for the machine `here`" in card
    assert "og.Generator(model, parameters)" in card and "apply_chat_template" not in card
    assert "Unknown: neither the base nor the deltas state one." in card
    document["files"].append({"path": "chat_template.jinja", "bytes": 1, "sha256": "00"})
    document["lineage"]["base"]["licence"] = "Apache-2.0"
    card = model_card(document)
    assert "apply_chat_template" in card and 'license: "Apache-2.0"' in card and "Apache-2.0, as stated by the base" in card


def test_model_card_of_an_encoder(document: dict[str, Any]) -> None:
    card = model_card(document | {"model": {"kind": "encoder", "family": "bert", "task": "text-classification", "labels": ["repair", "billing"]}})
    assert "ort.InferenceSession" in card and "onnxruntime_genai" not in card and "`repair`, `billing`" in card


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_code_in_the_card_is_python(document: dict[str, Any], kind: str) -> None:
    document["files"].append({"path": "chat_template.jinja"})
    for files in (document["files"], [{"path": "model.onnx"}]):
        snippets = re.findall(r"```python\n(.*?)```", model_card(document | {"model": {"kind": kind}, "files": files}), re.S)
        assert len(snippets) == 1
        ast.parse(snippets[0])


def test_junit_counts_and_elements(failed: dict[str, Any]) -> None:
    root = ElementTree.fromstring(render_junit(failed))
    suite = root.find("testsuite")
    assert suite is not None and root.tag == "testsuites"
    assert [suite.get(key) for key in ("tests", "failures", "errors", "skipped", "time")] == ["7", "1", "1", "1", "143.700"]
    outcome = {case.get("name"): [child.tag for child in case if child.tag != "system-out"] for case in suite.iter("testcase")}
    assert outcome["size_mb"] == ["failure"] and outcome["ttft_p95_ms"] == ["error"] and outcome["perplexity_ratio"] == ["skipped"] and outcome["kl_mean"] == []
    failure = suite.find("testcase/failure")
    assert failure is not None and failure.get("message") == "limit missed: measured 112 MB, allowed at most 105 MB"
    assert {case.get("classname") for case in suite.iter("testcase")} == {"trimtab.support-assistant.here"}


# The elements of the schema that Jenkins' xUnit plugin publishes (junit-10.xsd): required and allowed attributes, allowed children.
JUNIT: dict[str, tuple[set[str], set[str], set[str]]] = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors", "disabled"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests"},
        {
            "name",
            "tests",
            "failures",
            "errors",
            "time",
            "disabled",
            "skipped",
            "timestamp",
            "hostname",
            "id",
            "package",
            "group",
            "file",
            "log",
            "url",
            "version",
        },
        {"properties", "testsuite", "testcase", "system-out", "system-err"},
    ),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, {"name", "value"}, set()),
    "testcase": (
        {"name"},
        {"name", "assertions", "time", "timestamp", "classname", "status", "class", "file", "line", "log", "group", "url"},
        {"skipped", "error", "failure", "rerunFailure", "rerunError", "flakyFailure", "flakyError", "system-out", "system-err"},
    ),
    "failure": (set(), {"message", "type"}, set()),
    "error": (set(), {"message", "type"}, set()),
    "skipped": (set(), {"message", "type"}, set()),
    "system-out": (set(), set(), set()),
}


def assert_junit(element: ElementTree.Element) -> None:
    required, allowed, children = JUNIT[element.tag]
    assert required <= set(element.attrib) <= allowed, element.tag
    for child in element:
        assert child.tag in children, f"{child.tag} in {element.tag}"
        assert_junit(child)


def test_junit_keeps_to_the_schema_with_several_targets(document: dict[str, Any], failed: dict[str, Any]) -> None:
    broken = {"name": "cache_equals_recompute", "measured": 0.3, "limit": 0.001, "outcome": "FAIL", "kind": "behaviour"}
    checks = [*failed["verdict"]["checks"], broken]
    root = ElementTree.fromstring(render_junit(document, failed | {"verdict": failed["verdict"] | {"checks": checks}}))
    assert_junit(root)
    suites = root.findall("testsuite")
    assert len(suites) == 2 and int(root.get("tests", "0")) == sum(int(suite.get("tests", "0")) for suite in suites)
    assert int(root.get("failures", "0")) == len(root.findall(".//failure")) == 2
    assert [case.get("name") for case in suites[1].findall("testcase") if case.find("failure") is not None][-1] == "cache_equals_recompute"


def test_a_broken_behaviour_speaks_before_limits(document: dict[str, Any]) -> None:
    rows = [
        {"name": "padding_invariance", "measured": value, "limit": 0.001, "outcome": outcome, "kind": "behaviour"}
        for value, outcome in ((0.2, "FAIL"), (0.0, "PASS"))
    ]
    verdict = {"target": "here", "outcome": "FAIL", "checks": [*document["verdict"]["checks"], *rows]}
    line = summary_line(document | {"verdict": verdict})
    assert line.startswith("FAIL support-assistant on here: 1 of 2 behaviours is broken: padding invariance is 0.2, allowed is at most 0.001")
    assert "1 of 2 behaviours hold" in printed(document | {"verdict": verdict}, terminal=False)
    alone = document | {"verdict": verdict | {"checks": rows}}  # no limits at all: what is broken still fails
    assert summary_line(alone).startswith("FAIL support-assistant on here: 1 of 2 behaviours is broken")
    suite = ElementTree.fromstring(render_junit(alone)).find("testsuite")
    assert suite is not None and (suite.get("failures"), suite.get("errors")) == ("1", "0")


def test_junit_of_nothing_is_not_green() -> None:
    for document in ({}, {"verdict": {"target": "t", "outcome": "PASS", "checks": []}}):
        suite = ElementTree.fromstring(render_junit(document)).find("testsuite")
        assert suite is not None and suite.get("errors") == "1"


def test_junit_survives_any_text(document: dict[str, Any]) -> None:
    document["verdict"]["checks"][0] |= {"name": HOSTILE, "note": "\x00\ufffe]]>"}
    assert ElementTree.fromstring(render_junit(document | {"name": HOSTILE})).find("testsuite") is not None


def test_notes_of_the_merge_are_shown_and_escaped(document: dict[str, Any]) -> None:
    from compiler.report.html import render_html

    told = {**document, "lineage": {**document["lineage"], "notes": ["a was made from base c0ffee; <b>accept_base</b> names beef in its place"]}}
    assert "* a was made from base c0ffee; &#60;b&#62;accept" in model_card(told)
    assert "&lt;b&gt;accept_base&lt;/b&gt; names beef" in render_html(told)
