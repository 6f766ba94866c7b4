"""OFT (Qiu et al. 2023, arXiv 2306.07280) and BOFT (Liu et al. 2024, arXiv 2311.06243), as PEFT 0.21 stores them: rotations of the inputs.

    merged = W Q^T                      Q block-diagonal, b x b blocks; W [out, in]
    embedding: merged = W Q             W [vocabulary, dim]
    BOFT: merged = s o (W Q^T)          s [out, 1]; Q = M_(m-1) ... M_1 M_0, M_i = P_i diag(Q_i) P_i^T for m butterfly factors
    difference = merged - W

    OFT:  K skew, its upper triangle row by row in oft_R.weight [blocks, b (b - 1) / 2]
          use_cayley_neumann, n terms: Q = I + 2 K + ... + 2 K^(n-2) + K^(n-1); n 2: I + 2 K; n 3 as n 4
          else Cayley: Q = (I - K) (I + K)^-1
          block_share: one block for all; coft: K shrunk to a norm of at most eps / sqrt(blocks)
    BOFT: K = (R - R^T) / 2, R in boft_R [m, blocks, b, b]; Cayley; P_i deals out half blocks (`butterfly`), P_0 = I

Both rotate inside a row, so a block of rows needs no other. PEFT writes neither for Conv1D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from compiler.checkpoints.view import TensorView
from compiler.deltas.base import ANY, Change, Delta, Edit, wrong_delta
from compiler.deltas.peft import Adapter, Parts, make_delta, misfit, modules_of, need

Rotation = Callable[[TensorView], np.ndarray]  # stored factors -> Q float32 [blocks, b, b]

SINCE = (0, 18)  # PEFT changed the Cayley-Neumann series in this version


def load_oft(adapter: Adapter) -> Delta:
    """A PEFT OFT adapter. Raises DeltaError: adapters of PEFT before 0.18 that use the series, parts of another form."""
    _refuse_old(adapter)
    modules, rest = modules_of(adapter, ("oft_R", "oft_embedding_R"), "oft_")
    rotation: Rotation = lru_cache(maxsize=1)(lambda stored: _oft_rotation(stored.read(), adapter.config))  # of the tensor at hand
    return make_delta(adapter, "oft", [_oft_edit(adapter, module, parts, rotation) for module, parts in modules.items()], modules, rest)


def load_boft(adapter: Adapter) -> Delta:
    """A PEFT BOFT adapter. Raises DeltaError: parts that do not fit together."""
    modules, rest = modules_of(adapter, ("boft_R", "boft_s"), "boft_")
    rotation: Rotation = lru_cache(maxsize=1)(lambda stored: _boft_rotation(stored.read()))
    return make_delta(adapter, "boft", [_boft_edit(adapter, module, parts, rotation) for module, parts in modules.items()], modules, rest)


def _refuse_old(adapter: Adapter) -> None:
    version = str(adapter.config.get("peft_version") or "0.0")
    numbers = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])
    if adapter.config.get("use_cayley_neumann", True) and numbers < SINCE:
        found = f"PEFT {version}" if adapter.config.get("peft_version") else "no peft_version, so one before 0.18"
        raise wrong_delta(adapter.origin, "OFT as PEFT writes it since 0.18", found, "train it again: the series of use_cayley_neumann was another one")


def _oft_edit(adapter: Adapter, module: str, parts: Parts, rotation: Rotation) -> Edit:
    place = adapter.place(module)
    embedding = "oft_embedding_R" in parts
    (stored,) = need(place, parts, "oft_embedding_R" if embedding else "oft_R")
    size = _block_size(stored.shape[-1])
    if len(stored.shape) != 2 or size * (size - 1) // 2 != stored.shape[1]:
        raise misfit(place, "oft_R of shape [blocks, b (b - 1) / 2]", parts)
    shared = bool(adapter.config.get("block_share"))
    inputs = ANY if shared else stored.shape[0] * size

    def rotate(rows: np.ndarray) -> np.ndarray:
        return _turned(rows, rotation(stored) if embedding else rotation(stored).swapaxes(1, 2))

    return _rotating(f"{module}.weight", (ANY, inputs), rotate, size, place)


def _boft_edit(adapter: Adapter, module: str, parts: Parts, rotation: Rotation) -> Edit:
    place = adapter.place(module)
    stored, scale = need(place, parts, "boft_R", "boft_s")
    if len(stored.shape) != 4 or stored.shape[2] != stored.shape[3] or len(scale.shape) != 2 or scale.shape[1] != 1:
        raise misfit(place, "boft_R [factors, blocks, b, b] and boft_s [out, 1]", parts)
    factors, count, size = stored.shape[:3]
    if factors > 1 and (size % 2 or count % 2 ** (factors - 1)):
        raise misfit(place, f"blocks of an even size, {2 ** (factors - 1)} or a multiple of them, for {factors} butterfly factors", parts)
    orders = [butterfly(count * size, size, number) for number in range(factors)]

    def rotate(rows: np.ndarray) -> np.ndarray:
        for blocks, order in zip(rotation(stored), orders, strict=True):
            sorted_rows = np.empty_like(rows)
            sorted_rows[:, order] = rows
            rows = _turned(sorted_rows, blocks.swapaxes(1, 2))[:, order]
        return rows

    return _rotating(f"{module}.weight", (scale.shape[0], count * size), rotate, size, place, scale)


def butterfly(width: int, size: int, number: int) -> np.ndarray:
    """P of butterfly factor `number` as an index: int [width]. Width 8, size 2, number 1 -> [0 2 1 3 4 6 5 7].

    Within each run of size * 2^number columns the half blocks are dealt out, those at even places first, then those at odd ones.
    """
    halves = np.arange(width).reshape(-1, 2 ** (number + 1), size // 2) if number else np.arange(width).reshape(1, 1, width)
    return np.concatenate([halves[:, 0::2], halves[:, 1::2]], axis=1).reshape(-1)


def _turned(rows: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """rows [n, inputs] times the block-diagonal matrix of `blocks` [count or 1, b, b] -> [n, inputs]."""
    parts = rows.reshape(len(rows), -1, blocks.shape[1]).swapaxes(0, 1)
    return np.matmul(parts, blocks).swapaxes(0, 1).reshape(rows.shape)


def _rotating(target: str, shape: tuple[int, int], rotate: Callable[[np.ndarray], np.ndarray], size: int, place: str, scale: TensorView | None = None) -> Edit:
    """rotate: rows [n, inputs] -> rows times Q^T (or Q). size: of its blocks. scale [out, 1]: BOFT's."""

    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        merged = rotate(base)
        if scale is not None:
            merged = merged * scale.rows(first, first + len(base))
        return np.asarray(merged - base)

    def prepare(tensor: TensorView, transposed: bool) -> Change:
        if tensor.shape[1] % size:
            found = f"{tensor.shape[1]}: the adapter is for another base"
            raise wrong_delta(place, f"inputs in whole blocks of {size}", found, "use the base it was trained on")
        return change

    return Edit(target, shape, change, reads_base=True, prepare=prepare)


