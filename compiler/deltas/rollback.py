"""Taking a merge back, bit for bit: what has to be kept beside a merged checkpoint so that it returns its base.

Floating-point addition cannot be undone by subtraction, so the words themselves are kept. Each row block of each base tensor
is stored in the smallest of these forms, all on words as stored (4 bytes of F32, 2 of F16 and BF16):

    same      nothing: the merge did not change it
    sparse    positions (u4) and base XOR merged of the words that differ
    xor       base XOR merged of all words, deflated byte plane by byte plane: sign, exponent and leading bits agree, so runs of zeros
    words     the base's words, deflated likewise: the merged tensor has another dtype

`rollback.json` names base and merge, and for each base tensor its digest, its name in the merged checkpoint and its blocks;
`rollback.safetensors` holds their bytes, one U8 tensor per base tensor. In `reference` mode there are no residuals: the base
itself, found again by name, is checked tensor by tensor against the digests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from compiler.checkpoints.files import read_json, sha256_file
from compiler.checkpoints.safetensors import STORED, file_tensors, widen
from compiler.checkpoints.view import ROW_BLOCK_BYTES, Checkpoint, TensorView
from compiler.errors import CheckpointError, RecipeError

RECORD, RESIDUALS = "rollback.json", "rollback.safetensors"
NOISE_BITS = 7.5  # entropy of a byte from which on deflate gains too little
MODES = ("auto", "residual", "reference")
FORMAT = {"format": "trimtab-rollback", "version": 1}
Update = Callable[[str, int, int], None]


def block_rows(view: TensorView) -> int:
    """Rows of one block: as many as a checkpoint is written by, so that restoring decodes each block once."""
    return max(1, ROW_BLOCK_BYTES // max(4 * view.size // max(view.row_count, 1), 1))


def encode(base: bytes, merged: bytes | None, item: int) -> tuple[str, bytes]:
    """(form, payload) of one block. item: bytes of a word. merged None: there are no such words to start from."""
    words = np.frombuffer(base, f"<u{item}")
    if merged is None:
        return "words", _deflate(words)
    change = words ^ np.frombuffer(merged, words.dtype)
    size = (4 + item) * int(np.count_nonzero(change))  # of the sparse form
    if not size:
        return "same", b""
    dense = _deflate(change) if 16 * size >= len(base) else None  # below, deflate would spend its time on zeros for little
    if dense is not None and len(dense) < size:
        return "xor", dense
    places = np.flatnonzero(change)
    return "sparse", places.astype("<u4").tobytes() + change[places].tobytes()


def decode(form: str, payload: bytes, merged: bytes | None, item: int, count: int) -> bytes:
    """The base's bytes of one block of `count` words. Raises ValueError for a payload that is damaged."""
    if form == "words":
        return _inflate(payload, item, count).tobytes()
    words = np.frombuffer(merged or b"", f"<u{item}").copy()
    if len(words) != count:
        raise ValueError(f"{len(words)} words instead of {count}")
    if form == "sparse":
        number, rest = divmod(len(payload), 4 + item)
        places = np.frombuffer(payload, "<u4", number)
        if rest or (number and int(places.max()) >= count):
            raise ValueError("positions outside the block")
        words[places] ^= np.frombuffer(payload, words.dtype, number, 4 * number)
    elif form == "xor":
        words ^= _inflate(payload, item, count)
    elif form != "same":
        raise ValueError(f"a form named {form!r}")
    return words.tobytes()


def _deflate(words: np.ndarray) -> bytes:
    """Byte planes of the words: a byte that tells how many of the low ones stand as they are, those, and the others deflated.

    Low bytes of a mantissa are noise: deflating them took nine tenths of the time and gained nothing.
    """
    planes = np.ascontiguousarray(words.view(np.uint8).reshape(-1, words.itemsize).T)
    plain = next((number for number, plane in enumerate(planes) if _entropy_bits(plane) < NOISE_BITS), len(planes))
    pack = zlib.compressobj(1, strategy=zlib.Z_RLE)  # runs of zeros and the code of single bytes are all there is: smaller and faster than matching
    return bytes([plain]) + planes[:plain].tobytes() + pack.compress(planes[plain:].tobytes()) + pack.flush()


