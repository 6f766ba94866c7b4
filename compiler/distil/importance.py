"""Which layers, channels and heads a model can best do without, measured on text.

Layers: block influence, 1 - mean over tokens of cos(what enters the layer, what leaves it) (ShortGPT, arXiv 2403.03853). The least influential one goes,
then what is left is measured again: a layer that did little beside another may carry its work once that one is gone.

Channels of a feed-forward and groups of heads: root mean square of what enters the last matrix, times the norm of the columns that it meets (activation-
weighted magnitude as in Wanda, arXiv 2306.11695, summed over a column as in Minitron, arXiv 2407.14679).

Unlike with pruned weights, the speed is that of a smaller dense model on the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from compiler.checkpoints.view import Checkpoint
from compiler.distil.trim import DEPTH, HEADS, KEY_HEADS, Cut, Sizes, cut
from compiler.reference import reference_model

Report = Callable[[str, int, int], None]
Feed = Mapping[str, Any]  # keyword arguments of a forward pass: input_ids, attention_mask
Ranked = list[dict[str, Any]]


def choose(teacher: Checkpoint, task: str, feeds: Sequence[Feed], sizes: Sizes, report: Report) -> tuple[Cut, Ranked]:
    """The cut to `sizes`, and a row {layer, influence} for each dropped layer, in the order in which they went. feeds: texts as the model takes them."""
    dropped: Ranked = []
    kept = list(range(teacher.config[DEPTH]))
    goal = sizes.layers or len(kept)
    start = len(kept)
    while len(kept) > goal:
        measured = influences(reference_model(cut(teacher, Cut(tuple(kept))), task), feeds, len(kept))
        worst = int(np.argmin(measured))
        dropped.append({"layer": kept.pop(worst), "influence": float(measured[worst])})
        report("layers chosen to drop", start - len(kept), start - goal)
    if sizes.intermediate is None and sizes.heads is None:
        return Cut(tuple(kept)), dropped
    entering = energies(reference_model(cut(teacher, Cut(tuple(kept))), task), feeds, len(kept))
    channels, groups = {}, {}
    for new, old in enumerate(kept):
        if sizes.intermediate is not None:
            channels[old] = largest(entering["feed-forward"][new], sizes.intermediate)
        if sizes.heads is not None:
            keys = int(teacher.config.get(KEY_HEADS) or teacher.config[HEADS])
            of_groups = np.sqrt(np.square(entering["attention"][new]).reshape(keys, -1).sum(axis=1))
            groups[old] = largest(of_groups, sizes.heads * keys // teacher.config[HEADS])
    return Cut(tuple(kept), channels, groups), dropped


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest `count` values, ascending. [3, 1, 2], 2 -> [0, 2]."""
    return np.sort(np.argsort(-values, kind="stable")[:count])


def stack_of(model: Any, depth: int) -> Any:
    """The module list of a transformers model that holds its layers."""
    import torch

    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == depth)


def influences(model: Any, feeds: Sequence[Feed], depth: int) -> np.ndarray:
    """Block influence of every layer, float64 [depth]. Padded tokens count for nothing."""
    import torch

    total, count = np.zeros(depth), 0
    entered: dict[int, Any] = {}

    def measure(at: int, x: Any, y: Any, mask: Any) -> None:
        total[at] += float((1 - torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1))[mask].sum())

    for feed in feeds:
        mask = feed["attention_mask"].bool()
        count += int(mask.sum())

        def before(module: Any, args: Any, kwargs: Any, at: int) -> None:
            entered[at] = args[0] if args else kwargs["hidden_states"]

        def after(module: Any, args: Any, output: Any, at: int, mask: Any = mask) -> None:
            measure(at, entered.pop(at), output[0] if isinstance(output, tuple) else output, mask)

        with hooked(stack_of(model, depth), before, after), torch.inference_mode():
            model(**feed)
    return total / count


@contextmanager
def hooked(layers: Any, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None) -> Iterator[None]:
    """Hooks on numbered modules that are told the number."""
    from functools import partial

    handles = [layer.register_forward_pre_hook(partial(before, at=at), with_kwargs=True) for at, layer in enumerate(layers)] if before else []
    handles += [layer.register_forward_hook(partial(after, at=at)) for at, layer in enumerate(layers)] if after else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


ENDS = {"feed-forward": ("mlp.down_proj", "output.dense"), "attention": ("self_attn.o_proj",)}


def energies(model: Any, feeds: Sequence[Feed], depth: int) -> dict[str, list[np.ndarray]]:
    """For the last matrix of every feed-forward and attention: rms of each input times the norm of its column, by layer."""
    import torch

    layers = stack_of(model, depth)
    ends = {
        kind: [part for layer in layers for name, part in layer.named_modules() if name in names and isinstance(part, torch.nn.Linear)]
        for kind, names in ENDS.items()
    }
    squares = {kind: [torch.zeros(part.in_features, dtype=torch.float64) for part in parts] for kind, parts in ends.items()}
    for feed in feeds:
        mask = feed["attention_mask"].bool()
        for kind, parts in ends.items():

            def before(module: Any, args: Any, kwargs: Any, at: int, kind: str = kind, mask: Any = mask) -> None:
                squares[kind][at] += args[0].reshape(*mask.shape, -1)[mask].double().square().sum(dim=0)

            with hooked(parts, before), torch.inference_mode():
                model(**feed)
    tokens = sum(int(feed["attention_mask"].sum()) for feed in feeds)
    found = {}
    for kind, parts in ends.items():
        norms = [part.weight.detach().double().norm(dim=0) for part in parts]
        found[kind] = [((square / tokens).sqrt() * norm).numpy() for square, norm in zip(squares[kind], norms, strict=True)]
    return found
