"""`trimtab distil`: a smaller student as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compiler.cli_parts import AS_JSON, DELTAS, OUT, finish, mixture, progress


@click.command("distil")
@click.argument("base")
@DELTAS
@click.option("--layers", type=click.IntRange(1), help="Layers to keep, chosen by measured influence.")
@click.option("--intermediate", type=click.IntRange(1), help="Channels of each feed-forward to keep.")
@click.option("--heads", type=click.IntRange(1), help="Query heads to keep (decoders).")
@click.option("--student", help="Another checkpoint with the same tokenizer, instead of a part of BASE.")
@click.option("--data", type=click.Path(path_type=Path, dir_okay=False), help="Text or JSONL to train on. Default: a small built-in text.")
@click.option("--tokens", type=click.IntRange(1), default=200_000, show_default=True, help="Tokens to see in training.")
@click.option("--objective", "objectives", multiple=True, metavar="NAME[=WEIGHT]", help="kl, jsd, cross-entropy, cosine, ...; repeatable.")
@click.option("--train", type=click.Choice(["full", "lora", "none"]), default="full", show_default=True, help="What is trained.")
@click.option("--rate", type=float, help="Learning rate. Default: 1e-4 for full, 1e-3 for lora.")
@click.option("--batch", type=click.IntRange(1), help="Windows (texts) a step. Default: 1 (32).")
@click.option("--length", type=click.IntRange(8), help="Tokens of a window, or at most of a text. Default: 512 (128).")
@click.option("--patience", type=click.IntRange(0), default=0, show_default=True, help="Checks without a better one before training stops; 0: never.")
@click.option("--task", help="Default: from the config.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@OUT
@AS_JSON
def distil_command(base: str, deltas: tuple[str, ...], task: str | None, seed: int, data: Path | None, out: Path, as_json: bool, **asked: Any) -> None:
    """Merge BASE and deltas, cut a student out of it, and train it to answer as the merged model; a run that is killed goes on where it was.

    \b
    Example:
      trimtab distil models/base --layers 24 --data text.txt --out student
      trimtab distil sentence-encoder --layers 3 --data sentences.jsonl --tokens 2000000 --objective cosine --objective similarity --out student
    """
    from compiler import model_tools

    asked["objectives"] = dict(_weighted(text) for text in asked["objectives"])
    given = {key: value for key, value in asked.items() if value is not None}
    finish(model_tools.distil_files(mixture(base, deltas), given, data, task, seed, out, progress(as_json)), as_json)


def _weighted(text: str) -> tuple[str, float]:
    """`kl=0.5` -> ("kl", 0.5)."""
    name, _separator, weight = text.partition("=")
    try:
        return name, float(weight or 1)
    except ValueError as error:
        from compiler.errors import RecipeError

        raise RecipeError(f"--objective {text}", expected="NAME=number", found=repr(weight), remedy="for example --objective kl=0.5") from error
