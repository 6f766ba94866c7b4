"""Calibration: a decoder run block by block, so that peak memory is one block and the activations of the windows.

The blocks are transformers' own (compiler.reference builds them on the meta device), so every family of the reference is covered and the
statistics are of the same model that the evaluation trusts. A block is filled from the lazy checkpoint, run, and emptied again.

The statistic is the input second moment of each fused matrix over all tokens of the windows,

    H = X^T X / n          float32 [k, k], X float32 [n, k]

which gives the output error of any rounding dW [rows, k] without running the model again: E |dW x|^2 = tr(dW H dW^T).
q, k and v share one H, and so do gate and up: four for a block, and one for the head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler.checkpoints.view import Checkpoint
from compiler.errors import ArchitectureError
from compiler.reference import match_tensors, skeleton
from compiler.scheme import matrix_name

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 2048  # tokens run through a block at a time: eager attention holds heads x length x 4 bytes for each, a few times over
Report = Callable[[str, int, int], None]


@dataclass
class Block:
    """One decoder block, filled, with the hidden states that enter it.

    linears  fused matrix of the graph -> the torch linears stacked in it, in the order of the graph's rows
    hidden   float32 [batch, length, width] of each batch of windows
    outputs  what the next block is to see, where a visitor knows it; else the block is run as the visitor leaves it
    """

    name: str
    module: Any
    linears: Mapping[str, Sequence[Any]]
    hidden: list[torch.Tensor]
    kwargs: Mapping[str, Any]
    outputs: list[torch.Tensor] | None = None

    def weight(self, matrix: str) -> np.ndarray:
        """float32 [rows, k] of a fused matrix."""
        return np.concatenate([linear.weight.detach().numpy() for linear in self.linears[matrix]])

    def replace(self, matrix: str, weight: np.ndarray) -> None:
        """Give the block other weights [rows, k]: what follows sees the quantized model."""
        import torch

        start = 0
        for linear in self.linears[matrix]:
            stop = start + linear.weight.shape[0]
            linear.weight = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(weight[start:stop])), requires_grad=False)
            start = stop

    def run(self, hidden: Sequence[torch.Tensor] | None = None, kwargs: Mapping[str, Any] | None = None) -> list[torch.Tensor]:
        """The block's outputs, batch by batch: of what entered it, or of other states, of other windows with what `BlockStream.enter` gave for those."""
        import torch

        with torch.inference_mode():
            return [self.module(batch, **(self.kwargs if kwargs is None else kwargs)) for batch in (self.hidden if hidden is None else hidden)]

    def visit(self, visitor: Callable[[str, int, torch.Tensor], None]) -> list[torch.Tensor]:
        """`run`, with visitor(fused matrix, number of the batch, inputs float32 [tokens, k]) for every matrix and batch."""
        import torch

        def hook(matrix: str, number: int) -> Callable[..., None]:
            return lambda _module, inputs: visitor(matrix, number, inputs[0].reshape(-1, inputs[0].shape[-1]))

        outputs = []
        for number, batch in enumerate(self.hidden):
            handles = [linears[0].register_forward_pre_hook(hook(matrix, number)) for matrix, linears in self.linears.items()]
            try:
                with torch.inference_mode():
                    outputs.append(self.module(batch, **self.kwargs))
            finally:
                for handle in handles:
                    handle.remove()
        return outputs

    def moments(self) -> dict[str, np.ndarray]:
        """Fused matrix -> H float32 [k, k], by running the block once as it stands."""
        found: dict[str, Moment] = {}
        self.visit(lambda matrix, _number, rows: found.setdefault(matrix, Moment()).add(rows))
        return {matrix: moment.mean() for matrix, moment in found.items()}


