"""Reading a kernel table between and beyond its rows: what one operator takes at any size.

1. Rows of one kernel (operator, bits, block, symmetry) and one number of tokens make a surface over (k, n), for attention over (k, n, context).
2. A surface is a sum of costs that cannot be negative: a fixed one, and those that grow with the sizes as the work does (`_features`). They are fitted by
   least squares of the relative error. Beyond the measured sizes this sum alone speaks: a head of 49152 columns costs what its bytes cost.
3. At and between the rows, the fit is multiplied by what the rows measured over what it says there, weighted by inverse squared distance in the logarithms of
   the sizes. So a row's own size gives the row's own figure, and no estimate leaves the range of the rows around it.
4. Between two numbers of tokens time is interpolated in logarithms (a power law from row to row). Beyond the last it grows with the work.
5. A width that is no multiple of the block counts as padded, as the kernel computes it.
6. A kernel with rows at few sizes (one with zero points) takes its shape from the same kernel without them, times the mean ratio at the sizes both have.
   A block that was not measured takes the nearest measured one of the same bits.
7. Operators in a layer: what chains of whole layers (`targets.layers`) took over the sum of their operators by rules 1 to 6, weighted by inverse squared
   distance in the logarithms of width, intermediate size, context, tokens (FEWER_TOKENS times) and streamed bytes. Chains of the same bits and the nearest
   block count, or all where the bits have none.

Worked: us(512, 512) = 8 and us(512, 4096) = 50 give, at 1 token, 2 us + 1.5e-5 us per weight + ...; between the two it follows the sum, at both it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from targets.errors import TargetError
from targets.kernels import ATTENTION, MATRICES, Case, Point
from targets.layers import LAYERS, layer_bytes, parts
from targets.profile import KernelTime

Floats = NDArray[np.float64]
FEWER_TOKENS = 3.0  # one token and many are different work: they hardly tell of each other
Key = tuple[str, int, int, bool]  # operator, bits, block, symmetric


@dataclass(frozen=True)
class Surface:
    """Rule 1-3: the time of one kernel at one number of tokens, over its sizes."""

    rows: tuple[KernelTime, ...]

    @cached_property
    def costs(self) -> Floats:
        """Non-negative coefficients of `_features`, by trying every subset of them: at most four, so at most fifteen small systems."""
        features = np.array([_features(row.op, row.k, row.n, Point(row.m, row.context)) for row in self.rows])
        scaled = features / np.array([[row.us] for row in self.rows])
        best, least = np.zeros(features.shape[1]), math.inf
        for size in range(1, min(features.shape) + 1):
            for chosen in combinations(range(features.shape[1]), size):
                found, *_ = np.linalg.lstsq(scaled[:, chosen], np.ones(len(scaled)), rcond=None)
                error = float(np.square(scaled[:, chosen] @ found - 1).sum())
                if (found >= 0).all() and error < least - 1e-6:
                    least, best = error, np.zeros(features.shape[1])
                    best[list(chosen)] = found
        return best

    def us(self, k: int, n: int, point: Point) -> float:
        estimate = float(_features(self.rows[0].op, k, n, point) @ self.costs)
        here = _place(k, n, point.context)
        weights = [1.0 / (float(np.square(_place(row.k, row.n, row.context) - here).sum()) + 1e-9) for row in self.rows]
        ratios = [math.log(row.us / float(_features(row.op, row.k, row.n, Point(row.m, row.context)) @ self.costs)) for row in self.rows]
        return estimate * math.exp(float(np.average(ratios, weights=weights)))


def _features(op: str, k: int, n: int, point: Point) -> Floats:
    """What the time of an operator grows with, for a fixed number of tokens; the work first, so that a single row is read as proportional to it."""
    seen = point.context + point.m
    if op in ATTENTION:
        pairs = point.m * (point.context + (point.m + 1) / 2) if op == "GroupQueryAttention" else point.m * point.m
        return np.array([pairs * k, 1.0, float(seen * n), float(point.m * (k + 2 * n))])
    if op in MATRICES:
        return np.array([float(k) * n, 1.0, float(n), float(k)])
    return np.array([float(k), 1.0])


def _case(row: KernelTime) -> Case:
    return Case(row.op, row.bits, row.block, row.k, row.n, row.symmetric)


def _spot(k: int, n: int, point: Point, streamed_bytes: int) -> Floats:
    """Where a chain lies. Many tokens do arithmetic: the bytes do not tell there."""
    streamed = math.log2(streamed_bytes) if point.m == 1 else 0.0
    return np.array([math.log2(k), math.log2(n), math.log2(point.context + 16.0), FEWER_TOKENS * math.log2(point.m), streamed])


def _place(k: int, n: int, context: int) -> Floats:
    return np.log2(np.array([k, n, context + 16.0]))


@dataclass(frozen=True)
class KernelTable:
    """The rows of a profile, ready to be asked."""

    rows: tuple[KernelTime, ...]

    @cached_property
    def surfaces(self) -> dict[Key, dict[int, Surface]]:
        """Rule 1, and rule 6 for kernels with zero points."""
        found: dict[Key, dict[int, list[KernelTime]]] = {}
        for row in self.rows:
            found.setdefault((row.op, row.bits, row.block, row.symmetric), {}).setdefault(row.m, []).append(row)
        for key, by_m in found.items():
            plain = found.get((*key[:3], True), {})
            if not key[3]:
                by_m.update({m: _scaled(plain[m], rows) for m, rows in by_m.items() if len(rows) < len(plain.get(m, ()))})
        return {key: {m: Surface(tuple(rows)) for m, rows in sorted(by_m.items())} for key, by_m in found.items()}

    def knows(self, op: str, bits: int) -> bool:
        """Whether any block of this operator and width was measured."""
        return any(key[:2] == (op, bits) for key in self.surfaces)

    def us(self, case: Case, point: Point) -> float:
        """Microseconds of the case with `point.m` tokens. Raises TargetError when no kernel like it is in the table."""
        k = -(-case.k // case.block) * case.block if case.op == "MatMulNBits" else case.k
        by_m = self.surfaces[self._nearest(case)]
        tokens = list(by_m)
        above = next((m for m in tokens if m >= point.m), None)
        below = next((m for m in reversed(tokens) if m <= point.m), None)
        if above is None or below is None:
            nearest = tokens[-1] if above is None else tokens[0]
            return by_m[nearest].us(k, case.n, Point(nearest, point.context)) * _work(case, point) / _work(case, Point(nearest, point.context))
        low = by_m[below].us(k, case.n, Point(below, point.context))
        if above == below:
            return low
        share = math.log(point.m / below) / math.log(above / below)
        return low ** (1 - share) * by_m[above].us(k, case.n, Point(above, point.context)) ** share

    def together(self, layer: Case, point: Point, streamed_bytes: int) -> float:
        """Rule 7: the time of operators in layers like `layer`, over the sum of their times alone; 1 where the table has no chain of this operator.

        streamed_bytes  weights that one token streams through all layers and the head
        """
        alike = [(row, log) for row, log in self.chains if row.op == layer.op]
        alike = [(row, log) for row, log in alike if row.bits == layer.bits] or alike
        if not alike:
            return 1.0

        def off(row: KernelTime) -> float:
            return abs(math.log2((row.block + 1) / (layer.block + 1)))

        nearest, here = min(off(row) for row, _ in alike), _spot(layer.k, layer.n, point, streamed_bytes)
        near = [(row, log) for row, log in alike if off(row) == nearest]
        spots = [_spot(row.k, row.n, Point(row.m, row.context), row.layers * layer_bytes(_case(row))) for row, _ in near]
        weights = [1.0 / (float(np.square(spot - here).sum()) + 1e-9) for spot in spots]
        return math.exp(float(np.average([log for _, log in near], weights=weights)))

    @cached_property
    def chains(self) -> list[tuple[KernelTime, float]]:
        """Rows of layers whose operators are all in the table, with the logarithm of their time over the sum of their operators'."""
        found = []
        for row in (row for row in self.rows if row.op in LAYERS):
            layer = parts(_case(row))
            if all(self.knows(case.op, case.bits) for case, _ in layer):
                alone = sum(count * self.us(case, Point(row.m, row.context)) for case, count in layer)
                found.append((row, math.log(row.us / alone)))
        return found

    def _nearest(self, case: Case) -> Key:
        """Rule 6: the kernel itself, or the one of the same operator and bits with the nearest block."""
        alike = [key for key in self.surfaces if key[:2] == (case.op, case.bits)]
        if not alike:
            raise TargetError(
                f"kernel table: {case.op}, {case.bits} bits",
                expected="rows of this kernel",
                found="none",
                remedy="measure this machine: `trimtab targets probe --out machine.yaml`",
            )
        return min(alike, key=lambda key: (abs(math.log2((key[2] + 1) / (case.block + 1))), key[3] != case.symmetric))


def _scaled(plain: Sequence[KernelTime], few: Sequence[KernelTime]) -> list[KernelTime]:
    """The plain kernel's rows times the geometric mean of few over plain at the sizes both have; `few` itself when they share none."""
    known = {(row.k, row.n, row.context): row.us for row in plain}
    logs = [math.log(row.us / known[row.k, row.n, row.context]) for row in few if (row.k, row.n, row.context) in known]
    return [replace(row, us=row.us * math.exp(sum(logs) / len(logs))) for row in plain] if logs else list(few)


def _work(case: Case, point: Point) -> float:
    """What time grows with beyond the measured numbers of tokens."""
    return point.m * (point.context + point.m / 2) if case.op in ATTENTION else float(point.m)
