"""The twin against its worked cases and its bounds; the fast path against the twin, bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.quantizers import affine, nbits
from compiler.quantizers.pack import nibbles, pack
from compiler.scheme import Scheme, parse_scheme

SCHEMES = [
    *("int4-g32", "int4-g32-asym", "int4-g64", "int4-g128-asym", "int8-g32", "int8-g64-asym", "int8-g128"),
    *("int2-g32-asym", "int3-g32", "int5-g32-s16", "int6-g64-asym-s16", "int7-g32"),
]


def test_worked_case_of_the_docstring():
    quantized = affine.quantize(np.array([[-8, 4, 2, 0] + [0] * 12], np.float32), Scheme(4, 16, True, "nbits"))
    assert quantized.scales.tolist() == [[1.0]]
    assert quantized.codes[0, :4].tolist() == [0, 12, 10, 8]


def test_asymmetric_range_always_holds_zero():
    quantized = affine.quantize(np.linspace(3, 6, 16, dtype=np.float32)[None], Scheme(4, 16, False, "nbits"))
    assert quantized.zero_points is not None and quantized.zero_points[0, 0] == 0
    assert quantized.scales[0, 0] == np.float32(6) / np.float32(15)


def test_nibbles_low_half_first_and_odd_tail():
    assert nibbles(np.array([[1, 2, 3]], np.uint8)).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize("text", SCHEMES)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 9), width=st.integers(1, 300), exponent=st.integers(-30, 30))
@settings(max_examples=25, deadline=None)
def test_fast_path_equals_twin_bit_for_bit(text, seed, rows, width, exponent):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, width)) * 2.0**exponent).astype(np.float32)
    weight[rng.random(weight.shape) < 0.1] = 0
    weight[0, : min(width, 128)] = rng.choice([0, np.float32(2.0**exponent), 1e-42])  # constant and denormal groups
    expected, got = pack(affine.quantize(weight, parse_scheme(text))), nbits.quantize(weight, parse_scheme(text))
    assert np.array_equal(expected.codes, got.codes)
    assert expected.scales.tobytes() == got.scales.tobytes()
    assert (expected.zero_points is None) == (got.zero_points is None)
    if expected.zero_points is not None:
        assert np.array_equal(expected.zero_points, got.zero_points)


def test_ties_round_alike_in_both():
    halves = (np.arange(-16, 16, dtype=np.float32) / 2)[None].repeat(2, 0)
    for text in SCHEMES:
        expected, got = pack(affine.quantize(halves, parse_scheme(text))), nbits.quantize(halves, parse_scheme(text))
        assert np.array_equal(expected.codes, got.codes), text


@pytest.mark.parametrize("text", SCHEMES)
def test_error_is_at_most_half_a_step_inside_the_range(text):
    scheme = parse_scheme(text)
    weight = np.random.default_rng(1).standard_normal((64, 500)).astype(np.float32)
    quantized = affine.quantize(weight, scheme)
    step = np.abs(quantized.scales).repeat(scheme.group_size, axis=1)[:, :500]
    # A symmetric grid has no code at +8 steps, so the element opposite to the extreme may lose a full step; a scale rounded to float16 moves the ends a little.
    assert np.all(np.abs(affine.dequantize(quantized) - weight) <= step * ((1.0 if scheme.symmetric else 0.51) + (0.02 if scheme.half_scales else 0.0)))


def test_more_bits_never_hurt():
    weight = np.random.default_rng(2).standard_normal((32, 256)).astype(np.float32)
    error = {text: float(np.square(affine.dequantize(affine.quantize(weight, parse_scheme(text))) - weight).sum()) for text in SCHEMES}
    assert error["int8-g32"] < error["int4-g32"] and error["int4-g32"] < error["int4-g64"]


def test_codes_survive_a_round_trip():
    scheme = parse_scheme("int4-g32-asym")
    first = affine.quantize(np.random.default_rng(3).standard_normal((16, 96)).astype(np.float32), scheme)
    again = affine.quantize(affine.dequantize(first), scheme)
    assert np.allclose(affine.dequantize(again), affine.dequantize(first), atol=1e-6)


def test_threads_do_not_change_bytes():
    weight = np.random.default_rng(4).standard_normal((2000, 512)).astype(np.float32)
    one, two = (nbits.quantize(weight, parse_scheme("int4-g64-asym"), threads) for threads in (1, 3))
    assert one.codes.tobytes() == two.codes.tobytes() and one.scales.tobytes() == two.scales.tobytes()


def test_needs_groups_and_two_dimensions():
    with pytest.raises(ValueError, match="2-D weight and a group size"):
        nbits.quantize(np.zeros(4, np.float32), parse_scheme("int4-g32"))
