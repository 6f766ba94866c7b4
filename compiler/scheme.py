"""`Scheme`: how one tensor is quantized, and the words a recipe uses for it.

The quantization equation, for each group of `group_size` neighbours along the input dimension:

    code  = clip(round(w / scale) + zero_point, 0, 2**bits - 1)      uint
    w_hat = (code - zero_point) * scale                               float32

symmetric:   zero_point = 2**(bits - 1) and is not stored
asymmetric:  zero_point is a stored uint of `bits` bits

Kernels know 4 and 8 bits (`kernel_bits`). A scheme of other bits runs on the next larger kernel with its codes left-aligned,

    kernel code = code << (kernel_bits - bits),  kernel scale = scale / 2**(kernel_bits - bits)

which is the same number exactly. The file leaves out the low bits, all zero: the bits of a scheme are what is stored, its kernel bits
what is read in each multiplication.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from compiler.errors import RecipeError

GROUP_SIZES = (16, 32, 64, 128, 256)
FORM = re.compile(r"int(?P<bits>[2-8])(-g(?P<group>\d+))?(-(?P<asym>asym|sym))?(-(?P<half>s16))?")
KNOWN = (
    "intB-gN (B from 2 to 8; N in 16, 32, 64, 128, 256; append -asym for stored zero points, -s16 for float16 scales), "
    "int8-rows (decoders), int8, int8-stored, int8-dynamic and int8-dynamic-vnni (encoders), fp16, fp32"
)
NAMES = {"rows": "int8", "stored": "int8-stored", "dynamic": "int8-dynamic", "tokens": "int8-rows"}  # kernel -> its one scheme


@dataclass(frozen=True)
class Scheme:
    """Granularity and kernel of one tensor.

    kernel  float:  MatMul on float32, or float16 storage cast once at load
            nbits:  MatMulNBits with accuracy_level 4, GatherBlockQuantized for lookups (weights only)
            stored: 8-bit weights in groups of 32, expanded to float32 once at load; small on disk, exact enough for encoders
            tokens: 8-bit activations (one scale a token) and per-output-channel weights of 7 bits in a byte (MatMulIntegerToFloat), for decoders
            rows: 8-bit activations with one scale a token and per-output-channel 8-bit weights, outlying channels float (`graph.encoder_rows`), for encoders
            dynamic: the same with one scale a call (DynamicQuantizeMatMul), in all matrices, for encoders
    """

    bits: int = 32
    group_size: int | None = None  # None: per output channel, or not quantized
    symmetric: bool = True
    kernel: str = "float"
    half_scales: bool = False  # kernel scales are float16 in the file; the codes are chosen for the rounded scale
    full_range: bool = False  # of `dynamic`: codes up to 127 whatever their neighbour, for processors that add products of 8 bits in 32 (VNNI)

    @property
    def kernel_bits(self) -> int:
        """Bits of a code in the kernel: 4 or 8."""
        return 4 if self.bits <= 4 else 8

    @property
    def shift(self) -> int:
        """How far a kernel's code is left of the code."""
        return self.kernel_bits - self.bits

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    def __str__(self) -> str:
        if not self.quantized:
            return f"fp{self.bits}"
        if self.kernel in NAMES:
            return NAMES[self.kernel] + ("-vnni" if self.full_range else "")
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"int{self.bits}{group}{'' if self.symmetric else '-asym'}{'-s16' if self.half_scales else ''}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Schemes:
    """A scheme for every weight matrix of a model: a default and overrides by name pattern, the last match wins.

    Names are the fused matrices of the graph: `model.layers.3.attn.qkv_proj`, `model.layers.3.attn.o_proj`,
    `model.layers.3.mlp.gate_up_proj`, `model.layers.3.mlp.down_proj`, `lm_head`, `model.embed_tokens`.
    A tied embedding follows `lm_head`: both are one stored tensor. Under `int8-rows` head and embedding are int8-g64: the head reads one token at a time,
    and a lookup needs groups.
    """

    default: Scheme
    overrides: Mapping[str, Scheme] = field(default_factory=dict)

    def of(self, name: str) -> Scheme:
        chosen = self.default
        for pattern, scheme in self.overrides.items():
            if fnmatchcase(name, pattern):
                chosen = scheme
        return HEAD_OF_ROWS if chosen.kernel == "tokens" and name in ("lm_head", "model.embed_tokens") else chosen


