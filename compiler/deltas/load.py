"""`load_delta`: from what a user writes to a `Delta`. Kinds are rows of data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compiler.checkpoints.files import read_json
from compiler.checkpoints.resolve import locate
from compiler.checkpoints.safetensors import file_tensors
from compiler.checkpoints.view import TensorView
from compiler.deltas.base import Delta
from compiler.deltas.lora import load_lora
from compiler.errors import CheckpointError, DeltaError

Loader = Callable[[Path, str, float, Mapping[str, Any], Mapping[str, TensorView]], Delta]

# PEFT's peft_type -> loader
KINDS: Mapping[str, Loader] = {"LORA": load_lora}


def load_delta(source: str, *, weight: float = 1.0, relative_to: Path | None = None) -> Delta:
    """The delta in the folder that `source` names (a path, package:MODULE/path, or a hub id). Raises DeltaError.

    Only headers and a scan for NaN and infinity are read here; factors are read again when a merge asks for rows.
    """
    if not math.isfinite(weight):
        raise DeltaError(source, expected="a finite weight", found=repr(weight), remedy="correct deltas.weight in the recipe")
    try:
        return _load(locate(source, relative_to), source, weight)
    except CheckpointError as error:
        raise DeltaError(error.place, expected=error.expected, found=error.found, remedy=error.remedy) from error


def _load(folder: Path, source: str, weight: float) -> Delta:
    config_path = folder / "adapter_config.json"
    if not config_path.is_file():
        raise DeltaError(
            source, expected="an adapter folder with adapter_config.json", found="none", remedy="name the folder that PEFT's save_pretrained wrote"
        )
    config = read_json(config_path, "the adapter's config")
    kind = str(config.get("peft_type"))
    if kind not in KINDS:
        raise DeltaError(
            source,
            expected=f"a delta of kind {', '.join(KINDS)}",
            found=kind,
            remedy=f"merge it with PEFT and compile the result: {kind} is not built yet; LoRA is",
        )
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise _no_weights(folder, source)
    delta = KINDS[kind](folder, source, weight, config, file_tensors(weights))
    return replace(delta, labels=_labels(folder))


def _no_weights(folder: Path, source: str) -> DeltaError:
    pickle = folder / "adapter_model.bin"
    if pickle.is_file():
        return DeltaError(
            str(pickle),
            expected="adapter_model.safetensors",
            found="a pickle, which runs code when it is opened: refused",
            remedy="convert it in a sandbox (PeftModel.save_pretrained writes safetensors) or ask for a safetensors copy",
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
