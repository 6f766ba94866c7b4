"""`trimtab bench`: speed, memory, load time and accuracy of bundles, alone or beside peers."""

from __future__ import annotations

from pathlib import Path

import click

from compiler.cli_parts import AS_JSON, print_json, progress


@click.command("bench")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--against", default="", metavar="PEER,...", help="llama.cpp, openvino, ort-genai, torch, or single systems such as `llama.cpp q4_0`.")
@click.option("--only", default="", metavar="NAME,...", help="Some questions: 0, 512, 2048 (context), 8x128 (batch x length), fresh (load, memory), accuracy.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Times that every system is asked every question.")
@click.option("--seconds", type=click.FloatRange(1), default=600.0, show_default=True, help="No round begins after this.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Threads of every system; default: this process's cores.")
@click.option("--source", help="The recipe that the bundle was compiled from, or its base: where peers find its weights.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for NAME.json, NAME.md and NAME.svg.")
@click.option("--append", is_flag=True, help="Add rounds to the results that are in --out.")
@click.option("--prepare", is_flag=True, help="Make the peers' models and stop.")
@AS_JSON
def bench_command(bundles: tuple[Path, ...], against: str, only: str, as_json: bool, **options: object) -> None:
    """Measure BUNDLES: decode and prefill speed, time to first token, memory, load time; beside peers also accuracy and ratios.

    The first bundle is the system `trimtab`. Every system runs in a process of its own, a new one in each round; a round asks all of them in turn, and the
    others are stopped meanwhile.

    \b
    Example:
      trimtab bench out/support-assistant-here
      trimtab bench out/support-assistant-here --against llama.cpp,openvino --out results
    """
    from compiler.bench.side import BenchRequest, bench
    from compiler.bench.text import as_text

    request = BenchRequest(against=_names(against), only=_names(only), **options)  # type: ignore[arg-type]  # click has checked them
    results = bench(bundles, request, progress(as_json))
    if as_json:
        print_json(results.rows)
    else:
        click.echo(as_text(results.as_dict()))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
