"""Round-to-nearest for MatMulNBits at memory speed: the same bytes as `pack(affine.quantize(...))`.

Work goes by cache-sized row blocks over a thread pool (numpy releases the lock), so the float temporaries never leave
the cache and peak memory is the input block plus the packed output.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from compiler.quantizers.affine import reciprocal, storable
from compiler.quantizers.pack import Packed, nibbles
from compiler.scheme import Scheme

CACHE_BYTES = 1 << 18  # float32 bytes of one work unit
ROUND = np.float32(3 << 22)  # 1.5 * 2**23: adding it to |x| < 2**22 rounds to the nearest integer, ties to even


def quantize(weight: np.ndarray, scheme: Scheme, threads: int = 2) -> Packed:
    """float32 [rows, width] -> packed codes, scales and zero points. Raises ValueError as `affine.quantize` does."""
    if scheme.group_size is None or weight.ndim != 2:
        raise ValueError(f"group-wise quantization needs a 2-D weight and a group size, got {weight.shape} and {scheme}")
    rows, width = weight.shape
    size = scheme.group_size
    groups = -(-width // size)
    codes = np.empty((rows, groups * size * scheme.kernel_bits // 8), np.uint8)
    scales = np.empty((rows, groups), np.float32)
    zero_points = None if scheme.symmetric else np.empty((rows, groups), np.uint8)
    step = max(1, CACHE_BYTES // (4 * groups * size))

    def work(start: int) -> None:
        stop = min(start + step, rows)
        block = weight[start:stop]
        if groups * size != width:
            block = np.pad(block, ((0, 0), (0, groups * size - width)))
        zeros = None if zero_points is None else zero_points[start:stop]
        _quantize_block(block.reshape(-1, size), scheme, (codes[start:stop], scales[start:stop], zeros))

    starts = range(0, rows, step)
    if threads > 1 and len(starts) > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, starts))
    else:
        for start in starts:
            work(start)
    if zero_points is not None and scheme.kernel_bits == 4:
        zero_points = nibbles(zero_points)
    return Packed(codes.reshape(rows, groups, -1), scales, zero_points)


def _quantize_block(blocks: np.ndarray, scheme: Scheme, out: tuple[np.ndarray, np.ndarray, np.ndarray | None]) -> None:
    """float32 [n, group_size] into slices of the packed codes, scales and (unpacked) zero points.

    The block is turned to [group_size, n] once, so that every step is a long vector operation. Only half scales need a
    clip on both sides: else the smallest value of a group lands on code 0 by construction; the largest may round up to `top` + 1.
    """
    codes_out, scales_out, zeros_out = out
    middle, top = 1 << (scheme.bits - 1), (1 << scheme.bits) - 1
    turned = np.ascontiguousarray(blocks.T)
    low, high = turned.min(axis=0), turned.max(axis=0)
    if scheme.symmetric:
        scales = storable(np.where(high >= -low, high, low) / np.float32(-middle), scheme)
        zeros = np.full(scales.shape, middle, np.float32)
    else:
        low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
        scales = storable((high - low) / np.float32(top), scheme)
        zeros = np.rint(-low * reciprocal(scales)).clip(0, top)
    if zeros_out is not None:
        zeros_out[...] = zeros.reshape(zeros_out.shape) * (1 << scheme.shift)
    scales_out[...] = scales.reshape(scales_out.shape) / np.float32(1 << scheme.shift)
    turned *= reciprocal(scales)
    turned += zeros + ROUND  # rounds, and leaves the code in the low mantissa bits
    if scheme.half_scales:
        np.clip(turned, ROUND, ROUND + top, out=turned)
    codes = np.minimum(turned.view(np.uint32).astype(np.uint16) & 0x1FF, top).astype(np.uint8) << scheme.shift
    if scheme.kernel_bits == 4:
        codes = codes[0::2] | (codes[1::2] << 4)
    codes_out.reshape(blocks.shape[0], -1)[...] = codes.T