FUSED = (
    (re.compile(r"(model\.layers\.\d+)\.self_attn\.(?:q|k|v|qkv)_proj\.weight"), r"\1.attn.qkv_proj"),
    (re.compile(r"(model\.layers\.\d+)\.self_attn\.o_proj\.weight"), r"\1.attn.o_proj"),
    (re.compile(r"(model\.layers\.\d+)\.mlp\.(?:gate|up|gate_up)_proj\.weight"), r"\1.mlp.gate_up_proj"),
    (re.compile(r"(model\.layers\.\d+)\.mlp\.down_proj\.weight"), r"\1.mlp.down_proj"),
    (re.compile(r"lm_head\.weight"), "lm_head"),
)


def matrix_name(tensor: str, config: Mapping[str, Any]) -> str | None:
    """The fused matrix of the graph that a checkpoint tensor belongs to; None for vectors and what is never quantized.

    `model.layers.3.self_attn.k_proj.weight` -> `model.layers.3.attn.qkv_proj`; a tied embedding -> `lm_head`.
    """
    if tensor == "model.embed_tokens.weight":
        return "lm_head" if config.get("tie_word_embeddings") else "model.embed_tokens"
    for pattern, name in FUSED:
        if match := pattern.fullmatch(tensor):
            return match.expand(name)
    return None


def stored_bytes(shape: tuple[int, ...], scheme: Scheme) -> int:
    """[rows, width] under a scheme. [576, 576] at int4-g32: 576 * 18 * (16 + 4) = 207360."""
    size = math.prod(shape)
    if not scheme.quantized or len(shape) != 2:
        return size * scheme.bits // 8
    rows, width = shape
    if scheme.group_size is None:
        return size * scheme.kernel_bits // 8 + 4 * rows
    groups = -(-width // scheme.group_size)
    zero_points = 0 if scheme.symmetric else -(-groups * scheme.kernel_bits // 8)
    return rows * (groups * (scheme.group_size * scheme.bits // 8 + (2 if scheme.half_scales else 4)) + zero_points)


ENCODER_SCHEMES = {
    "int8": Scheme(8, None, True, "rows"),
    "int8-stored": Scheme(8, 32, True, "stored"),
    "int8-dynamic": Scheme(8, None, True, "dynamic"),
    "int8-dynamic-vnni": Scheme(8, None, True, "dynamic", full_range=True),
}
DECODER_SCHEMES = {"int8-rows": Scheme(7, None, True, "tokens")}
HEAD_OF_ROWS = Scheme(8, 64, True, "nbits")


def parse_scheme(text: str, place: str = "quantize.scheme") -> Scheme:
    """`int4-g64-asym` -> Scheme(4, 64, False, "nbits"). Raises RecipeError for anything unknown."""
    if text in ("fp32", "fp16"):
        return Scheme(bits=int(text[2:]))
    match = FORM.fullmatch(text)
    bits = int(match["bits"]) if match else 0
    if match and match["group"] and int(match["group"]) in GROUP_SIZES:
        return Scheme(bits, int(match["group"]), match["asym"] != "asym", "nbits", bool(match["half"]))
    if text in ENCODER_SCHEMES or text in DECODER_SCHEMES:
        return {**ENCODER_SCHEMES, **DECODER_SCHEMES}[text]
    raise RecipeError(place, expected=KNOWN, found=repr(text), remedy="choose one of these schemes")


def prompt_scheme(name: str, scheme: Scheme) -> Scheme:
    """What a matrix has in the graph for prompts (`quantize.prompts`): by row where it is in groups; head, embedding and all others stay as they are."""
    return DECODER_SCHEMES["int8-rows"] if scheme.kernel == "nbits" and name not in ("lm_head", "model.embed_tokens") else scheme