class Moment:
    """H of rows that come in pieces: X^T X / n."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.count = 0

    def add(self, rows: torch.Tensor) -> None:
        """rows: float32 [tokens, k]"""
        if self.total is None:
            self.total = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.total.addmm_(rows.T, rows)
        self.count += len(rows)

    def mean(self) -> np.ndarray:
        """float32 [k, k]. Raises ValueError when no row came."""
        if self.total is None:
            raise ValueError("no rows")
        return (self.total / self.count).numpy()


class BlockStream:
    """The decoder of a checkpoint over token windows, one filled block at a time.

    windows  int64 [count, length], all of one length
    table    what becomes of rows of the embedding, float32 [n, width], before they enter; None: nothing

    Iterate `blocks()`; whatever the visitor puts into a block (`Block.replace`) is what the next blocks see. Afterwards `head_inputs()`
    are the inputs of lm_head. Raises ArchitectureError for a model without `model.layers`, CheckpointError for missing tensors.
    """

    def __init__(self, checkpoint: Checkpoint, windows: np.ndarray, table: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
        self.checkpoint, self.windows, self.table = checkpoint, windows, table
        self.model = skeleton(checkpoint.config, "text-generation", checkpoint.origin)
        base = getattr(self.model, "model", None)
        if not hasattr(base, "layers"):
            raise ArchitectureError(
                f"{checkpoint.origin}: model_type", expected="a decoder with model.layers", found=str(checkpoint.config.get("model_type")), remedy="use rtn"
            )
        self.base: Any = base
        self.views = match_tensors(self.model, checkpoint)
        self.hidden: list[torch.Tensor] = []
        self.kwargs: list[dict[str, Any]] = []

    @property
    def block_count(self) -> int:
        return len(self.base.layers)

    def blocks(self) -> Iterator[Block]:
        self.hidden, self.kwargs = self.enter(self.table)
        for index in range(self.block_count):
            block = self.filled(index)
            yield block
            self.hidden = block.outputs or block.run()
            self.empty(index)

    def filled(self, index: int) -> Block:
        """A block with its weights, and the states that stand before it; only in or after `blocks`. `empty` frees it."""
        name, module = f"model.layers.{index}", self.base.layers[index]
        self._fill(name, module)
        return Block(name, module, self.linears(name, module), self.hidden, self.kwargs[index])

    def empty(self, index: int) -> None:
        """Free a block, and give what it took back to the system: glibc would keep much of it, block after block."""
        self.base.layers[index].to("meta")
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc only
            trim(0)

    def head_inputs(self, hidden: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """float32 [batch, length, width] of each batch: the final norm of what the last block gave, or of other states."""
        import torch

        self._fill("model.norm", self.base.norm)
        with torch.inference_mode():
            return [self.base.norm(batch) for batch in (self.hidden if hidden is None else hidden)]

    def head_weight(self) -> np.ndarray:
        """float32 [vocab, width]; a tied head is the embedding."""
        return (self.views.get("lm_head.weight") or self.views["model.embed_tokens.weight"]).read()

    def logits_of(self, rows: torch.Tensor, weight: np.ndarray) -> torch.Tensor:
        """Logits [tokens, vocab] of the head's inputs [tokens, width] under head weights [vocab, width], with whatever the family does to logits."""
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPast

        self.model.lm_head.weight = torch.nn.Parameter(torch.from_numpy(weight), requires_grad=False)
        self.base.forward = lambda **_: BaseModelOutputWithPast(last_hidden_state=rows[None])
        try:
            logits: torch.Tensor = self.model(input_ids=torch.zeros(1, len(rows), dtype=torch.long), use_cache=False).logits[0]
        finally:
            del self.base.forward
        return logits

    def head_moment(self) -> np.ndarray:
        """H of lm_head, float32 [width, width]."""
        batches = [batch.reshape(-1, batch.shape[-1]) for batch in self.head_inputs()]
        return (sum(rows.T @ rows for rows in batches) / sum(map(len, batches))).numpy()

    def enter(self, table: Callable[[np.ndarray], np.ndarray] | None) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
        """Embed the windows and learn what the model hands to each block (masks, rotations), without running any block: states by batch, arguments by block."""
        import torch

        count, length = self.windows.shape
        size = max(divisor for divisor in range(1, count + 1) if count % divisor == 0 and (divisor == 1 or divisor * length <= BATCH_TOKENS))
        used, places = np.unique(self.windows, return_inverse=True)
        embedding, view = self.base.embed_tokens, self.views["model.embed_tokens.weight"]
        embedding.padding_idx = None
        rows = picked_rows(view, used)
        embedding.weight = torch.nn.Parameter(torch.from_numpy(rows if table is None else table(rows)), requires_grad=False)
        kwargs: list[dict[str, Any]] = []

        entered: list[torch.Tensor] = []

        def skip(hidden: torch.Tensor, *_: Any, **given: Any) -> torch.Tensor:
            kwargs.append({key: value for key, value in given.items() if key not in ("past_key_values", "use_cache")})
            if len(kwargs) == 1:
                entered.append(hidden)
            return hidden

        for start in range(0, count, size):
            kwargs.clear()
            for layer in self.base.layers:
                layer.forward = skip
            try:
                with torch.no_grad():
                    norm, self.base.norm = self.base.norm, torch.nn.Identity()
                    self.base(input_ids=torch.from_numpy(places.reshape(count, length)[start : start + size]), use_cache=False)
            finally:
                self.base.norm = norm
                for layer in self.base.layers:
                    del layer.forward
        embedding.to("meta")
        return entered, kwargs

    def _fill(self, name: str, module: Any) -> None:
        import torch

        state = {}
        for key in module.state_dict():
            if f"{name}.{key}" in self.views:
                array = self.views[f"{name}.{key}"].read()
                state[key] = torch.from_numpy(array if array.flags.writeable else array.copy())
        module.load_state_dict(state, strict=False, assign=True)
        module.requires_grad_(False)

    def linears(self, name: str, module: Any) -> dict[str, list[Any]]:
        """Fused matrix -> the torch linears stacked in it, in the order of the graph's rows."""
        import torch

        found: dict[str, list[Any]] = {}
        for key, part in module.named_modules():
            matrix = matrix_name(f"{name}.{key}.weight", self.checkpoint.config) if isinstance(part, torch.nn.Linear) else None
            if matrix:
                found.setdefault(matrix, []).append(part)
        return found


def picked_rows(view: Any, rows: np.ndarray) -> np.ndarray:
    """float32 [len(rows), width] of ascending row numbers, a block of the tensor in memory at a time."""
    picked = np.empty((len(rows), view.shape[1]), np.float32)
    for start, block in view.blocks():
        low, high = np.searchsorted(rows, (start, start + len(block)))
        picked[low:high] = block[rows[low:high] - start]
    return picked


def second_moments(checkpoint: Checkpoint, windows: np.ndarray, report: Report | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(fused matrix, H float32 [k, k]) of every matrix of the float model, block by block, `lm_head` last."""
    stream = BlockStream(checkpoint, windows)
    for number, block in enumerate(stream.blocks()):
        yield from block.moments().items()
        if report is not None:
            report("blocks calibrated", number + 1, stream.block_count)
    yield "lm_head", stream.head_moment()
