"""GPTQ: each column's rounding error is carried into the columns not yet rounded, as the inputs' second moment H says.

Frantar et al., "GPTQ" (arXiv 2210.17323). The objective is the output error tr(dW H dW^T) of compiler.quantizers.moments.

1. H is shrunk towards its diagonal, (1 - SHRINK) H + SHRINK diag(H), and damped, + DAMPING * mean(diag H) I. A few thousand tokens say more about which
   inputs are loud than about which of them go together, and what is fitted to the latter is lost on other text: on SmolLM2-135M (7,680 tokens, int4-g64-asym,
   error on WikiText-2 relative to rounding to nearest) 0.78 without and 0.57 with shrinking in the down projection of layer 0, 0.67 and 0.64 in gate and up of
   layer 1. Inputs that never fire get the mean on the diagonal, padding of the tail group too
2. scales and zero points come from an importance-weighted search (compiler.quantizers.search) before anything is rounded ("static groups"), so
   the columns may be taken in any order without the kernel knowing: no g_idx
3. columns are taken by falling H[j, j] ("act-order")
4. with U upper triangular, U^T U = H^-1: error e = (w_j - w_hat_j) / U[j, j]; w_i -= e U[j, i] for every later i
5. with the codes fixed, all scales of a row are solved for jointly: the loss is quadratic in them,
   minimise (w - sum_g s_g u_g)^T H (w - sum_g s_g u_g), u_g = (code - zero_point) inside group g and 0 outside
6. kept row by row only where it lowers the loss, so the result is never worse than the search's or the step before
"""

from __future__ import annotations

import numpy as np

from compiler.quantizers import search
from compiler.quantizers.affine import Quantized, dequantize, reciprocal, storable
from compiler.scheme import Scheme

DAMPING = 0.01
SHRINK = 0.25
LAZY = 64  # columns whose updates of the rest are applied together
ROWS = 2048  # rows at a time: they do not depend on each other


