"""What each matrix loses under each choice, in nats of KL, before anything is exported.

For a change dW of one matrix, y the matrix's outputs and x its inputs,

    KL  ~  1/2 E[g^2] / n  *  E |dW x|^2         E |dW x|^2 = tr(dW H dW^T),  H = X^T X / tokens

to second order, where g = d log p / d y under tokens that the model itself draws (so E[g g^T] is the Fisher information; taken here as the same in all
n directions). One backward pass gives E[g^2] of all matrices, one forward pass their H.

That is the shape; its height is measured. Each kind of matrix (qkv, o, gate and up, down, head) is rounded alone, all other matrices as they are, and the KL of
that model over the same windows divided by the estimate is the kind's factor; then all kinds at once, for what they do to each other:

    loss[i, c] = joint * factor[kind of i] * slope[i] * tr(dW H dW^T)

So the rows add up to measured KL at the probed choice, and are proportional to output error elsewhere. Activation rounding of the kernels is not in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler.checkpoints.view import Checkpoint
from compiler.quantizers import affine, nbits
from compiler.quantizers.moments import output_error
from compiler.quantizers.pack import unpack
from compiler.reference import reference_model
from compiler.scheme import Scheme, matrix_name

if TYPE_CHECKING:
    import torch

Report = Callable[[str, int, int], None]
HEAD = "lm_head"


@dataclass(frozen=True)
class Row:
    """One matrix under one choice: output error per token, and the KL it is expected to cost."""

    matrix: str
    scheme: str
    error: float
    loss: float


@dataclass(frozen=True)
class Sensitivity:
    """rows: every matrix by every choice. slope: KL per output error of a matrix. factor: measured over estimated KL, by kind; `joint` of all kinds at once."""

    rows: tuple[Row, ...]
    slope: Mapping[str, float]
    factor: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "slope": dict(self.slope), "factor": dict(self.factor)}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Sensitivity:
        return Sensitivity(tuple(Row(**row) for row in stored["rows"]), stored["slope"], stored["factor"])

    def table(self, matrices: Sequence[str], schemes: Sequence[Scheme]) -> np.ndarray:
        """loss, float64 [matrices, schemes]. Raises KeyError for one that was not measured."""
        found = {(row.matrix, row.scheme): row.loss for row in self.rows}
        return np.array([[found[matrix, str(scheme)] for scheme in schemes] for matrix in matrices])


def sensitivity(checkpoint: Checkpoint, windows: np.ndarray, choices: Sequence[Scheme], probed: Scheme, report: Report, seed: int = 0) -> Sensitivity:
    """Rows for every quantizable matrix of a decoder.

    windows  int64 [count, length], calibration text
    choices  schemes in groups, rounded to nearest; probed is one of them, at which the height is measured
    """
    model = Model(checkpoint, windows)
    slopes, moments = model.slopes_and_moments(seed, report)
    errors: dict[tuple[str, str], float] = {}
    for done, matrix in enumerate(model.linears):
        weight = model.weight(matrix)
        for scheme in choices:
            errors[matrix, str(scheme)] = output_error(rounded(weight, scheme) - weight, moments[matrix])
        report("matrices rounded every way", done + 1, len(model.linears))
    factor: dict[str, float] = {}
    kinds = sorted({kind_of(matrix) for matrix in model.linears})
    for done, kind in enumerate(kinds):
        names = [matrix for matrix in model.linears if kind_of(matrix) == kind]
        factor[kind] = model.kl_with(names, probed) / max(sum(slopes[name] * errors[name, str(probed)] for name in names), 1e-30)
        report("kinds measured", done + 1, len(kinds) + 1)
    alone = sum(factor[kind_of(name)] * slopes[name] * errors[name, str(probed)] for name in model.linears)
    factor["joint"] = model.kl_with(list(model.linears), probed) / max(alone, 1e-30)
    report("kinds measured", len(kinds) + 1, len(kinds) + 1)
    rows = tuple(Row(name, scheme, error, factor["joint"] * factor[kind_of(name)] * slopes[name] * error) for (name, scheme), error in errors.items())
    return Sensitivity(rows, slopes, factor)


def rounded(weight: np.ndarray, scheme: Scheme) -> np.ndarray:
    """The weights that codes rounded to nearest stand for, float32 [rows, width]."""
    return affine.dequantize(unpack(nbits.quantize(weight, scheme), scheme, weight.shape[1]))


def kind_of(matrix: str) -> str:
    """`model.layers.3.mlp.down_proj` -> `mlp.down_proj`."""
    return re.sub(r"^model\.layers\.\d+\.", "", matrix)


class Model:
    """The float model over windows: its linears by fused matrix, and KL with some of them rounded."""

    def __init__(self, checkpoint: Checkpoint, windows: np.ndarray) -> None:
        import torch

        self.module: Any = reference_model(checkpoint, "text-generation")
        self.windows = torch.from_numpy(windows)
        self.linears: dict[str, list[Any]] = {}
        for name, part in self.module.named_modules():
            matrix = matrix_name(f"{name}.weight", checkpoint.config) if isinstance(part, torch.nn.Linear) else None
            if matrix:
                self.linears.setdefault(matrix, []).append(part)
        self.reference = [self.log_probabilities(window) for window in self.windows]

    def log_probabilities(self, window: torch.Tensor) -> torch.Tensor:
        """float32 [length, vocab]"""
        import torch

        with torch.inference_mode():
            logits: torch.Tensor = self.module(input_ids=window[None], use_cache=False).logits[0]
            return logits.log_softmax(-1)

    def weight(self, matrix: str) -> np.ndarray:
        return np.concatenate([linear.weight.detach().numpy() for linear in self.linears[matrix]])

    def kl_with(self, matrices: Sequence[str], scheme: Scheme) -> float:
        """Mean KL in nats per token with `matrices` rounded. A tied embedding is rounded with the head. The weights are put back."""
        import torch

        kept = []
        for linear in (linear for matrix in matrices for linear in self.linears[matrix]):
            kept.append((linear, linear.weight.data.clone()))
            linear.weight.data.copy_(torch.from_numpy(rounded(linear.weight.data.numpy(), scheme)))
        found = []
        for window, reference in zip(self.windows, self.reference, strict=True):
            found.append(float((reference.exp() * (reference - self.log_probabilities(window))).sum(-1).mean()))
        for linear, weight in kept:
            linear.weight.data.copy_(weight)
        return float(np.mean(found))

    def slopes_and_moments(self, seed: int, report: Report) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """(1/2 E[g^2] / n, H float32 [k, k]) of every matrix, from one forward and one backward pass a window."""
        import torch

        squares = dict.fromkeys(self.linears, 0.0)
        sums = {matrix: torch.zeros(linears[0].in_features, linears[0].in_features) for matrix, linears in self.linears.items()}
        handles = [
            linear.register_forward_hook(_watch(matrix, squares, sums, first=linear is linears[0]))
            for matrix, linears in self.linears.items()
            for linear in linears
        ]
        draw = torch.Generator().manual_seed(seed)
        embedding = self.module.get_input_embeddings()
        try:
            for done, window in enumerate(self.windows):
                embedded = embedding(window[None]).detach().requires_grad_(True)
                logits = self.module(inputs_embeds=embedded, use_cache=False).logits[0].log_softmax(-1)
                drawn = torch.multinomial(logits.detach().exp(), 1, generator=draw)
                logits.gather(1, drawn).sum().backward()
                report("windows", done + 1, len(self.windows))
        finally:
            for handle in handles:
                handle.remove()
        tokens = self.windows.numel()
        outputs = {matrix: sum(linear.out_features for linear in linears) for matrix, linears in self.linears.items()}
        return {name: squares[name] / tokens / outputs[name] / 2 for name in squares}, {name: (total / tokens).numpy() for name, total in sums.items()}


def _watch(matrix: str, squares: dict[str, float], sums: Mapping[str, torch.Tensor], first: bool) -> Callable[..., None]:
    """A forward hook: adds the inputs' second moment now (once for linears that share their input), and the output's squared gradient when it comes."""

    def seen(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if first:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            sums[matrix].addmm_(rows.T, rows)

        def add(gradient: torch.Tensor) -> None:
            squares[matrix] += float(gradient.double().square().sum())

        if output.requires_grad:
            output.register_hook(add)

    return seen
