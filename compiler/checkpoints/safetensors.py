"""Safetensors checkpoints as lazy tensors: one file, or shards with an index.

The header is parsed here, not by the `safetensors` package, because rows are read by position (see `files`) and the
package's numpy side cannot read bfloat16. The format: 8 bytes little endian header length N, N bytes of JSON
`{name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {...}}`, then the data. The rules checked:

1. the header fits in the file and is at most 100 MB of JSON that starts with `{`, no name twice;
2. each tensor's span is shape x item size;
3. the spans cover the data without hole or overlap and end where the file ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import index as whole
from pathlib import Path
from typing import Any

import numpy as np

from compiler.checkpoints.files import Stamp, file_size, read_at, read_json, stamp
from compiler.checkpoints.view import TensorView
from compiler.errors import CheckpointError

HEADER_LIMIT_BYTES = 100 << 20
MOST_TENSORS = 200_000
MAGICS = ((b"PK\x03\x04", "an archive"), (b"\x80\x02", "a pickle"), (b"\x80\x03", "a pickle"), (b"\x80\x04", "a pickle"), (b"\x80\x05", "a pickle"))
AGAIN = "copy or download the file again"

# name -> numpy type of the stored bits; BF16 is read as uint16 and widened by a shift
STORED: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Span:
    """One tensor of one file. begin, end: absolute byte offsets."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _TwiceError(ValueError):
    """A name that stands twice."""


