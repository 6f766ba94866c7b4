"""8 bits for encoders: two forms, `int8` (stored) and `int8-dynamic` (integer), and what was measured of them.

Stored (`int8`): codes uint8 in groups of 32 along the input, by `quantizers.nbits`; the graph turns them into float32 once, at load
(onnxruntime folds constants), and multiplies in float32. The file is a quarter, the vectors hold, and no kernel can saturate.

Integer (`int8-dynamic`): DynamicQuantizeMatMul (com.microsoft),

    scale[n] = max_k |w[n, k]| / 127        code[k, n] = clip(rint(w[n, k] / scale[n]), -127, 127)  int8        w_hat = code * scale
    x: one scale and zero point a call over [min(x, 0), max(x, 0)], uint8 (DynamicQuantizeLinear)

Why `int8` is not the integer form: cosine to torch of all-MiniLM-L6-v2's sentence vectors, 32 sentences, English, Japanese, typos
(min / mean; "sim" is fake quantization in torch, "run" the exported graph in onnxruntime 1.31 on AVX2 without VNNI):
    run  stored form                                                         0.9993 / 0.9998   (25.0 MB; float32 is 90.3)
    run  integer form                                                        0.9730 / 0.9895   (23.8 MB)
    run  onnxruntime's quantize_dynamic, per channel, on the exporter's graph 0.9781 / 0.9896
    run  the same, session.x64quantprecision=1 (U8U8, cannot saturate)        0.9766 / 0.9920
    run  MatMulNBits 8 bits, groups of 128 / 32, accuracy_level 4 (min)       0.9932 / 0.9981
    sim  8-bit word table in groups of 128, all else fp32                     0.99997 / 0.99999
    sim  weights per channel / groups of 128 / groups of 32, activations fp32  0.9965 / 0.9989 / 0.9995 (min)
    sim  activations per tensor, weights fp32                                 0.9692 / 0.9921
           of which fc2's input 0.9926, fc1's 0.9902, qkv's 0.9963, o's 0.9998 (min, each alone)
    sim  activations per row                                                  0.9822 / 0.9969
    sim  integer + smoothing 0.5 / 0.65 and shift, bias corrected (9 worst)   0.9824 / 0.9854 (min)
    sim  integer + 16 (fc2: 64) widest input channels kept in float32 (9 worst) 0.9979 / 0.9989
Speed on the same machine, one thread, CPU ms of 1x32 / 1x128 / 8x128, one interleaved run: stored 13.4 / 46.5 / 392, float32 14.0 / 50.6 / 386,
integer 8.7 / 33.4 / 288, quantize_dynamic 8.4 / 34.4 / 262, MatMulNBits groups of 32 16.8 / 77.1 / 590.
The short sentences ("Yes.", "ok thx") are the worst: few tokens to average over. Nothing with one activation scale a tensor reached 0.999.

Saturation: on x86 without VNNI the U8S8 kernel adds two products in 16 bits (vpmaddubsw) and may saturate; the integer form there costs the
difference of the two "run" lines above. With VNNI it cannot. `session.x64quantprecision` lets onnxruntime take U8U8 kernels instead.
"""

from __future__ import annotations

import numpy as np

PAIR_BOUND = 128  # 255 * 128 = 32640 fits int16, 255 * 129 does not
TOPS = (127, 112, 104, 96, 88, 80, 64)  # largest code a row may use; 64 never breaks the bound


def quantize_pairs(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [out, in] -> (codes int8 [in, out], scales float32 [out]): per row the largest code of TOPS with the least squared error under the bound.

    A pair beyond the bound gives up the excess in equal parts. Row [127, 127, ...] of equal weights -> codes 64.
    """
    largest = np.abs(weight).max(axis=1)
    largest = np.where(largest == 0, np.float32(1), largest).astype(np.float32)
    best = np.full(len(weight), np.inf, np.float32)
    codes, scales = np.zeros(weight.shape, np.int8), largest.copy()
    for top in TOPS:
        scale = largest / np.float32(top)
        tried = bounded(np.rint(weight / scale[:, None]).clip(-top, top))
        error = np.square(tried * scale[:, None] - weight).sum(axis=1)
        better = error < best
        best[better], scales[better] = error[better], scale[better]
        codes[better] = tried[better].astype(np.int8)
    return np.ascontiguousarray(codes.T), scales


def bounded(codes: np.ndarray) -> np.ndarray:
    """Codes [out, in] with |c[2 j]| + |c[2 j + 1]| <= PAIR_BOUND; changed in place where they are not (few are)."""
    even, odd = codes[:, 0 : codes.shape[1] - 1 : 2], codes[:, 1::2]
    over = np.nonzero(np.abs(even) + np.abs(odd) > PAIR_BOUND)
    one, two = even[over], odd[over]
    excess = np.abs(one) + np.abs(two) - PAIR_BOUND
    less = np.minimum(np.minimum(np.abs(one), np.abs(two)), np.floor(excess / 2))  # what the smaller one gives up
    first = np.abs(one) >= np.abs(two)
    even[over] = one - np.sign(one) * np.where(first, excess - less, less)
    odd[over] = two - np.sign(two) * np.where(first, less, excess - less)
    return codes


def worst_pair(codes: np.ndarray) -> int:
    """max |c[2 j]| + |c[2 j + 1]| of a kernel's codes int8 [in, out]."""
    size = np.abs(codes.astype(np.int16))
    if len(size) % 2:
        size = np.concatenate([size, np.zeros_like(size[:1])])
    return int((size[0::2] + size[1::2]).max(initial=0))


def dequantize_channels(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The twin's way back: float32 [out, in]."""
    return codes.T.astype(np.float32) * scales[:, None]
