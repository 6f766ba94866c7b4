"""A smaller model cut out of a larger one: fewer layers, narrower feed-forwards, fewer attention heads.

What is left are the same tensors, read through views: nothing is copied and nothing is trained here. A layer that goes away is skipped by the residual
stream, a channel of a feed-forward or a head takes its rows of the matrices before it and its columns of the one after it:

    gate, up, (BERT: intermediate)   rows of the kept channels        down (BERT: output)   their columns
    q                                rows of the kept heads           o                     their columns
    k, v                             rows of the kept key/value heads, each with all query heads that share it

config.json says the new sizes, and every list in it that has one entry per layer (layer_types, no_rope_layers) loses the entries of the dropped ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.errors import RecipeError
from compiler.reference import DROPPED_CONFIG
from compiler.store import cache_key

LAYER = re.compile(r"(?P<stack>(?:.*\.)?(?:layers|layer|h|blocks))\.(?P<number>\d+)\.(?P<rest>.+)")
DEPTH, WIDTH = "num_hidden_layers", "intermediate_size"
HEADS, KEY_HEADS = "num_attention_heads", "num_key_value_heads"
BEFORE = re.compile(r"mlp\.(?:gate|up)_proj\.(?:weight|bias)|intermediate\.dense\.(?:weight|bias)")  # rows are channels
AFTER = re.compile(r"mlp\.down_proj\.weight|output\.dense\.weight")  # columns are channels
QUERY = re.compile(r"self_attn\.q_proj\.(?:weight|bias)")
KEY = re.compile(r"self_attn\.[kv]_proj\.(?:weight|bias)")
OUTPUT = re.compile(r"self_attn\.o_proj\.weight")


@dataclass(frozen=True)
class Sizes:
    """How large a student is: layers, channels of a feed-forward, query heads. None: as large as the teacher."""

    layers: int | None = None
    intermediate: int | None = None
    heads: int | None = None

    @property
    def smaller(self) -> bool:
        return (self.layers, self.intermediate, self.heads) != (None, None, None)


@dataclass(frozen=True)
class Cut:
    """What is kept, by the teacher's numbers, ascending.

    layers    of all
    channels  layer -> of its feed-forward; a layer that is missing keeps all
    groups    layer -> key/value heads, with the query heads that share each
    """

    layers: tuple[int, ...]
    channels: Mapping[int, np.ndarray] = field(default_factory=dict)
    groups: Mapping[int, np.ndarray] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        parts = {"channels": self.channels, "groups": self.groups}
        return {"layers": list(self.layers), **{name: {str(at): kept.tolist() for at, kept in part.items()} for name, part in parts.items()}}

    @staticmethod
    def from_dict(told: Mapping[str, Any]) -> Cut:
        channels, groups = ({int(at): np.array(kept, np.int64) for at, kept in told[name].items()} for name in ("channels", "groups"))
        return Cut(tuple(told["layers"]), channels, groups)


@dataclass(frozen=True)
class Rows:
    """Some rows of a view, then some of its columns; indices ascend."""

    view: TensorView
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    def __call__(self, start: int, stop: int) -> np.ndarray:
        if self.rows is None:
            block = self.view.rows(start, stop)
        else:
            wanted = self.rows[start:stop]
            block = self.view.rows(int(wanted[0]), int(wanted[-1]) + 1)[wanted - wanted[0]] if len(wanted) else self.view.rows(0, 0)
        return block if self.columns is None else np.ascontiguousarray(block[:, self.columns])


def some(view: TensorView, rows: np.ndarray | None = None, columns: np.ndarray | None = None) -> TensorView:
    """[4, 3] with rows [0, 2] and columns [1] -> [2, 1]."""
    height = view.shape[0] if rows is None else len(rows)
    rest = view.shape[1:] if columns is None else (len(columns),)
    return replace(view, shape=(height, *rest), rows=Rows(view, rows, columns))


def check(checkpoint: Checkpoint, sizes: Sizes) -> None:
    """Raises RecipeError for sizes that this model cannot be cut to."""
    config = checkpoint.config
    wanted = {"layers": (sizes.layers, DEPTH), "intermediate": (sizes.intermediate, WIDTH), "heads": (sizes.heads, HEADS)}
    for name, (size, key) in wanted.items():
        if size is None:
            continue
        if not isinstance(config.get(key), int):
            raise _wrong(name, f"a model whose config has {key}", f"{config.get('model_type')!r}, which has none", "leave it out")
        if not 1 <= size <= config[key]:
            raise _wrong(name, f"1 to {config[key]}, the teacher's", str(size), "ask for less")
    rests = [match["rest"] for name in checkpoint.tensors if (match := LAYER.fullmatch(name))]
    if not rests:
        raise _wrong("layers", "a model of numbered layers", "none", "leave `distil` out")
    if sizes.intermediate is not None and not any(BEFORE.fullmatch(rest) for rest in rests):
        raise _wrong("intermediate", "separate gate, up and down (or BERT's dense) matrices", "none of them", "leave it out")
    if sizes.heads is not None:
        keys = int(config.get(KEY_HEADS) or config[HEADS])
        share = config[HEADS] // keys
        if not any(QUERY.fullmatch(rest) for rest in rests):
            raise _wrong("heads", "a decoder with separate q, k, v and o matrices", "none of them", "leave it out")
        if sizes.heads % share:
            raise _wrong("heads", f"a multiple of {share}, the query heads that share a key/value head", str(sizes.heads), "round it")


def _wrong(name: str, expected: str, found: str, remedy: str) -> RecipeError:
    return RecipeError(f"distil.{name}", expected=expected, found=found, remedy=remedy, code="RECIPE_VALUE")


def first(checkpoint: Checkpoint, sizes: Sizes) -> Cut:
    """The cut of these sizes that keeps what comes first: as large as the one that importance will choose, for planning."""
    config = checkpoint.config
    layers = tuple(range(sizes.layers or config[DEPTH]))
    keys = int(config.get(KEY_HEADS) or config.get(HEADS) or 1)
    groups = {} if sizes.heads is None else {at: np.arange(sizes.heads * keys // config[HEADS]) for at in layers}
    channels = {} if sizes.intermediate is None else {at: np.arange(sizes.intermediate) for at in layers}
    return Cut(layers, channels, groups)


def cut(checkpoint: Checkpoint, kept: Cut) -> Checkpoint:
    """The student as a checkpoint: views on the teacher's tensors under their new numbers."""
    config = checkpoint.config
    number = {old: new for new, old in enumerate(kept.layers)}
    head_size = head_size_of(config) if kept.groups else 0
    share = config[HEADS] // int(config.get(KEY_HEADS) or config[HEADS]) if kept.groups else 0
    tensors: dict[str, TensorView] = {}
    for name, view in checkpoint.tensors.items():
        match = LAYER.fullmatch(name)
        if match is None:
            tensors[name] = view
            continue
        at, rest = int(match["number"]), match["rest"]
        if at not in number:
            continue
        made = _narrow(view, rest, kept.channels.get(at), kept.groups.get(at), head_size, share)
        named = f"{match['stack']}.{number[at]}.{rest}"
        tensors[named] = replace(made, name=named)

    def digest() -> str:
        return cache_key({"teacher": checkpoint.digest, "cut": kept.as_dict()})

    return replace(checkpoint, tensors=tensors, config=_config(config, kept, head_size, share), digest_of=digest)


