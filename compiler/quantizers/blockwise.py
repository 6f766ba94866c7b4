"""Codes trained block by block: each block, seen through its codes, learns to give what the float block gives.

    minimise over p     mean over tokens of |B_q(x_q) - B(x)|^2 / |B(x)|^2
    W_q = scale * (code - zero_point),     code = clip(rint(p + zero_point), 0, 2**bits - 1)

x enters block B of the float model, x_q is what the quantized blocks before it give: a block also learns to undo what those did. Reconstruction by block is
BRECQ's (arXiv 2102.05426), training the weights through their rounding EfficientQAT's first phase (arXiv 2407.11062). Layout, scales and zero points stay.

1. p float32 [rows, groups, group size], in steps of the scale, begins where the float weight lies, but within NEAR of the code that the quantizer chose:
   rounding gives that code, and what lies near a border turns first. Gradients go to p as if it were not rounded (straight-through, arXiv 1308.3432).
2. Adam; the rate rises over WARM of STEPS and falls to 0 in a straight line. Every step takes one batch of the stream's windows, drawn by (seed, block).
3. Every HELD-th batch is not trained on. CHECKS times it is asked; the codes that are best there are kept, those that the block came with among them.
4. The next block sees what was kept. Table and head keep their codes.
5. What was kept of a block lies in a file; a run that was killed goes on from its last block, to the same codes.

What kernels do to activations is not in it. Memory is the codes of all matrices, a few times one block, and the states of the windows three times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils import parametrize

from compiler.checkpoints.view import Checkpoint
from compiler.distil.teacher import Answers
from compiler.errors import RecipeError
from compiler.quantizers.affine import Quantized, dequantize, reciprocal
from compiler.quantizers.calibrate import Block, BlockStream

NEAR = 0.49
RATE = 6e-3  # steps of the scale
STEPS = 60
WARM = 0.1
BETAS = (0.9, 0.98)
CHECKS = 4
HELD = 8
BATCH = 4  # windows that the stream takes together
HEAD, TABLE = "lm_head", "model.embed_tokens"
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Trained:
    """matrices: the blocks' matrices with other codes. before, after: error of the last block on windows held out, by the codes that came and by these."""

    matrices: Mapping[str, Quantized]
    before: float
    after: float


class Through(torch.autograd.Function):
    """p -> scale * (code - zero_point), gradients straight through."""

    @staticmethod
    def forward(ctx: Any, position: torch.Tensor, scales: torch.Tensor, least: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scales)
        return position.round().clamp_(least, most).mul_(scales)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scales,) = ctx.saved_tensors
        return gradients[0] * scales, None, None, None


class Coded(torch.nn.Module):
    """Some rows of a fused matrix, as a parametrization of the linear that holds their float weights [rows, width]."""

    def __init__(self, quantized: Quantized, rows: slice, weight: torch.Tensor) -> None:
        super().__init__()
        self.width = quantized.width
        scales = quantized.scales[rows]
        middle = np.full(scales.shape, 1 << (quantized.scheme.bits - 1), np.float32)
        zeros = torch.from_numpy(middle if quantized.zero_points is None else quantized.zero_points[rows].astype(np.float32))[..., None]
        self.zeros, self.scales = zeros, torch.from_numpy(scales)[..., None]
        self.least, self.most = -zeros, float((1 << quantized.scheme.bits) - 1) - zeros
        steps = torch.from_numpy(quantized.codes[rows].astype(np.float32)).view(*scales.shape, -1) - zeros
        padded = torch.nn.functional.pad(weight, (0, steps[0].numel() - self.width)).view(steps.shape)
        lies = padded * torch.from_numpy(reciprocal(scales))[..., None]
        self.position = torch.nn.Parameter(steps + (lies - steps).clamp_(-NEAR, NEAR))

    def forward(self, _weight: torch.Tensor) -> torch.Tensor:
        dense: torch.Tensor = Through.apply(self.position, self.scales, self.least, self.most)
        return dense.view(len(dense), -1)[:, : self.width]

    def codes(self) -> np.ndarray:
        """uint8 [rows, groups * group size]."""
        with torch.no_grad():
            codes = self.position.round().clamp_(self.least, self.most).add_(self.zeros)
        return codes.to(torch.uint8).view(len(codes), -1).numpy()


