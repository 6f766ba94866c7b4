"""GGUF checkpoints as lazy tensors under Hugging Face names.

Two things that llama.cpp's converter did are undone while rows are read:

1. llama's rotary order. Within a head of size d, row `t * d/2 + j` (half t, pair j) was stored at `2 * j + t`. Rows are read by
   whole heads and put back.
2. gemma's norms, stored as weight + 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from compiler.checkpoints import ggml
from compiler.checkpoints.coded import Coded
from compiler.checkpoints.files import Stamp, read_at, sha256_file, stamp
from compiler.checkpoints.gguf_config import AUXILIARY, Family, Source, build_config, family_of, generation_config, hugging_face_name
from compiler.checkpoints.gguf_header import Entry, Header, read_header
from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.errors import CheckpointError
from compiler.quantizers.affine import Quantized

Rows = Callable[[int, int], np.ndarray]


def open_gguf(path: Path, origin: str) -> Checkpoint:
    """The GGUF file as a checkpoint; nothing but its header is read. Raises CheckpointError."""
    header = read_header(path)
    family = family_of(origin, header.metadata)
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(origin, expected="token_embd.weight", found="no such tensor", remedy="this is no whole language model: name the model's file")
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    source = Source(origin, str(header.metadata["general.architecture"]), header.metadata, shapes, lambda name: _whole(path, header.tensors[name]))
    config = build_config(source, family)
    tensors = {}
    for name, entry in header.tensors.items():
        if name not in AUXILIARY:
            view = _view(path, origin, entry, family, config)
            tensors[view.name] = view
    return Checkpoint(tensors, config, GgufAssets(header, config, origin), origin, lambda: sha256_file(path))


def _view(path: Path, origin: str, entry: Entry, family: Family, config: Mapping[str, Any]) -> TensorView:
    name = hugging_face_name(entry.name, family)
    if name is None:
        raise CheckpointError(
            f"{origin}: {entry.name}",
            expected=f"a tensor of {family.model_type}",
            found="an unknown name",
            remedy="use the model's safetensors instead of its GGUF",
        )
    if not ggml.decodable(entry.dtype):
        raise CheckpointError(
            f"{origin}: {entry.name}",
            expected="a type that can be decoded",
            found=entry.dtype,
            remedy="use another quantization of the model, or its safetensors",
        )
    rows: Rows = StoredRows(path, entry, stamp(path))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(name.split(".")[-2])
    if family.permuted and heads:
        if entry.shape[0] % (2 * heads):
            raise CheckpointError(f"{origin}: {entry.name}", expected=f"rows for {heads} heads", found=f"{entry.shape[0]}", remedy="convert the model again")
        rows = _unpermuted(rows, entry.shape[0] // heads)
    if family.norm_shift and name.endswith("norm.weight"):
        rows = _shifted(rows, -family.norm_shift)
    return TensorView(name, entry.shape, entry.dtype, rows)


@dataclass(frozen=True)
class StoredRows:
    """Rows of one tensor: called, float32 [n, columns], a vector as rows of one value; `coded`, its codes where a kernel can take them."""

    path: Path
    entry: Entry
    seen: Stamp | None = None  # the file as it was when its header was read

    @property
    def columns(self) -> int:
        return self.entry.shape[-1] if len(self.entry.shape) > 1 else 1  # vectors are never quantized: GGUF packs along the last dimension

    def __call__(self, start: int, stop: int) -> np.ndarray:
        return ggml.decode(self._data(start, stop), self.entry.dtype, self.columns).reshape(stop - start, *self.entry.shape[1:])

    @property
    def coded(self) -> Coded | None:
        if len(self.entry.shape) != 2 or self.entry.dtype not in ggml.LATTICES:
            return None
        return Coded(ggml.LATTICES[self.entry.dtype].scheme, lambda start, stop: ggml.codes(self._data(start, stop), self.entry.dtype, self.columns))

    def _data(self, start: int, stop: int) -> np.ndarray:
        row_bytes = ggml.row_size(self.entry.dtype, self.columns) * int(np.prod(self.entry.shape[1:-1], dtype=np.int64))
        return read_at(self.path, self.entry.begin + start * row_bytes, (stop - start) * row_bytes, self.seen)


def _whole(path: Path, entry: Entry) -> np.ndarray:
    return StoredRows(path, entry)(0, entry.shape[0])


@dataclass(frozen=True)
class HeadsInOrder:
    """Rule 1 above: heads that cover the wanted rows are read whole, at most two heads more than asked for."""

    stored: Rows
    head_dim: int

    def __call__(self, start: int, stop: int) -> np.ndarray:
        first, last = self._heads(start, stop)
        return self._ordered(self.stored(first, last), start - first, stop - first)

    @property
    def coded(self) -> Coded | None:
        stored: Coded | None = getattr(self.stored, "coded", None)
        if stored is None:
            return None

        def rows(start: int, stop: int) -> Quantized:
            first, last = self._heads(start, stop)
            found = stored.rows(first, last)
            places = (start - first, stop - first)
            zeros = None if found.zero_points is None else self._ordered(found.zero_points, *places)
            return replace(found, codes=self._ordered(found.codes, *places), scales=self._ordered(found.scales, *places), zero_points=zeros)

        return Coded(stored.scheme, rows)

    def _heads(self, start: int, stop: int) -> tuple[int, int]:
        return start // self.head_dim * self.head_dim, -(-stop // self.head_dim) * self.head_dim

    def _ordered(self, block: np.ndarray, start: int, stop: int) -> np.ndarray:
        pairs = block.reshape(-1, self.head_dim // 2, 2, *block.shape[1:])
        return np.swapaxes(pairs, 1, 2).reshape(block.shape)[start:stop]


def _unpermuted(stored: Rows, head_dim: int) -> Rows:
    return HeadsInOrder(stored, head_dim)


def _shifted(stored: Rows, shift: float) -> Rows:
    return lambda start, stop: stored(start, stop) + np.float32(shift)


@dataclass(frozen=True)
class GgufAssets(Mapping[str, bytes]):
    """Tokenizer, chat template and generation config, each written when asked for."""

    header: Header = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    origin: str

    @cached_property
    def _builders(self) -> dict[str, Callable[[], bytes]]:
        from compiler.checkpoints import gguf_tokenizer

        metadata = self.header.metadata
        builders: dict[str, Callable[[], bytes]] = {"generation_config.json": lambda: _json(generation_config(metadata))}
        if "tokenizer.ggml.tokens" in metadata:
            builders["tokenizer.json"] = lambda: gguf_tokenizer.tokenizer_json(metadata, self.origin)
            builders["tokenizer_config.json"] = lambda: _json(gguf_tokenizer.tokenizer_config(metadata, self.config))
        if "tokenizer.chat_template" in metadata:
            builders["chat_template.jinja"] = lambda: str(metadata["tokenizer.chat_template"]).encode()
        return builders

    @cached_property
    def _built(self) -> dict[str, bytes]:
        return {}

    def __getitem__(self, name: str) -> bytes:
        if name not in self._built:
            self._built[name] = self._builders[name]()
        return self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._builders)

    def __len__(self) -> int:
        return len(self._builders)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
