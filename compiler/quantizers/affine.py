"""The slow exact twin: group-wise affine round-to-nearest in plain numpy, one readable step at a time.

Every fast quantizer must give the same codes, scales and zero points bit for bit, and every kernel must agree with
`dequantize`. The equation is `compiler.scheme`'s.

Scale rules (float32 throughout, ties to even as numpy.rint does):
1. symmetric, zero point z = 2**(bits-1): scale = extreme / -z, where extreme is the element of largest magnitude with
   its sign (max when max >= -min, else min). The extreme lands exactly on code 0, so all 2**bits codes serve and no sign is clipped (the Q4_0 rule of
   llama.cpp; onnxruntime's own default is the same). A scale may therefore be negative.
2. asymmetric: the range is widened to hold 0; scale = (max - min) / (2**bits - 1); zero_point = rint(-min / scale).
3. a group of zeros has scale 0 and code z (symmetric) or 0 (asymmetric, zero point 0).
4. a width that is no multiple of group_size is padded with zeros: the tail group sees [w..., 0, ...].
5. half scales: the scale is rounded so that the kernel's scale (scale / 2**shift) is a float16, before zero point and codes are chosen.

Worked case, 4 bits symmetric, group [-8, 4, 2, 0]: extreme -8 -> scale 1.0, codes [0, 12, 10, 8].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compiler.scheme import Scheme


@dataclass(frozen=True)
class Quantized:
    """Codes uint8 [rows, groups * group_size], scales float32 [rows, groups], zero points uint8 [rows, groups] or None."""

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    scheme: Scheme
    width: int  # columns before padding


def quantize(weight: np.ndarray, scheme: Scheme) -> Quantized:
    """float32 [rows, width] -> codes, scales, zero points by rules 1-4.

    Raises ValueError for a scheme without groups or a weight that is not 2-D.
    """
    if scheme.group_size is None or weight.ndim != 2:
        raise ValueError(f"group-wise quantization needs a 2-D weight and a group size, got {weight.shape} and {scheme}")
    rows, width = weight.shape
    groups = -(-width // scheme.group_size)
    padded = np.zeros((rows, groups * scheme.group_size), np.float32)
    padded[:, :width] = weight  # rule 4
    blocks = padded.reshape(rows, groups, scheme.group_size)
    middle, top = 1 << (scheme.bits - 1), (1 << scheme.bits) - 1
    if scheme.symmetric:  # rule 1
        low, high = blocks.min(axis=2), blocks.max(axis=2)
        scales = storable(np.where(high >= -low, high, low) / np.float32(-middle), scheme)
        zero_points = np.full(scales.shape, middle, np.uint8)
    else:  # rule 2
        low = np.minimum(blocks.min(axis=2), np.float32(0))
        high = np.maximum(blocks.max(axis=2), np.float32(0))
        scales = storable((high - low) / np.float32(top), scheme)
        zero_points = np.rint(-low * reciprocal(scales)).clip(0, top).astype(np.uint8)
    steps = (blocks * reciprocal(scales)[..., None]).astype(np.float64)  # float64 holds step + zero point exactly: one rounding
    codes = np.rint(steps + zero_points[..., None]).clip(0, top).astype(np.uint8).reshape(rows, -1)
    return Quantized(codes, scales, None if scheme.symmetric else zero_points, scheme, width)


def storable(scales: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Rule 5: the nearest scales that the file can hold, float32. 4 bits, 0.1 -> 0.09997559 with half scales. Beyond float16's range: its largest."""
    if not scheme.half_scales:
        return scales
    step = np.float32(1 << scheme.shift)
    most = np.float32(np.finfo(np.float16).max)
    return (scales / step).clip(-most, most).astype(np.float16).astype(np.float32) * step


def reciprocal(scales: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 where the scale is 0 (rule 3)."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    return np.where(np.isfinite(inverse), inverse, np.float32(0)).astype(np.float32)


def dequantize(quantized: Quantized) -> np.ndarray:
    """float32 [rows, width]: (code - zero_point) * scale."""
    rows, groups = quantized.scales.shape
    middle = 1 << (quantized.scheme.bits - 1)
    zero = np.full((rows, groups), middle, np.float32) if quantized.zero_points is None else quantized.zero_points.astype(np.float32)
    codes = quantized.codes.reshape(rows, groups, -1).astype(np.float32)
    return ((codes - zero[..., None]) * quantized.scales[..., None]).reshape(rows, -1)[:, : quantized.width]
