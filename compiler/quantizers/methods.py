"""Quantizers as rows. A new one is a function here, a row, a test and a paragraph in docs/quantization.md.

Each takes a weight float32 [rows, width], a scheme in groups, and the input second moment H float32 [width, width] where it needs one,
and gives what the kernel reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from compiler.quantizers import gptq, nbits, search
from compiler.quantizers.pack import Packed, pack
from compiler.scheme import Scheme

Quantizer = Callable[[np.ndarray, Scheme, np.ndarray | None], Packed]


@dataclass(frozen=True)
class Method:
    """quantize: the function. calibrated: whether it needs H, and so text that is run through the model. source: where it is from."""

    quantize: Quantizer
    calibrated: bool
    source: str


def _rtn(weight: np.ndarray, scheme: Scheme, moment: np.ndarray | None) -> Packed:
    return nbits.quantize(weight, scheme)


def _search(weight: np.ndarray, scheme: Scheme, moment: np.ndarray | None) -> Packed:
    return pack(search.quantize(weight, scheme, None if moment is None else moment.diagonal()))


def _gptq(weight: np.ndarray, scheme: Scheme, moment: np.ndarray | None) -> Packed:
    if moment is None:
        raise ValueError("gptq needs the inputs' second moment")
    return pack(gptq.quantize(weight, scheme, moment))


METHODS: dict[str, Method] = {
    "rtn": Method(_rtn, False, "round to nearest, compiler.quantizers.affine"),
    "search": Method(_search, False, "scales of least squared error, compiler.quantizers.search"),
    "imatrix": Method(_search, True, "the same with each input weighted by its mean square, as llama.cpp's imatrix does"),
    "gptq": Method(_gptq, True, "arXiv 2210.17323, compiler.quantizers.gptq"),
}
