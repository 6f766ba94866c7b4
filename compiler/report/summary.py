"""The verdict in a terminal: one line, or a compact table. Colour for a person, plain aligned text for a pipe.

Nothing in a document is taken as console markup: every text is a `rich.text.Text`, and control characters are already
gone (`read_document`, rule 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compiler.report import words
from compiler.report.document import CheckRow, Report, read_document
from compiler.report.verdict import FAIL, INCONCLUSIVE, PASS

STYLES = {PASS: "bold green", FAIL: "bold red", INCONCLUSIVE: "bold yellow"}
HEADS = ("result", "check", "measured", "limit", "interval", "samples", "confidence", "false pass")
WIDE, ESSENTIAL = 110, 5  # columns of characters that hold all HEADS; HEADS that a narrower terminal shows
NUMERIC = {"measured", "limit", "samples", "confidence", "false pass"}


def summary_line(document: Mapping[str, Any] | Report) -> str:
    """One line for a log or a commit status.

    "FAIL support-assistant on here: 1 of 6 limits is missed: size on disk is 112 MB, allowed is at most 105 MB."
    """
    report = read_document(document)
    top = words.headline(report)
    outcome = "NO VERDICT" if top.outcome == words.NONE else top.outcome
    return words.one_line(f"{outcome} {report.name} on {report.target_id or 'the target'}: {top.sentence}")


def print_report(document: Mapping[str, Any] | Report, console: Console | None = None) -> None:
    """The headline, every check, and what the build cost; to stdout when no console is given.

    A terminal gets colour, and on a narrow one the columns that matter most. A pipe gets every column as plain text, never cut or wrapped.
    """
    report, console = read_document(document), console or Console()
    top, rows = words.headline(report), [check_cells(check) for check in (report.verdict.told if report.verdict else ())]
    if not console.is_terminal:
        for line in (top.title, top.sentence, words.emulation(report), *aligned(rows), words.behaviours(report), build_line(report)):
            if line:
                console.print(Text(words.one_line(line) if line in (top.title, top.sentence) else line), soft_wrap=True)
        return
    console.print(Text(f"{words.MARKS.get(top.outcome, '–')} {words.one_line(top.title)}", style=STYLES.get(top.outcome, "bold")))
    console.print(Text(words.one_line(top.sentence)))
    if rows:
        console.print(coloured(rows, len(HEADS) if console.width >= WIDE else ESSENTIAL))
    for line in (words.emulation(report), words.behaviours(report), build_line(report)):
        if line:
            console.print(Text(line, style="dim"))


def coloured(rows: list[tuple[str, ...]], columns: int) -> Table:
    """The first `columns` cells of each row as a table."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in HEADS[:columns]:
        table.add_column(head, justify="right" if head in NUMERIC else "left", no_wrap=head in ("result", "measured", "limit"))
    for cells in rows:
        table.add_row(Text(cells[0], style=STYLES.get(cells[0], "dim")), *(Text(cell) for cell in cells[1:columns]))
    return table


def check_cells(check: CheckRow) -> tuple[str, ...]:
    """One check as the cells of `HEADS`."""
    limit = f"{words.limit_sign(check)} {words.figure(check.limit, check.unit, against=check.measured)}" if check.limit is not None else "–"
    measured = words.figure(check.measured, check.unit, against=check.limit)
    return (
        check.outcome,
        words.one_line(check.name, 60),
        measured,
        limit,
        words.interval(check),
        f"{check.samples:,}",
        words.percent(check.confidence),
        words.percent(check.false_pass),
    )


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Cells as lines of equal columns, numbers to the right; an empty list stays empty."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in (HEADS, *rows)) for column in range(len(HEADS))]
    lines = []
    for row in (HEADS, *rows):
        cells = [cell.rjust(width) if head in NUMERIC else cell.ljust(width) for head, cell, width in zip(HEADS, row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def build_line(report: Report) -> str:
    """ "built in 4.06 s: merge 30 ms, quantize 2.91 s (cached), export 1.12 s"."""
    timed = [record for record in report.records if record.seconds is not None]
    if not timed:
        return ""
    parts = [f"{words.one_line(record.stage, 40)} {words.seconds(record.seconds)}{' (cached)' if record.cached else ''}" for record in timed]
    return f"built in {words.seconds(sum(record.seconds or 0 for record in timed))}: {', '.join(parts)}"