class Student:
    """A block seen through the codes of its matrices; a matrix that has none keeps its float weights."""

    def __init__(self, block: Block, module: Any, linears: Mapping[str, Sequence[Any]], matrices: Mapping[str, Quantized]) -> None:
        self.kwargs, self.module = block.kwargs, module
        self.coded: dict[str, list[Coded]] = {}
        for name in linears.keys() & matrices.keys():
            start = 0
            for linear in linears[name]:
                rows = slice(start, start + len(linear.weight))
                start = rows.stop
                self.coded.setdefault(name, []).append(Coded(matrices[name], rows, linear.weight.detach()))
                parametrize.register_parametrization(linear, "weight", self.coded[name][-1], unsafe=True)

    @property
    def positions(self) -> list[torch.nn.Parameter]:
        return [coded.position for name in sorted(self.coded) for coded in self.coded[name]]

    def codes(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate([coded.codes() for coded in parts]) for name, parts in self.coded.items()}

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        with parametrize.cached():
            found: torch.Tensor = self.module(states, **self.kwargs)
        return found

    def run(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad(), parametrize.cached():
            return [self.module(states, **self.kwargs) for states in batches]


def error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared distance, relative to the squared length wanted."""
    return ((found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()


def mean_error(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([error(one, other) for one, other in zip(found, wanted, strict=True)]).mean())


def train(checkpoint: Checkpoint, matrices: Mapping[str, Quantized], windows: np.ndarray, folder: Path, report: Report, seed: int = 0) -> Trained:
    """Train the codes of the blocks' `matrices` on token windows int64 [count, length], by rules 1-5.

    matrices  fused matrix -> its codes, those of table and head too where they are quantized
    folder    for what was kept of each block
    Raises RecipeError for less than two batches of windows, OutputError where the folder cannot be written, ArchitectureError as `BlockStream` does.
    """
    windows = windows[: len(windows) // BATCH * BATCH] if len(windows) >= 2 * BATCH else windows
    table = matrices.get(HEAD if checkpoint.config.get("tie_word_embeddings") else TABLE)
    stream = BlockStream(checkpoint, windows)
    used = np.unique(windows)
    states = stream.enter(None if table is None else lambda _: dequantize(rows_of(table, used)))[0]
    if len(states) < 2:
        found, remedy = f"{windows.size} tokens", "give more text, or remove quantize.tune"
        raise RecipeError("quantize.calibration", expected="text to train on and to hold out", found=found, remedy=remedy, code="DATA_EMPTY")
    held = [place for place in range(len(states)) if place % HELD == HELD // 2] or [len(states) - 1]
    plain = [states[place] for place in held]
    made: dict[str, Quantized] = {}
    before = after = 0.0
    for number, block in enumerate(stream.blocks()):
        block.outputs = wanted = [batch.clone() for batch in block.run()]  # clones may be learnt from: what inference mode makes may not
        mine = {name: matrices[name] for name in block.linears if name in matrices}
        lesson = Lesson(stream, block, mine, states, wanted, held)
        plain = lesson.student().run(plain)

        def learn(_: int, lesson: Lesson = lesson, number: int = number) -> dict[str, np.ndarray]:
            return lesson.learn((seed, number), lambda words, step: report(words, number * STEPS + step, stream.block_count * STEPS))

        kept = Answers(folder, learn).of(number)
        mine = {name: replace(quantized, codes=kept[name]) for name, quantized in mine.items()}
        made |= mine
        states = replace(lesson, matrices=mine).student().run(states)
        before, after = mean_error(plain, [wanted[place] for place in held]), mean_error([states[place] for place in held], [wanted[place] for place in held])
        report(f"blocks trained, error {before:.4f} -> {after:.4f}", (number + 1) * STEPS, stream.block_count * STEPS)
    return Trained(made, before, after)


def rows_of(quantized: Quantized, rows: np.ndarray) -> Quantized:
    """Some rows of a matrix."""
    zeros = quantized.zero_points
    return replace(quantized, codes=quantized.codes[rows], scales=quantized.scales[rows], zero_points=None if zeros is None else zeros[rows])


@dataclass(frozen=True)
class Lesson:
    """One block: what enters its student and what it should give, by batch; `held` are not trained on."""

    stream: BlockStream
    block: Block
    matrices: Mapping[str, Quantized]
    states: Sequence[torch.Tensor]
    wanted: Sequence[torch.Tensor]
    held: Sequence[int]

    def student(self) -> Student:
        module = copy.deepcopy(self.block.module)
        return Student(self.block, module, self.stream.linears(self.block.name, module), self.matrices)

    def learn(self, seed: tuple[int, int], told: Callable[[str, int], None]) -> dict[str, np.ndarray]:
        """The best codes of each matrix, by rules 2 and 3."""
        student = self.student()
        best, kept = self.judged(student), student.codes()
        if not student.positions:
            return kept
        adam = torch.optim.Adam(student.positions, lr=RATE, betas=BETAS)
        for step, place in enumerate(self.order(seed)):
            adam.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / (WARM * STEPS)) * (1 - step / STEPS)
            adam.zero_grad()
            error(student(self.states[place]), self.wanted[place]).backward()
            adam.step()
            if (step + 1) % (STEPS // CHECKS) == 0:
                found = self.judged(student)
                if found < best:
                    best, kept = found, student.codes()
            told(f"steps of training, error {best:.4f}", step + 1)
        return kept

    def judged(self, student: Student) -> float:
        return mean_error(student.run([self.states[place] for place in self.held]), [self.wanted[place] for place in self.held])

    def order(self, seed: tuple[int, int]) -> Iterator[int]:
        """STEPS batches, each pass in an order of its own."""
        trained = [place for place in range(len(self.states)) if place not in self.held]
        draw, left = np.random.default_rng(seed), STEPS
        while left:
            for place in draw.permutation(trained)[:left]:
                left -= 1
                yield int(place)
