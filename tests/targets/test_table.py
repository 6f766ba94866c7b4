"""The kernel table read between and beyond its rows, against machines whose law is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest

from targets.errors import TargetError
from targets.kernels import CONTEXTS, HEADS, SHAPES, Case, Point
from targets.profile import KernelTime
from targets.table import KernelTable

NBITS = Case("MatMulNBits", 4, 64, 512, 512)


def roofline(k: int, n: int, m: int) -> float:
    """A machine of 2 us a node, 20 GB/s and 100 GOP/s."""
    return 2 + max(0.625 * k * n / 20e3, 2e-5 * m * k * n)


def rows(law: Callable[[int, int, int], float], case: Case = NBITS, shapes: Sequence[tuple[int, int]] = SHAPES) -> tuple[KernelTime, ...]:
    return tuple(KernelTime(case.op, case.bits, case.block, k, n, m, 2, law(k, n, m), case.symmetric) for (k, n), m in product(shapes, (1, 32, 512)))


def case_of(k: int, n: int, case: Case = NBITS) -> Case:
    return Case(case.op, case.bits, case.block, k, n, case.symmetric)


def test_a_row_is_given_back_exactly() -> None:
    table = KernelTable(rows(lambda k, n, m: (3 + 7e-5 * m * k * n) * (1.3 if n > 1000 else 0.9)))  # no sum of costs makes this
    for row in table.rows:
        assert table.us(case_of(row.k, row.n), Point(row.m)) == pytest.approx(row.us, rel=1e-3)


@pytest.mark.parametrize(("k", "n"), [(576, 960), (1536, 576), (576, 3072), (576, 49152), (4096, 11008)])
@pytest.mark.parametrize("m", [1, 32, 512])
def test_sizes_between_and_beyond_follow_the_law(k: int, n: int, m: int) -> None:
    assert KernelTable(rows(roofline)).us(case_of(k, n), Point(m)) == pytest.approx(roofline(k, n, m), rel=0.02)


@pytest.mark.parametrize("m", [128, 256, 2048])
def test_numbers_of_tokens_between_and_beyond(m: int) -> None:
    assert KernelTable(rows(roofline)).us(case_of(576, 1536), Point(m)) == pytest.approx(roofline(576, 1536, m), rel=0.05)


def test_a_padded_width_costs_what_is_computed() -> None:
    wide = Case("MatMulNBits", 4, 128, 512, 512)
    table = KernelTable(rows(roofline, wide))
    assert table.us(case_of(576, 512, wide), Point(512)) == table.us(case_of(640, 512, wide), Point(512))


def test_zero_points_take_their_share_from_one_size() -> None:
    plain = rows(roofline)
    asym = Case("MatMulNBits", 4, 64, 512, 512, symmetric=False)
    dearer = rows(lambda k, n, m: roofline(k, n, m) * (1.1 if m == 1 else 1.04), asym, SHAPES[:1])
    table = KernelTable(plain + dearer)
    assert table.us(case_of(576, 3072, asym), Point(1)) == pytest.approx(1.1 * table.us(case_of(576, 3072), Point(1)))
    assert table.us(case_of(576, 3072, asym), Point(512)) == pytest.approx(1.04 * table.us(case_of(576, 3072), Point(512)))


def test_a_block_that_was_not_measured_is_the_nearest_one() -> None:
    table = KernelTable(rows(roofline) + rows(lambda *size: 9 * roofline(*size), Case("MatMulNBits", 4, 128, 1, 1)))
    assert table.us(Case("MatMulNBits", 4, 256, 512, 512), Point(32)) == pytest.approx(9 * roofline(512, 512, 32))
    assert table.us(Case("MatMulNBits", 4, 16, 512, 512), Point(32)) == pytest.approx(roofline(512, 512, 32))
    with pytest.raises(TargetError, match="trimtab targets probe"):
        table.us(Case("MatMulNBits", 8, 64, 512, 512), Point(1))


@pytest.mark.parametrize("point", [Point(1, 144), Point(1, 1024), Point(64), Point(256, 256)])
def test_attention_between_its_contexts(point: Point) -> None:
    def law(k: int, n: int, at: Point) -> float:
        pairs = at.m * (at.context + (at.m + 1) / 2)
        return 6 + 4e-5 * pairs * k + 8 * (at.context + at.m) * n / 15e3

    table = KernelTable(
        tuple(KernelTime("GroupQueryAttention", 32, head, k, n, at.m, 2, law(k, n, at), True, at.context) for (k, n, head), at in product(HEADS, CONTEXTS))
    )
    assert table.us(Case("GroupQueryAttention", 32, 64, 576, 192), point) == pytest.approx(law(576, 192, point), rel=0.15)