def quantize(weight: np.ndarray, scheme: Scheme, moment: np.ndarray) -> Quantized:
    """float32 [rows, width] under H float32 [width, width], by rules 1-6. Raises ValueError as `affine.quantize` does."""
    damped = damped_moment(moment, -(-weight.shape[1] // (scheme.group_size or 1)) * (scheme.group_size or 1))
    order = np.argsort(-damped.diagonal(), kind="stable")
    factor = inverse_factor(damped[np.ix_(order, order)])
    parts = [_rows(weight[start : start + ROWS], scheme, damped, order, factor) for start in range(0, len(weight), ROWS)]
    zero_points = None if scheme.symmetric else np.concatenate([part.zero_points for part in parts if part.zero_points is not None])
    return Quantized(np.concatenate([part.codes for part in parts]), np.concatenate([part.scales for part in parts]), zero_points, scheme, weight.shape[1])


def damped_moment(moment: np.ndarray, width: int, damping: float = DAMPING) -> np.ndarray:
    """Rule 1: float64 [width, width], H in its upper left corner."""
    size, diagonal = len(moment), moment.diagonal().astype(np.float64)
    mean = diagonal.mean() or 1.0
    made = np.eye(width) * mean
    made[:size, :size] = (1.0 - SHRINK) * moment
    made[np.arange(size), np.arange(size)] = np.where(diagonal > 0, diagonal, mean) + damping * mean
    return made


def inverse_factor(moment: np.ndarray) -> np.ndarray:
    """U upper triangular, float32, U^T U = H^-1 (rule 4). H = diag(4, 1) -> diag(0.5, 1).

    With J the reversal of rows and columns and J H J = L L^T, R = J L J is upper triangular, H = R R^T, and U = R^-1: one factor and one triangular inverse.
    """
    from scipy.linalg import lapack

    lower = np.linalg.cholesky(moment[::-1, ::-1])
    inverse, fault = lapack.dtrtri(lower[::-1, ::-1], lower=0)
    assert fault == 0  # a factor has no zero on its diagonal
    return np.ascontiguousarray(np.triu(inverse).astype(np.float32))


def _rows(weight: np.ndarray, scheme: Scheme, moment: np.ndarray, order: np.ndarray, factor: np.ndarray) -> Quantized:
    start = search.quantize(weight, scheme, moment.diagonal()[: weight.shape[1]].astype(np.float32))
    padded = search.grouped(weight, scheme).reshape(len(weight), -1)
    small = moment.astype(np.float32)
    carried = _carry(padded, start, order, factor)
    best = start
    for candidate in (carried, refit(padded, carried, small)):
        best = _better(padded, best, candidate, small)
    return best


def _carry(padded: np.ndarray, start: Quantized, order: np.ndarray, factor: np.ndarray) -> Quantized:
    """Rules 3 and 4 with the scales and zero points of `start`.

    H = [[1, 0.9], [0.9, 1]], scale 1, w = [0.4, 0.4]: each alone is nearest to 0, and that loses 0.608. Here the first is 0, its error makes the second
    0.4 + 0.9 * 0.4 = 0.76, which is 1, and [0, 1] loses 0.088.
    """
    scheme, size = start.scheme, start.scheme.group_size or 1
    top = np.float32((1 << scheme.bits) - 1)
    zeros = np.full(start.scales.shape, 1 << (scheme.bits - 1), np.float32) if start.zero_points is None else start.zero_points.astype(np.float32)
    groups = order // size
    scales, zeros = start.scales[:, groups].T.copy(), zeros[:, groups].T.copy()  # [columns, rows]: a column is contiguous
    inverse = reciprocal(scales)
    left = padded[:, order].T.copy()
    codes = np.empty_like(left)
    for first in range(0, len(order), LAZY):
        last = min(first + LAZY, len(order))
        errors = np.empty((last - first, left.shape[1]), np.float32)
        for column in range(first, last):
            codes[column] = np.rint(left[column] * inverse[column] + zeros[column]).clip(0, top)
            error = (left[column] - (codes[column] - zeros[column]) * scales[column]) / factor[column, column]
            left[column + 1 : last] -= factor[column, column + 1 : last, None] * error
            errors[column - first] = error
        left[last:] -= factor[first:last, last:].T @ errors
    placed = np.empty_like(codes)
    placed[order] = codes
    return Quantized(placed.T.astype(np.uint8), start.scales, start.zero_points, scheme, start.width)


def refit(padded: np.ndarray, quantized: Quantized, moment: np.ndarray) -> Quantized:
    """Rule 5: the same codes with scales solved for. padded float32 [rows, columns], H float32 [columns, columns]."""
    steps = steps_of(quantized)
    rows, groups = quantized.scales.shape
    size = steps.shape[1] // groups
    cross = (padded @ moment * steps).reshape(rows, groups, size).sum(axis=2)
    square = np.empty((rows, groups, groups), np.float32)
    for group in range(groups):  # symmetric: what is left of the diagonal was right of it in a group before
        inside, rest = slice(group * size, (group + 1) * size), slice(group * size, None)
        square[:, group, group:] = np.einsum("rgs->rg", (steps[:, inside] @ moment[inside, rest] * steps[:, rest]).reshape(rows, groups - group, size))
        square[:, group:, group] = square[:, group, group:]
    square += np.eye(groups, dtype=np.float32) * (1e-6 * np.trace(square, axis1=1, axis2=2)[:, None, None] / groups + np.finfo(np.float32).tiny)
    solved = np.linalg.solve(square.astype(np.float64), cross.astype(np.float64)[..., None])[..., 0].astype(np.float32)
    return Quantized(quantized.codes, storable(solved, quantized.scheme), quantized.zero_points, quantized.scheme, quantized.width)


def steps_of(quantized: Quantized) -> np.ndarray:
    """code - zero_point, float32 [rows, columns]."""
    rows, groups = quantized.scales.shape
    codes = quantized.codes.reshape(rows, groups, -1).astype(np.float32)
    if quantized.zero_points is None:
        return (codes - np.float32(1 << (quantized.scheme.bits - 1))).reshape(rows, -1)
    return (codes - quantized.zero_points[..., None].astype(np.float32)).reshape(rows, -1)


def row_errors(padded: np.ndarray, quantized: Quantized, moment: np.ndarray) -> np.ndarray:
    """float32 [rows]: each row's share of tr(dW H dW^T)."""
    change = padded.copy()
    change[:, : quantized.width] -= dequantize(quantized)
    return np.einsum("ij,ij->i", change @ moment, change)


def _better(padded: np.ndarray, one: Quantized, other: Quantized, moment: np.ndarray) -> Quantized:
    """Rule 6: of two, the better row by row."""
    wins = (row_errors(padded, other, moment) < row_errors(padded, one, moment))[:, None]
    zero_points = None
    if one.zero_points is not None and other.zero_points is not None:
        zero_points = np.where(wins, other.zero_points, one.zero_points)
    return Quantized(np.where(wins, other.codes, one.codes), np.where(wins, other.scales, one.scales), zero_points, one.scheme, one.width)
