"""`Delta` and `Edit`: a trained change of a model, tensor by tensor, row block by row block.

A kind of delta (LoRA, DoRA, LoKr, sparse, diff ...) is one file that turns stored factors into edits. An edit is asked for
the change of the rows it is shown, so a merge holds one block at a time. A kind that multiplies (DoRA, IA3, OFT) gives
f(W) - W: its difference reads the base's rows, and is always taken against the base alone, never against what other deltas
made of it, so the order of several deltas does not matter and a weighted sum of them means something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from compiler.checkpoints.view import TensorView
from compiler.deltas.select import EVERYTHING, Selection
from compiler.errors import DeltaError

# (first row, base rows float32 [n, ...], is the tensor stored transposed) -> difference at weight 1, float32 [n, ...]
Change = Callable[[int, np.ndarray, bool], np.ndarray]
# trained shape (out, in) -> left [out, r], right [r, in], float32: the difference at weight 1 is exactly their product
Factors = Callable[[tuple[int, ...]], tuple[np.ndarray, np.ndarray]]
# (the base's whole tensor, is it stored transposed) -> the change to use on it
Prepare = Callable[[TensorView, bool], Change]

ANY = -1  # a dimension that the delta's file does not tell

ONE_THREAD = 1 << 18  # multiply-adds up to which OpenBLAS stays on the calling thread
TILE_COLUMNS = 1024
TILED_RANK = 32


@dataclass(frozen=True)
class Edit:
    """The change of one parameter.

    target      the parameter as the delta spells it: the trained model's own name
    shape       the shape it was trained on: [out, in] for a linear weight; ANY where its file does not tell
    prepare     called once when the edit is bound, for a kind that reads or checks more of the base than the rows it is shown
    brings      rows, rising, whose whole values it holds, so that it can bring them to a base that lacks them (compiler.deltas.vocabulary)
    reads_base  the change depends on the base's rows, not only on how many there are
    factors     the same change as a product of two thin matrices, for a kind that is one
    transposes  the base may hold it as [in, out] too (GPT-2's Conv1D)
    flipped     it was trained on such a tensor (`fan_in_fan_out`): decides for square weights
    replaces    the rows stand in place of the base's instead of being added; `change` then returns them, whatever base rows it is shown
    may_add     the base may lack the parameter (a classification head): it is then added, as a replacement of nothing
    optional    where the base lacks the parameter there is nothing to change (IA3 scales a bias where there is one)
    """

    target: str
    shape: tuple[int, ...]
    change: Change = field(repr=False)
    transposes: bool = False
    flipped: bool = False
    replaces: bool = False
    may_add: bool = False
    optional: bool = False
    brings: Sequence[int] = field(default=(), repr=False)
    reads_base: bool = False
    prepare: Prepare | None = field(default=None, repr=False)
    factors: Factors | None = field(default=None, repr=False)

    def layout(self, shape: tuple[int, ...]) -> bool | None:
        """Is a base tensor of this shape transposed? None when it does not fit. (4, 3) trained, (3, 4) in the base -> True."""
        turned = self.transposes and _fits(self.shape[::-1], shape)
        if _fits(self.shape, shape):
            return self.flipped and turned
        return True if turned else None


@dataclass(frozen=True)
class Delta:
    """One trained change, read lazily.

    kind          lora, dora, loha, sparse, diff, ...
    origin        what the user named, for messages and lineage
    weight        factor on every difference
    edits         in the order they apply: replacements first
    base_name     the base it says it was trained on, "" when it does not say
    base_digest   digest of that base, None when it does not say
    labels        id -> label of a classification head, empty when it brings none
    task          PEFT's task type, "" when it does not say
    every_layer   it says that it adapts the same modules in every layer: a layer without is a sign of another base
    tied          trained with input and output embedding tied (`ensure_weight_tying`)
    name          what the user calls it, "" when nobody named it
    accept_base   digest of the base that the user accepts in place of the delta's own, None for no other
    select        the modules it changes, and by what factor (compiler.deltas.select)
    assets        tokenizer files beside it
    digest        sha256 over the delta's files
    """

    kind: str
    origin: str
    weight: float
    edits: tuple[Edit, ...] = field(repr=False)
    digest_of: Callable[[], str] = field(repr=False, compare=False)
    base_name: str = ""
    base_digest: str | None = None
    labels: Mapping[int, str] = field(default_factory=dict)
    task: str = ""
    every_layer: bool = False
    tied: bool = False
    name: str = ""
    accept_base: str | None = None
    select: Selection = EVERYTHING
    assets: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def digest(self) -> str:
        return self.digest_of()

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters it touches, as it spells them, each once."""
        return tuple(dict.fromkeys(edit.target for edit in self.edits))

    def apply(self, name: str, block: np.ndarray, first_row: int) -> np.ndarray:
        """Rows of parameter `name` with this delta alone applied: float32 [n, ...] -> float32 [n, ...], a new array."""
        for edit in self.edits:
            if edit.target == name:
                change = edit.change(first_row, block, edit.flipped)
                block = change if edit.replaces else block + np.float32(self.weight) * change
        return block


def _fits(trained: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(trained) == len(shape) and all(one in (ANY, other) for one, other in zip(trained, shape, strict=True))


def low_rank(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left [n, r] @ right [r, m] -> float32 [n, m], in tiles that BLAS computes on one thread.

    A product this thin costs less than waking a second thread for it: with another process on the machine, OpenBLAS's threads
    spin for each other and one merge took 8 s of processor time instead of 0.7. Tiles also make the result independent of
    the number of threads. From rank 33 on there is enough work in one product, and it is left whole.
    """
    (rows, rank), columns = left.shape, right.shape[1]
    if rank > TILED_RANK or rows * columns * rank <= ONE_THREAD:
        return np.matmul(left, right)
    out = np.empty((rows, columns), np.float32)
    step = max(1, ONE_THREAD // (min(columns, TILE_COLUMNS) * rank))
    for column in range(0, columns, TILE_COLUMNS):
        tile = right[:, column : column + TILE_COLUMNS]
        for row in range(0, rows, step):
            np.matmul(left[row : row + step], tile, out=out[row : row + step, column : column + TILE_COLUMNS])
    return out


def wrong_delta(origin: str, expected: str, found: str, remedy: str, code: str = "") -> DeltaError:
    return DeltaError(origin, expected=expected, found=found, remedy=remedy, code=code)