def widen(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Stored items -> float32 of the same shape. BF16: the bits are the upper half of a float32."""
    if dtype == "BF16":
        wide = bits.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return bits.astype(np.float32, copy=False)


def read_header(path: Path) -> tuple[dict[str, Span], dict[str, str]]:
    """(spans by name, metadata) of one safetensors file. Raises CheckpointError for anything the rules above forbid."""
    size = file_size(path)
    length = int(read_at(path, 0, 8).view("<u8")[0]) if size >= 8 else 0
    if size < 8 or length > min(size - 8, HEADER_LIMIT_BYTES):
        raise _no_header(path, length, size)
    text = read_at(path, 8, length).tobytes()
    if (count := text.count(b'"data_offsets"')) > MOST_TENSORS:  # counted before they become objects
        raise CheckpointError(str(path), expected=f"at most {MOST_TENSORS} tensors", found=f"{count}", remedy="this is no model", code="LIMIT_TENSORS")
    entries, metadata = _parse(path, text)
    start = 8 + length
    spans = {name: _span(path, name, entry, start) for name, entry in entries.items()}
    _check_cover(path, spans, start, size)
    return spans, metadata


def _no_header(path: Path, length: int, size: int) -> CheckpointError:
    """A pickle or an archive under this name is told as what it is: its first bytes make no length that could be."""
    if size < 8:
        return CheckpointError(str(path), expected="a whole safetensors file", found=f"{size} bytes", remedy=AGAIN, code="ST_HEADER_SMALL")
    start = read_at(path, 0, 8).tobytes()
    if kind := next((kind for magic, kind in MAGICS if start.startswith(magic)), ""):
        found, remedy = f"{kind} under this name: refused", "ask for a safetensors copy"
        return CheckpointError(str(path), expected="a whole safetensors file", found=found, remedy=remedy, code="MAGIC_MISMATCH")
    found = f"a header of {length} bytes in a file of {size}"
    return CheckpointError(str(path), expected="a whole safetensors file", found=found, remedy=AGAIN, code="ST_HEADER_LENGTH")


def _parse(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise _TwiceError("a name stands twice")
        return result

    try:
        if not text.startswith(b"{"):
            raise ValueError(f"starts with {text[:1]!r}, not with {{")
        entries = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        code = "ST_DUPLICATE" if isinstance(error, _TwiceError) else "ST_HEADER_JSON"
        raise CheckpointError(str(path), expected="a safetensors header in JSON", found=str(error)[:200], remedy=AGAIN, code=code) from error
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(str(path), expected="__metadata__ of names and texts", found=type(metadata).__name__, remedy=AGAIN, code="ST_HEADER_JSON")
    return entries, {str(key): str(value) for key, value in metadata.items()}


def _span(path: Path, name: str, entry: Any, start: int) -> Span:
    place = f"{path}: {name}"
    try:
        dtype, shape = str(entry["dtype"]), tuple(whole(n) for n in entry["shape"])
        begin, end = (whole(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(place, expected="dtype, shape and data_offsets", found=str(entry)[:80], remedy=AGAIN, code="ST_HEADER_JSON") from error
    if dtype not in STORED:
        raise CheckpointError(
            place,
            expected=f"one of {', '.join(STORED)}",
            found=dtype,
            remedy="save the checkpoint in float32, float16 or bfloat16 before compiling it",
            code="ST_DTYPE",
        )
    bytes_needed = math.prod(shape) * STORED[dtype].itemsize
    if min(shape, default=0) < 0 or begin < 0 or end - begin != bytes_needed:
        raise CheckpointError(
            place, expected=f"{bytes_needed} bytes for {dtype} {list(shape)}", found=f"data_offsets {begin} to {end}", remedy=AGAIN, code="ST_SHAPE"
        )
    return Span(dtype, shape, start + begin, start + end)


def _check_cover(path: Path, spans: Mapping[str, Span], start: int, size: int) -> None:
    reached = start
    for name, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.begin != reached:
            kind, code = ("overlaps its neighbour", "ST_OVERLAP") if span.begin < reached else ("leaves a hole before it", "ST_NOT_COVERED")
            raise CheckpointError(f"{path}: {name}", expected=f"data from byte {reached}", found=f"{span.begin}: it {kind}", remedy=AGAIN, code=code)
        reached = span.end
    if reached != size:
        kind, code = ("the file is truncated", "ST_TRUNCATED") if size < reached else ("bytes follow the last tensor", "ST_NOT_COVERED")
        raise CheckpointError(str(path), expected=f"{reached} bytes", found=f"{size}: {kind}", remedy=AGAIN, code=code)


def file_tensors(path: Path) -> dict[str, TensorView]:
    """The tensors of one safetensors file. Raises CheckpointError, also while reading, when the file is no longer the one whose header was read."""
    seen = stamp(path)
    return {name: TensorView(name, span.shape, span.dtype, StoredRows(path, span, seen)) for name, span in read_header(path)[0].items()}


@dataclass(frozen=True)
class StoredRows:
    """The rows of one stored tensor: called, float32 [n, ...]; `raw`, the bytes of the same rows."""

    path: Path
    span: Span
    seen: Stamp | None = None

    def __call__(self, start: int, stop: int) -> np.ndarray:
        bits = self._bits(start, stop).view(STORED[self.span.dtype])
        return widen(bits, self.span.dtype).reshape(stop - start, *self.span.shape[1:])

    def raw(self, start: int, stop: int) -> bytes:
        return self._bits(start, stop).tobytes()

    def _bits(self, start: int, stop: int) -> np.ndarray:
        row_bytes = math.prod(self.span.shape[1:]) * STORED[self.span.dtype].itemsize
        return read_at(self.path, self.span.begin + start * row_bytes, (stop - start) * row_bytes, self.seen)


def sharded_tensors(index: Path) -> tuple[dict[str, TensorView], list[Path]]:
    """Tensors and shard paths of `model.safetensors.index.json`.

    Raises CheckpointError: a shard outside the folder or missing, a tensor that its shard lacks, a tensor of a shard that the index lacks.
    """
    weight_map = read_json(index, "the shard index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            str(index), expected="a weight_map of tensor name to file", found=type(weight_map).__name__, remedy="restore the index file", code="INDEX_MISMATCH"
        )
    shards = {str(file): _shard(index, str(file)) for file in dict.fromkeys(weight_map.values())}
    tensors: dict[str, TensorView] = {}
    for file, found in shards.items():
        wanted = {name for name, where in weight_map.items() if where == file}
        for name in sorted(wanted - found.keys()):
            raise CheckpointError(
                f"{index}: {name}",
                expected=f"the tensor in {file}",
                found="no such tensor there",
                remedy="download index and shards again, from one revision",
                code="INDEX_MISMATCH",
            )
        for name in sorted(found.keys() - wanted):
            raise CheckpointError(
                f"{index}: {name}",
                expected=f"every tensor of {file} in the index",
                found="this one is not",
                remedy="download index and shards again, from one revision",
                code="INDEX_MISMATCH",
            )
        tensors.update(found)
    return tensors, [index.parent / file for file in shards]


def _shard(index: Path, file: str) -> dict[str, TensorView]:
    path = index.parent / file
    if Path(file).name != file or not file.endswith(".safetensors"):
        raise CheckpointError(str(index), expected="shards beside the index", found=repr(file), remedy="restore the index file", code="INDEX_PATH")
    if not path.is_file():
        raise CheckpointError(str(path), expected="a shard that the index names", found="no such file", remedy="download the missing shard", code="INDEX_PATH")
    return file_tensors(path)
