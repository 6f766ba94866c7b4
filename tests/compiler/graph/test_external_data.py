"""The data file: offsets, shared bytes, and a full disk in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compiler.errors import OutputError
from compiler.graph.external_data import DataFile


def test_round_trip_and_alignment(tmp_path: Path) -> None:
    big, small = np.arange(70_000, dtype=np.float32).reshape(700, 100), np.arange(5, dtype=np.float32)
    with DataFile(tmp_path / "w.data") as data:
        first = data.add("small", small)
        second = data.add_blocks("big", big.shape, big.dtype, [big[:7], big[7:]])
        third = data.view("flat", second, (70_000,))
    assert (first.offset, second.offset % 4096, third.offset) == (0, 0, second.offset)
    assert np.array_equal(first.numpy(), small)
    assert np.array_equal(second.numpy(), big)
    assert np.array_equal(third.numpy(), big.ravel())
    assert (tmp_path / "w.data").stat().st_size == data.size == 4096 + big.nbytes


def test_blocks_must_fill_the_shape(tmp_path: Path) -> None:
    with DataFile(tmp_path / "w.data") as data, pytest.raises(ValueError, match="40 bytes"):
        data.add_blocks("w", (4, 5), np.dtype(np.float32), [np.zeros((2, 5), np.float32)])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_is_one_line() -> None:
    with pytest.raises(OutputError, match="free space on this disk"), DataFile(Path("/dev/full")) as data:
        data.add("w", np.zeros((1 << 20,), np.float32))


def test_unwritable_place_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="check the directory"):
        DataFile(tmp_path / "missing" / "w.data")
