"""GPTQ and AWQ checkpoints: safetensors in which a linear weight is `qweight`, `qzeros`, `scales` (and `g_idx`) instead of `weight`.

    w_hat[n, k] = (code[n, k] - zero[group(k), n]) * scale[group(k), n]          scales float [groups, n]

GPTQ (AutoGPTQ, GPTQModel; qlinear of either): 2, 3, 4 or 8 bits.
    qweight int32 [k * bits / 32, n]      codes of one output, one after the other along k, the first in the lowest bits, as one stream of 32-bit words
    qzeros  int32 [groups, n * bits / 32] zero points along n in the same way. `checkpoint_format: gptq` (the usual one) stores zero - 1, modulo 2**bits;
                                          `gptq_v2` stores the zero point itself
    g_idx   int32 [k]                     group of each input. k // group_size is the plain order; another is that of desc_act ("act-order")
AWQ (AutoAWQ, `version: gemm`): 4 bits.
    qweight int32 [k, n / 8]              eight outputs a word; the nibble at 4 * i is output ORDER[i]
    qzeros  int32 [groups, n / 8]         the same, the zero point itself

Both are read as float32 [n, k]. The codes can go to a kernel unchanged (compiler.checkpoints.coded) where inputs are in the plain order and the group is a
multiple of a kernel's; act-order is only dequantized, because a g_idx makes the kernel dequantize on every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from compiler.checkpoints.coded import Coded, kernel_group
from compiler.checkpoints.files import read_json
from compiler.checkpoints.view import TensorView
from compiler.errors import CheckpointError
from compiler.quantizers.affine import Quantized
from compiler.scheme import Scheme

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
CONFIGS = ("quantize_config.json", "quant_config.json")  # of AutoGPTQ and AutoAWQ, before the key in config.json
FORMATS = {"gptq": (2, 3, 4, 8), "awq": (4,)}  # bits that are read
AGAIN = "restore the file from where the model came from"


@dataclass(frozen=True)
class Packing:
    """What the quantization config says. group_size: None for one group a row. stored_less: what zero points lack in the file."""

    method: str
    bits: int
    group_size: int | None
    stored_less: int

    @property
    def label(self) -> str:
        """For a stored type: GPTQ-4 g128."""
        return f"{self.method.upper()}-{self.bits}" + (f" g{self.group_size}" if self.group_size else "")


def config_files(folder: Path) -> list[Path]:
    """Older quantization configs beside config.json: part of what the model is."""
    return [folder / name for name in CONFIGS if (folder / name).is_file()]


def unpacked(tensors: Mapping[str, TensorView], config: Mapping[str, Any], folder: Path, origin: str) -> tuple[Mapping[str, TensorView], Mapping[str, Any]]:
    """Tensors with a `weight` in place of each packed matrix, and the config without its quantization; both as they are where nothing is packed.

    Raises CheckpointError: packed tensors without a config, a method, bits or format that is not read, parts that are missing or do not fit each other.
    """
    stems = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if not stems:
        return tensors, config
    packing = _packing(_stated(config, folder, origin), origin)
    held = Held()
    made: dict[str, TensorView] = {}
    for name, view in tensors.items():
        stem, _, part = name.rpartition(".")
        if f"{stem}.qweight" not in tensors or part not in PARTS:
            made[name] = view
        elif part == "qweight":
            rows = PackedRows({kind: tensors[f"{stem}.{kind}"] for kind in PARTS if f"{stem}.{kind}" in tensors}, packing, f"{origin}: {stem}", held)
            made[f"{stem}.weight"] = TensorView(f"{stem}.weight", rows.shape, packing.label, rows)
    return made, {key: value for key, value in config.items() if key != "quantization_config"}


def _stated(config: Mapping[str, Any], folder: Path, origin: str) -> Mapping[str, Any]:
    stated = config.get("quantization_config")
    if stated is None:
        stated = next((read_json(path, "the quantization config") for path in config_files(folder)), None)
    if not isinstance(stated, Mapping):
        raise CheckpointError(
            f"{origin}: quantization_config",
            expected="how the qweight tensors are packed, in config.json or quantize_config.json",
            found="nothing",
            remedy=AGAIN,
        )
    return stated


def _packing(stated: Mapping[str, Any], origin: str) -> Packing:
    """The config in our words, from the keys of either library."""

    def bad(key: str, expected: str, found: Any, remedy: str = "use another quantization of the model, or its float weights") -> CheckpointError:
        return CheckpointError(f"{origin}: quantization_config.{key}", expected=expected, found=repr(found), remedy=remedy)

    method = str(stated.get("quant_method") or ("awq" if "w_bit" in stated or "version" in stated else "gptq")).lower()
    if method not in FORMATS:
        raise bad("quant_method", "gptq or awq", method)
    layout = str(stated.get("version" if method == "awq" else "checkpoint_format") or ("gemm" if method == "awq" else "gptq")).lower()
    if layout not in (("gemm",) if method == "awq" else ("gptq", "gptq_v2")) or stated.get("is_marlin_format"):
        key, expected = ("version", "gemm") if method == "awq" else ("checkpoint_format", "gptq or gptq_v2")
        raise bad(key, expected, "marlin" if stated.get("is_marlin_format") else layout)
    bits, group = stated.get("bits", stated.get("w_bit")), stated.get("group_size", stated.get("q_group_size"))
    if bits not in FORMATS[method]:
        raise bad("bits", f"one of {', '.join(map(str, FORMATS[method]))} for {method}", bits)
    if isinstance(group, bool) or not isinstance(group, int) or group == 0 or group < -1:
        raise bad("group_size", "a whole number above 0, or -1 for one group", group, AGAIN)
    return Packing(method, int(bits), None if group == -1 else group, 1 if layout == "gptq" else 0)


class Held:
    """What was unpacked of the matrix that was read last: its rows are asked for block by block, and lie in columns of the file."""

    def __init__(self) -> None:
        self._held: tuple[str, Contents] | None = None

    def get(self, place: str, make: Callable[[], Contents]) -> Contents:
        held = self._held
        if held is None or held[0] != place:
            self._held = None  # so that the old matrix is gone before the new one is read
            self._held = held = (place, make())
        return held[1]


@dataclass(frozen=True)
class Contents:
    """words: uint32 of qweight as stored; zeros: uint8 [n, groups]; scales: float32 [n, groups]."""

    words: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray


def words_of(view: TensorView) -> np.ndarray:
    """An int32 tensor as stored, uint32."""
    raw = view.raw
    assert raw is not None, "tensors of a file have raw rows"
    return np.frombuffer(raw(0, view.row_count), "<u4").reshape(view.shape)


def unpack_stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint32 [n, columns] -> uint8 [count, columns]: a stream of `bits` bits down each column, the first in the lowest bits.

    4 bits, word 0x87654321 -> 1, 2, ... 8. 3 bits: 32 codes in three words, two of them across a border.
    """
    rows = -(-len(words) // bits) * bits
    padded = np.zeros((rows, words.shape[1]), np.uint32)
    padded[: len(words)] = words
    blocks = padded.reshape(-1, bits, words.shape[1])
    codes = np.empty((len(blocks), 32, words.shape[1]), np.uint8)
    for place in range(32):
        word, low = divmod(place * bits, 32)
        value = blocks[:, word] >> np.uint32(low)
        if low + bits > 32:
            value = value | (blocks[:, word + 1] << np.uint32(32 - low))
        codes[:, place] = value & np.uint32((1 << bits) - 1)
    return codes.reshape(-1, words.shape[1])[:count]


def unpack_interleaved(words: np.ndarray) -> np.ndarray:
    """AWQ: uint32 [k, n / 8] -> uint8 [k, n]. Word 0x76543210 -> 0, 4, 1, 5, 2, 6, 3, 7: output ORDER[i] lies in nibble i."""
    codes = np.empty((*words.shape, 8), np.uint8)
    for nibble, output in enumerate(ORDER):
        codes[..., output] = (words >> np.uint32(4 * nibble)) & np.uint32(15)
    return codes.reshape(len(words), -1)


@dataclass(frozen=True)
class PackedRows:
    """Rows of one packed matrix: called, float32 [rows, k]; `coded`, the codes where a kernel can take them."""

    parts: Mapping[str, TensorView] = field(repr=False)
    packing: Packing
    place: str
    held: Held = field(repr=False)

    def __post_init__(self) -> None:
        self._check()

    @property
    def shape(self) -> tuple[int, int]:
        """[n, k] of the weight."""
        first, columns = self.parts["qweight"].shape
        return (columns * 8, first) if self.packing.method == "awq" else (columns, first * 32 // self.packing.bits)

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // (self.packing.group_size or self.shape[1]))

    def _check(self) -> None:
        """Parts are there, of their types, and fit each other."""

        def bad(part: str, expected: str, found: Any) -> CheckpointError:
            return CheckpointError(
                f"{self.place}.{part}", expected=expected, found=str(found), remedy="use the config that belongs to these weights, or " + AGAIN
            )

        for part in ("qweight", "qzeros", "scales"):
            if part not in self.parts:
                raise bad(part, "this tensor beside qweight", "none")
        types = {part: ("F16", "F32", "BF16") if part == "scales" else ("I32",) for part in self.parts}
        for part, view in self.parts.items():
            if view.dtype not in types[part] or len(view.shape) != (1 if part == "g_idx" else 2):
                raise bad(part, f"{' or '.join(types[part])} in {1 if part == 'g_idx' else 2} dimension(s)", f"{view.dtype} {list(view.shape)}")
        rows, bits = self.parts["qweight"].shape[0], self.packing.bits
        if self.packing.method == "gptq" and rows * 32 % bits:
            raise bad("qweight", f"rows that hold whole codes of {bits} bits", f"{rows} rows")
        n, _ = self.shape
        wanted = {"qzeros": (self.groups, -(-n * bits // 32)), "scales": (self.groups, n), "g_idx": (self.shape[1],)}
        for part, shape in wanted.items():
            if part in self.parts and self.parts[part].shape != shape:
                group = f"groups of {self.packing.group_size}" if self.packing.group_size else "one group"
                raise bad(part, f"{list(shape)} for {bits} bits in {group}", list(self.parts[part].shape))

    @cached_property
    def order(self) -> np.ndarray | None:
        """Group of each input, int64 [k], where it is not the plain one. Raises CheckpointError for a group that does not exist."""
        if "g_idx" not in self.parts or self.packing.method == "awq":
            return None
        found = words_of(self.parts["g_idx"]).astype(np.int64)
        if len(found) and found.max() >= self.groups:
            raise CheckpointError(f"{self.place}.g_idx", expected=f"groups below {self.groups}", found=str(found.max()), remedy=AGAIN)
        plain = np.arange(self.shape[1]) // (self.packing.group_size or self.shape[1])
        return None if np.array_equal(found, plain) else found

    @property
    def contents(self) -> Contents:
        return self.held.get(self.place, self._contents)

    def _contents(self) -> Contents:
        zeros, bits = words_of(self.parts["qzeros"]), self.packing.bits
        if self.packing.method == "awq":
            points = unpack_interleaved(zeros).T
        else:
            points = (unpack_stream(zeros.T, bits, self.shape[0]) + np.uint8(self.packing.stored_less)) & np.uint8((1 << bits) - 1)
        return Contents(words_of(self.parts["qweight"]), np.ascontiguousarray(points), np.ascontiguousarray(self.parts["scales"].read().T))

    def codes(self, start: int, stop: int) -> np.ndarray:
        """uint8 [stop - start, k]"""
        words = self.contents.words
        if self.packing.method == "awq":
            first = start // 8
            codes = unpack_interleaved(words[:, first : -(-stop // 8)])[:, start - 8 * first : stop - 8 * first]
        else:
            codes = unpack_stream(words[:, start:stop], self.packing.bits, self.shape[1])
        return np.ascontiguousarray(codes.T)

    def __call__(self, start: int, stop: int) -> np.ndarray:
        groups = np.arange(self.shape[1]) // (self.packing.group_size or self.shape[1]) if self.order is None else self.order
        steps = self.codes(start, stop).astype(np.float32)
        steps -= self.contents.zeros[start:stop, groups]
        steps *= self.contents.scales[start:stop, groups]
        return steps

    @cached_property
    def coded(self) -> Coded | None:
        """None in another order of inputs than the plain one, or where no group of a kernel divides the group of the file."""
        size = kernel_group(self.packing.group_size or self.shape[1])
        if size is None or self.order is not None:
            return None
        bits, contents = self.packing.bits, self.contents
        step = np.float32(1 << Scheme(bits).shift)
        with np.errstate(over="ignore"):
            half = np.array_equal((contents.scales / step).astype(np.float16).astype(np.float32) * step, contents.scales)
        return Coded(Scheme(bits, size, bool((contents.zeros == 1 << (bits - 1)).all()), "nbits", half), self._quantized)

    def _quantized(self, start: int, stop: int) -> Quantized:
        coded, width, contents = self.coded, self.shape[1], self.contents
        assert coded is not None and coded.scheme.group_size, "asked only through coded"
        size = coded.scheme.group_size
        groups = -(-width // size)
        which = np.minimum(np.arange(groups) * size // (self.packing.group_size or width), self.groups - 1)
        zeros = contents.zeros[start:stop, which]
        codes = zeros.repeat(size, axis=1)  # padding stands for 0
        codes[:, :width] = self.codes(start, stop)
        return Quantized(codes, contents.scales[start:stop, which], zeros, coded.scheme, width)
