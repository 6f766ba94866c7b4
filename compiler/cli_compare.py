"""`trimtab compare`: two or more bundles beside each other."""

from __future__ import annotations

from pathlib import Path

import click

from compiler.cli_parts import AS_JSON, print_json, progress


@click.command("compare")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Rows to ask, as in evaluate.data; default: the built-in text.")
@click.option("--rows", type=click.IntRange(1), help="Only the first rows of --data.")
@click.option("--rounds", type=click.IntRange(0), default=5, show_default=True, help="Rounds of measuring speed; 0: none.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Threads of every bundle; default: this process's cores.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--report", type=click.Path(path_type=Path), help="Folder for compare.html, compare.json and compare.md.")
@AS_JSON
def compare_command(bundles: tuple[Path, ...], report: Path | None, as_json: bool, **options: object) -> None:
    """Compare BUNDLES with the first of them: size, speed, memory, and answers, with intervals of the paired difference.

    The same rows go to every bundle; speed is measured in rounds, every bundle in a fresh process, in changing order.

    \b
    Example:
      trimtab compare out/support-int4-here out/support-int8-here --data eval.jsonl
    """
    from compiler.compare import Ask, compare
    from compiler.errors import RecipeError
    from compiler.report.comparison import as_lines, write_comparison

    if len(bundles) < 2:
        raise RecipeError("trimtab compare", expected="at least two bundles", found=str(len(bundles)), remedy="name another one")
    found = compare(bundles, Ask(**options), progress(as_json))  # type: ignore[arg-type]  # click has checked them
    if report:
        write_comparison(found.as_dict(), report)
    if as_json:
        from compiler.report.document import worded

        print_json(worded(found.as_dict()))
    else:
        for line in as_lines(found.as_dict()):
            click.echo(line)
