"""Scales trained against the float model: the codes and zero points stay, so files keep their layout and kernels their speed.

    minimise over t     mean over tokens of KL( p_float || p ),     p of the model whose group scales are s * (1 + t)

Learning scales by gradient is LSQ's (arXiv 1902.08153); with frozen codes and the float model as teacher it is mlx-lm's distilled weight quantization (DWQ).

1. Teacher: the float model runs once, block by block; its last hidden states are kept, float32 [tokens, width], and logits made of them when they are needed.
2. Student: transformers' own blocks, with every quantized linear and the table multiplying by (code - zero_point) * s * (1 + t). A block is run again on the
   way back instead of keeping its activations, so memory is the codes (a byte a weight), the float head, and one window.
3. Gradient of a group's t: s * sum over its columns of dL/dW * (code - zero_point). dL/dW of one matrix exists at a time.
4. Adam on all t, which begin at 0; the rate falls to 0 linearly. One window a step, in an order drawn from the seed.
5. Every HELD-th window is not trained on. The scales of the pass that has the least KL there are kept; if none is below what it began with, nothing is changed.

What kernels do to activations is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint as run_again_on_the_way_back

from compiler.checkpoints.view import Checkpoint
from compiler.quantizers.affine import Quantized, storable
from compiler.quantizers.calibrate import BlockStream
from compiler.reference import match_tensors, skeleton
from compiler.scheme import matrix_name

RATE = 2e-3
PASSES = 2
HELD = 8  # one window of so many is held out
WARM = 4  # steps
CHUNK = 256  # tokens whose logits are held at a time, a few times over: 256 x 49,152 x 4 B = 50 MB
HEAD, TABLE = "lm_head", "model.embed_tokens"
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Tuned:
    """matrices: the same codes with other scales. before, after: KL on the held-out windows, nats a token."""

    matrices: Mapping[str, Quantized]
    before: float
    after: float


class Matrix:
    """Codes of one fused matrix with trainable scales. steps: code - zero_point, int8 or int16 [rows, groups, group_size]; change: t [rows, groups]."""

    def __init__(self, quantized: Quantized) -> None:
        self.quantized, self.width = quantized, quantized.width
        rows, groups = quantized.scales.shape
        middle = np.full((rows, groups), 1 << (quantized.scheme.bits - 1), np.int16)
        zeros = middle if quantized.zero_points is None else quantized.zero_points.astype(np.int16)
        steps = quantized.codes.reshape(rows, groups, -1).astype(np.int16) - zeros[..., None]
        self.steps = torch.from_numpy(steps.astype(np.int8 if np.abs(steps).max(initial=0) < 128 else np.int16))
        self.scales = torch.from_numpy(quantized.scales.copy())
        self.change = torch.zeros(rows, groups, requires_grad=True)

    def scaled(self, rows: Any) -> torch.Tensor:
        return self.scales[rows] * (1 + self.change[rows])

    def tuned(self, change: torch.Tensor) -> Quantized:
        """The same codes with the scales that a file can hold."""
        scales = (self.scales * (1 + change)).numpy()
        return replace(self.quantized, scales=storable(scales, self.quantized.scheme))


def dense(scales: torch.Tensor, steps: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, groups] and [rows, groups, size] -> W float32 [rows, width]."""
    return (steps.float() * scales[..., None]).reshape(len(steps), -1)[:, :width]


