"""Smoothing: what is loud in the inputs of a matrix is moved into its weights, channel by channel, before anything is rounded.

    y = W x = (W diag(s)) (x / s)

The division is folded into whatever makes x, so the float model stays the same function and no node is added:

| matrix | made by | x / s |
|---|---|---|
| qkv_proj, gate_up_proj | the norm before it | gamma / s |
| down_proj | activation(gate) * up | rows of up / s |
| o_proj | attention's mix of values | rows of v / s; heads that share a value share s |

A matrix whose input has no such maker (no norm before it, as in olmo2; the head, whose table a tied model also
reads) stays as it is.

For each matrix s is the best of CANDIDATES, s[k] = rms(x[k])^a / rms(W[:, k])^b around a median of 1, by what kernel and quantizer then lose,

    J(s) = gain tr(dW H dW^T) + sum_k |W[:, k] s[k]|^2 E[e_k^2]

dW rounding W diag(s) to nearest in its scheme, H the second moment of x / s, e the kernel's rounding of x / s to 8 bits in blocks of the group (rule 2 of
compiler.quantizers.sensitivity). s = 1 is a candidate, so J never grows.

Sources: SmoothQuant (arXiv 2211.10438) for the folding and b > 0, AWQ (arXiv 2306.00978) for the search over a with b = 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.graph.spec import DecoderSpec, decoder_spec
from compiler.quantizers.calibrate import Block, BlockStream, Moment
from compiler.quantizers.moments import output_error
from compiler.quantizers.sensitivity import in_blocks, rounded
from compiler.scheme import Scheme, Schemes, matrix_name
from compiler.store import cache_key

if TYPE_CHECKING:
    import torch

Report = Callable[[str, int, int], None]
CANDIDATES = ((0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0), (0.5, 0.5), (0.75, 0.25))
# What a method is taken to leave of the error of rounding to nearest. Assumed, not measured: it only steers the choice of s.
GAIN = {"rtn": 1.0, "search": 0.8, "imatrix": 0.6, "gptq": 0.4}
ROWS = 256  # of a matrix, to choose by
TOKENS = 256  # inputs, to choose by
REACH = 1e3  # s stays within 1 / REACH and REACH


@dataclass(frozen=True)
class Change:
    """One tensor of the smoothed model: (w + offset) / rows[:, None] * columns[None, :] - offset. None leaves a side alone."""

    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    offset: float = 0.0

    def of(self, block: np.ndarray, start: int = 0) -> np.ndarray:
        """Rows of the tensor from `start` on, changed; float32, a new array."""
        if self.columns is not None:
            block = block * self.columns
        if self.rows is not None:
            divisor = self.rows[start : start + len(block)].reshape(-1, *[1] * (block.ndim - 1))
            block = (block + np.float32(self.offset)) / divisor - np.float32(self.offset)
        return block

    def view(self, view: TensorView) -> TensorView:
        return replace(view, dtype="F32", rows=lambda start, stop: self.of(view.rows(start, stop), start))


def smoothed(checkpoint: Checkpoint, scales: Mapping[str, np.ndarray]) -> Checkpoint:
    """The same function with other weights; lazy. scales: fused matrix -> s float32 [k], as `smoothing` gives them."""
    changes = changes_of(checkpoint.tensors, checkpoint.config, scales)
    tensors = {name: changes[name].view(view) if name in changes else view for name, view in checkpoint.tensors.items()}
    digest = cache_key({name: hashlib.sha256(scales[name].tobytes()).hexdigest() for name in sorted(scales)})
    return replace(checkpoint, tensors=tensors, digest_of=lambda: cache_key({"base": checkpoint.digest, "smooth": digest}))


def changes_of(names: Iterable[str], config: Mapping[str, Any], scales: Mapping[str, np.ndarray]) -> dict[str, Change]:
    """Tensor name -> what becomes of it, for those of `names` that change."""
    spec, known, changes = decoder_spec(config), set(names), dict[str, Change]()
    for name in known:
        matrix = matrix_name(name, config)
        if matrix is not None and matrix in scales:
            changes[name] = Change(columns=scales[matrix])
    for matrix, scale in scales.items():
        for name, divisor, offset in makers(spec, matrix, scale):
            if name in known:
                changes[name] = replace(changes.get(name, Change()), rows=divisor, offset=offset)
    return changes


def makers(spec: DecoderSpec, matrix: str, scale: np.ndarray) -> list[tuple[str, np.ndarray, float]]:
    """(tensor, divisor of its rows, offset) of what makes the inputs of a matrix; empty where nothing can take the division."""
    layer, kind, fused = matrix.rsplit(".", 2)[0], matrix.rsplit(".")[-1], spec.family.fused_weights
    if kind in ("qkv_proj", "gate_up_proj"):
        norm = spec.family.norms[0 if kind == "qkv_proj" else 2]
        return [] if norm is None else [(f"{layer}.{norm}.weight", scale, spec.family.norm_offset)]
    if kind == "down_proj":
        name, before = ("mlp.gate_up_proj", spec.intermediate) if fused else ("mlp.up_proj", 0)
    elif kind == "o_proj":
        name, before = ("self_attn.qkv_proj", spec.q_width + spec.kv_width) if fused else ("self_attn.v_proj", 0)
        scale = scale.reshape(spec.kv_heads, -1, spec.head_size)[:, 0].reshape(-1)
    else:
        return []
    divisor = np.concatenate([np.ones(before, np.float32), scale])
    return [(f"{layer}.{name}.{part}", divisor, 0.0) for part in ("weight", "bias")]


def smoothing(checkpoint: Checkpoint, windows: np.ndarray, schemes: Schemes, method: str, report: Report) -> dict[str, np.ndarray]:
    """s float32 [k] of every matrix whose inputs can be divided and for which s = 1 is not the best; one pass of the float model, block by block.

    windows  int64 [count, length] of calibration text. Raises as BlockStream does.
    """
    spec, stream, found = decoder_spec(checkpoint.config), BlockStream(checkpoint, windows), dict[str, np.ndarray]()
    for number, block in enumerate(stream.blocks()):
        found |= _of_block(block, spec, schemes, method)
        report("blocks smoothed", number + 1, stream.block_count)
    return found


def _of_block(block: Block, spec: DecoderSpec, schemes: Schemes, method: str) -> dict[str, np.ndarray]:
    names = [
        name for name in block.linears if schemes.of(name).kernel == "nbits" and makers(spec, name, np.ones(block.linears[name][0].in_features, np.float32))
    ]
    moments, samples = {name: Moment() for name in names}, dict[str, Any]()

    def visit(name: str, number: int, rows: torch.Tensor) -> None:
        if name in moments:
            moments[name].add(rows)
            samples.setdefault(name, rows[:: max(1, len(rows) // TOKENS)].clone())

    block.outputs = block.visit(visit)
    found = {}
    for name in names:
        weight = block.weight(name)
        shared = spec.heads // spec.kv_heads if name.endswith("o_proj") else 1
        choice = Choice(weight[:: max(1, len(weight) // ROWS)], moments[name].mean(), samples[name], schemes.of(name), GAIN[method])
        scale = choice.best(shared, spec.head_size)
        if scale is not None:
            found[name] = scale
    return found


@dataclass(frozen=True)
class Choice:
    """What s is chosen by. weight float32 [rows, k], moment float32 [k, k], inputs float32 [tokens, k]."""

    weight: np.ndarray
    moment: np.ndarray
    inputs: torch.Tensor
    scheme: Scheme
    gain: float

    def best(self, shared: int = 1, head: int = 1) -> np.ndarray | None:
        """s of least J, None for s = 1. `shared` neighbouring heads of `head` channels take one s."""
        scales = [self.candidate(*powers, shared, head) for powers in CANDIDATES]
        losses = [self.loss(scale) for scale in scales]
        best = int(np.argmin(losses))
        return None if best == 0 else scales[best]

    def candidate(self, a: float, b: float, shared: int, head: int) -> np.ndarray:
        """float32 [k]"""
        loud = np.sqrt(np.maximum(self.moment.diagonal(), 0))
        wide = np.sqrt(np.square(self.weight).mean(axis=0))
        if shared > 1:  # [values, heads that share one, channels]
            loud, wide = (np.sqrt(np.square(one.reshape(-1, shared, head)).mean(axis=1, keepdims=True)).repeat(shared, 1).reshape(-1) for one in (loud, wide))
        tiny = np.finfo(np.float32).tiny
        logarithm = a * np.log(np.maximum(loud, tiny)) - b * np.log(np.maximum(wide, tiny))
        logarithm -= np.median(logarithm)
        return np.exp(logarithm.clip(-np.log(REACH), np.log(REACH))).astype(np.float32)

    def loss(self, scale: np.ndarray) -> float:
        """J(s), over the sampled rows and tokens."""
        import torch

        weight, divided = self.weight * scale, self.inputs / torch.from_numpy(scale)
        rounding = output_error((rounded(weight, self.scheme) - weight) / scale, self.moment)
        squares = (in_blocks(divided, self.scheme.group_size or 1) - divided).square().mean(dim=0, dtype=torch.float64).numpy()
        return self.gain * rounding + float(np.square(weight, dtype=np.float64).sum(axis=0) @ squares)
