"""Writing a checkpoint as safetensors, row block by row block: peak memory is a block, not a tensor and not a model.

The `safetensors` package serialises tensors that are whole in memory. Here the header is computed from shapes and dtypes
first, then the rows follow. A tensor that nothing changed is copied as stored, so its bits survive (also NaN payloads, and
integers beyond float32). The folder is written beside its place and renamed at the end: nothing half-written is left.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from compiler.checkpoints.files import beside
from compiler.checkpoints.safetensors import FLOATS, STORED
from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.errors import OutputError

CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SPOKEN = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "float32": "F32", "float16": "F16", "bfloat16": "BF16", **{name: name for name in FLOATS}}
Progress = Callable[[str, int, int], None]  # (tensor name, bytes done, bytes in all)


@dataclass(frozen=True)
class Shard:
    """One file. offsets are into its data part."""

    name: str
    views: tuple[TensorView, ...]
    dtypes: tuple[str, ...]

    @property
    def sizes(self) -> list[int]:
        return [view.size * STORED[dtype].itemsize for view, dtype in zip(self.views, self.dtypes, strict=True)]

    def header(self) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for view, dtype, size in zip(self.views, self.dtypes, self.sizes, strict=True):
            entries[view.name] = {"dtype": dtype, "shape": list(view.shape), "data_offsets": [begin, begin + size]}
            begin += size
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def write_checkpoint(
    checkpoint: Checkpoint, directory: Path, *, dtype: str | None = None, shard_bytes: int = 2 << 30, progress: Progress | None = None
) -> list[Path]:
    """The checkpoint as a folder that transformers loads: the paths of its files.

    dtype  fp32, fp16 or bf16 for every float tensor; None keeps each tensor's own (quantized types become F32)

    Raises OutputError: the folder exists and holds files, no space left, or a value too large for the dtype; CheckpointError while reading.
    """
    if dtype is not None and dtype not in SPOKEN:
        raise OutputError(str(directory), expected="dtype fp32, fp16 or bf16", found=repr(dtype), remedy="choose one of these")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OutputError(str(directory), expected="a folder that is new or empty", found="files in it", remedy="name another folder or remove this one")
    shards = _shards(checkpoint, SPOKEN[dtype] if dtype else None, shard_bytes)
    temporary = beside(directory, "writing")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _check_space(directory, sum(sum(shard.sizes) for shard in shards))
        temporary.mkdir()
        names = list(_write_all(checkpoint, shards, temporary, dtype, progress))
        if directory.exists():
            directory.rmdir()
        temporary.rename(directory)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OutputError(
            str(directory), expected="a folder that can be written", found=reason, remedy="free some space, or name a folder elsewhere"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [directory / name for name in names]


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory.parent).free
    if free < needed:
        raise OutputError(str(directory), expected=f"{needed} bytes free", found=f"{free}: no space left", remedy="free some space, or name a folder elsewhere")


def _shards(checkpoint: Checkpoint, dtype: str | None, shard_bytes: int) -> list[Shard]:
    """Tensors in the checkpoint's order, cut where a file would pass `shard_bytes`; inside a file wide types first, so that all are aligned."""
    groups: list[list[tuple[TensorView, str]]] = [[]]
    filled = 0
    for view in checkpoint.tensors.values():
        kind = _stored_dtype(view, dtype)
        size = view.size * STORED[kind].itemsize
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((view, kind))
        filled += size
    shards = []
    for number, group in enumerate(groups, 1):
        group.sort(key=lambda one: -STORED[one[1]].itemsize)
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shards.append(Shard(name, tuple(view for view, _ in group), tuple(kind for _, kind in group)))
    return shards


def _stored_dtype(view: TensorView, dtype: str | None) -> str:
    if view.dtype in STORED and view.dtype not in FLOATS:
        return view.dtype
    return dtype or (view.dtype if view.dtype in FLOATS else "F32")


def _write_all(checkpoint: Checkpoint, shards: Sequence[Shard], folder: Path, dtype: str | None, progress: Progress | None) -> Iterator[str]:
    total = sum(sum(shard.sizes) for shard in shards)
    done = 0
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header())
            for view, kind, size in zip(shard.views, shard.dtypes, shard.sizes, strict=True):
                _write_tensor(file, view, kind)
                done += size
                if progress:
                    progress(view.name, done, total)
        yield shard.name
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {view.name: shard.name for shard in shards for view in shard.views}}
        (folder / "model.safetensors.index.json").write_bytes(_json(index))
        yield "model.safetensors.index.json"
    for name, content in {**checkpoint.assets, "config.json": _json(_config(checkpoint, shards, dtype))}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        yield name


def _write_tensor(file: BinaryIO, view: TensorView, dtype: str) -> None:
    row_bytes = max(4 * view.size // max(view.row_count, 1), 1)
    step = max(1, (16 << 20) // row_bytes)
    for start in range(0, view.row_count, step):
        stop = min(start + step, view.row_count)
        if view.raw and view.dtype == dtype:
            file.write(view.raw(start, stop))
        else:
            file.write(narrow(view.rows(start, stop), dtype, view.name).data)


def narrow(block: np.ndarray, dtype: str, place: str) -> np.ndarray:
    """float32 -> stored items, rounded to nearest, ties to even. Raises OutputError where a finite value would become infinite.

    BF16: uint16, 1.00390625 (halfway between two bf16) -> 0x3F80, NaN stays NaN.
    """
    if dtype == "F32":
        return np.ascontiguousarray(block, "<f4")
    if dtype == "BF16":
        bits = np.ascontiguousarray(block, "<f4").view("<u4")
        rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype("<u2")
        result = np.where(np.isnan(block), ((bits >> 16) | np.uint32(0x40)).astype("<u2"), rounded)
        overflow = ((result & 0x7FFF) == 0x7F80) & np.isfinite(block)
    else:
        with np.errstate(over="ignore"):
            result = block.astype(STORED[dtype])
        overflow = ~np.isfinite(result) & np.isfinite(block) if dtype in FLOATS else np.zeros(1, bool)
    if overflow.any():
        largest = float(np.abs(block[overflow]).max())
        raise OutputError(
            place, expected=f"values that fit {dtype}", found=f"{largest:g}, which becomes infinite", remedy="write it as fp32 or bf16", code="MERGE_OVERFLOW"
        )
    return result


def _config(checkpoint: Checkpoint, shards: Sequence[Shard], dtype: str | None) -> dict[str, Any]:
    """config.json: its dtype is what most of the float data was written as."""
    config = dict(checkpoint.config)
    weights: dict[str, int] = {}
    for shard in shards:
        for kind, size in zip(shard.dtypes, shard.sizes, strict=True):
            weights[kind] = weights.get(kind, 0) + (size if kind in FLOATS else 0)
    if dtype or not ({"dtype", "torch_dtype"} & config.keys()):
        config.pop("torch_dtype", None)
        config["dtype"] = CONFIG_DTYPES[max((kind for kind in weights if kind in FLOATS), key=weights.__getitem__, default="F32")]
    return config


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
