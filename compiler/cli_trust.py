"""The commands that show what is stored and why, prove what was built, and say who built it: cache, explain, rebuild, sign, sbom."""

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


@click.command("sign")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), required=True, help="Private key in PEM, elliptic (P-256, P-384, P-521).")
@click.option("--release", "version", type=click.IntRange(1), required=True, help="Number of this release; a later one must be higher.")
@click.option("--expires", default="", metavar="YYYY-MM-DD", help="Last day on which the release is valid; default: none.")
@click.option("--password-env", metavar="NAME", help="Environment variable that holds the key's password.")
@AS_JSON
def sign_command(bundle: Path, key: Path, version: int, expires: str, password_env: str | None, as_json: bool) -> None:
    """Sign BUNDLE, offline, after verifying it: writes BUNDLE.sig, BUNDLE.release.json and its signature beside it. Needs trimtab[sign].

    \b
    Example:
      trimtab sign out/support-assistant-here --key release.pem --release 3 --expires 2027-06-30
    """
    import os

    from compiler.signing import sign_bundle

    result = sign_bundle(bundle, key, version, expires, os.environ.get(password_env) if password_env else None)
    if as_json:
        print_json(result)
    else:
        until = f", valid until {result['expires']}" if result["expires"] else ""
        click.echo(f"{bundle}: release {result['version']} of {result['name']} signed{until}\n{result['signature']}\n{result['release']}")


@click.command("sbom")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["cyclonedx", "slsa"]), default="cyclonedx", show_default=True, help="ML-BOM or provenance.")
def sbom_command(bundle: Path, form: str) -> None:
    """Print what BUNDLE is made of, after verifying it: a CycloneDX ML-BOM, or SLSA provenance as an in-toto statement.

    \b
    Example:
      trimtab sbom out/support-assistant-here > support-assistant.cdx.json
    """
    from compiler.provenance import describe_bundle

    print_json(describe_bundle(bundle)["bom" if form == "cyclonedx" else "provenance"])
