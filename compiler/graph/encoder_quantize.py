"""8-bit weights of encoders for integer kernels: one scale an output channel, and neighbouring codes bounded so that no sum saturates.

    w_hat[n, k] = code[k, n] * scale[n]        scale[n] = max_k |w[n, k]| / top[n]        |code[2 j, n]| + |code[2 j + 1, n]| <= 128

On x86 without VNNI the U8S8 kernel multiplies uint8 activations with int8 weights and adds two neighbouring products in 16 bits (vpmaddubsw), where
255 * 128 fits and 255 * 129 does not. Bounding the pair and not each code (7 bits) costs half: root mean square error of normal weights 1.46 times that of
full 8 bits, where 7 bits have 2. Hence the same file is right on every processor. Without the bound, one scale a call on this kernel lost the difference
between 0.9730 and 0.9807 (min cosine of all-MiniLM-L6-v2's sentence vectors, AVX2).

`int8-dynamic-vnni` leaves the bound out: for processors that add products in 32 bits (`targets.machine.sums_in_32_bits`), and refused by the others.

Forms (`compiler.scheme`), cosine to float32 of 32 sentences of all-MiniLM-L6-v2, English, Japanese, typos (min / mean), and the file:
    int8-stored    codes in groups of 32, float32 once at load and in arithmetic          0.9993 / 0.9998   25.0 MB   (float32: 90.3)
    int8           `encoder_rows`: half of the arithmetic in integers, one scale a token     0.9992 / 0.9997   29.3 MB
    int8-dynamic   all of it, one activation scale a call, smoothed, loud channels float     0.9965 / 0.9991   24.0 MB
    int8-dynamic-vnni  the same, codes of the full range, sums of 32 bits                    0.9959 / 0.9991   23.8 MB
    the same with neither                                                                  0.9807 / 0.9920   23.8 MB
    onnxruntime's quantize_dynamic, per channel                                              0.9781 / 0.9896
    MatMulNBits 8 bits, groups of 128 / 32, accuracy_level 4                                 0.9932 / 0.9981 (min), and on AVX2 slower than float32
Processor ms of 1x32 / 1x128 / 8x128, one thread, AVX2, a busy machine, least of an interleaved run: float32 13.1 / 46.5 / 363 (traced graph 14.1 / 49.8 / 402),
int8 11.5 / 42.0 / 330, DynamicQuantizeMatMul without wide channels 7.5 / 28.8 / 231, onnxruntime's quantize_dynamic 8.9 / 32.8 / 255.
The short sentences ("Yes.", "ok thx") are the worst: few tokens to average over.
"""

from __future__ import annotations

import numpy as np

PAIR_BOUND = 128  # 255 * 128 = 32640 fits int16, 255 * 129 does not
TOPS = (127, 112, 104, 96, 88, 80, 64)  # largest code a row may use; 64 never breaks the bound


def quantize_channels(weight: np.ndarray, *, full_range: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """float32 [out, in] -> (codes int8 [in, out], scales float32 [out]): per row the largest code of TOPS with the least squared error under the bound.

    A pair beyond the bound gives up the excess in equal parts. Row [127, 127, ...] of equal weights -> codes 64.
    full_range  no bound, and the largest code is 127
    """
    largest = np.abs(weight).max(axis=1)
    largest = np.where(largest == 0, np.float32(1), largest).astype(np.float32)
    best = np.full(len(weight), np.inf, np.float32)
    codes, scales = np.zeros(weight.shape, np.int8), largest.copy()
    for top in TOPS[:1] if full_range else TOPS:
        scale = largest / np.float32(top)
        tried = np.rint(weight / scale[:, None]).clip(-top, top)
        tried = tried if full_range else bounded(tried)
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