def _entropy_bits(plane: np.ndarray) -> float:
    """Zeroth-order entropy of uint8 [n], bits per byte; low for few bytes, which are quick to deflate anyway."""
    share = np.bincount(plane, minlength=256) / max(len(plane), 1)
    return float(-np.sum(share[share > 0] * np.log2(share[share > 0])))


def _inflate(payload: bytes, item: int, count: int) -> np.ndarray:
    """Inverse of `_deflate`: unsigned words [count]. Raises ValueError for anything but one whole block."""
    plain = min(payload[0], item) if payload else 0
    unpack, split, wanted = zlib.decompressobj(), 1 + plain * count, (item - plain) * count
    try:
        rest = unpack.decompress(payload[split:], wanted + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(rest) != wanted or not unpack.eof or unpack.unused_data:
        raise ValueError(f"{len(rest)} bytes instead of {wanted}, or not one whole block")
    planes = np.frombuffer(payload[1:split] + rest, np.uint8).reshape(item, count)
    return np.ascontiguousarray(planes.T).reshape(-1).view(f"<u{item}")


# --- writing a record ------------------------------------------------------------------------------------------------------------


def write_record(folder: Path, base: Checkpoint, merged: Checkpoint, names: Mapping[str, str], lineage: Mapping[str, Any], *, mode: str = "auto",
                 update: Update | None = None) -> dict[str, Any]:  # fmt: skip
    """Write the record of a merge into `folder` and return it.

    merged  the merged checkpoint as written, opened from disk
    names   base name -> name in the merged checkpoint
    mode    residual, reference, or auto: residuals unless they take more bytes than the base's own words

    Raises RecipeError for another mode, CheckpointError for a base whose words are not at hand (GGUF is decoded). The caller turns OSError into its own.
    """
    if mode not in MODES:
        raise RecipeError("--rollback", expected=f"one of {', '.join(MODES)}", found=repr(mode), remedy="choose one of these")
    for view in base.tensors.values():
        if view.raw is None:
            remedy = "write the base as safetensors first (trimtab merge BASE --out DIR) and merge into that"
            raise CheckpointError(f"{base.origin}: {view.name}", expected="a base whose words can be kept", found=f"{view.dtype}, decoded", remedy=remedy)
    payload, rows, done = folder / f"{RESIDUALS}.part", {}, 0
    with payload.open("wb") as file:
        for name, view in base.tensors.items():
            rows[name] = _tensor_record(view, names[name], merged.tensors.get(names[name]), file if mode != "reference" else None)
            done += 1
            if update:
                update(name, done, len(base.tensors))
        size = file.tell()
    total = sum(view.size * STORED[view.dtype].itemsize for view in base.tensors.values())
    if mode == "reference" or (mode == "auto" and size >= total):
        payload.unlink()
        rows = {name: {key: value for key, value in row.items() if key != "blocks"} for name, row in rows.items()}
        mode, size = "reference", 0
    else:
        mode = "residual"
        _wrap(payload, folder / RESIDUALS, rows)
    digest = sha256_file(folder / RESIDUALS) if mode == "residual" else None
    record = {**FORMAT, "mode": mode, "base": {"name": base.origin, "digest": base.digest}, "merge": dict(lineage), "config": dict(base.config)}
    record |= _files(base.assets, merged.assets)
    record |= {"residuals": digest, "residual_bytes": size, "base_bytes": total, "tensors": rows}
    (folder / RECORD).write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def _tensor_record(view: TensorView, name: str, merged: TensorView | None, file: BinaryIO | None) -> dict[str, Any]:
    """Digest and blocks of one base tensor; their payloads go to `file`, None for no residuals."""
    digest, blocks, step = hashlib.sha256(), [], block_rows(view)
    alike = merged if _begins_alike(merged, view.dtype, view.shape) else None
    for first in range(0, view.row_count, step):
        stop = min(first + step, view.row_count)
        words = _raw(view, first, stop)
        digest.update(words)
        if file is not None:
            form, payload = encode(words, _raw(alike, first, stop) if alike else None, STORED[view.dtype].itemsize)
            file.write(payload)
            blocks.append([form, len(payload)])
    return {"name": name, "dtype": view.dtype, "shape": list(view.shape), "sha256": digest.hexdigest(), "blocks": blocks}


def _begins_alike(merged: TensorView | None, dtype: str, shape: tuple[int, ...]) -> bool:
    """Has the merged tensor rows to start from, of this type and width? It may have more of them (added tokens)."""
    if merged is None or merged.dtype != dtype or len(merged.shape) != len(shape):
        return False
    return merged.shape == shape or (merged.shape[1:] == shape[1:] and merged.shape[0] > shape[0])


def _files(base: Mapping[str, bytes], merged: Mapping[str, bytes]) -> dict[str, Any]:
    """The base's small files where the merge put others in their place; nothing where it left them as they were."""
    if dict(base) == dict(merged):
        return {}
    kept = {name: content for name, content in base.items() if merged.get(name) != content}
    return {"files": {name: base64.b64encode(zlib.compress(kept[name])).decode() if name in kept else None for name in base}}


def _restored_files(record: Mapping[str, Any], merged: Mapping[str, bytes], place: str) -> Mapping[str, bytes]:
    if "files" not in record:
        return merged
    try:
        return {name: merged[name] if text is None else zlib.decompress(base64.b64decode(text)) for name, text in record["files"].items()}
    except (KeyError, ValueError, TypeError, AttributeError, zlib.error) as error:
        raise _damaged(place, f"{type(error).__name__}: {error}") from error


def _raw(view: TensorView, first: int, stop: int) -> bytes:
    if view.raw is None:
        raise AssertionError(f"{view.name} has no words")
    return view.raw(first, stop)


def _wrap(payload: Path, place: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Put a safetensors header before the payloads."""
    entries, begin = {}, 0
    for name, row in rows.items():
        size = sum(count for _, count in row["blocks"])
        if size:
            entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [begin, begin + size]}
            begin += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with place.open("wb") as file, payload.open("rb") as source:
        file.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, file, 1 << 20)
    payload.unlink()


# --- rolling back ----------------------------------------------------------------------------------------------------------------


def read_record(path: Path) -> dict[str, Any]:
    """rollback.json, checked. Raises CheckpointError."""
    record = read_json(path, "a rollback record")
    if {key: record.get(key) for key in FORMAT} != FORMAT or record.get("mode") not in MODES[1:]:
        found = f"format {record.get('format')!r}, version {record.get('version')!r}, mode {record.get('mode')!r}"
        raise CheckpointError(str(path), expected="a rollback record of version 1", found=found, remedy="name the rollback.json that trimtab merge wrote")
    try:
        for row in record["tensors"].values():
            _ = (str(row["name"]), STORED[row["dtype"]], [int(n) for n in row["shape"]], str(row["sha256"]))
            _ = [(str(form), int(size)) for form, size in row.get("blocks", ())]
        _ = (str(record["base"]["name"]), str(record["base"]["digest"]), dict(record["config"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    return record


def _damaged(place: Path | str, found: str) -> CheckpointError:
    return CheckpointError(str(place), expected="a whole rollback record", found=found, remedy="restore the record that was written with this merge")


def restored(merged: Checkpoint, path: Path, base: Checkpoint | None = None) -> Checkpoint:
    """The base as a lazy checkpoint, from the merged one and the record at `path`; in reference mode from `base`, where the record says it was.

    Raises CheckpointError: a record that is damaged, residuals that are missing or altered, a tensor that the merged checkpoint lacks.
    """
    record = read_record(path)
    residuals: Mapping[str, TensorView] = {}
    if record["mode"] == "residual":
        file = path.with_name(RESIDUALS)
        if sha256_file(file) != record["residuals"]:
            raise CheckpointError(
                str(file), expected=f"the residuals {path.name} was written with", found="another digest", remedy="restore both from one copy"
            )
        residuals = file_tensors(file)
    source = base if record["mode"] == "reference" and base is not None else merged
    tensors = {}
    for name, row in record["tensors"].items():
        view = source.tensors.get(name if source is base else row["name"])
        shape = tuple(row["shape"])
        if record["mode"] == "residual":
            rows = RestoredRows(name, row["dtype"], shape, view, residuals.get(name), row["blocks"], str(path))
            tensors[name] = TensorView(name, shape, row["dtype"], rows)
        elif view is None or (view.dtype, view.shape) != (row["dtype"], shape):
            raise CheckpointError(
                f"{source.origin}: {name}", expected=f"{row['dtype']} {list(shape)}", found=_told(view), remedy="name the base of this merge with --base"
            )
        else:
            tensors[name] = view
    assets = _restored_files(record, merged.assets, str(path))
    return Checkpoint(tensors, record["config"], assets, record["base"]["name"], lambda: str(record["base"]["digest"]))


def _told(view: TensorView | None) -> str:
    return "none" if view is None else f"{view.dtype} {list(view.shape)}"


@dataclass(frozen=True)
class RestoredRows:
    """Rows of a base tensor out of merged words and residuals. Called: float32 [n, ...]; `raw`: the words."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    merged: TensorView | None
    residual: TensorView | None
    forms: list[tuple[str, int]]
    place: str

    def __call__(self, start: int, stop: int) -> np.ndarray:
        words = np.frombuffer(self.raw(start, stop), STORED[self.dtype])
        return widen(words, self.dtype).reshape(stop - start, *self.shape[1:]).copy()

    def raw(self, start: int, stop: int) -> bytes:
        whole = TensorView(self.name, self.shape, self.dtype, self)
        step, width = block_rows(whole), whole.size // max(whole.row_count, 1) * STORED[self.dtype].itemsize
        pieces = []
        for number in range(start // step, -(-stop // step)):
            first = number * step
            block = self._block(number, first, min(first + step, whole.row_count), width)
            pieces.append(block[max(start - first, 0) * width : (stop - first) * width])
        return b"".join(pieces)

    def _block(self, number: int, first: int, stop: int, width: int) -> bytes:
        item = STORED[self.dtype].itemsize
        try:
            form, size = self.forms[number]
            begin = sum(count for _, count in self.forms[:number])
            payload = self.residual.raw(begin, begin + size) if size and self.residual and self.residual.raw else b""
            if len(payload) != size:
                raise ValueError("residuals are missing")
            fits = _begins_alike(self.merged, self.dtype, self.shape)
            if form != "words" and not fits:
                raise ValueError(f"the merged checkpoint has {_told(self.merged)} for {self.dtype} {list(self.shape)}")
            words = self.merged.raw(first, stop) if fits and form != "words" and self.merged and self.merged.raw else None
            return decode(form, payload, words, item, (stop - first) * width // item)
        except (ValueError, IndexError) as error:
            raise _damaged(f"{self.place}: {self.name}", str(error)) from error


def verify_restored(base: Checkpoint, path: Path, update: Update | None = None) -> None:
    """Every tensor of `restored` against the digests of the record. Raises CheckpointError for the first that differs: nothing is written then."""
    tensors = read_record(path)["tensors"]
    for number, (name, view) in enumerate(base.tensors.items(), 1):
        digest = hashlib.sha256()
        for words in _words(view):
            digest.update(words)
        if digest.hexdigest() != tensors[name]["sha256"]:
            remedy = "roll back the very checkpoint this record was written with, or name the very base"
            raise CheckpointError(f"{path}: {name}", expected=f"the base's words, sha256 {tensors[name]['sha256'][:12]}", found="others", remedy=remedy)
        if update:
            update(name, number, len(tensors))


def _words(view: TensorView) -> Iterator[bytes]:
    step = block_rows(view)
    for first in range(0, view.row_count, step):
        yield _raw(view, first, min(first + step, view.row_count))