class Product(torch.autograd.Function):
    """x [..., width] @ W^T with W made of codes, forward and again backward: it is never kept (rule 3)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scales: torch.Tensor, steps: torch.Tensor, width: int) -> torch.Tensor:
        ctx.save_for_backward(x, scales, steps)
        return x @ dense(scales, steps, width).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (x, scales, steps) = gradients, ctx.saved_tensors
        width = x.shape[-1]
        to_x = gradient @ dense(scales, steps, width)
        to_weight = gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, width)
        padded = torch.nn.functional.pad(to_weight, (0, steps.shape[1] * steps.shape[2] - width))
        return to_x, torch.einsum("rgs,rgs->rg", padded.view(steps.shape), steps.float()), None, None


class Linear(torch.nn.Module):
    """Some rows of a fused matrix in place of a torch linear."""

    def __init__(self, matrix: Matrix, rows: slice, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.matrix, self.rows, self.bias = matrix, rows, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = Product.apply(x, self.matrix.scaled(self.rows), self.matrix.steps[self.rows], self.matrix.width)
        return y if self.bias is None else y + self.bias


class Student:
    """The quantized model, float32, whose group scales can be trained.

    matrices  fused matrix -> its codes; a matrix that is missing here keeps its float weights
    """

    def __init__(self, checkpoint: Checkpoint, matrices: Mapping[str, Quantized]) -> None:
        self.checkpoint = checkpoint
        self.tied = bool(checkpoint.config.get("tie_word_embeddings"))
        self.matrices = {name: Matrix(quantized) for name, quantized in matrices.items()}
        model = skeleton(checkpoint.config, "text-generation", checkpoint.origin)
        self.views = match_tensors(model, checkpoint)
        self.base: Any = model.model
        self._fill(model)
        for name, layer in enumerate(self.base.layers):
            self._replace(f"model.layers.{name}", layer)
            layer.forward = _again(layer.forward)
        self.scaling = float(getattr(model.config, "logits_scaling", None) or 1.0)
        self.cap = getattr(model.config, "final_logit_softcapping", None)
        embedding = self.base.embed_tokens
        self.embed_scale = getattr(embedding, "embed_scale", 1.0)
        self.table = None if self._table_name in self.matrices else self._float("model.embed_tokens.weight")
        self.head = None if HEAD in self.matrices else self._float("model.embed_tokens.weight" if self.tied else "lm_head.weight")

    @property
    def _table_name(self) -> str:
        return HEAD if self.tied else TABLE

    def _float(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.views[name].read()))

    def _fill(self, model: Any) -> None:
        """Everything of the blocks that has no codes; the table and the head are held apart."""
        state = {}
        for name, view in self.views.items():
            if matrix_name(name, self.checkpoint.config) not in (*self.matrices, HEAD, TABLE):
                array = view.read()
                state[name] = torch.from_numpy(array if array.flags.writeable else array.copy())
        model.load_state_dict(state, strict=False, assign=True)
        model.requires_grad_(False)

    def _replace(self, place: str, layer: Any) -> None:
        taken: dict[str, int] = {}
        for key, part in list(layer.named_modules()):
            name = matrix_name(f"{place}.{key}.weight", self.checkpoint.config) if isinstance(part, torch.nn.Linear) else None
            if name is None or name not in self.matrices:
                continue
            start = taken.get(name, 0)
            taken[name] = start + part.out_features
            parent, _, last = key.rpartition(".")
            setattr(layer.get_submodule(parent), last, Linear(self.matrices[name], slice(start, taken[name]), part.bias))

    def hidden(self, ids: np.ndarray) -> torch.Tensor:
        """What enters the head: int64 [length] -> float32 [length, width]."""
        places = torch.from_numpy(ids)
        if self.table is not None:
            rows = self.table[places]
        else:
            table = self.matrices[self._table_name]
            rows = dense(table.scaled(places), table.steps[places], table.width)
        found: torch.Tensor = self.base(inputs_embeds=(rows * self.embed_scale)[None], use_cache=False).last_hidden_state[0]
        return found

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [n, vocab] of the quantized head."""
        matrix = self.matrices.get(HEAD)
        if matrix is None:
            return self.finished(hidden @ self.head.T)  # type: ignore[union-attr]  # one of the two is there
        every = slice(0, len(matrix.steps))
        return self.finished(Product.apply(hidden, matrix.scaled(every), matrix.steps, matrix.width))

    def finished(self, logits: torch.Tensor) -> torch.Tensor:
        """What a family does to its logits."""
        logits = logits / self.scaling
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any, **more: Any) -> Any:
        return run_again_on_the_way_back(forward, *inputs, use_reentrant=False, **more) if torch.is_grad_enabled() else forward(*inputs, **more)

    return run


def tune(checkpoint: Checkpoint, matrices: Mapping[str, Quantized], windows: np.ndarray, report: Report, seed: int = 0) -> Tuned:
    """Train the scales of `matrices` on token windows int64 [count, length], by rules 1-5."""
    targets = _teacher(checkpoint, windows, report)
    student = Student(checkpoint, matrices)
    head = torch.from_numpy(np.ascontiguousarray(student.views["model.embed_tokens.weight" if student.tied else "lm_head.weight"].read()))
    held = [place for place in range(len(windows)) if place % HELD == HELD // 2] if len(windows) > 1 else []
    trained = [place for place in range(len(windows)) if place not in held]
    changes = [matrix.change for matrix in student.matrices.values()]

    def kl(places: Sequence[int]) -> float:
        with torch.inference_mode():
            return float(np.mean([_kl(student, windows[place], targets[place], head, learn=False) for place in places]))

    before = best = kl(held or trained)
    kept = [change.detach().clone() for change in changes]
    adam, steps, done = torch.optim.Adam(changes, lr=RATE, betas=(0.9, 0.99)), PASSES * len(trained), 0
    draw = np.random.default_rng(seed)
    for _ in range(PASSES):
        for place in draw.permutation(trained):
            adam.param_groups[0]["lr"] = RATE * min(1.0, (done + 1) / WARM) * (1 - done / steps)
            adam.zero_grad()
            _kl(student, windows[place], targets[place], head, learn=True)
            adam.step()
            done += 1
            report(f"steps of tuning, KL {best:.4f}", done, steps)
        found = kl(held or trained)
        if found < best:
            best, kept = found, [change.detach().clone() for change in changes]
    return Tuned({name: matrix.tuned(change) for (name, matrix), change in zip(student.matrices.items(), kept, strict=True)}, before, best)


def _teacher(checkpoint: Checkpoint, windows: np.ndarray, report: Report) -> torch.Tensor:
    """Rule 1: float32 [count, length, width]."""
    stream = BlockStream(checkpoint, windows)
    for number, _ in enumerate(stream.blocks()):
        report("blocks of the float model", number + 1, stream.block_count)
    return torch.cat([batch.clone() for batch in stream.head_inputs()])


def _kl(student: Student, ids: np.ndarray, target: torch.Tensor, head: torch.Tensor, *, learn: bool) -> float:
    """Mean KL of one window, nats a token; with `learn` its gradients are added to every change. Logits exist for CHUNK tokens at a time."""
    hidden = student.hidden(ids)
    inputs = hidden.detach().requires_grad_(learn)
    total = 0.0
    for start in range(0, len(ids), CHUNK):
        with torch.no_grad():
            wanted = student.finished(target[start : start + CHUNK] @ head.T).log_softmax(-1)
        got = student.logits(inputs[start : start + CHUNK]).log_softmax(-1)
        loss = (wanted.exp() * (wanted - got)).sum() / len(ids)
        if learn:
            loss.backward()
        total += float(loss.detach())
    if learn:
        hidden.backward(inputs.grad)
    return total
