"""Every quantizer: losses that only fall, the textbook twin of GPTQ, and what reaches the kernel."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.quantizers import affine, gptq, search
from compiler.quantizers.methods import METHODS
from compiler.quantizers.moments import output_error
from compiler.quantizers.pack import pack, plane, plane_table, planes, unpack
from compiler.scheme import parse_scheme

SCHEMES = ["int4-g32", "int4-g64-asym-s16", "int3-g32-asym", "int5-g32-s16", "int8-g64-asym"]


def problem(seed=0, rows=24, width=160, tokens=400):
    """A weight [rows, width] and the moment of correlated inputs, a few of them loud."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((width, width)) / np.sqrt(width) + np.eye(width)
    inputs = (rng.standard_normal((tokens, width)) @ mixing * np.exp(rng.standard_normal(width))).astype(np.float32)
    return (rng.standard_normal((rows, width)) * 0.1).astype(np.float32), inputs.T @ inputs / tokens


def error_of(method, weight, moment, text):
    scheme = parse_scheme(text)
    packed = METHODS[method].quantize(weight, scheme, moment)
    return output_error(weight - affine.dequantize(unpack(packed, scheme, weight.shape[1])), moment)


def textbook_gptq(weight, start, moment, order):
    """One column at a time with the inverse of what is left, as optimal brain surgeon has it; float64, no blocks, no factor."""
    size, top = start.scheme.group_size, 2**start.scheme.bits - 1
    zeros = np.full(start.scales.shape, 2 ** (start.scheme.bits - 1)) if start.zero_points is None else start.zero_points
    left, codes, inverse = weight.astype(np.float64), np.zeros(weight.shape, np.uint8), np.linalg.inv(moment)
    for column in order:
        scale, zero = start.scales[:, column // size].astype(np.float64), zeros[:, column // size]
        codes[:, column] = np.rint(left[:, column] / np.where(scale == 0, np.inf, scale) + zero).clip(0, top)
        error = (left[:, column] - (codes[:, column] - zero.astype(np.float64)) * scale) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # eliminated: its row and column are zero elsewhere
    return codes


@pytest.mark.parametrize("text", SCHEMES)
def test_gptq_is_the_textbook_s(text):
    weight, moment = problem()
    scheme = parse_scheme(text)
    width = -(-weight.shape[1] // scheme.group_size) * scheme.group_size
    damped = gptq.damped_moment(moment, width)
    order = np.argsort(-damped.diagonal(), kind="stable")
    start = search.quantize(weight, scheme, damped.diagonal()[: weight.shape[1]].astype(np.float32))
    padded = search.grouped(weight, scheme).reshape(len(weight), -1)
    fast = gptq._carry(padded, start, order, gptq.inverse_factor(damped[np.ix_(order, order)]))
    slow = textbook_gptq(padded, start, damped, order)
    assert (fast.codes != slow).mean() < 0.01  # float32 against float64: a tie may fall to the other side, and carry on


@pytest.mark.parametrize("text", SCHEMES)
def test_each_method_loses_less_than_the_one_before(text):
    weight, moment = problem(1)
    errors = [error_of(method, weight, moment, text) for method in ("rtn", "imatrix", "gptq")]
    assert errors[0] > errors[1] > errors[2]


@given(seed=st.integers(0, 10_000), text=st.sampled_from(SCHEMES), width=st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_search_is_never_worse_than_rounding(seed, text, width):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((5, width)) ** 3).astype(np.float32)
    scheme = parse_scheme(text)
    plain, found = (np.square(affine.dequantize(one.quantize(weight, scheme)) - weight).sum() for one in (affine, search))
    assert found <= plain * (1 + 1e-6)


def test_search_finds_the_lattice_that_rounding_misses():
    """[0, 1, 2, ..., 15] is on the grid of scale 1; an outlier of importance 0 must not coarsen it."""
    weight = np.concatenate([np.arange(16), [100.0], np.zeros(15)]).astype(np.float32)[None]
    importance = np.ones(32, np.float32)
    importance[16] = 0
    scheme = parse_scheme("int4-g32-asym")
    plain, found = (affine.dequantize(one) for one in (affine.quantize(weight, scheme), search.quantize(weight, scheme, importance)))
    loss = [np.square((restored - weight) * importance).sum() for restored in (plain, found)]
    assert loss[1] < loss[0] / 1.5


@pytest.mark.parametrize("method", list(METHODS))
def test_more_bits_never_hurt(method):
    weight, moment = problem(2)
    errors = [error_of(method, weight, moment, f"int{bits}-g32-asym") for bits in range(2, 9)]
    assert all(fine < coarse for coarse, fine in pairwise(errors))


@pytest.mark.parametrize("method", list(METHODS))
def test_rows_do_not_know_each_other(method):
    weight, moment = problem(3)
    order = np.random.default_rng(0).permutation(len(weight))
    scheme = parse_scheme("int4-g32-asym")
    whole, shuffled = (METHODS[method].quantize(rows, scheme, moment) for rows in (weight, weight[order]))
    assert np.array_equal(whole.codes[order], shuffled.codes) and np.allclose(whole.scales[order], shuffled.scales, rtol=1e-5)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("text", ["int4-g32-asym", "int3-g32"])
def test_groups_may_stand_in_any_order(method, text):
    """Columns moved by whole groups, and H with them: the same codes and scales, moved likewise."""
    weight, moment = problem(7)
    order = np.random.default_rng(1).permutation(5)
    columns = (order[:, None] * 32 + np.arange(32)).ravel()
    scheme = parse_scheme(text)
    plain = unpack(METHODS[method].quantize(weight, scheme, moment), scheme, 160)
    moved = unpack(METHODS[method].quantize(weight[:, columns], scheme, moment[np.ix_(columns, columns)]), scheme, 160)
    # float32 sums in another order: a tie may fall to the other side, and GPTQ carries it on
    assert (plain.codes[:, columns] != moved.codes).mean() < 0.01
    same = (plain.codes[:, columns] == moved.codes).all(axis=1)
    assert same.sum() >= len(weight) // 2 and np.allclose(plain.scales[same][:, order], moved.scales[same], rtol=1e-3)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("text", SCHEMES)
def test_what_is_on_the_lattice_stays_there(method, text):
    """A round trip: weights that codes stand for are met again, by every method."""
    weight, moment = problem(8)
    scheme = parse_scheme(text)
    once = affine.dequantize(affine.quantize(weight, scheme))
    again = affine.dequantize(unpack(METHODS[method].quantize(once, scheme, moment), scheme, 160))
    assert np.allclose(again, once, atol=2e-3 * np.abs(once).max() if scheme.half_scales else 1e-5 * np.abs(once).max())


def test_worked_case_of_the_search():
    weight = np.array([[7, -7, 3, -1] + [0] * 12], np.float32)
    scheme = parse_scheme("int4-g16")
    assert affine.dequantize(affine.quantize(weight, scheme))[0, :4].tolist() == [7, -6.125, 2.625, -0.875]
    found = search.quantize(weight, scheme)
    assert found.scales.tolist() == [[-1.0]] and np.array_equal(affine.dequantize(found), weight)


def test_worked_case_of_carrying():
    moment = np.eye(16)
    moment[0, 1] = moment[1, 0] = 0.9
    weight = np.array([[0.4, 0.4] + [0] * 14], np.float32)
    start = affine.Quantized(np.full((1, 16), 8, np.uint8), np.ones((1, 1), np.float32), None, parse_scheme("int4-g16"), 16)
    carried = affine.dequantize(gptq._carry(weight, start, np.arange(16), gptq.inverse_factor(moment)))
    assert carried[0].tolist() == [0, 1] + [0] * 14
    losses = [output_error(weight - made, moment) for made in (np.zeros_like(weight), carried)]
    assert np.allclose(losses, [0.608, 0.088], atol=1e-6)


def test_inputs_that_never_fire_do_no_harm():
    weight, moment = problem(4)
    moment[:, 5] = moment[5] = 0
    scheme = parse_scheme("int4-g64-asym")
    restored = affine.dequantize(gptq.quantize(weight, scheme, moment))
    assert np.isfinite(restored).all() and np.abs(restored[:, 5] - weight[:, 5]).max() < 0.1
    assert np.isfinite(affine.dequantize(gptq.quantize(weight, scheme, np.zeros_like(moment)))).all()


def test_refit_solves_for_the_scales():
    """Codes of a lattice and scales spoilt by 10 %: the joint solution finds the scales again."""
    _, moment = problem(5, width=128)
    scheme = parse_scheme("int4-g32")
    rng = np.random.default_rng(5)
    true = affine.Quantized(rng.integers(0, 16, (6, 128)).astype(np.uint8), rng.uniform(0.05, 0.2, (6, 4)).astype(np.float32), None, scheme, 128)
    spoilt = affine.Quantized(true.codes, true.scales * np.float32(1.1), None, scheme, 128)
    solved = gptq.refit(affine.dequantize(true), spoilt, gptq.damped_moment(moment, 128).astype(np.float32))
    assert np.allclose(solved.scales, true.scales, rtol=1e-3)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rest", ["-g32", "-g64-asym-s16"])
def test_packing_is_undone(bits, rest):
    scheme = parse_scheme(f"int{bits}{rest}")
    quantized = affine.quantize(np.random.default_rng(bits).standard_normal((7, 150)).astype(np.float32), scheme)
    packed = pack(quantized)
    again = unpack(packed, scheme, 150)
    assert np.array_equal(again.codes, quantized.codes) and np.array_equal(again.scales, quantized.scales)
    assert np.array_equal(affine.dequantize(again), affine.dequantize(quantized))
    joined = np.zeros((7, packed.codes.reshape(7, -1).shape[1]), np.uint8)
    for width, low in planes(bits):
        stored = plane(packed.codes, scheme, width, low)
        assert stored.nbytes * 8 == quantized.codes.size * width
        joined += plane_table(scheme, width, low)[stored].reshape(7, -1)
    assert np.array_equal(joined, packed.codes.reshape(7, -1))


def test_planes_of_seven_bits():
    assert planes(7) == [(4, 3), (2, 1), (1, 0)] and planes(5) == [(4, 1), (1, 0)] and planes(3) == [(2, 1), (1, 0)]
    assert plane_table(parse_scheme("int8-g32"), 1, 3)[0b101].tolist() == [8, 0, 8, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("kind", "text", "method"), [("Q4_0", "int4-g32-s16", "rtn"), ("Q8_0", "int8-g32-s16", "search")])
def test_blocks_of_a_gguf_are_kept_bit_for_bit(kind, text, method):
    """What llama.cpp rounded lies on a lattice that the kernel has too: rounding it again changes nothing."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    weight = np.random.default_rng(6).standard_normal((8, 256)).astype(np.float32)
    stored = dequantize(quantize(weight, GGMLQuantizationType[kind]), GGMLQuantizationType[kind])
    scheme = parse_scheme(text)
    again = affine.dequantize(unpack(METHODS[method].quantize(stored, scheme, None), scheme, 256))
    assert np.array_equal(again, stored)
