"""The byte layout of onnxruntime's MatMulNBits (contrib operator spec, com.microsoft 1) and of GatherBlockQuantized.

codes        uint8 [rows, groups, group_size * kernel_bits / 8], two 4-bit codes a byte, the first in the low half
scales       float32 [rows, groups]
zero points  uint8 [rows, ceil(groups * kernel_bits / 8)], packed like codes; the odd last half byte is 0

Codes and zero points of a scheme with other bits than 4 and 8 are left-aligned (compiler.scheme). The file drops their low zero bits: the rest is cut
into planes of 4, 2 and 1 bits, the highest first, and a plane holds the bits of one code after the other, the first in the low bits of a byte:

    5 bits, codes 8 wide: 0b10110_000 -> plane of 4 bits 0b1011, plane of 1 bit 0b0

The graph puts them together again by a table for each plane, which onnxruntime does once, when it loads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compiler.quantizers.affine import Quantized
from compiler.scheme import Scheme


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
    scheme = quantized.scheme
    half = nibbles if scheme.kernel_bits == 4 else np.asarray
    zero_points = None if quantized.zero_points is None else half(quantized.zero_points << scheme.shift)
    scales = quantized.scales / np.float32(1 << scheme.shift)
    return Packed(half(quantized.codes << scheme.shift).reshape(rows, groups, -1), scales, zero_points)


def unpack(packed: Packed, scheme: Scheme, width: int) -> Quantized:
    """The inverse of `pack`: codes, scales and zero points by the scheme's own equation."""
    rows, groups = packed.scales.shape
    codes, zero_points = packed.codes.reshape(rows, -1), packed.zero_points
    if scheme.kernel_bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(rows, -1)
        if zero_points is not None:
            zero_points = np.stack([zero_points & 15, zero_points >> 4], axis=2).reshape(rows, -1)[:, :groups]
    zero_points = None if zero_points is None else zero_points >> scheme.shift
    return Quantized(codes >> scheme.shift, packed.scales * np.float32(1 << scheme.shift), zero_points, scheme, width)


def planes(bits: int) -> list[tuple[int, int]]:
    """(width, lowest bit within the code) of the planes that `bits` bits are stored in. 7 -> [(4, 3), (2, 1), (1, 0)]."""
    made = []
    for width in (8, 4, 2, 1):
        if bits & width:
            bits -= width
            made.append((width, bits))
    return made


def plane(codes: np.ndarray, scheme: Scheme, width: int, low: int) -> np.ndarray:
    """Kernel codes uint8 [rows, groups, bytes] -> the bytes of one plane, uint8 [rows, groups * group_size * width / 8]."""
    flat = codes.reshape(len(codes), -1)
    if scheme.kernel_bits == 4:
        flat = np.stack([flat & 15, flat >> 4], axis=2).reshape(len(codes), -1)
    part = (flat >> (scheme.shift + low)) & ((1 << width) - 1)
    made = part[:, :: 8 // width].copy()
    for place in range(1, 8 // width):
        made |= part[:, place :: 8 // width] << (place * width)
    return made


def plane_table(scheme: Scheme, width: int, low: int) -> np.ndarray:
    """uint8 [256, bytes]: what each byte of a plane adds to the kernel's codes, which lie in that many bytes.

    8-bit kernel, a plane of 1 bit at bit 3: byte 0b101 -> [8, 0, 8, 0, 0, 0, 0, 0].
    """
    values = np.arange(256, dtype=np.uint16)[:, None]
    codes = ((values >> (np.arange(8 // width, dtype=np.uint16) * width)) & ((1 << width) - 1)) << (scheme.shift + low)
    return (codes[:, 0::2] | (codes[:, 1::2] << 4) if scheme.kernel_bits == 4 else codes).astype(np.uint8)
