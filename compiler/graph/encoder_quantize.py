"""Dynamic 8 bits for encoders: weights per output channel, activations per tensor at run time (DynamicQuantizeMatMul, com.microsoft).

    scale[n] = max_k |w[n, k]| / 127        code[k, n] = clip(rint(w[n, k] / scale[n]), -127, 127)  int8        w_hat = code * scale
    x: one scale and zero point a call over [min(x, 0), max(x, 0)], uint8 (DynamicQuantizeLinear)
"""

from __future__ import annotations

import numpy as np

TOP = 127  # -128 is left out: the grid is symmetric


def quantize_channels(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [out, in] -> (codes int8 [in, out], the kernel's layout; scales float32 [out]). A row of zeros has scale 1 and codes 0."""
    largest = np.abs(weight).max(axis=1)
    scales = np.where(largest == 0, np.float32(TOP), largest).astype(np.float32) / np.float32(TOP)
    codes = np.rint(weight / scales[:, None]).clip(-TOP, TOP).astype(np.int8)
    return np.ascontiguousarray(codes.T), scales


def dequantize_channels(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The twin's way back: float32 [out, in]."""
    return codes.T.astype(np.float32) * scales[:, None]
