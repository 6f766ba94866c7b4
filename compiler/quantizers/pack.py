"""The byte layout of onnxruntime's MatMulNBits (contrib operator spec, com.microsoft 1) and of GatherBlockQuantized.

codes        uint8 [rows, groups, group_size * bits / 8], two 4-bit codes a byte, the first in the low half
scales       float32 [rows, groups]
zero points  uint8 [rows, ceil(groups * bits / 8)], packed like codes; the odd last half byte is 0
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compiler.quantizers.affine import Quantized


@dataclass(frozen=True)
class Packed:
    """Ready for the kernel; see the module for the layout."""

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None


def nibbles(values: np.ndarray) -> np.ndarray:
    """uint8 [rows, n] of 4-bit values -> uint8 [rows, ceil(n / 2)]. [[1, 2, 3]] -> [[0x21, 0x03]]."""
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    return values[:, 0::2] | (values[:, 1::2] << 4)


def pack(quantized: Quantized) -> Packed:
    """Codes [rows, groups * group_size] -> the kernel's layout."""
    rows, groups = quantized.scales.shape
    half = nibbles if quantized.scheme.bits == 4 else np.asarray
    zero_points = None if quantized.zero_points is None else half(quantized.zero_points)
    return Packed(half(quantized.codes).reshape(rows, groups, -1), quantized.scales, zero_points)
