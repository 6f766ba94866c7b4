"""The commands that show what is stored and why, and prove what was built: cache, explain, rebuild."""

from __future__ import annotations

from pathlib import Path

import click

from compiler.cli_parts import AS_JSON, print_json, progress


@click.group("cache")
def cache_group() -> None:
    """Results that are kept, in $TRIMTAB_CACHE or the user's cache folder.

    \b
    Example:
      trimtab cache list
    """


@cache_group.command("list")
@AS_JSON
def cache_list(as_json: bool) -> None:
    """Show every entry: stage, size, last use, and whether a process uses it now.

    \b
    Example:
      trimtab cache list
    """
    _print_entries(False, as_json)


@cache_group.command("verify")
@AS_JSON
def cache_verify(as_json: bool) -> None:
    """Read every byte of every entry; exit code 1 where one is damaged. A damaged entry is never used and is made again when needed.

    \b
    Example:
      trimtab cache verify
    """
    if not _print_entries(True, as_json):
        raise click.exceptions.Exit(1)


def _print_entries(verify: bool, as_json: bool) -> bool:
    """Whether all are intact, as far as was looked."""
    import datetime

    from compiler.store import Store

    store = Store.default()
    entries = store.entries(verify)
    if as_json:
        rows = [{"key": e.key, "stage": e.stage, "bytes": e.size_bytes, "used": e.used, "in_use": e.in_use, "intact": e.intact} for e in entries]
        print_json({"store": str(store.root), "bytes": sum(e.size_bytes for e in entries), "entries": rows})
    else:
        for entry in entries:
            used = datetime.datetime.fromtimestamp(entry.used, datetime.UTC).strftime("%Y-%m-%d %H:%M")
            state = {None: "", True: "intact", False: "DAMAGED"}[entry.intact] + (" in use" if entry.in_use else "")
            click.echo(f"{entry.key[:12]}  {entry.stage:11s} {entry.size_bytes / 1e6:10.2f} MB  {used}  {state}")
        click.echo(f"{store.root}: {len(entries)} entries, {sum(entry.size_bytes for entry in entries) / 1e6:.2f} MB")
    return all(entry.intact is not False for entry in entries)


@cache_group.command("gc")
@click.option("--max-gb", type=click.FloatRange(0), default=10.0, show_default=True, help="Keep at most this many GB (1e9 bytes), the last used first.")
@AS_JSON
def cache_gc(max_gb: float, as_json: bool) -> None:
    """Remove damaged entries, what interrupted runs left, and the least used entries above a size. What a process uses now stays.

    \b
    Example:
      trimtab cache gc --max-gb 2
    """
    from compiler.store import Store

    store = Store.default()
    removed = store.collect(round(max_gb * 1e9))
    freed, left = sum(entry.size_bytes for entry in removed), store.entries()
    if as_json:
        print_json({"removed": [entry.key for entry in removed], "freed_bytes": freed, "left": len(left), "left_bytes": sum(e.size_bytes for e in left)})
    else:
        click.echo(f"removed {len(removed)} entries, {freed / 1e6:.2f} MB; {len(left)} left, {sum(e.size_bytes for e in left) / 1e6:.2f} MB")


@click.command("explain")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Lay a value over the recipe.")
@AS_JSON
def explain_command(recipe: Path, settings: tuple[str, ...], as_json: bool) -> None:
    """Say which steps of RECIPE are cached, and which part of its key keeps each of the others from the nearest stored result.

    \b
    Example:
      trimtab explain recipe.yaml --set quantize.scheme=int4-g32
    """
    from compiler.explain import explain_recipe, explanation_lines
    from compiler.recipe import load_recipe
    from compiler.store import Store

    plans = explain_recipe(load_recipe(recipe, settings), Store.default())
    if as_json:
        print_json(plans)
    else:
        click.echo("\n".join(line for plan in plans for line in explanation_lines(plan)))


@click.command("rebuild")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--folder", type=click.Path(path_type=Path), default=Path(), help="Where relative paths of the bundle's recipe start; default: here.")
@click.option("--base", help="Where the base is now, when it is not where the recipe says.")
@AS_JSON
def rebuild_command(bundle: Path, folder: Path, base: str | None, as_json: bool) -> None:
    """Build the bytes of BUNDLE again from its manifest, without the cache, and compare the digest. Exit code 1 when it differs.

    \b
    Example:
      trimtab rebuild out/support-assistant-here --folder examples/01-support-assistant
    """
    from compiler.rebuild import rebuild_bundle

    result = rebuild_bundle(bundle, folder, base, progress(as_json))
    if as_json:
        print_json(result)
        return
    for row in result["tools"]:
        click.echo(f"built with {row['name']} {row['then']}, here {row['now']}")
    click.echo(f"{bundle}: rebuilt byte for byte, digest {result['digest']}, {result['seconds']} s")
