"""`trimtab rebuild`: prove a bundle's digest from its own manifest, by building the same bytes again.

Nothing is taken from the store. The manifest holds the recipe, the digests of base and deltas, the resolved options of every step and the versions of the
tools; what is different here is told before the digests are compared, because it is the likely reason when they differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compiler.errors import BundleError, RecipeError
from compiler.pipeline import export_again
from compiler.progress import Progress
from compiler.recipe import Recipe, parse_recipe
from compiler.record import Stopwatch, versions
from compiler.sources import Sources
from compiler.stages import package
from compiler.store import Store, writing
from runtimes.bundle import verify_bundle


def rebuild_bundle(bundle: Path, folder: Path, base: str | None, progress: Progress) -> dict[str, Any]:
    """Build the files that determine answers once more and compare their digest with the bundle's.

    folder  where the relative paths of the manifest's recipe start
    base    another place of the base, when it is no longer where the recipe says

    Returns {digest, rebuilt, tools, seconds}: tools are the rows {name, then, now} of versions that differ. Raises BundleError when the bundle is altered or
    the digests differ, CheckpointError or DeltaError when a source is not the one that the manifest names.
    """
    from runtimes.bundle import MANIFEST, read_json_object

    watch = Stopwatch()
    with progress.stage("verify", str(bundle)):
        verify_bundle(bundle)
    manifest = read_json_object(bundle / MANIFEST)
    recipe = _recipe(manifest, folder, bundle)
    if base:
        recipe = recipe.model_copy(update={"base": str(Path(base).resolve()) if Path(base).exists() else base})
    options = next(record["measured"] for record in manifest["records"] if record["stage"] == "export")
    with tempfile.TemporaryDirectory(prefix="trimtab-rebuild-") as place, writing(Path(place)):
        exported = export_again(recipe, options, Store(Path(place) / "store"), progress, lambda sources: _same_sources(sources, manifest, bundle))
        out = Path(place) / "out"
        out.mkdir()
        package.assemble(exported, out)
        rebuilt = str(package.write_manifest(out, {})["digest"])
    result = {"bundle": str(bundle), "digest": manifest["digest"], "rebuilt": rebuilt, "tools": _tools(manifest), "seconds": round(watch.seconds, 2)}
    if rebuilt != manifest["digest"]:
        reason = ", ".join(f"{row['name']} {row['then']} then, {row['now']} now" for row in result["tools"])
        remedy = f"install the versions of lineage.tools: {reason}" if reason else "do not deploy it: its manifest does not account for its bytes"
        raise BundleError(str(bundle), expected=f"digest {manifest['digest'][:16]}", found=rebuilt[:16], remedy=remedy, code="REBUILD")
    return result


def _recipe(manifest: Mapping[str, Any], folder: Path, bundle: Path) -> Recipe:
    try:
        return parse_recipe(manifest["lineage"]["recipe"], folder / "manifest.json")
    except (KeyError, TypeError, RecipeError) as error:
        raise BundleError(str(bundle), expected="a recipe in lineage.recipe", found=str(error)[:200], remedy="it was built by another version") from error


def _same_sources(sources: Sources, manifest: Mapping[str, Any], bundle: Path) -> None:
    """Raises BundleError naming the base or delta that has other contents than then."""
    lineage = manifest["lineage"]
    then = {"base": lineage["base"]["digest"], **{f"delta {row['name']}": row["digest"] for row in lineage["deltas"]}}
    now = {"base": sources.lineage["base"]["digest"], **{f"delta {row['name']}": row["digest"] for row in sources.lineage["deltas"]}}
    for name, digest in then.items():
        if now.get(name) != digest:
            found = str(now.get(name, "none"))[:16]
            raise BundleError(
                f"{bundle}: {name}", expected=f"digest {digest[:16]}", found=found, remedy="name the one it was built from", code="REBUILD_SOURCE"
            )


def _tools(manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    then, now = manifest["lineage"]["tools"], versions()
    return [{"name": name, "then": then.get(name, "none"), "now": now.get(name, "none")} for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
