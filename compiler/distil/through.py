"""A student seen through its scheme while it is trained: every forward pass multiplies by dequantize(quantize(W)), gradients go to W as if it were not rounded.

That is the straight-through estimator (Bengio et al., arXiv 1308.3432) with the very quantizer of the export, `quantizers.affine` by way of
`evaluation.faithful.round_through`: what rounds to nearest later is what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils import parametrize

from compiler.evaluation.faithful import round_through
from compiler.scheme import Scheme, Schemes, matrix_name


class Through(torch.nn.Module):
    """W -> W as `scheme` stores it, straight through."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        rounded = weight.detach().clone()
        round_through(rounded.numpy(), self.scheme)
        return weight + (rounded - weight.detach())


@contextmanager
def seen_through(student: Any, schemes: Schemes, config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, every matrix that `schemes` rounds is seen rounded; afterwards the float weights that were trained stand there again."""
    touched = []
    for name, part in list(student.named_modules()):
        if not isinstance(part, (torch.nn.Linear, torch.nn.Embedding)):
            continue
        fused = matrix_name(f"{name}.weight", config)
        scheme = schemes.of(fused) if fused else Scheme()
        if scheme.quantized:
            parametrize.register_parametrization(part, "weight", Through(scheme), unsafe=True)
            touched.append(part)
    try:
        yield
    finally:
        for part in touched:
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=False)
