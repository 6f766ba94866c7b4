"""`Scheme`: how one tensor is quantized, and the words a recipe uses for it.

The quantization equation, for each group of `group_size` neighbours along the input dimension:

    code  = clip(round(w / scale) + zero_point, 0, 2**bits - 1)      uint
    w_hat = (code - zero_point) * scale                               float32

symmetric:   zero_point = 2**(bits - 1) and is not stored
asymmetric:  zero_point is a stored uint of `bits` bits
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from compiler.errors import RecipeError

GROUP_SIZES = (16, 32, 64, 128, 256)
FORM = re.compile(r"int(?P<bits>[48])(-g(?P<group>\d+))?(-(?P<asym>asym|sym))?")
KNOWN = "int4-gN, int8-gN (N in 16, 32, 64, 128, 256; append -asym for stored zero points), int8, int8-stored and int8-dynamic (encoders), fp16, fp32"


ENCODER_KERNELS = {"rows": "int8", "stored": "int8-stored", "dynamic": "int8-dynamic"}


@dataclass(frozen=True)
class Scheme:
    """Granularity and kernel of one tensor.

    kernel  float:  MatMul on float32, or float16 storage cast once at load
            nbits:  MatMulNBits with accuracy_level 4, GatherBlockQuantized for lookups (weights only)
            stored: 8-bit weights in groups of 32, expanded to float32 once at load; small on disk, exact enough for encoders
            rows: 8-bit activations with one scale a token and per-output-channel 8-bit weights, outlying channels float (`graph.encoder_rows`), for encoders
            dynamic: 8-bit activations (one scale a call) and per-output-channel 8-bit weights (DynamicQuantizeMatMul), for encoders
    """

    bits: int = 32
    group_size: int | None = None  # None: per output channel, or not quantized
    symmetric: bool = True
    kernel: str = "float"

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    def __str__(self) -> str:
        if not self.quantized:
            return f"fp{self.bits}"
        if self.kernel in ENCODER_KERNELS:
            return ENCODER_KERNELS[self.kernel]
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"int{self.bits}{group}{'' if self.symmetric else '-asym'}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Schemes:
    """A scheme for every weight matrix of a model: a default and overrides by name pattern, the last match wins.

    Names are the fused matrices of the graph: `model.layers.3.attn.qkv_proj`, `model.layers.3.attn.o_proj`,
    `model.layers.3.mlp.gate_up_proj`, `model.layers.3.mlp.down_proj`, `lm_head`, `model.embed_tokens`.
    A tied embedding follows `lm_head`: both are one stored tensor.
    """

    default: Scheme
    overrides: Mapping[str, Scheme] = field(default_factory=dict)

    def of(self, name: str) -> Scheme:
        chosen = self.default
        for pattern, scheme in self.overrides.items():
            if fnmatchcase(name, pattern):
                chosen = scheme
        return chosen


ENCODER_SCHEMES = {"int8": Scheme(8, None, True, "rows"), "int8-stored": Scheme(8, 32, True, "stored"), "int8-dynamic": Scheme(8, None, True, "dynamic")}


def parse_scheme(text: str, place: str = "quantize.scheme") -> Scheme:
    """`int4-g64-asym` -> Scheme(4, 64, False, "nbits"). Raises RecipeError for anything unknown."""
    if text in ("fp32", "fp16"):
        return Scheme(bits=int(text[2:]))
    match = FORM.fullmatch(text)
    bits = int(match["bits"]) if match else 0
    if match and match["group"] and int(match["group"]) in GROUP_SIZES:
        return Scheme(bits, int(match["group"]), match["asym"] != "asym", "nbits")
    if text in ENCODER_SCHEMES:
        return ENCODER_SCHEMES[text]
    raise RecipeError(place, expected=KNOWN, found=repr(text), remedy="choose one of these schemes")
