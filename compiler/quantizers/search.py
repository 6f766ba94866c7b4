"""Scales that lose least: a grid of shrunken ranges for each group, then least squares for the codes found.

For a group of weights w with importances h >= 0 (the diagonal of the input second moment, or ones) the loss is

    sum_j h[j] (w[j] - (code[j] - zero_point) scale)^2

1. candidates: the round-to-nearest range shrunk by each factor of SHRINK; with zero points also the neighbours of the rounded one; without them also the range
   that clips neither sign, extreme / (2**(bits-1) - 1), which is that of GGUF's Q8_0: weights that come from such blocks of 32 are met exactly (int8-g32-s16)
2. the scale is refitted to each candidate's codes, scale = sum(h w u) / sum(h u^2) with u = code - zero_point, and the codes to it once more
3. the candidate of least loss wins, the loss being that of its codes under the refitted scale; codes are then taken anew, which can only
   lower it. Plain round-to-nearest is one of the candidates, so the loss is never above it

Worked case, 4 bits symmetric: of [7, -7, 3, -1] rounding to nearest takes the scale 7 / -8 and gives [7, -6.125, 2.625, -0.875]; the range that clips
neither sign has the scale -1, and all four are met.

Source: the searches of llama.cpp's k-quants (ggml-quants.c, make_qkx2_quants) and of OmniQuant (arXiv 2308.13137) are of this kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compiler.quantizers import affine
from compiler.quantizers.affine import Quantized, reciprocal, storable
from compiler.scheme import Scheme

SHRINK = tuple(np.linspace(1.0, 0.7, 13))
ROWS = 256  # rows searched at a time, so that temporaries stay small


def quantize(weight: np.ndarray, scheme: Scheme, importance: np.ndarray | None = None) -> Quantized:
    """float32 [rows, width] by rules 1-3. importance: float32 [width], None for ones. Raises ValueError as `affine.quantize` does."""
    parts = [_search(weight[start : start + ROWS], scheme, importance) for start in range(0, len(weight), ROWS)]
    zero_points = None if scheme.symmetric else np.concatenate([part.zero_points for part in parts if part.zero_points is not None])
    return Quantized(np.concatenate([part.codes for part in parts]), np.concatenate([part.scales for part in parts]), zero_points, scheme, weight.shape[1])


def _search(weight: np.ndarray, scheme: Scheme, importance: np.ndarray | None) -> Quantized:
    plain = affine.quantize(weight, scheme)
    rows, groups = plain.scales.shape
    blocks = grouped(weight, scheme)
    heavy = np.ones(weight.shape[1], np.float32) if importance is None else importance.astype(np.float32) + np.float32(1e-6) * importance.mean()
    heavy = grouped(heavy[None], scheme)
    middle, top = np.float32(1 << (scheme.bits - 1)), np.float32((1 << scheme.bits) - 1)
    zeros = np.full((rows, groups), middle, np.float32) if plain.zero_points is None else plain.zero_points.astype(np.float32)
    best = [plain.scales, zeros, _fit(blocks, heavy, plain.scales, zeros, top).left]
    shifts = (0.0,) if scheme.symmetric else (-1.0, 0.0, 1.0)
    factors = (float(middle / (middle - 1)), *SHRINK) if scheme.symmetric else SHRINK
    for factor in factors:
        for shift in shifts:
            moved = zeros if scheme.symmetric else (zeros + np.float32(shift)).clip(0, top)
            fit = _fit(blocks, heavy, plain.scales * np.float32(factor), moved, top)
            scales = storable(fit.best(), scheme)  # rule 2
            loss = fit.loss(scales)
            better = loss < best[2]
            best = [np.where(better, new, old) for new, old in zip((scales, moved, loss), best, strict=True)]
    codes = codes_for(blocks, best[0], best[1], top).astype(np.uint8).reshape(rows, -1)
    return Quantized(codes, best[0], None if scheme.symmetric else best[1].astype(np.uint8), scheme, weight.shape[1])


@dataclass(frozen=True)
class Fit:
    """Codes of groups, as the sums that the loss under any scale follows from; float32 [rows, groups].

    scales  those that the codes were taken with;  left = sum(h r^2), cross = sum(h r u), square = sum(h u^2) with r = w - u scale
    """

    scales: np.ndarray
    left: np.ndarray
    cross: np.ndarray
    square: np.ndarray

    def best(self) -> np.ndarray:
        """The scale of least loss, sum(h w u) / sum(h u^2); the old one where a group has only zeros."""
        found: np.ndarray = self.scales + np.where(self.square > 0, self.cross / np.maximum(self.square, np.finfo(np.float32).tiny), np.float32(0))
        return found

    def loss(self, scales: np.ndarray) -> np.ndarray:
        """sum(h (w - u scale)^2) under other scales."""
        change = scales - self.scales
        return np.maximum(self.left - change * (2 * self.cross - change * self.square), np.float32(0))


def _fit(blocks: np.ndarray, heavy: np.ndarray, scales: np.ndarray, zeros: np.ndarray, top: np.float32) -> Fit:
    steps = codes_for(blocks, scales, zeros, top)
    steps -= zeros[..., None]
    rest = steps * scales[..., None]
    np.subtract(blocks, rest, out=rest)
    weighted = heavy * steps
    cross, square = np.einsum("rgk,rgk->rg", weighted, rest), np.einsum("rgk,rgk->rg", weighted, steps)
    np.multiply(heavy, rest, out=weighted)
    return Fit(scales, np.einsum("rgk,rgk->rg", weighted, rest), cross, square)


def grouped(values: np.ndarray, scheme: Scheme) -> np.ndarray:
    """float32 [rows, width] -> [rows, groups, group_size], zeros behind the tail."""
    size = scheme.group_size or 1
    padded = np.zeros((len(values), -(-values.shape[1] // size) * size), np.float32)
    padded[:, : values.shape[1]] = values
    return padded.reshape(len(values), -1, size)


def codes_for(blocks: np.ndarray, scales: np.ndarray, zeros: np.ndarray, top: np.float32) -> np.ndarray:
    """Nearest codes, float32 [rows, groups, group_size]."""
    codes: np.ndarray = blocks * reciprocal(scales)[..., None]
    codes += zeros[..., None]
    np.rint(codes, out=codes)
    return np.clip(codes, 0, top, out=codes)
