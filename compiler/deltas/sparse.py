"""Sparse deltas in a file format of our own: a few entries of a tensor change (Ansell et al. 2022, arXiv 2110.07560, train such masks).

    difference[index] = value, 0 elsewhere

Our file is one safetensors file. Its metadata:

    format       trimtab-delta
    version      1
    kind         sparse
    shapes       JSON, parameter name -> shape of the parameter
    base_digest  digest of the base it was made from; may be absent
    base_name    what that base is called; may be absent

and per parameter NAME two tensors of one length: NAME.indices, int32 or int64, positions in the parameter laid out row by
row, strictly ascending; NAME.values, a float type, what is added there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from compiler.checkpoints.files import sha256_file, sha256_parts
from compiler.checkpoints.safetensors import FLOATS, STORED
from compiler.checkpoints.view import TensorView
from compiler.deltas.base import Change, Delta, Edit, wrong_delta
from compiler.deltas.peft import check_finite, misfit, need

FORMAT, VERSION = "trimtab-delta", "1"
AGAIN = "write the delta again"
Entries = Callable[[], tuple[np.ndarray, np.ndarray]]  # (positions int64 [n] ascending, values float32 [n])


def load_sparse(path: Path, origin: str, weight: float, metadata: Mapping[str, str], tensors: Mapping[str, TensorView]) -> Delta:
    """A sparse delta of our own format. Raises DeltaError: rules of the format broken, NaN or infinity."""
    shapes = _shapes(origin, metadata)
    extra = sorted(tensors.keys() - {f"{name}.{part}" for name in shapes for part in ("indices", "values")})
    if extra:
        raise wrong_delta(f"{origin}: {extra[0]}", "NAME.indices and NAME.values of each name in shapes", "a tensor of neither", AGAIN)
    check_finite(origin, tensors.values())
    kept = lru_cache(maxsize=1)(_read)  # the entries of the tensor at hand
    edits = tuple(_own_edit(f"{origin}: {name}", name, shape, tensors, kept) for name, shape in shapes.items())
    return Delta(
        kind="sparse",
        origin=origin,
        weight=weight,
        edits=edits,
        digest_of=lambda: sha256_parts({"delta.safetensors": sha256_file(path)}),
        base_name=metadata.get("base_name", ""),
        base_digest=metadata.get("base_digest") or None,
    )


def _shapes(origin: str, metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    try:
        table = {str(name): tuple(int(size) for size in shape) for name, shape in json.loads(metadata["shapes"]).items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise wrong_delta(origin, "shapes in the metadata: JSON of parameter name to shape", repr(metadata.get("shapes"))[:80], AGAIN) from error
    if not table:
        raise wrong_delta(origin, "at least one parameter in shapes", "none", AGAIN)
    return table


def _own_edit(
    place: str,
    name: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, TensorView],
    kept: Callable[[TensorView, TensorView], tuple[np.ndarray, np.ndarray]],
) -> Edit:
    parts = {part: tensors[f"{name}.{part}"] for part in ("indices", "values") if f"{name}.{part}" in tensors}
    indices, values = need(place, parts, "indices", "values")
    if indices.dtype not in ("I32", "I64") or values.dtype not in FLOATS:
        raise wrong_delta(place, "int32 or int64 indices and float values", f"{indices.dtype} and {values.dtype}", AGAIN, "SPARSE_SHAPE")
    if len(indices.shape) != 1 or indices.shape != values.shape:
        raise misfit(place, "one value for each index", parts, "SPARSE_SHAPE")
    positions, _ = kept(indices, values)
    check_positions(place, positions, math.prod(shape))
    return Edit(name, shape, scatter(lambda: kept(indices, values)))


def _read(indices: TensorView, values: TensorView) -> tuple[np.ndarray, np.ndarray]:
    return integers(indices), values.read()


def integers(view: TensorView) -> np.ndarray:
    """The tensor as int64: its rows would come as float32, which is exact up to 2^24 only."""
    if view.raw is None or view.dtype in FLOATS:  # PEFT on Windows writes indices as float32
        return view.read().astype(np.int64)
    return np.frombuffer(view.raw(0, view.row_count), STORED[view.dtype]).astype(np.int64).reshape(view.shape)


def check_positions(place: str, positions: np.ndarray, size: int) -> None:
    """Raises DeltaError for positions that do not ascend strictly inside 0 .. size."""
    if not positions.size:
        return
    if positions[0] < 0 or positions[-1] >= size or (np.diff(positions) <= 0).any():
        found = f"{positions.min()} to {positions.max()}" + ("" if (np.diff(positions) > 0).all() else ", not ascending or repeated")
        raise wrong_delta(place, f"strictly ascending indices from 0 to {size - 1}", found, AGAIN, "SPARSE_INDEX")


def scatter(entries: Entries) -> Change:
    """The difference that these entries are, block by block."""

    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        positions, values = entries()
        start, size = first * math.prod(base.shape[1:]), base.size
        low, high = np.searchsorted(positions, (start, start + size))
        result = np.zeros(size, np.float32)
        result[positions[low:high] - start] = values[low:high]
        return result.reshape(base.shape)

    return change


def write_sparse(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.ndarray, np.ndarray]], base_digest: str = "", base_name: str = "") -> None:
    """name -> (shape, positions int [n] strictly ascending, values float32 [n]) as a file that `load_sparse` reads."""
    metadata = {"format": FORMAT, "version": VERSION, "kind": "sparse", "shapes": json.dumps({name: list(shape) for name, (shape, _, _) in tensors.items()})}
    metadata.update({key: text for key, text in (("base_digest", base_digest), ("base_name", base_name)) if text})
    arrays: dict[str, tuple[str, np.ndarray]] = {}
    for name, (shape, positions, _) in tensors.items():
        wide = math.prod(shape) > np.iinfo(np.int32).max
        arrays[f"{name}.indices"] = ("I64", positions.astype("<i8")) if wide else ("I32", positions.astype("<i4"))
    arrays.update({f"{name}.values": ("F32", values.astype("<f4")) for name, (_, _, values) in tensors.items()})
    ordered = sorted(arrays.items(), key=lambda item: -item[1][1].itemsize)  # wide types first, so that all are aligned
    header: dict[str, object] = {"__metadata__": metadata}
    begin = 0
    for name, (dtype, array) in ordered:
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, begin + array.nbytes]}
        begin += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, (_, array) in ordered:
            file.write(array.tobytes())
