"""`render_junit`: the verdict as JUnit XML, one test case per check, for any CI system.

    PASS          a passed test case
    FAIL          <failure>: the limit is missed
    INCONCLUSIVE  <error>: nothing was proven. Not <skipped>: CI systems show that as green, and a limit that nobody
                  proved must not let a model through
    INFO          <skipped>: measured, but no limit was set

A document without a verdict, or whose verdict has no limit, gives one <error>: an empty suite would be green too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from compiler.report import words
from compiler.report.document import CheckRow, Report, read_document
from compiler.report.verdict import FAIL, INCONCLUSIVE, INFO

ELEMENTS = {FAIL: "failure", INCONCLUSIVE: "error", INFO: "skipped"}


def render_junit(*documents: Mapping[str, Any] | Report) -> str:
    """JUnit XML of one or more reports, a suite each (the schema that Jenkins and GitLab read). Raises BundleError for a document that is no report."""
    root = ElementTree.Element("testsuites", {"name": "trimtab"})
    root.extend(suite_of(read_document(document)) for document in documents)
    for total in ("tests", "failures", "errors"):
        root.set(total, str(sum(int(suite.get(total, "0")) for suite in root)))
    root.set("time", f"{sum(float(suite.get('time', '0')) for suite in root):.3f}")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def suite_of(report: Report) -> ElementTree.Element:
    """One report as a <testsuite>."""
    suite = ElementTree.Element("testsuite", name=words.one_line(f"trimtab {report.name} on {report.target_id or 'target'}"))
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in facts(report).items():
        ElementTree.SubElement(properties, "property", name=name, value=words.one_line(value))
    classname = f"trimtab.{dotless(report.name)}.{dotless(report.target_id or 'target')}"
    for check in report.verdict.checks if report.verdict else ():
        add_case(suite, classname, check)
    if words.headline(report).outcome == words.NONE:
        case = ElementTree.SubElement(suite, "testcase", classname=classname, name="verdict", time="0")
        ElementTree.SubElement(case, "error", message=words.headline(report).title, type="NO VERDICT")
    counts = {kind: str(len(suite.findall(f"testcase/{kind}"))) for kind in ("failure", "error", "skipped")}
    totals = {"tests": str(len(suite.findall("testcase"))), "failures": counts["failure"], "errors": counts["error"], "time": elapsed(report)}
    suite.attrib.update(totals | {"skipped": counts["skipped"]})
    return suite


def add_case(suite: ElementTree.Element, classname: str, check: CheckRow) -> None:
    """One check as a test case; its evidence stands in the element's text, or in <system-out> when it passed."""
    case = ElementTree.SubElement(suite, "testcase", classname=classname, name=words.one_line(check.name), time="0")
    tag, text = ELEMENTS.get(check.outcome), evidence(check)
    if tag:
        ElementTree.SubElement(case, tag, message=message(check), type=check.outcome)
    ElementTree.SubElement(case, "system-out").text = text


def message(check: CheckRow) -> str:
    """One line: what was measured against what."""
    if check.limit is None:
        return f"measured {words.figure(check.measured, check.unit)}, no limit set"
    state = {FAIL: "limit missed", INCONCLUSIVE: "limit not proven"}.get(check.outcome, "limit holds")
    return f"{state}: measured {words.figure(check.measured, check.unit, check.limit)}, allowed {words.allowed(check)}"


def evidence(check: CheckRow) -> str:
    """Everything a check knows, one fact a line."""
    parts = [message(check), f"samples {check.samples}"]
    if check.low is not None or check.high is not None:
        parts.append(f"true value in {words.interval(check)}")
    if check.confidence is not None:
        parts.append(f"confidence {words.percent(check.confidence)}")
    if check.false_pass is not None:
        parts.append(f"false pass at most {words.percent(check.false_pass)}")
    if check.stage:
        parts.append(f"stage {check.stage}")
    if check.note:
        parts.append(check.note)
    return "\n".join(parts)


def facts(report: Report) -> dict[str, str]:
    """What a test archive should keep beside the cases."""
    values = {"outcome": report.verdict.outcome if report.verdict else "", "target": report.target_id, "fingerprint": report.target.fingerprint or ""}
    values |= {"emulation": report.target.emulation}
    values |= {"base.digest": report.lineage.base.digest if report.lineage.base else ""}
    values |= {f"delta.{place}.digest": delta.digest for place, delta in enumerate(report.lineage.deltas)}
    values |= {f"tool.{name}": str(version) for name, version in report.lineage.tools.items()}
    return {name: value for name, value in values.items() if value}


def elapsed(report: Report) -> str:
    """Seconds of the validate stage, as JUnit wants them."""
    spent = sum(record.seconds for record in report.records if record.stage == "validate" and record.seconds is not None and math.isfinite(record.seconds))
    return f"{spent:.3f}"


def dotless(name: str) -> str:
    """A name as one part of a dotted class name."""
    return words.one_line(name).replace(".", "_").replace(" ", "_")
