"""The `targets` commands: machines, known and measured."""

from __future__ import annotations

import json
from pathlib import Path

import click

from compiler.cli_parts import AS_JSON, print_json, progress


@click.group("targets")
def targets_group() -> None:
    """Machines: the profiles that are known, and this one.

    \b
    Example:
      trimtab targets show here
    """


@targets_group.command("list")
@AS_JSON
def targets_list(as_json: bool) -> None:
    """List the known profiles.

    \b
    Example:
      trimtab targets list
    """
    from compiler.commands import list_targets

    rows = list_targets()
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(f"{row['id']:24s} {row['summary']}")


@targets_group.command("show")
@click.argument("profile", default="here")
@AS_JSON
def targets_show(profile: str, as_json: bool) -> None:
    """Show a profile: each field with where it comes from.

    \b
    Example:
      trimtab targets show raspberry-pi-5
    """
    from compiler.commands import show_target

    fields = show_target(profile)
    if as_json:
        print_json(fields)
        return
    for name, value in fields.items():
        click.echo(f"{name:28s} {value if not isinstance(value, (list, dict)) else json.dumps(value)}")


@targets_group.command("probe")
@click.option("--seconds", type=click.FloatRange(5), default=75.0, show_default=True, help="Time budget.")
@click.option("--out", type=click.Path(path_type=Path), help="Profile file to write as well, for other machines to plan with.")
@click.option("--gpu/--no-gpu", default=None, help="Measure the GPU too, through onnxruntime's CUDA provider. Default: where that provider is there.")
@AS_JSON
def targets_probe(seconds: float, out: Path | None, gpu: bool | None, as_json: bool) -> None:
    """Measure this machine: bandwidth, arithmetic, and onnxruntime's own kernels. `here` knows the figures from then on.

    \b
    Example:
      trimtab targets probe --out line4.yaml
    """
    from compiler.commands import probe_target

    fields, places = probe_target(seconds, out, progress(as_json), gpu)
    if as_json:
        print_json(fields)
        return
    rows = fields.pop("kernels", [])
    for name, source in fields["provenance"].items():
        if "samples" in source:
            click.echo(f"{name:20s} {fields[name]:>10}   {source['samples']} samples, spread {source.get('spread', 0):.0%}: {source['note']}")
    click.echo(f"{'kernels':20s} {len(rows):>10} rows   {fields['description']}")
    for place in places:
        click.echo(f"wrote {place}")


@targets_group.command("diff")
@click.argument("one")
@click.argument("other")
@AS_JSON
def targets_diff(one: str, other: str, as_json: bool) -> None:
    """What tells two profiles apart: fields that differ, and how much faster each kernel of OTHER is.

    \b
    Example:
      trimtab targets diff here line4.yaml
    """
    from targets.difference import difference
    from targets.profile import load_profile

    rows = difference(load_profile(one), load_profile(other))
    if as_json:
        print_json(rows)
        return
    for row in rows:
        ratio = f"x {row['ratio']:.2f}" if row["ratio"] else ""
        click.echo(f"{row['name']:44s} {row['one']!s:>24s} {row['other']!s:>24s} {ratio}")
