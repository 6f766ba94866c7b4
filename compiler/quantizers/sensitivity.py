"""What each matrix loses under each choice, in nats of KL, before anything is exported.

For a change dW of one matrix, y the matrix's outputs and x its inputs,

    KL  ~  1/2 E[g^2] / n  *  E |dW x|^2         E |dW x|^2 = tr(dW H dW^T),  H = X^T X / tokens

to second order, where g = d log p / d y under tokens that the model itself draws (so E[g g^T] is the Fisher information; taken here as the same in all
n directions). What is added up:

1. Rounding to nearest, every choice. Under another method the error is that times gain = tr(dW H dW^T) of the method over that of rounding to nearest, measured
   once a matrix at the probed choice: codes made from the H of some windows, both errors taken with the H of others.
2. Activations: MatMulNBits rounds its input x in blocks of the group size to 8 bits, amax / 127 a step. With e that rounding's errors, taken as independent,
   a matrix gains sum_k |W[:, k]|^2 E[e_k^2].
3. Height: each kind of matrix (qkv, o, gate and up, down, head) takes the probed choice alone, all other matrices as they are, and the KL of that model
   on windows that no code was made from, divided by the estimate, is the kind's factor; then all kinds at once, for what they do to each other; and all
   activations alone, rounded in blocks of the probed choice's group:

    loss[i, c] = slope[i] * (joint * factor[kind of i] * error[i, c] + rounded * activation[i, c])

The model runs block by block (compiler.quantizers.calibrate), all variants of rule 3 beside each other: one block, the hidden states of the windows and
one table are in memory. Gradients go back the same way, each block run again from the states that entered it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler.checkpoints.view import Checkpoint
from compiler.quantizers import affine, nbits
from compiler.quantizers.calibrate import Block, BlockStream, Moment
from compiler.quantizers.methods import METHODS
from compiler.quantizers.moments import output_error
from compiler.quantizers.pack import unpack
from compiler.scheme import Scheme

if TYPE_CHECKING:
    import torch

Report = Callable[[str, int, int], None]
HEAD, TABLE = "lm_head", "model.embed_tokens"
ALL = "all kinds"
ROUNDED = "rounded activations"
CHECKED = 8  # the last eighth of the batches is kept for checking, one at least
TOKENS = 128  # positions whose logits are held at a time
ROWS = 4096  # of a matrix, rounded at a time


@dataclass(frozen=True)
class Row:
    """One matrix under one choice: output error per token by its weights and by its activations, and the KL both are expected to cost."""

    matrix: str
    scheme: str
    error: float
    activation: float
    loss: float


@dataclass(frozen=True)
class Sensitivity:
    """rows: every matrix by every choice. slope: KL per output error of a matrix. factor: measured over estimated KL, by kind; `joint` of all kinds at once,
    `rounded` of the activations.

    gain  error of the method over that of rounding to nearest, by matrix
    """

    rows: tuple[Row, ...]
    slope: Mapping[str, float]
    factor: Mapping[str, float]
    gain: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "slope": dict(self.slope), "factor": dict(self.factor), "gain": dict(self.gain)}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Sensitivity:
        return Sensitivity(tuple(Row(**row) for row in stored["rows"]), stored["slope"], stored["factor"], stored["gain"])

    def table(self, matrices: Sequence[str], schemes: Sequence[Scheme]) -> np.ndarray:
        """loss, float64 [matrices, schemes]. Raises KeyError for one that was not measured."""
        found = {(row.matrix, row.scheme): row.loss for row in self.rows}
        return np.array([[found[matrix, str(scheme)] for scheme in schemes] for matrix in matrices])


@dataclass(frozen=True)
class Question:
    """choices: schemes in groups, and floats; probed: the one of them at which gain and height are measured; method: a row of METHODS."""

    choices: Sequence[Scheme]
    probed: Scheme
    method: str = "rtn"

    def quantized(self, weight: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """The weights that the method's codes at the probed choice stand for, float32 [rows, width]."""
        method = METHODS[self.method]
        return affine.dequantize(unpack(method.quantize(weight, self.probed, moment if method.calibrated else None), self.probed, weight.shape[1]))


