"""Rotary position embedding: a twin in numpy of transformers' rope initialisers, so that no torch is needed.

Arithmetic is float32 where transformers' is, because an angle at position 8000 shifts by 5e-4 when one frequency moves by one ulp.

    inv_freq[i] = theta ** (-2 i / rotary_dim)           i in 0 .. rotary_dim / 2
    angle[p, i] = p * inv_freq[i];  cos and sin are multiplied by attention_factor

1. default   as above
2. linear    inv_freq / factor
3. llama3    wavelengths above original / low_freq_factor are divided by factor, those below original / high_freq_factor stay, between is blended
4. yarn      a ramp over i between interpolated and extrapolated frequencies (arXiv 2309.00071)
5. longrope  per-frequency divisors: `short_factor` while the sequence fits `original_max_position_embeddings`, `long_factor` beyond (2402.13753)
`dynamic` depends on every length seen so far and is refused by name, as is any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from compiler.errors import ArchitectureError

KNOWN_ROPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """inv_freq float32 [rotary_dim / 2]; long_inv_freq and switch_length only for longrope (rule 5)."""

    kind: str
    rotary_dim: int
    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0
    long_inv_freq: tuple[float, ...] | None = None
    switch_length: int | None = None


def rope_of(parameters: Mapping[str, Any], head_size: int, max_positions: int) -> Rope:
    """`rope_parameters` of one kind of layer (with rope_theta) -> Rope.

    Raises ArchitectureError for a rope type outside KNOWN_ROPES, a parameter that is missing, or a width the kernel refuses.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in KNOWN_ROPES:
        raise ArchitectureError(
            "config.json: rope_parameters.rope_type",
            expected=f"one of {', '.join(KNOWN_ROPES)}",
            found=repr(kind),
            remedy="this rope scaling has no fixed table of angles and cannot be built; set a supported type if the model allows it",
        )
    rotary_dim = int(head_size * float(parameters.get("partial_rotary_factor") or 1.0))
    if rotary_dim % 2 or rotary_dim == 0:
        raise ArchitectureError(
            "config.json: head_dim",
            expected="an even rotary width",
            found=f"{rotary_dim} of head size {head_size}",
            remedy="rope turns pairs: correct head_dim or partial_rotary_factor",
        )
    try:
        return BUILDERS[kind](parameters, rotary_dim, max_positions)
    except KeyError as missing:
        raise ArchitectureError(
            "config.json: rope_parameters",
            expected=f"{missing.args[0]} for rope type {kind}",
            found=f"keys {', '.join(sorted(parameters))}",
            remedy="complete the rope parameters of the base model's config.json",
        ) from missing


def powers(theta: float, rotary_dim: int) -> np.ndarray:
    """theta ** (2 i / rotary_dim), float32 [rotary_dim / 2].

    The exponent is rounded to float32 as transformers' is; the power is taken in float64 and rounded once, because float32 powers differ by an ulp from
    one processor to the next and a bundle must be the same bytes on each.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return np.power(float(theta), exponents.astype(np.float64)).astype(np.float32)


def row(values: np.ndarray) -> tuple[float, ...]:
    """float32 [n] as an exact, hashable tuple."""
    return tuple(float(value) for value in values.astype(np.float32))


def default_rope(parameters: Mapping[str, Any], rotary_dim: int, max_positions: int) -> Rope:
    """Rule 1."""
    return Rope("default", rotary_dim, row(1.0 / powers(parameters["rope_theta"], rotary_dim)))


def linear_rope(parameters: Mapping[str, Any], rotary_dim: int, max_positions: int) -> Rope:
    """Rule 2."""
    frequencies = np.float32(1.0) / powers(parameters["rope_theta"], rotary_dim)
    return Rope("linear", rotary_dim, row(frequencies / np.float32(parameters["factor"])))


def llama3_rope(parameters: Mapping[str, Any], rotary_dim: int, max_positions: int) -> Rope:
    """Rule 3."""
    frequencies = np.float32(1.0) / powers(parameters["rope_theta"], rotary_dim)
    factor, low, high = (np.float32(parameters[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = np.float32(parameters.get("original_max_position_embeddings") or max_positions)
    wavelengths = np.float32(2 * math.pi) / frequencies
    blend = (original / wavelengths - low) / (high - low)
    medium = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = np.where(wavelengths > original / low, frequencies / factor, frequencies)
    between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return Rope("llama3", rotary_dim, row(np.where(between, medium, scaled)))


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """yarn's attention temperature: 0.1 * weight * ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def yarn_rope(parameters: Mapping[str, Any], rotary_dim: int, max_positions: int) -> Rope:
    """Rule 4."""
    theta = float(parameters["rope_theta"])
    original = parameters.get("original_max_position_embeddings") or max_positions
    factor = parameters["factor"] if parameters.get("factor") is not None else max_positions / original
    attention = parameters.get("attention_factor")
    if attention is None:
        top, bottom = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention = yarn_scale(factor, top) / yarn_scale(factor, bottom) if top and bottom else yarn_scale(factor)

    def dimension(rotations: float) -> float:  # the (fractional) frequency index that turns `rotations` times over the original length
        return rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high += 0.001 if low == high else 0.0
    ramp = ((np.arange(rotary_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)).clip(0, 1)
    base = powers(theta, rotary_dim)
    frequencies = ramp / (np.float32(factor) * base) + (1 - ramp) / base
    return Rope("yarn", rotary_dim, row(frequencies), float(attention))


def longrope(parameters: Mapping[str, Any], rotary_dim: int, max_positions: int) -> Rope:
    """Rule 5."""
    original = parameters.get("original_max_position_embeddings") or max_positions
    factor = parameters["factor"] if parameters.get("factor") is not None else max_positions / original
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    base = powers(parameters["rope_theta"], rotary_dim)
    short, long = (np.asarray(parameters[key], np.float32) for key in ("short_factor", "long_factor"))
    if not len(short) == len(long) == rotary_dim // 2:
        raise ArchitectureError(
            "config.json: rope_parameters",
            expected=f"{rotary_dim // 2} values in short_factor and long_factor",
            found=f"{len(short)} and {len(long)}",
            remedy="take the rope parameters from the base model's own config.json",
        )
    return Rope("longrope", rotary_dim, row(1.0 / (short * base)), float(attention), row(1.0 / (long * base)), int(original))


BUILDERS = {"default": default_rope, "linear": linear_rope, "llama3": llama3_rope, "yarn": yarn_rope, "longrope": longrope}
