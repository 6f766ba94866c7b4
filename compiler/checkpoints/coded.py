"""Matrices that are stored as codes already (GPTQ, AWQ, some types of GGUF): what is needed to hand the codes on instead of rounding them again.

Rows of such a matrix read as float32 like any others; their function carries `coded` beside (`TensorView.coded`). A merge that changes the matrix puts
other rows in its place, and the codes are gone with the old ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from compiler.quantizers.affine import Quantized
from compiler.scheme import GROUP_SIZES, Scheme

CodeRows = Callable[[int, int], Quantized]  # (start, stop) -> codes of these rows, with zero points, padding of a tail group decoded to 0


@dataclass(frozen=True)
class Coded:
    """Codes of one stored matrix. scheme: the narrowest that holds them exactly; rows: the codes."""

    scheme: Scheme
    rows: CodeRows

    def under(self, scheme: Scheme, start: int, stop: int) -> Quantized:
        """The codes of rows under a scheme that `holds` says can take them.

        Groups of 128 under int4-g64: the same codes, each scale twice. Symmetric ones under an asymmetric scheme: zero points of the middle.
        """
        stored = self.rows(start, stop)
        times = (self.scheme.group_size or 1) // (scheme.group_size or 1)
        groups = -(-stored.width // (scheme.group_size or 1))
        zeros = None if scheme.symmetric or stored.zero_points is None else stored.zero_points.repeat(times, axis=1)[:, :groups]
        scales = stored.scales.repeat(times, axis=1)[:, :groups]
        return Quantized(stored.codes[:, : groups * (scheme.group_size or 1)], scales, zeros, scheme, stored.width)


def holds(scheme: Scheme, stored: Scheme) -> bool:
    """Can `scheme` take the codes of `stored` unchanged? int4-g64-asym those of int4-g128: yes; int4-g64-s16 those of int4-g64: no, scales would be rounded."""
    if scheme.kernel != "nbits" or scheme.bits != stored.bits or not scheme.group_size or not stored.group_size:
        return False
    return stored.group_size % scheme.group_size == 0 and scheme.symmetric <= stored.symmetric and scheme.half_scales <= stored.half_scales


def common(schemes: list[Scheme]) -> Scheme | None:
    """The one scheme that holds the codes of several matrices that are stacked: q of int4-g128, k of int4-g64-asym -> int4-g64-asym. None: there is none."""
    if len({scheme.bits for scheme in schemes}) != 1:
        return None
    sizes = [scheme.group_size or 0 for scheme in schemes]
    half, symmetric = all(scheme.half_scales for scheme in schemes), all(scheme.symmetric for scheme in schemes)
    found = replace(schemes[0], group_size=min(sizes), symmetric=symmetric, half_scales=half)
    return found if all(holds(found, scheme) for scheme in schemes) else None


def kernel_group(size: int) -> int | None:
    """The largest group of a kernel in which groups of `size` can be written by repeating scales. 512 -> 256, 48 -> 16, 24 -> None."""
    return next((group for group in reversed(GROUP_SIZES) if size % group == 0), None)