def _narrow(view: TensorView, rest: str, channels: np.ndarray | None, groups: np.ndarray | None, head_size: int, share: int) -> TensorView:
    if channels is not None and BEFORE.fullmatch(rest):
        return some(view, rows=channels)
    if channels is not None and AFTER.fullmatch(rest):
        return some(view, columns=channels)
    if groups is not None and QUERY.fullmatch(rest):
        return some(view, rows=spans(groups, share * head_size))
    if groups is not None and KEY.fullmatch(rest):
        return some(view, rows=spans(groups, head_size))
    if groups is not None and OUTPUT.fullmatch(rest):
        return some(view, columns=spans(groups, share * head_size))
    return view


def spans(groups: np.ndarray, size: int) -> np.ndarray:
    """[0, 2], 3 -> [0, 1, 2, 6, 7, 8]."""
    return (groups[:, None] * size + np.arange(size)).reshape(-1)


def head_size_of(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config[HEADS])


def _config(config: Mapping[str, Any], kept: Cut, head_size: int, share: int) -> dict[str, Any]:
    depth = config[DEPTH]
    made = {**config, **per_layer(config)}
    made = {key: [value[at] for at in kept.layers] if isinstance(value, list) and len(value) == depth else value for key, value in made.items()}
    made[DEPTH] = len(kept.layers)
    if kept.channels:
        made[WIDTH] = len(next(iter(kept.channels.values())))
    if kept.groups:
        count = len(next(iter(kept.groups.values())))
        made |= {KEY_HEADS: count, HEADS: count * share, "head_dim": head_size}
    return made


def per_layer(config: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """Lists with an entry for each layer that transformers works out from other keys: which layers have a window goes by number in some families."""
    from transformers import AutoConfig

    try:
        built = AutoConfig.for_model(str(config.get("model_type")), **{key: value for key, value in config.items() if key not in DROPPED_CONFIG})
    except ValueError:
        return {}
    found = {key: getattr(built, key, None) for key in ("layer_types", "no_rope_layers")}
    return {key: value for key, value in found.items() if isinstance(value, list) and len(value) == config[DEPTH]}
