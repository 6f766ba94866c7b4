"""Weights by output channel, 7 bits in a byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.errors import RecipeError
from compiler.quantizers.rows import TOP, dequantize_rows, gather_rows, quantize_rows
from compiler.scheme import Schemes, parse_scheme, stored_bytes
from compiler.stages.quantize import resolve_method


def test_worked_example() -> None:
    codes, scales = quantize_rows(np.array([[3, -1, 0], [0, 0, 0]], np.float32))
    assert codes.tolist() == [[63, -21, 0], [0, 0, 0]]
    assert scales.tolist() == [np.float32(3 / 63), 0.0]


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 40))
def test_no_weight_moves_by_more_than_half_a_step(seed: int, rows: int, width: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    codes, scales = quantize_rows(weight)
    assert np.abs(codes).max() <= TOP  # two products of an unsigned and such a code fit 16 bits
    assert 2 * 255 * TOP < 2**15
    assert (np.abs(dequantize_rows(codes, scales) - weight) <= 0.5001 * scales[:, None]).all()


def test_blocks_gather_to_the_transpose() -> None:
    weight = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    codes, scales = gather_rows([weight[:3], weight[3:]], (7, 5))
    whole, same = quantize_rows(weight)
    assert np.array_equal(codes, whole.T)
    assert np.array_equal(scales, same)


def test_a_byte_a_weight_is_stored_and_the_head_keeps_groups() -> None:
    rows = Schemes(parse_scheme("int8-rows"))
    assert stored_bytes((6, 10), rows.of("model.layers.0.mlp.down_proj")) == 6 * 10 + 4 * 6
    assert str(rows.of("lm_head")) == "int8-g64"


def test_calibrated_methods_need_groups(tiny_llama: object) -> None:
    from compiler.checkpoints.resolve import open_checkpoint

    checkpoint = open_checkpoint(str(tiny_llama))
    with pytest.raises(RecipeError, match="rtn for int8-rows"):
        resolve_method(checkpoint, Schemes(parse_scheme("int8-rows")), {"*": "search"}, None)
