"""`load_delta`: from what a user writes to a `Delta`. Kinds are rows of data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compiler.checkpoints.files import FolderAssets, read_json
from compiler.checkpoints.resolve import TOKENIZER_FILES, locate, open_checkpoint
from compiler.checkpoints.safetensors import file_tensors, read_header
from compiler.checkpoints.view import TensorView
from compiler.deltas.adalora import load_adalora
from compiler.deltas.base import Delta
from compiler.deltas.diff import checkpoint_delta, load_diff
from compiler.deltas.ia3 import load_ia3
from compiler.deltas.loha import load_loha
from compiler.deltas.lokr import load_lokr
from compiler.deltas.lora import load_lora
from compiler.deltas.oft import load_boft, load_oft
from compiler.deltas.peft import Adapter, check_finite, load_tokens
from compiler.deltas.select import EVERYTHING, Selection
from compiler.deltas.shira import load_shira
from compiler.deltas.sparse import FORMAT, VERSION, load_sparse
from compiler.deltas.vera import load_vera
from compiler.errors import CheckpointError, DeltaError

# PEFT's peft_type -> loader
KINDS: Mapping[str, Callable[[Adapter], Delta]] = {
    "LORA": load_lora,  # and DoRA
    "ADALORA": load_adalora,
    "BOFT": load_boft,
    "IA3": load_ia3,
    "LOHA": load_loha,
    "LOKR": load_lokr,
    "OFT": load_oft,
    "SHIRA": load_shira,
    "TRAINABLE_TOKENS": load_tokens,
    "VERA": load_vera,
}
# kind in the metadata of a delta file of our own -> loader
OwnLoader = Callable[[Path, str, float, Mapping[str, str], Mapping[str, TensorView]], Delta]
OWN_KINDS: Mapping[str, OwnLoader] = {"sparse": load_sparse, "diff": load_diff}
OWN_FILE = "delta.safetensors"


def load_delta(
    source: str, *, weight: float = 1.0, relative_to: Path | None = None, name: str = "", select: Selection = EVERYTHING, accept_base: str | None = None
) -> Delta:
    """The delta that `source` names (a path, package:MODULE/path, or a hub id). Raises DeltaError.

    1. A folder with adapter_config.json: a PEFT adapter of one of KINDS.
    2. A folder with delta.safetensors, or a .safetensors file whose metadata says trimtab-delta: one of OWN_KINDS.
    3. A checkpoint: its difference from the base.

    Only headers and a scan for NaN and infinity are read here; factors are read again when a merge asks for rows.
    """
    if not math.isfinite(weight):
        raise DeltaError(source, expected="a finite weight", found=repr(weight), remedy="correct deltas.weight in the recipe", code="ADAPTER_SCALE")
    try:
        return replace(_load(locate(source, relative_to), source, weight), name=name, select=select, accept_base=accept_base)
    except CheckpointError as error:
        raise DeltaError(
            error.place, expected=error.expected, found=error.found, remedy=error.remedy, code=error.code if error.code != CheckpointError.code else ""
        ) from error


def _load(path: Path, source: str, weight: float) -> Delta:
    own = path / OWN_FILE if path.is_dir() else path
    if (path / "adapter_config.json").is_file():
        return _adapter(path, source, weight)
    if own.is_file() and own.suffix == ".safetensors" and (path.is_dir() or read_header(own)[1].get("format") == FORMAT):
        return _own(own, source, weight)
    if path.is_file() or (path / "config.json").is_file():
        return checkpoint_delta(open_checkpoint(str(path)), source, weight)
    raise DeltaError(
        source,
        expected=f"an adapter folder with adapter_config.json, a {OWN_FILE}, or a checkpoint",
        found="none",
        remedy="name the folder that PEFT's save_pretrained wrote",
    )


def _adapter(folder: Path, source: str, weight: float) -> Delta:
    config = read_json(folder / "adapter_config.json", "the adapter's config")
    kind = str(config.get("peft_type"))
    if kind not in KINDS:
        raise DeltaError(
            source,
            expected=f"a delta of kind {', '.join(KINDS)}",
            found=kind,
            remedy=f"merge it with PEFT, where PEFT can, and compile the result: {kind} is not built",
        )
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise _no_weights(folder, source)
    adapter = Adapter(folder, source, weight, config, file_tensors(weights))
    check_finite(source, adapter.tensors.values())
    base_digest = read_header(weights)[1].get("base_digest")  # as `trimtab delta diff` writes it; PEFT knows a base by name only
    assets = FolderAssets(folder, tuple(name for name in TOKENIZER_FILES if (folder / name).is_file()))
    return replace(KINDS[kind](adapter), labels=_labels(folder), base_digest=str(base_digest) if base_digest else None, assets=assets)


def _own(path: Path, source: str, weight: float) -> Delta:
    metadata = read_header(path)[1]
    found = {key: metadata.get(key) for key in ("format", "version", "kind")}
    if found["format"] != FORMAT or found["version"] != VERSION or found["kind"] not in OWN_KINDS:
        raise DeltaError(
            str(path),
            expected=f"metadata format {FORMAT}, version {VERSION}, kind {' or '.join(OWN_KINDS)}",
            found=", ".join(f"{key} {value}" for key, value in found.items()),
            remedy="write the delta as docs/deltas.md says",
        )
    return OWN_KINDS[str(found["kind"])](path, source, weight, metadata, file_tensors(path))


def _no_weights(folder: Path, source: str) -> DeltaError:
    pickle = folder / "adapter_model.bin"
    if pickle.is_file():
        return DeltaError(
            str(pickle),
            expected="adapter_model.safetensors",
            found="a pickle, which runs code when it is opened: refused",
            remedy="convert it in a sandbox (PeftModel.save_pretrained writes safetensors) or ask for a safetensors copy",
            code="PICKLE_REFUSED",
        )
    return DeltaError(source, expected="adapter_model.safetensors", found="none", remedy="save the adapter with PEFT's save_pretrained")


def _labels(folder: Path) -> dict[int, str]:
    """id2label of a config.json beside the adapter, where its author saved the trained model's config there."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    table = read_json(path, "the trained model's config").get("id2label")
    if not isinstance(table, dict) or not all(str(key).isdigit() for key in table):
        return {}
    return {int(key): str(value) for key, value in table.items()}


def labels_as_config(labels: Mapping[int, str]) -> dict[str, Any]:
    """{0: "billing"} -> id2label and label2id as config.json holds them."""
    return {"id2label": {str(key): labels[key] for key in sorted(labels)}, "label2id": {labels[key]: key for key in sorted(labels)}}