def sensitivity(checkpoint: Checkpoint, windows: np.ndarray, question: Question, report: Report, seed: int = 0) -> Sensitivity:
    """Rows for every matrix of a decoder. windows: int64 [count, length], calibration text. Raises as BlockStream does."""
    return Measuring(checkpoint, windows, question, report, seed).run()


def rounded(weight: np.ndarray, scheme: Scheme) -> np.ndarray:
    """The weights that codes rounded to nearest stand for, float32 [rows, width]."""
    if not scheme.quantized:
        return weight.astype(np.float16).astype(np.float32) if scheme.bits == 16 else weight
    return affine.dequantize(unpack(nbits.quantize(weight, scheme), scheme, weight.shape[1]))


def kind_of(matrix: str) -> str:
    """`model.layers.3.mlp.down_proj` -> `mlp.down_proj`."""
    return re.sub(r"^model\.layers\.\d+\.", "", matrix)


def rounding_error(weight: np.ndarray, scheme: Scheme, moment: np.ndarray | None) -> float:
    """tr(dW H dW^T) of rounding to nearest, a block of rows in memory at a time; without H the sum of squares."""
    total = 0.0
    for start in range(0, len(weight), ROWS):
        rows = weight[start : start + ROWS]
        change = rounded(rows, scheme) - rows
        total += float(np.square(change, dtype=np.float64).sum()) if moment is None else output_error(change, moment)
    return total


