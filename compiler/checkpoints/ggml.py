"""Decoding the tensor types of GGUF to float32, row block by row block.

The common types have their own vectorised decoders here: `gguf.quants` is the slow twin, equal bit for bit (tests), and
decodes every other type it knows. Block layouts: ggml-common.h of llama.cpp; 32 codes a block, low nibbles first.

    Q4_0   d: f16, 16 bytes of nibbles             w = (q - 8) * d
    Q4_1   d: f16, m: f16, 16 bytes of nibbles     w = q * d + m
    Q8_0   d: f16, 32 x int8                       w = q * d

Some types are symmetric codes with one scale a group, which is what kernels read too (`coded_scheme`, `codes`):

    Q4_0, Q8_0 as above; Q5_0   d: f16, 4 bytes of fifth bits, 16 bytes of nibbles     w = (q - 16) * d
    Q6_K   128 bytes of low nibbles, 64 of high pairs, 16 x int8 s, d: f16; 256 codes     w = (q - 32) * (d * s)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from compiler.checkpoints.safetensors import widen
from compiler.quantizers.affine import Quantized
from compiler.scheme import Scheme, parse_scheme

CHUNK_BLOCKS = 2048  # 256 KiB of float32: the passes over a chunk stay in the cache
LOW = np.uint64(0x0F0F0F0F0F0F0F0F)
FOUR = np.uint64(4)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [n, 16] -> codes uint8 [n, 32]: eight codes at a time, low nibbles before high."""
    words = np.ascontiguousarray(packed).view(np.uint64)
    codes = np.empty((len(words), 4), np.uint64)
    np.bitwise_and(words, LOW, out=codes[:, :2])
    np.right_shift(words, FOUR, out=codes[:, 2:])
    codes[:, 2:] &= LOW
    return codes.view(np.uint8)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block: float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.subtract(_nibbles(blocks[:, 2:]), 8.0, out=out, dtype=np.float32)
    out *= _half(blocks, 0)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_nibbles(blocks[:, 4:]), _half(blocks, 0), out=out)
    out += _half(blocks, 2)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks, 0), out=out)


@dataclass(frozen=True)
class Packing:
    """decode fills float32 [n, 32] from uint8 [n, block_bytes]."""

    block_bytes: int
    decode: Callable[[np.ndarray, np.ndarray], None]


FAST: Mapping[str, Packing] = {"Q4_0": Packing(18, _q4_0), "Q4_1": Packing(20, _q4_1), "Q8_0": Packing(34, _q8_0)}
PLAIN: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "F64": np.dtype("<f8")}


def decode(data: np.ndarray, dtype: str, columns: int) -> np.ndarray:
    """uint8 [rows * row_bytes] -> float32 [rows, columns]. `dtype` is one of FAST, PLAIN or a type that `gguf.quants` decodes."""
    if dtype in PLAIN:
        return widen(data.view(PLAIN[dtype]), dtype).reshape(-1, columns)
    if dtype not in FAST:
        return _decode_with_gguf(data, dtype, columns)
    packing = FAST[dtype]
    blocks = data.reshape(-1, packing.block_bytes)
    out = np.empty((len(blocks), 32), np.float32)
    for start in range(0, len(blocks), CHUNK_BLOCKS):
        packing.decode(blocks[start : start + CHUNK_BLOCKS], out[start : start + CHUNK_BLOCKS])
    return out.reshape(-1, columns)


def _decode_with_gguf(data: np.ndarray, dtype: str, columns: int) -> np.ndarray:
    from gguf import GGMLQuantizationType, dequantize  # imported late: it costs a quarter second that the common types need not pay

    row_bytes = row_size(dtype, columns)
    return np.asarray(dequantize(data.reshape(-1, row_bytes), GGMLQuantizationType[dtype]), np.float32).reshape(-1, columns)


def row_size(dtype: str, columns: int) -> int:
    """Bytes of one row of `columns` values, 0 when the width is no whole number of blocks."""
    if dtype in PLAIN:
        return PLAIN[dtype].itemsize * columns
    if dtype in FAST:
        width, size = 32, FAST[dtype].block_bytes
    else:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        width, size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    return 0 if columns % width else columns // width * size


def decodable(dtype: str) -> bool:
    """Can rows of this type be decoded here or by `gguf.quants`?"""
    if dtype in FAST or dtype in PLAIN:
        return True
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[dtype]
    try:
        dequantize(np.zeros((1, max(row_size(dtype, 256), 1)), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


Codes = tuple[np.ndarray, np.ndarray]  # uint8 [n, values of a block], float32 scales [n, groups of a block]


def _codes_q4_0(blocks: np.ndarray) -> Codes:
    return _nibbles(blocks[:, 2:]), _half(blocks, 0)


def _codes_q5_0(blocks: np.ndarray) -> Codes:
    fifth = np.unpackbits(np.ascontiguousarray(blocks[:, 2:6]), axis=1, bitorder="little")
    return _nibbles(blocks[:, 6:]) | (fifth << 4), _half(blocks, 0)


def _codes_q8_0(blocks: np.ndarray) -> Codes:
    return blocks[:, 2:] ^ np.uint8(128), _half(blocks, 0)  # two's complement to offset 128


def _codes_q6_k(blocks: np.ndarray) -> Codes:
    """In each half of 128 values, 32 at a time: low nibbles of ql[0:32], of ql[32:64], then their high nibbles; pairs of qh likewise."""
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    nibbles = np.concatenate([low & 15, low >> 4], axis=2)
    pairs = (high >> (2 * np.arange(4, dtype=np.uint8))[:, None]) & 3
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32) * _half(blocks, 208)
    return (nibbles | (pairs << 4)).reshape(-1, 256), scales


@dataclass(frozen=True)
class Lattice:
    """A type whose blocks are symmetric codes. scheme: the one that holds them exactly; values of one block, and its bytes."""

    scheme: Scheme
    values: int
    block_bytes: int
    codes: Callable[[np.ndarray], Codes]


LATTICES: Mapping[str, Lattice] = {
    "Q4_0": Lattice(parse_scheme("int4-g32-s16"), 32, 18, _codes_q4_0),
    "Q5_0": Lattice(parse_scheme("int5-g32"), 32, 22, _codes_q5_0),
    "Q8_0": Lattice(parse_scheme("int8-g32-s16"), 32, 34, _codes_q8_0),
    "Q6_K": Lattice(parse_scheme("int6-g16"), 256, 210, _codes_q6_k),
}


def codes(data: np.ndarray, dtype: str, columns: int) -> Quantized:
    """uint8 [rows * row_bytes] of one of LATTICES -> its codes, every zero point the middle."""
    lattice = LATTICES[dtype]
    found, scales = lattice.codes(np.ascontiguousarray(data).reshape(-1, lattice.block_bytes))
    scales = scales.reshape(-1, columns // (lattice.scheme.group_size or 1))
    zeros = np.full(scales.shape, 1 << (lattice.scheme.bits - 1), np.uint8)
    return Quantized(found.reshape(-1, columns), scales, zeros, lattice.scheme, columns)
