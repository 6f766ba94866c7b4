"""`TensorView` and `Checkpoint`: a model as a lazy mapping of names to tensors.

Nothing is read until a row block is asked for, and a block is always float32 whatever is stored: bf16 and fp16 widen
exactly, GGUF blocks are decoded. Merging is a view over a view (`replace`), so the base is never changed and peak
memory is a block, not a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler.errors import CheckpointError

if TYPE_CHECKING:
    from compiler.checkpoints.coded import Coded

ROW_BLOCK_BYTES = 16 << 20  # float32 bytes in one block of `TensorView.blocks`


@dataclass(frozen=True)
class TensorView:
    """One tensor of a checkpoint, read by row block.

    shape [4, 3], `rows(1, 3)` -> float32 [2, 3]. A scalar (shape ()) reads as one row and `read` gives shape ().
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  # as stored: F32, F16, BF16, Q4_1, ...
    rows: Callable[[int, int], np.ndarray]  # (start, stop) -> float32 [stop - start, *shape[1:]], an array of the caller's own

    @property
    def raw(self) -> Callable[[int, int], bytes] | None:
        """The same rows as stored, little endian, None where they are computed. It belongs to `rows`, so a view with other rows cannot keep it."""
        return getattr(self.rows, "raw", None)

    @property
    def coded(self) -> Coded | None:
        """The codes of a matrix that is stored quantized, None where there are none that a kernel takes. They belong to `rows`, as `raw` does."""
        return getattr(self.rows, "coded", None)

    @property
    def row_count(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    def read(self) -> np.ndarray:
        """The whole tensor, float32 [*shape]: a large one block by block, so that what widening and merging take is a block's."""
        if 4 * self.size <= ROW_BLOCK_BYTES:
            return self.rows(0, self.row_count).reshape(self.shape)
        whole = np.empty(self.shape, np.float32)
        for start, block in self.blocks(ROW_BLOCK_BYTES):
            whole[start : start + len(block)] = block
        return whole

    def blocks(self, limit_bytes: int = ROW_BLOCK_BYTES) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 block) from top to bottom, each at most `limit_bytes` or one row."""
        row_bytes = 4 * self.size // max(self.row_count, 1)
        step = max(1, limit_bytes // max(row_bytes, 1))
        for start in range(0, self.row_count, step):
            yield start, self.rows(start, min(start + step, self.row_count))


@dataclass(frozen=True)
class FiniteRows:
    """The same rows, refused where one is NaN or infinite."""

    view: TensorView
    origin: str

    @property
    def coded(self) -> Coded | None:
        return self.view.coded

    def __call__(self, start: int, stop: int) -> np.ndarray:
        block = self.view.rows(start, stop)
        with np.errstate(over="ignore", invalid="ignore"):
            total = block.sum()
        if not np.isfinite(total) and (bad := int((~np.isfinite(block)).sum())):  # a finite sum has no NaN or infinity in it
            found = f"NaN or infinity: {bad} among rows {start} to {stop - 1}"
            remedy = "find out what broke the model: no metric of it would mean anything"
            raise CheckpointError(f"{self.origin}: {self.view.name}", expected="finite weights", found=found, remedy=remedy, code="WEIGHT_NONFINITE")
        return block


@dataclass(frozen=True)
class Checkpoint:
    """A model: lazy tensors, its config, and the small files that travel with it.

    tensors  Hugging Face parameter names (`model.layers.0.self_attn.q_proj.weight`), [out, in] for linear weights
    config   config.json as a dict
    assets   file name -> content: tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json, ...
    origin   what the user named, for messages and lineage
    digest   sha256 over the contents of the files, not their paths (a merged view: over base digest and delta digests)
    """

    tensors: Mapping[str, TensorView]
    config: Mapping[str, Any]
    assets: Mapping[str, bytes]
    origin: str
    digest_of: Callable[[], str] = field(repr=False, compare=False)

    @cached_property
    def digest(self) -> str:
        return self.digest_of()

    def finite(self) -> Checkpoint:
        """The same model, whose rows raise CheckpointError where one is NaN or infinite."""
        return replace(self, tensors={name: replace(view, rows=FiniteRows(view, self.origin)) for name, view in self.tensors.items()})

    @cached_property
    def parameter_count(self) -> int:
        return sum(view.size for view in self.tensors.values())
