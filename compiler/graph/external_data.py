"""A file of external tensors, written from front to back while the weights stream through.

Big tensors (from 256 KiB) start on a page (4096) so that they can be mapped, small ones on a cache line (64): with pages for all, the padding of a model
of a hundred million weights would be a percent of its file. Padding is zeros. The same
bytes may be named by several initializers (`view`): that is how a tied embedding and head are stored once.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

from compiler.errors import OutputError

PAGE, LINE = 4096, 64
BIG = 1 << 18  # bytes

DTYPES = {
    np.dtype(np.float32): ir.DataType.FLOAT,
    np.dtype(np.float16): ir.DataType.FLOAT16,
    np.dtype(np.uint8): ir.DataType.UINT8,
    np.dtype(np.int8): ir.DataType.INT8,
    np.dtype(np.int64): ir.DataType.INT64,
}


class DataFile:
    """`with DataFile(directory / "model.onnx.data") as data: data.add("w", array)`. Raises OutputError when the disk is full or the path not writable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise output_error(path, error) from error

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError as failure:
            if error is None:
                raise output_error(self.path, failure) from failure

    def write(self, content: memoryview | bytes) -> None:
        try:
            self._file.write(content)
        except OSError as error:
            raise output_error(self.path, error) from error
        self.size += len(content)

    def align(self, nbytes: int) -> int:
        """Pad with zeros to where a tensor of `nbytes` may start, and say where."""
        step = PAGE if nbytes >= BIG else LINE
        self.write(bytes(-self.size % step))
        return self.size

    def add(self, name: str, array: np.ndarray) -> ir.ExternalTensor:
        """One whole tensor."""
        return self.add_blocks(name, array.shape, array.dtype, [array])

    def add_blocks(self, name: str, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[np.ndarray]) -> ir.ExternalTensor:
        """One tensor [*shape] that arrives as row blocks, top to bottom. Raises ValueError when they do not fill it exactly."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        offset = self.align(nbytes)
        for block in blocks:
            self.write(np.ascontiguousarray(block, dtype).reshape(-1).view(np.uint8).data)
        if self.size - offset != nbytes:
            raise ValueError(f"{name}: blocks hold {self.size - offset} bytes, {shape} {dtype} needs {nbytes}")
        return self._tensor(name, offset, nbytes, DTYPES[dtype], shape)

    def view(self, name: str, tensor: ir.ExternalTensor, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """The bytes of `tensor`, of whichever file, under another name and shape."""
        return ir.ExternalTensor(tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=ir.Shape(shape), name=name, base_dir=tensor.base_dir)

    def _tensor(self, name: str, offset: int, nbytes: int, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.ExternalTensor:
        return ir.ExternalTensor(self.path.name, offset, nbytes, dtype, shape=ir.Shape(shape), name=name, base_dir=self.path.parent)


def output_error(path: Path, error: OSError) -> OutputError:
    """An OSError as one line for the user."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return OutputError(
        str(path),
        expected="room to write the weights" if full else "a file that can be written",
        found=error.strerror or type(error).__name__,
        remedy="free space on this disk or choose another --out" if full else "check the directory and its permissions",
    )
