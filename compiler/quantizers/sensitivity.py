"""What each matrix loses under each choice, in nats of KL, before anything is exported.

For a change dW of one matrix and x its inputs, the KL to the float model grows to second order as the matrix's output error

    E |dW x|^2 = tr(dW H dW^T),     H = X^T X / tokens

1. Slope. Each matrix takes the probed choice alone, all others stay float, and the KL of that model is measured on windows that no code was made from. Divided
   by the matrix's output error at the probed choice this is its slope. (Not a Fisher estimate from gradients, which costs less: gradients that gather in few
   tokens, and errors that tokens share, are not in it, and they differ from matrix to matrix.)
2. Rounding to nearest, every choice, on ROWS rows of the matrix, evenly spread. Under another method the error is that times gain = the method's error over
   that of rounding to nearest, measured once a matrix at the probed choice: codes made from the H of some windows, both errors taken with the H of others.
   What a method gains hangs on the groups too (GPTQ gains more in smaller groups): one block in GROUPED shows, on FEW rows of
   its matrices, the gain at each kind of group over that at the probed one; the geometric mean holds for all matrices.
3. Activations: MatMulNBits rounds its input x in blocks of the group size to 8 bits, amax / 127 a step. With e that rounding's errors, taken as independent,
   a matrix gains sum_k |W[:, k]|^2 E[e_k^2].
4. All at once: all matrices under the probed choice, for what they do to each other, and all activations, rounded in blocks of the probed choice's group:

    loss[i, c] = slope[i] * (joint * error[i, c] + rounded * activation[i, c])

The model runs block by block (compiler.quantizers.calibrate), all variants of rules 1 and 4 beside each other: one block, the hidden states of the windows, one
table, and TOKENS states of every variant (fewer where they would take more than STATES_MB) are in memory.
"""

from __future__ import annotations

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
FLOAT, ALL, ROUNDED = "float", "all matrices", "rounded activations"
CHECKED = 8  # the last eighth of the batches is kept for checking, one at least
TOKENS, STATES_MB = 512, 256
MATRICES = 4  # of a block
LEAD = 4  # the first of so many parts of a window is context only
CHUNK = 64  # positions whose logits are held at a time
ROWS = 1024
AT_A_TIME = 8192  # rows of a head, for memory: no method looks from one row to another
GROUPED, FEW = 8, 128


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
    """rows: every matrix by every choice. slope: KL per output error of a matrix. joint, rounded: measured over estimated KL, of all matrices and of the
    activations.

    gain  error of the method over that of rounding to nearest, by matrix
    """

    rows: tuple[Row, ...]
    slope: Mapping[str, float]
    joint: float
    rounded: float
    gain: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "rows": [asdict(row) for row in self.rows]}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Sensitivity:
        return Sensitivity(**{**stored, "rows": tuple(Row(**row) for row in stored["rows"])})

    def table(self, matrices: Sequence[str], schemes: Sequence[Scheme]) -> np.ndarray:
        """loss, float64 [matrices, schemes]. Raises KeyError for one that was not measured."""
        found = {(row.matrix, row.scheme): row.loss for row in self.rows}
        return np.array([[found[matrix, str(scheme)] for scheme in schemes] for matrix in matrices])


@dataclass(frozen=True)
class Question:
    """choices: schemes in groups, and floats; probed: the one of them at which slope and gain are measured; method: a row of METHODS."""

    choices: Sequence[Scheme]
    probed: Scheme
    method: str = "rtn"

    def quantized(self, weight: np.ndarray, moment: np.ndarray, scheme: Scheme | None = None) -> np.ndarray:
        """The weights that the method's codes at the probed choice, or at another, stand for, float32 [rows, width]."""
        method, scheme, made = METHODS[self.method], scheme or self.probed, np.empty_like(weight)
        for start in range(0, len(weight), AT_A_TIME):
            rows = slice(start, start + AT_A_TIME)
            made[rows] = affine.dequantize(unpack(method.quantize(weight[rows], scheme, moment if method.calibrated else None), scheme, weight.shape[1]))
        return made

    def kinds(self) -> dict[tuple[int, bool], Scheme]:
        """(group size, symmetric) -> the first choice of that kind."""
        found: dict[tuple[int, bool], Scheme] = {}
        for choice in self.choices:
            if choice.group_size:
                found.setdefault((choice.group_size, choice.symmetric), choice)
        return found


