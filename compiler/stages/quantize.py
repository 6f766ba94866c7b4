"""Quantize: weights seen through their scheme.

The exporter quantizes as it streams, so no quantized checkpoint lies on the way to a bundle. This stage is the same
step as files in, files out: each weight becomes `dequantize(quantize(weight))` in float32, by the same code that fills
the kernels. It answers "what does the rounding alone cost", apart from kernels and activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.quantizers import affine
from compiler.scheme import Scheme, Schemes, matrix_name, stored_bytes
from compiler.store import cache_key


def scheme_of(view: TensorView, schemes: Schemes, config: Mapping[str, Any]) -> Scheme | None:
    """The scheme a tensor is stored in, or None where it stays float32."""
    name = matrix_name(view.name, config)
    scheme = schemes.of(name) if name else None
    return scheme if scheme and scheme.bits < 32 else None


def quantized_view(checkpoint: Checkpoint, schemes: Schemes) -> Checkpoint:
    """The checkpoint with every matrix seen through its scheme; lazy, the input is never changed."""

    def through(view: TensorView, scheme: Scheme) -> TensorView:
        def rows(start: int, stop: int) -> np.ndarray:
            block = view.rows(start, stop)
            if scheme.bits == 16:
                return block.astype(np.float16).astype(np.float32)
            return affine.dequantize(affine.quantize(block, scheme))

        return replace(view, dtype="F32", rows=rows)

    tensors = {name: through(view, scheme) if (scheme := scheme_of(view, schemes, checkpoint.config)) else view for name, view in checkpoint.tensors.items()}
    identity = {"default": str(schemes.default), "layers": {pattern: str(scheme) for pattern, scheme in schemes.overrides.items()}}
    return replace(checkpoint, tensors=tensors, digest_of=lambda: cache_key({"base": checkpoint.digest, "quantize": identity}))


def predicted_bytes(checkpoint: Checkpoint, schemes: Schemes, *, every_matrix: bool = False) -> int:
    """Bytes of the weights in a bundle, from shapes alone: codes, float32 scales, packed zero points, float32 for the rest.

    every_matrix  the encoder road: any 2-D tensor takes the default scheme
    """
    total = 0
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    for view in checkpoint.tensors.values():
        if tied and view.name == "lm_head.weight":
            continue
        scheme = schemes.default if every_matrix and len(view.shape) == 2 else scheme_of(view, schemes, checkpoint.config)
        total += 4 * view.size if scheme is None else stored_bytes(view.shape, scheme)
    return total
