"""`trimtab delta`: what a trained delta is, how two checkpoints differ, and a merge taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compiler.cli_parts import AS_JSON, OUT, finish, one_blas_thread, print_json, progress


@click.group("delta")
def delta_group() -> None:
    """Trained deltas: what one holds, how two checkpoints differ, and a merge taken back.

    \b
    Example:
      trimtab delta inspect adapters/a
    """


@delta_group.command("inspect")
@click.argument("path")
@click.option("--base", help="The base; needed by kinds whose difference depends on it, and for norms relative to the base's.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="File (.svg, .png, .pdf) for the energy by layer.")
@AS_JSON
def inspect_command(path: str, base: str | None, picture: Path | None, as_json: bool) -> None:
    """Show rank, norm and share of the energy of every tensor and layer that the delta in PATH touches.

    \b
    Example:
      trimtab delta inspect adapters/a --base models/base --plot energy.svg
    """
    one_blas_thread()
    from compiler.delta_tools import inspect_delta

    found = inspect_delta(path, base, picture)
    if as_json:
        print_json(found)
        return
    click.echo(f"{path}: {found['kind']}, {len(found['tensors'])} tensors, trained on {found['trained_on'] or 'a base it does not name'}")
    click.echo(f"{'energy':>7s} {'norm':>10s} {'relative':>9s} {'rank':>5s}  tensor")
    for row in found["tensors"]:
        relative = "" if row["relative"] is None else f"{row['relative']:.2e}"
        energy = "whole" if row["replaced"] else f"{row['energy']:.2%}"
        rank = "" if row["rank"] is None else row["rank"]
        click.echo(f"{energy:>7s} {row['norm']:10.4g} {relative:>9s} {rank!s:>5s}  {row['tensor']} {row['shape']}")
    click.echo(f"{'energy':>7s} {'norm':>10s} {'tensors':>9s}        layer")
    for row in found["layers"]:
        click.echo(f"{row['energy']:7.2%} {row['norm']:10.4g} {row['tensors']:9d}        {row['layer']}")


@delta_group.command("ablate")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--by", type=click.Choice(["layer", "kind", "layer-kind"]), default="layer", show_default=True, help="How modules are grouped.")
@click.option("--limit-rows", type=click.IntRange(1), help="Use only the first rows of the evaluation data.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="File (.svg, .png, .pdf) for the contributions by group.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Lay a value over the recipe.")
@AS_JSON
def ablate_command(recipe: Path, by: str, limit_rows: int | None, picture: Path | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Measure what each group of modules that the deltas of RECIPE change contributes to its evaluation.

    \b
    Example:
      trimtab delta ablate recipe.yaml --by layer --limit-rows 50 --plot ablation.svg
    """
    from compiler.delta_tools import ablate_recipe
    from compiler.recipe import load_recipe

    found = ablate_recipe(load_recipe(recipe, settings), by, limit_rows, picture, progress(as_json))
    if as_json:
        print_json(found)
        return
    for key in ("base", "all"):
        accuracy = "" if found[key]["accuracy"] is None else f", accuracy {found[key]['accuracy']:.1%}"
        click.echo(f"{key:4s} loss {found[key]['loss']:.4f} nats{accuracy}, {found[key]['samples']} samples in {found['sequences']} sequences")
    click.echo(f"{'without it the rest loses':>34s} {'alone it brings':>34s}  group (nats, 95 % interval; positive: it helps)")
    for row in found["rows"]:
        click.echo(f"{_interval(row['leave_out'])} {_interval(row['alone'])}  {row['group']}, {row['tensors']} tensors")


def _interval(metric: dict[str, Any]) -> str:
    bounds = "too few sequences" if metric["low"] is None else f"{metric['low']:+.4f} to {metric['high']:+.4f}"
    return f"{metric['value']:+.4f} [{bounds:>20s}]".rjust(34)


@delta_group.command("diff")
@click.argument("old")
@click.argument("new")
@click.option("--error", type=click.FloatRange(0, 1), default=1e-5, show_default=True, help="What low rank may leave, relative to each difference's norm.")
@click.option("--max-rank", type=click.IntRange(1), default=64, show_default=True, help="Largest rank to look for.")
@click.option("--activations", metavar="TEXT|builtin", help="Choose the rank for the error of outputs: run OLD on this text (`builtin`: ours) first.")
@click.option("--form", type=click.Choice(["lora", "sparse", "diff"]), help="Write this form; default: the smallest.")
@OUT
@AS_JSON
def diff_command(old: str, new: str, error: float, max_rank: int, out: Path, as_json: bool, **how: Any) -> None:
    """Write the smallest delta that turns OLD into NEW: LoRA, sparse or whole differences.

    \b
    Example:
      trimtab delta diff models/base models/tuned --out adapters/tuned
      trimtab delta diff models/base models/tuned --error 0.05 --activations builtin --form lora --out adapters/tuned
    """
    one_blas_thread()
    from compiler.delta_tools import DiffOptions, diff_checkpoints

    finish(diff_checkpoints(old, new, out, DiffOptions(error, max_rank, **how), progress(as_json)), as_json)


@delta_group.command("rollback")
@click.argument("merged")
@click.option("--record", type=click.Path(path_type=Path), help="The record of the merge; default: rollback.json in MERGED.")
@click.option("--base", help="Where the base is now, for a record that refers to it; default: where the record says.")
@OUT
@AS_JSON
def rollback_command(merged: str, record: Path | None, base: str | None, out: Path, as_json: bool) -> None:
    """Write the base that MERGED was made from, every tensor bit for bit. Nothing is written when a digest differs.

    \b
    Example:
      trimtab merge models/base --delta adapters/a --rollback --out merged
      trimtab delta rollback merged --out base-again
    """
    from compiler.delta_tools import roll_back

    finish(roll_back(merged, record, base, out, progress(as_json)), as_json)
