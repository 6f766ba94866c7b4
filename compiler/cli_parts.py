"""What the command modules share: options that many commands have, and how results are printed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from compiler.deltas.combine import Combine
    from compiler.progress import Progress
    from compiler.sources import Mixture

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
OUT = click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; it must not exist yet or be empty.")
DELTAS = click.option("--delta", "deltas", multiple=True, metavar="PATH[=WEIGHT]", help="A trained delta and its weight (default 1.0); repeatable.")


def progress(as_json: bool) -> Progress:
    """Progress on stderr, silent where the result is JSON."""
    from compiler.progress import Progress

    return Progress(quiet=as_json)


def one_blas_thread() -> None:
    """Ask OpenBLAS for one thread, before numpy is imported, unless the user asked for another number.

    Thin products are not worth a second thread, and with another process on the machine OpenBLAS's threads spin for each other: `delta diff` of two
    checkpoints of 135 M parameters then took ten times as long.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def finish(result: dict[str, Any], as_json: bool) -> None:
    """The result of a command that writes files: JSON, or its plain fields on one line."""
    if as_json:
        print_json(result)
    else:
        click.echo("  ".join(f"{key} {value}" for key, value in result.items() if not isinstance(value, (list, dict))))


def mixture(
    base: str,
    deltas: Sequence[str],
    combine: Combine | None = None,
    only: Sequence[str] = (),
    scale: Sequence[str] = (),
    accept_base: str | None = None,
) -> Mixture:
    """What these options ask to merge. Raises RecipeError for patterns and factors that make no sense."""
    from compiler.deltas.combine import Combine
    from compiler.deltas.select import selection
    from compiler.sources import DeltaSource, Mixture
    from compiler.text import default_name

    sources = tuple(DeltaSource(path, weight, default_name(path), accept_base=accept_base) for path, weight in map(weighted, deltas))
    return Mixture(base, sources, combine or Combine(), selection(only, [_scaled(text) for text in scale], "--only, --scale"))


def weighted(text: str) -> tuple[str, float]:
    """`path=0.5` -> ("path", 0.5). Only a number after the last `=` is a weight: paths may hold `=`."""
    path, separator, weight = text.rpartition("=")
    try:
        return (path, float(weight)) if separator else (text, 1.0)
    except ValueError:
        return text, 1.0


def _scaled(text: str) -> tuple[str, float]:
    """`*.mlp.*=0.5` -> ("*.mlp.*", 0.5). Raises RecipeError."""
    from compiler.errors import RecipeError

    pattern, _separator, factor = text.rpartition("=")
    try:
        return pattern, float(factor)
    except ValueError as error:
        raise RecipeError(f"--scale {text}", expected="PATTERN=number", found=repr(factor or text), remedy="for example --scale '*.mlp.*=0.5'") from error


class Interrupted(BaseException):
    """Ctrl-C: under a name that click does not know, because it would write an empty line of its own to stderr."""


class Commands(click.Group):
    """The commands, with Ctrl-C left to `main`."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted from error