def _block_size(entries: int) -> int:
    """b for which b (b - 1) / 2 is nearest to the number of entries: 6 -> 4."""
    return round((1 + (1 + 8 * entries) ** 0.5) / 2)


def _boft_rotation(stored: np.ndarray) -> np.ndarray:
    """boft_R [factors, blocks, b, b] -> Q float32 of the same shape."""
    factors = stored.astype(np.float64).reshape(-1, *stored.shape[2:])
    return _cayley((factors - factors.swapaxes(1, 2)) / 2).reshape(stored.shape)


def _oft_rotation(stored: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """oft_R.weight [blocks, b (b - 1) / 2] -> Q float32 [blocks, b, b]."""
    size = _block_size(stored.shape[1])
    skew = np.zeros((len(stored), size, size))
    upper = np.triu_indices(size, 1)
    skew[:, upper[0], upper[1]] = stored
    skew -= skew.swapaxes(1, 2)
    if config.get("coft"):
        largest = float(config.get("eps", 6e-5)) / len(stored) ** 0.5
        norms = np.sqrt((skew**2).sum((1, 2), keepdims=True))
        skew *= np.minimum(1.0, largest / np.maximum(norms, largest))
    if config.get("use_cayley_neumann", True):
        return _neumann(skew, int(config.get("num_cayley_neumann_terms", 5)))
    return _cayley(skew)


def _neumann(skew: np.ndarray, terms: int) -> np.ndarray:
    result = np.eye(skew.shape[1]) + (2 * skew if terms > 1 else 0 * skew)
    if terms > 2:
        power = skew @ skew
        result += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            result += 2 * power
        result += power @ skew
    return result.astype(np.float32)


def _cayley(skew: np.ndarray) -> np.ndarray:
    """(I - K) (I + K)^-1, by solving X (I + K) = I - K: transposed, (I + K)^T X^T = (I - K)^T."""
    one = np.eye(skew.shape[1])
    return np.linalg.solve((one + skew).swapaxes(1, 2), (one - skew).swapaxes(1, 2)).swapaxes(1, 2).astype(np.float32)