class Inputs:
    """What enters one matrix: H of the windows that codes are made from and of those they are checked on, and what rounding in blocks of each size does."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.fitted, self.checked = Moment(), Moment()
        self.squares: dict[int, np.ndarray] = dict.fromkeys(sizes, np.zeros(0))

    def add(self, rows: torch.Tensor, checks: bool) -> None:
        """rows: float32 [tokens, width]. A single batch is taken for both."""
        import torch

        if checks:
            self.checked.add(rows)
            for size, sums in self.squares.items():
                found = (in_blocks(rows, size) - rows).square().sum(dim=0, dtype=torch.float64).numpy()
                self.squares[size] = found if not sums.size else sums + found
        if not checks or not self.fitted.count:
            self.fitted.add(rows)

    def rounding_squares(self, size: int) -> np.ndarray:
        """Rule 2: E[e_k^2], float64 [width]"""
        found: np.ndarray = self.squares[size] / self.checked.count
        return found


def in_blocks(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Rule 2: float32 [..., width] as MatMulNBits sees it: blocks of `size` along the width, rounded to steps of amax / 127. [[127, 1.4]] -> [[127, 1]]"""
    import torch

    width = rows.shape[-1]
    blocks = torch.nn.functional.pad(rows, (0, -width % size)).unflatten(-1, (-1, size))
    steps = (blocks.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return ((blocks / steps).round() * steps).flatten(-2)[..., :width]


@dataclass
class Measuring:
    """One run of `sensitivity`."""

    checkpoint: Checkpoint
    windows: np.ndarray
    question: Question
    report: Report
    seed: int = 0
    errors: dict[tuple[str, str], float] = field(default_factory=dict)
    activations: dict[tuple[str, str], float] = field(default_factory=dict)
    gain: dict[str, float] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)  # of each matrix: sum of its outputs' squared gradients, by output
    entered: list[list[torch.Tensor]] = field(default_factory=list)  # [block][checked batch]: what entered each block
    variants: dict[str, list[torch.Tensor]] = field(default_factory=dict)  # kind -> hidden states of the checked batches where that kind is rounded

    @cached_property
    def stream(self) -> BlockStream:
        return BlockStream(self.checkpoint, self.windows)

    @cached_property
    def tied(self) -> bool:
        return bool(self.checkpoint.config.get("tie_word_embeddings"))

    def _checks(self, number: int) -> bool:
        """Whether a batch of windows is one that no code is made from."""
        count = len(self.stream.hidden)
        return number >= count - max(1, count // CHECKED)

    def checked(self, batches: Sequence[Any]) -> list[Any]:
        """Those batches."""
        return [batch for number, batch in enumerate(batches) if self._checks(number)]

    def run(self) -> Sensitivity:
        total = 2 * self.stream.block_count + 1
        for number, block in enumerate(self.stream.blocks()):
            self._block(block)
            self.report("blocks measured", number + 1, total)
        measured, gradients = self._head()
        for done, index in enumerate(reversed(range(self.stream.block_count))):
            gradients = self._back(index, gradients)
            self.report("blocks measured", self.stream.block_count + done + 2, total)
        return self._result(measured)

    def _block(self, block: Block) -> None:
        """Rules 1 and 2 for the matrices of a block, and all variants through it."""
        if not self.variants:
            self._enter(block)
        self.entered.append(self.checked(block.hidden))
        statistics = {name: Inputs(self._sizes) for name in block.linears}
        block.outputs = block.visit(lambda name, number, rows: statistics[name].add(rows, self._checks(number)))
        weights = {name: block.weight(name) for name in block.linears}
        probed = {name: self._matrix(name, weights[name], statistics[name]) for name in block.linears}
        self.variants = {kind: self._through(block, kind, weights, probed) for kind in self.variants}

    def _enter(self, block: Block) -> None:
        """The kinds of matrices of this model, and what enters the first block under each: rounded rows of the table where that is rounded too."""
        table = HEAD if self.tied else TABLE
        rounded_table = self.checked(self.stream.enter(lambda rows: rounded(rows, self.question.probed))[0])
        for kind in (*map(kind_of, block.linears), HEAD, ALL, ROUNDED, *(() if self.tied else (TABLE,))):
            self.variants[kind] = rounded_table if kind in (table, ALL) else self.checked(block.hidden)

    def _through(self, block: Block, kind: str, weights: Mapping[str, np.ndarray], probed: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
        """One variant's hidden states after the block."""
        changed = [name for name in weights if kind in (ALL, kind_of(name))]
        for name in changed:
            block.replace(name, probed[name])
        handles = [linear.register_forward_pre_hook(self._round) for linears in block.linears.values() for linear in linears] if kind == ROUNDED else []
        after = block.run(self.variants[kind])
        for handle in handles:
            handle.remove()
        for name in changed:
            block.replace(name, weights[name])
        return after

    def _round(self, _module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """A forward pre-hook: inputs as the kernel of the probed choice sees them."""
        return (in_blocks(inputs[0], self.question.probed.group_size or 1), *inputs[1:])

    def _matrix(self, name: str, weight: np.ndarray, inputs: Inputs) -> np.ndarray:
        """Rules 1 and 2 of one matrix; what it is at the probed choice, float32 [rows, width]."""
        fitted, checked, question = inputs.fitted.mean(), inputs.checked.mean(), self.question
        probed = question.quantized(weight, fitted)
        self.gain[name] = 1.0
        if question.method != "rtn":
            self.gain[name] = output_error(probed - weight, checked) / max(rounding_error(weight, question.probed, checked), 1e-30)
        both, columns = (checked + fitted) / 2, np.einsum("ij,ij->j", weight, weight, dtype=np.float64)
        for choice in question.choices:
            self.errors[name, str(choice)] = (self.gain[name] if choice.quantized else 1.0) * rounding_error(weight, choice, both)
            self.activations[name, str(choice)] = float(columns @ inputs.rounding_squares(choice.group_size)) if choice.group_size else 0.0
        return probed

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(sorted({choice.group_size for choice in self.question.choices if choice.group_size}))

    def _head(self) -> tuple[dict[str, float], list[torch.Tensor]]:
        """The head's own rows; KL of each variant, mean over the checked tokens; the gradients that enter the last block's outputs."""
        import torch

        final = self.stream.head_inputs()
        weight, statistics = self.stream.head_weight(), Inputs(self._sizes)
        for number, batch in enumerate(final):
            statistics.add(batch.reshape(-1, batch.shape[-1]), self._checks(number))
        probed = self._matrix(HEAD, weight, statistics)
        if not self.tied:
            self._table()
        logits = self.stream.logits_of
        reference, draw = self.checked(final), torch.Generator().manual_seed(self.seed)
        self.squares[HEAD] = 0.0
        gradients = [self._drawn(batch, weight, draw) for batch in reference]
        measured = {}
        for kind, hidden in self.variants.items():
            head = probed if kind in (HEAD, ALL) else weight
            states = self.stream.head_inputs(hidden)
            if kind == ROUNDED:
                states = [in_blocks(batch, self.question.probed.group_size or 1) for batch in states]
            sums = [_divergence(logits, left, weight, right, head) for left, right in zip(reference, states, strict=True)]
            measured[kind] = sum(sums) / self._tokens
        return measured, self.stream.back_through_norm(self.checked(self.stream.hidden), gradients)

    def _table(self) -> None:
        """An embedding of its own: each token reads one row, all rows alike; rounded to nearest under every method."""
        weight = self.stream.views[f"{TABLE}.weight"].read()
        for choice in self.question.choices:
            self.errors[TABLE, str(choice)] = rounding_error(weight, choice, None) / len(weight)
            self.activations[TABLE, str(choice)] = 0.0
        self.gain[TABLE] = 1.0

    def _drawn(self, batch: torch.Tensor, weight: np.ndarray, draw: torch.Generator) -> torch.Tensor:
        """Gradient of the log-likelihood of drawn tokens with respect to the head's inputs [batch, length, width]; adds up the head's own squares."""
        import torch

        rows, found = batch.reshape(-1, batch.shape[-1]), []
        for start in range(0, len(rows), TOKENS):
            given = rows[start : start + TOKENS].clone().requires_grad_(True)
            logits = self.stream.logits_of(given, weight)
            logits.retain_grad()
            likely = logits.log_softmax(-1)
            tokens = torch.multinomial(likely.detach().exp(), 1, generator=draw)
            likely.gather(1, tokens).sum().backward()
            assert logits.grad is not None and given.grad is not None
            self.squares[HEAD] += float(logits.grad.square().sum(dtype=torch.float64)) / logits.shape[1]
            found.append(given.grad)
        return torch.cat(found).reshape(batch.shape)

    def _back(self, index: int, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run a block again, and its gradients back: squares of every matrix's outputs, and the gradients of what entered."""
        block = self.stream.filled(index)
        handles = []
        for name, linears in block.linears.items():
            outputs, self.squares[name] = sum(linear.out_features for linear in linears), 0.0
            handles += [linear.register_forward_hook(_adding(self.squares, name, outputs)) for linear in linears]
        before = block.back(self.entered[index], gradients)
        for handle in handles:
            handle.remove()
        self.stream.empty(index)
        return before

    @property
    def _tokens(self) -> int:
        return sum(batch.shape[0] * batch.shape[1] for batch in self.entered[0])

    def _result(self, measured: Mapping[str, float]) -> Sensitivity:
        probed = str(self.question.probed)
        slope = {name: total / self._tokens / 2 for name, total in self.squares.items()} | ({} if self.tied else {TABLE: 1.0})
        factor = {}
        for kind in sorted(measured.keys() - {ALL, ROUNDED}):
            factor[kind] = measured[kind] / max(sum(slope[name] * self.errors[name, probed] for name in slope if kind_of(name) == kind), 1e-30)
        alone = sum(factor[kind_of(name)] * slope[name] * self.errors[name, probed] for name in slope)
        factor["joint"] = measured[ALL] / max(alone, 1e-30)
        factor["rounded"] = measured[ROUNDED] / max(sum(slope[name] * self.activations[name, probed] for name in slope), 1e-30)
        rows = []
        for (name, scheme), error in self.errors.items():
            activation = self.activations[name, scheme]
            loss = slope[name] * (factor["joint"] * factor[kind_of(name)] * error + factor["rounded"] * activation)
            rows.append(Row(name, scheme, error, activation, loss))
        return Sensitivity(tuple(rows), slope, factor, self.gain)


def _adding(squares: dict[str, float], name: str, outputs: int) -> Callable[..., None]:
    """A forward hook that adds the output's squared gradient, per output of the fused matrix, when it comes."""

    def add(gradient: torch.Tensor) -> None:
        squares[name] += float(gradient.double().square().sum()) / outputs

    def seen(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(add)

    return seen


def _divergence(logits: Callable[..., torch.Tensor], left: torch.Tensor, weight: np.ndarray, right: torch.Tensor, head: np.ndarray) -> float:
    """Sum over positions of KL(left || right), nats; hidden states [batch, length, width] and the heads they go through."""
    import torch

    total = 0.0
    one, other = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    with torch.inference_mode():
        for start in range(0, len(one), TOKENS):
            known = logits(one[start : start + TOKENS], weight).log_softmax(-1)
            total += float((known.exp() * (known - logits(other[start : start + TOKENS], head).log_softmax(-1))).sum(dtype=torch.float64))
    return total
