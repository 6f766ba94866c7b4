"""What the command modules share: options that many commands have, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from compiler.progress import Progress

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
OUT = click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; it must not exist yet or be empty.")
DELTAS = click.option("--delta", "deltas", multiple=True, metavar="PATH[=WEIGHT]", help="A trained delta and its weight (default 1.0); repeatable.")


def progress(as_json: bool) -> Progress:
    """Progress on stderr, silent where the result is JSON."""
    from compiler.progress import Progress

    return Progress(quiet=as_json)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def finish(result: dict[str, Any], as_json: bool) -> None:
    """The result of a command that writes files: JSON, or its plain fields on one line."""
    if as_json:
        print_json(result)
    else:
        click.echo("  ".join(f"{key} {value}" for key, value in result.items() if not isinstance(value, (list, dict))))


def weighted(deltas: Sequence[str]) -> list[tuple[str, float]]:
    """`path=0.5` -> ("path", 0.5). Only a number after the last `=` is a weight: paths may hold `=`."""
    pairs = []
    for text in deltas:
        path, separator, weight = text.rpartition("=")
        try:
            pairs.append((path, float(weight)) if separator else (text, 1.0))
        except ValueError:
            pairs.append((text, 1.0))
    return pairs