def sensitivity(checkpoint: Checkpoint, windows: np.ndarray, question: Question, report: Report) -> Sensitivity:
    """Rows for every matrix of a decoder. windows: int64 [count, length], calibration text. Raises as BlockStream does."""
    return Measuring(checkpoint, windows, question, report).run()


def rounded(weight: np.ndarray, scheme: Scheme) -> np.ndarray:
    """The weights that codes rounded to nearest stand for, float32 [rows, width]."""
    if not scheme.quantized:
        return weight.astype(np.float16).astype(np.float32) if scheme.bits == 16 else weight
    return affine.dequantize(unpack(nbits.quantize(weight, scheme), scheme, weight.shape[1]))


def rounding_error(weight: np.ndarray, scheme: Scheme, moment: np.ndarray | None) -> float:
    """tr(dW H dW^T) of rounding to nearest; without H the sum of squares."""
    change = rounded(weight, scheme) - weight
    return float(np.square(change, dtype=np.float64).sum()) if moment is None else output_error(change, moment)


def spread(weight: np.ndarray, rows: int = ROWS) -> np.ndarray:
    """At most so many rows, evenly spread, by which errors of the whole are told: [0, 4, 8, ...] of 4096."""
    return weight[:: -(-len(weight) // rows)]


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
        """Rule 3: E[e_k^2], float64 [width]"""
        found: np.ndarray = self.squares[size] / self.checked.count
        return found


def in_blocks(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Rule 3: float32 [..., width] as MatMulNBits sees it: blocks of `size` along the width, rounded to steps of amax / 127. [[127, 1.4]] -> [[127, 1]]"""
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
    errors: dict[tuple[str, str], float] = field(default_factory=dict)
    activations: dict[tuple[str, str], float] = field(default_factory=dict)
    gain: dict[str, float] = field(default_factory=dict)
    grouped: dict[tuple[int, bool], list[float]] = field(default_factory=dict)  # kind of group -> logarithms of its gain over the probed one's
    variants: dict[str, list[torch.Tensor]] = field(default_factory=dict)  # what is rounded -> hidden states of the short windows

    @cached_property
    def stream(self) -> BlockStream:
        return BlockStream(self.checkpoint, self.windows)

    @cached_property
    def short(self) -> BlockStream:
        """The checked windows, as long as the states of all variants may be."""
        count = sum(len(batch) for number, batch in enumerate(self.stream.hidden) if self._checks(number))
        of_a_token = 4e-6 * int(self.checkpoint.config["hidden_size"]) * (MATRICES * self.stream.block_count + MATRICES)  # MB
        length = int(min(TOKENS, STATES_MB / of_a_token)) // count
        return BlockStream(self.checkpoint, self.windows[-count:, : max(LEAD, length)])

    @cached_property
    def tied(self) -> bool:
        return bool(self.checkpoint.config.get("tie_word_embeddings"))

    def _checks(self, number: int) -> bool:
        """Whether a batch of windows is one that no code is made from."""
        count = len(self.stream.hidden)
        return number >= count - max(1, count // CHECKED)

    def run(self) -> Sensitivity:
        total = self.stream.block_count + 1
        for number, block in enumerate(self.stream.blocks()):
            self._block(block, number)
            self.report("blocks measured", number + 1, total)
        measured = self._head()
        self.report("blocks measured", total, total)
        return self._result(measured)

    def _block(self, block: Block, number: int) -> None:
        """Rules 2 and 3 for the matrices of a block, and all variants through it."""
        if not self.variants:
            self._enter()
        statistics = {name: Inputs(self._sizes) for name in block.linears}
        block.outputs = block.visit(lambda name, batch, rows: statistics[name].add(rows, self._checks(batch)))
        weights = {name: block.weight(name) for name in block.linears}
        probed = {name: self._matrix(name, weights[name], statistics[name]) for name in block.linears}
        if self.question.method != "rtn" and number % GROUPED == min(GROUPED, self.stream.block_count) // 2:
            for name in block.linears:
                self._groups(spread(weights[name], FEW), statistics[name])
        arguments = self.short.kwargs[number]
        entered = dict(self.variants)
        for kind, states in entered.items():
            if kind not in (ALL, ROUNDED):
                self.variants[kind] = block.run(states, arguments)
        for name in block.linears:
            self.variants[name] = self._changed(block, {name: (probed[name], weights[name])}, entered[FLOAT], arguments)
        both = {name: (probed[name], weights[name]) for name in block.linears}
        self.variants[ALL] = self._changed(block, both, entered[ALL], arguments)
        handles = [linear.register_forward_pre_hook(self._round) for linears in block.linears.values() for linear in linears]
        self.variants[ROUNDED] = block.run(entered[ROUNDED], arguments)
        for handle in handles:
            handle.remove()

    def _enter(self) -> None:
        """What enters the first block under each variant that there is from the start: rounded rows of the table where that is rounded."""
        self.short.hidden, self.short.kwargs = self.short.enter(None)
        table = self.short.enter(lambda rows: rounded(rows, self.question.probed))[0]
        plain = self.short.hidden
        self.variants = {FLOAT: plain, ROUNDED: plain, ALL: table, HEAD if self.tied else TABLE: table}

    def _changed(
        self, block: Block, weights: Mapping[str, tuple[np.ndarray, np.ndarray]], states: list[torch.Tensor], arguments: Mapping[str, Any]
    ) -> list[torch.Tensor]:
        """States after the block with the first of each two weights in it; the second stand there afterwards."""
        for name, (probed, _) in weights.items():
            block.replace(name, probed)
        after = block.run(states, arguments)
        for name, (_, plain) in weights.items():
            block.replace(name, plain)
        return after

    def _round(self, _module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """A forward pre-hook: inputs as the kernel of the probed choice sees them."""
        return (in_blocks(inputs[0], self.question.probed.group_size or 1), *inputs[1:])

    def _matrix(self, name: str, weight: np.ndarray, inputs: Inputs) -> np.ndarray:
        """Rules 2 and 3 of one matrix; what it is at the probed choice, float32 [rows, width]."""
        fitted, checked, question = inputs.fitted.mean(), inputs.checked.mean(), self.question
        probed, some = question.quantized(weight, fitted), spread(weight)
        share = len(weight) / len(some)
        self.gain[name] = 1.0
        if question.method != "rtn":
            self.gain[name] = output_error(spread(probed) - some, checked) / max(rounding_error(some, question.probed, checked), 1e-30)
        both, columns = (checked + fitted) / 2, np.einsum("ij,ij->j", weight, weight, dtype=np.float64)
        for choice in question.choices:
            self.errors[name, str(choice)] = share * (self.gain[name] if choice.quantized else 1.0) * rounding_error(some, choice, both)
            self.activations[name, str(choice)] = float(columns @ inputs.rounding_squares(choice.group_size)) if choice.group_size else 0.0
        return probed

    def _groups(self, some: np.ndarray, inputs: Inputs) -> None:
        """Rule 2's gain by kind of group, on some rows of a matrix."""
        fitted, checked, question = inputs.fitted.mean(), inputs.checked.mean(), self.question

        def gain(scheme: Scheme) -> float:
            return output_error(question.quantized(some, fitted, scheme) - some, checked) / max(rounding_error(some, scheme, checked), 1e-30)

        usual = gain(question.probed)
        for kind, scheme in question.kinds().items():
            self.grouped.setdefault(kind, []).append(np.log(max(gain(scheme), 1e-30) / max(usual, 1e-30)))

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(sorted({choice.group_size for choice in self.question.choices if choice.group_size}))

    def _head(self) -> dict[str, float]:
        """The head's own rows, the table's where it is another, and the KL of each variant, mean over the tokens that have context."""
        weight, statistics = self.stream.head_weight(), Inputs(self._sizes)
        for number, batch in enumerate(self.stream.head_inputs()):
            statistics.add(batch.reshape(-1, batch.shape[-1]), self._checks(number))
        probed = self._matrix(HEAD, weight, statistics)
        if not self.tied:
            self._table()
            self.variants[HEAD] = self.variants[FLOAT]
        lead = self.short.windows.shape[1] // LEAD
        states = {}
        for kind in list(self.variants):
            states[kind] = [batch[:, lead:].reshape(-1, batch.shape[-1]) for batch in self.stream.head_inputs(self.variants.pop(kind))]
        states[ROUNDED] = [in_blocks(batch, self.question.probed.group_size or 1) for batch in states[ROUNDED]]
        found = dict.fromkeys(states.keys() - {FLOAT}, 0.0)
        for number, batch in enumerate(states[FLOAT]):
            for start in range(0, len(batch), CHUNK):
                known = self._likely(batch[start : start + CHUNK], weight)
                chances = known.exp()
                for kind in found:
                    other = self._likely(states[kind][number][start : start + CHUNK], probed if kind in (HEAD, ALL) else weight)
                    found[kind] += _divergence(known, chances, other)
        return {kind: total / sum(map(len, states[FLOAT])) for kind, total in found.items()}

    def _likely(self, states: torch.Tensor, weight: np.ndarray) -> torch.Tensor:
        """Log-probabilities [tokens, vocab]."""
        import torch

        with torch.inference_mode():
            return self.stream.logits_of(states, weight).log_softmax(-1)

    def _table(self) -> None:
        """An embedding of its own: each token reads one row, all rows alike; rounded to nearest under every method."""
        weight = self.stream.views[f"{TABLE}.weight"].read()
        some = spread(weight)
        for choice in self.question.choices:
            self.errors[TABLE, str(choice)] = rounding_error(some, choice, None) / len(some)
            self.activations[TABLE, str(choice)] = 0.0
        self.gain[TABLE] = 1.0

    def _result(self, measured: Mapping[str, float]) -> Sensitivity:
        probed, of_groups = str(self.question.probed), {kind: float(np.exp(np.mean(logs))) for kind, logs in self.grouped.items()}
        for choice in self.question.choices:
            for name in self.gain.keys() - {TABLE} if str(choice) != probed else ():
                self.errors[name, str(choice)] *= of_groups.get((choice.group_size or 0, choice.symmetric), 1.0)
        slope = {name: measured[name] / max(self.errors[name, probed], 1e-30) for name in self.gain}
        joint = measured[ALL] / max(sum(measured[name] for name in slope), 1e-30)
        active = measured[ROUNDED] / max(sum(slope[name] * self.activations[name, probed] for name in slope), 1e-30)
        rows = []
        for (name, scheme), error in self.errors.items():
            activation = self.activations[name, scheme]
            rows.append(Row(name, scheme, error, activation, slope[name] * (joint * error + active * activation)))
        return Sensitivity(tuple(rows), slope, joint, active, self.gain)


def _divergence(known: torch.Tensor, chances: torch.Tensor, other: torch.Tensor) -> float:
    """sum over tokens of KL(known || other), of log-probabilities [tokens, vocab]; chances = exp(known). `other` is used up: each of these takes megabytes."""
    import torch

    with torch.inference_mode():
        return float(other.neg_().add_(known).mul_(chances).sum(-1).double().sum())
