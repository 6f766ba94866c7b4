"""Unmerged adapters of a bundle: several tenants over one base, chosen per request, swapped without loading anything again.

The graph takes each tenant's factors as inputs with a default of rank 0 (`compiler.graph.adapters`), in onnxruntime's adapter
format. A plain `session.run` takes a file as `RunOptions.add_active_adapter(LoraAdapter)`; runs with an IOBinding ignore that,
so here the same file's tensors are bound as inputs: once per swap, not per token. No adapter is the adapter of rank 0.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bundle import Bundle
from runtimes.decode import KEPT_POSITIONS
from targets.errors import BundleError, TrimtabError

Values = Mapping[str, Any]  # graph input -> onnxruntime.OrtValue, every optional input of the graph
REMEDY = "build the bundle again, or copy it again from where it was built"


class Adapters:
    """The adapters of one session, read when first asked for and kept: they are small."""

    def __init__(self, bundle: Bundle, session: Any) -> None:
        self._bundle = bundle
        self._rows = _rows(bundle)
        self._shapes: dict[str, list[int | str]] = {node.name: node.shape for node in session.get_overridable_initializers() if node.name != KEPT_POSITIONS}
        self._kept: dict[str, Values] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Tenants, in the order of the manifest."""
        return tuple(self._rows)

    def check(self, name: str) -> None:
        """Raises TrimtabError for a name that the bundle does not have, with the nearest. "" is the base alone."""
        if name and name not in self._rows:
            near = difflib.get_close_matches(name, self.names, n=1, cutoff=0.5)
            known = f"known: {', '.join(self.names)}" if self.names else "this bundle has none: compile with `deltas: {mode: attached, ...}`"
            expected = "the name of an adapter of this bundle"
            raise TrimtabError(f"adapter {name!r}", expected=expected, found="none of that name", remedy=f"did you mean {near[0]!r}?" if near else known)

    def values(self, name: str) -> Values:
        """What to bind for a tenant; "" for the base alone. Raises TrimtabError for an unknown name, BundleError for a file of another model."""
        self.check(name)
        if name not in self._kept:
            found = self._read(self._rows[name]) if name else {}
            self._kept[name] = {**{each: _empty(shape) for each, shape in self._shapes.items() if each not in found}, **found}
        return self._kept[name]

    def _read(self, row: Mapping[str, Any]) -> Values:
        import onnxruntime

        path = self._bundle.directory / Path(str(row["file"])).name  # a bundle is flat; nothing outside of it is read
        if not path.is_file():
            raise BundleError(str(path), expected="an adapter file", found="none", remedy=REMEDY)
        try:
            stored = onnxruntime.AdapterFormat.read_adapter(str(path))
        except RuntimeError as error:
            found = " ".join(str(error).split())[:200]
            raise BundleError(str(path), expected="a file in onnxruntime's adapter format", found=found, remedy=REMEDY) from error
        if stored.get_model_version() != row["model_version"]:
            found = f"one for base {stored.get_model_version()}"
            raise BundleError(str(path), expected=f"an adapter for this base ({row['model_version']})", found=found, remedy=REMEDY)
        values = stored.get_parameters()
        if misfits := [name for name, value in values.items() if not _fits(value.shape(), self._shapes.get(name))]:
            found = f"{misfits[0]} {values[misfits[0]].shape()} ({len(misfits)} of {len(values)} do not fit)"
            raise BundleError(str(path), expected="factors that this graph takes: an adapter for this model", found=found, remedy=REMEDY)
        return values


def _rows(bundle: Bundle) -> dict[str, Mapping[str, Any]]:
    """`model.adapters` of the manifest by name. Raises BundleError."""
    found: dict[str, Mapping[str, Any]] = {}
    for number, row in enumerate(bundle.model.get("adapters") or ()):
        if not isinstance(row, Mapping) or not {"name", "file", "model_version"} <= set(row):
            place = f"{bundle.directory / 'manifest.json'}: model.adapters[{number}]"
            raise BundleError(place, expected="name, file and model_version of an adapter", found=repr(row)[:60], remedy=REMEDY)
        found[str(row["name"])] = row
    return found


def _fits(found: list[int], wanted: list[int | str] | None) -> bool:
    """Equal but for the rank, which is symbolic."""
    return wanted is not None and len(found) == len(wanted) and all(not isinstance(want, int) or got == want for got, want in zip(found, wanted, strict=True))


def _empty(shape: list[int | str]) -> Any:
    """An input of rank 0."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros([side if isinstance(side, int) else 0 for side in shape], np.float32))
