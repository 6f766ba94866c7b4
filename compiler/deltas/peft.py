"""What every PEFT adapter has in common, whatever its kind: names, patterns, saved modules, the scan for NaN.

A kind gives the names of its parts (`lora_A`, `hada_w1_a`, ...) and turns the parts of one module into edits; all other
tensors of the file are whole tensors that replace the base's (`modules_to_save`, trained biases, saved embeddings).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from re import _parser as re_parser  # type: ignore[attr-defined]  # what `re` itself reads patterns with; no public name
from typing import Any

import numpy as np

from compiler.checkpoints.files import sha256_file, sha256_parts
from compiler.checkpoints.safetensors import FLOATS
from compiler.checkpoints.view import TensorView
from compiler.deltas.base import Delta, Edit, wrong_delta
from compiler.deltas.tokens import PART, is_tokens, token_edit
from compiler.errors import DeltaError

Whole = Callable[[TensorView], np.ndarray]  # reads a factor, and keeps the last few
Parts = Mapping[str, TensorView]

PREFIX = "base_model.model."
PATTERN_LIMIT, MOST_REPEATS = 500, 4  # characters, repeats of one pattern
FILES = ("adapter_config.json", "adapter_model.safetensors", "config.json")  # the last one, where it is there, names a head's labels
SAVE_AGAIN = "save the adapter again: a part of it is missing"


def _keeper() -> Whole:
    """A reader that keeps the factors of the tensor at hand: keeping more would let memory grow with the model."""
    return lru_cache(maxsize=4)(TensorView.read)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, opened. config: adapter_config.json. tensors: adapter_model.safetensors."""

    folder: Path
    origin: str
    weight: float
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorView] = field(repr=False)
    whole: Whole = field(default_factory=_keeper, repr=False, compare=False)

    def place(self, module: str) -> str:
        return f"{self.origin}: {module}"

    def scale(self, place: str, module: str, alpha: str, rank: int) -> float:
        """alpha / r of a module by `rank_pattern` and `alpha_pattern`. alpha: its key in the config. Raises DeltaError when r is not `rank`."""
        said = int(by_pattern(self.config.get("rank_pattern"), module, self.config.get("r", 8)))
        check_rank(place, said, rank)
        return float(by_pattern(self.config.get("alpha_pattern"), module, self.config.get(alpha, 8))) / rank


def modules_of(adapter: Adapter, parts: Sequence[str], prefix: str) -> tuple[dict[str, dict[str, TensorView]], dict[str, TensorView]]:
    """(parts by module, tensors that are no part). `a.b.lora_A.weight` -> module a.b, part lora_A.

    Raises DeltaError: a tensor that begins with the kind's prefix and is none of its parts, so that nothing is skipped silently.
    """
    pattern = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(sorted(map(re.escape, parts), key=len, reverse=True))})(\.weight)?")
    found: dict[str, dict[str, TensorView]] = {}
    rest: dict[str, TensorView] = {}
    for name, view in adapter.tensors.items():
        if ".original_module." in name:
            continue
        match = pattern.fullmatch(name)
        if match:
            found.setdefault(match["module"].removeprefix(PREFIX), {})[match["part"]] = view
        elif (prefix and f".{prefix}" in name) or ("trainable_tokens" in name and not is_tokens(name)):
            raise wrong_delta(
                adapter.place(name),
                ", ".join(parts),
                "a part that is not built",
                "merge this adapter with PEFT and compile the result: convolutions are not built",
            )
        else:
            rest[name] = view
    return found, rest


def make_delta(adapter: Adapter, kind: str, edits: Iterable[Edit], modules: Iterable[str], rest: Mapping[str, TensorView]) -> Delta:
    """The delta of these edits and of the whole tensors in `rest`. modules: the adapted ones.

    Raises DeltaError: NaN or infinity, no tensors, a whole tensor that nothing in adapter_config.json accounts for.
    """
    known = frozenset(modules)
    replaced = [_replacement(adapter, name, view, known) for name, view in rest.items() if not is_tokens(name)]
    tokens = [_tokens(adapter, name, view) for name, view in rest.items() if is_tokens(name)]
    if adapter.config.get("trainable_token_indices") and not tokens:
        raise wrong_delta(adapter.origin, "trainable_tokens_delta, as trainable_token_indices says", "no such rows in the file", SAVE_AGAIN)
    changed = [*edits, *tokens]
    if not changed and not replaced:
        raise wrong_delta(adapter.origin, f"{kind} factors", "none: the file holds no tensors", "train the adapter, or gather sharded weights before saving it")
    files = [path for name in FILES if (path := adapter.folder / name).is_file()]
    config = adapter.config
    return Delta(
        kind=kind,
        origin=adapter.origin,
        weight=adapter.weight,
        edits=(*replaced, *changed),
        digest_of=lambda: sha256_parts({path.name: sha256_file(path) for path in files}),
        base_name=str(config.get("base_model_name_or_path") or ""),
        task=str(config.get("task_type") or ""),
        every_layer=_adapts_every_layer(config),
        tied=bool(config.get("ensure_weight_tying") or tokens),
    )


def load_tokens(adapter: Adapter) -> Delta:
    """An adapter of trainable tokens alone (compiler.deltas.tokens). Raises DeltaError as `token_edit` does."""
    modules, rest = modules_of(adapter, ("trainable_tokens_original",), "")
    return make_delta(adapter, "tokens", [], modules, rest)


def _adapts_every_layer(config: Mapping[str, Any]) -> bool:
    """target_modules is a list of names without layer numbers, and nothing else picks layers."""
    modules = config.get("target_modules")
    if not isinstance(modules, list) or not modules or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return False
    return not any(part.isdigit() for module in modules for part in str(module).split("."))


def check_finite(origin: str, views: Iterable[TensorView]) -> None:
    """Raises DeltaError for NaN or infinity."""
    for view in views:
        if view.dtype not in FLOATS:
            continue
        for first, block in view.blocks():
            if not np.isfinite(block).all():
                bad = int(block.size - np.isfinite(block).sum())
                raise wrong_delta(
                    f"{origin}: {view.name}",
                    "finite numbers",
                    f"{bad} NaN or infinite from row {first}",
                    "train the adapter again: this one diverged",
                    "ADAPTER_NONFINITE",
                )


def need(place: str, parts: Parts, *names: str) -> tuple[TensorView, ...]:
    """These parts of a module. Raises DeltaError for one that is missing."""
    for name in names:
        if name not in parts:
            raise wrong_delta(
                place, " and ".join(names), f"no {name}", "save the adapter again: half of the pair is missing" if len(names) == 2 else SAVE_AGAIN
            )
    return tuple(parts[name] for name in names)


def check_rank(place: str, said: int, rank: int) -> None:
    """Raises DeltaError when the weights are not of the rank, 1 or more, that adapter_config.json says."""
    if said < 1 or rank < 1:
        found = f"r {said} in adapter_config.json" if said < 1 else "0 in the weights"
        raise wrong_delta(place, "a rank of at least 1", found, "correct r in adapter_config.json", "ADAPTER_SHAPE")
    if said != rank:
        remedy = "put the adapter_config.json of this training run beside its weights"
        raise wrong_delta(place, f"rank {said} as adapter_config.json says", f"rank {rank} in the weights", remedy, "ADAPTER_SHAPE")


def misfit(place: str, expected: str, parts: Parts, code: str = "ADAPTER_SHAPE") -> DeltaError:
    """The error for parts of one module whose shapes do not go together."""
    shapes = ", ".join(f"{name} {list(view.shape)}" for name, view in parts.items())
    return wrong_delta(place, expected, shapes, "save the adapter again: its parts belong to different runs, or to a convolution, which is not built", code)


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern p for which `(.*\\.)?(p)$` matches the module's name. Raises DeltaError for a pattern that is none, or too slow."""
    for pattern, value in (patterns or {}).items():
        if _compiled(pattern).match(module):
            return value
    return default


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """`(.*\\.)?(p)$`. Repeats within repeats, `(a+)+`, take time exponential in the name's length; many in a row a high power of it.

    Groups are counted in the whole, as PEFT counts them: \\2 in p is p itself. Raises DeltaError.
    """
    place, remedy = f"adapter_config.json: pattern {pattern[:80]!r}", "write out the modules' names"
    endless = wrong_delta(place, f"at most {MOST_REPEATS} repeats, none in another", "a pattern that may take for ever", remedy, "REGEX_LIMIT")
    if len(pattern) > PATTERN_LIMIT:
        raise endless
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of sets that a later Python may read otherwise
            repeats, whole = _repeats(re_parser.parse(pattern), 0), re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise wrong_delta(place, "a regular expression", str(error), remedy, "REGEX_LIMIT") from error
    if len(repeats) > MOST_REPEATS or max(repeats, default=0) > 0:
        raise endless
    return whole


def _repeats(parsed: Any, depth: int) -> list[int]:
    """For each unbounded repeat of a parsed pattern, in how many others it stands: `(a+)+b*` -> [0, 1, 0]."""
    found: list[int] = []
    for operator, argument in parsed:
        repeats = str(operator) in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
        if repeats and argument[1] > 1:
            found.append(depth)
        inner = depth + 1 if repeats and argument[1] > 1 else depth
        for part in _parts_of(argument):
            found += _repeats(part, inner)
    return found


def _parts_of(argument: Any) -> Iterator[Any]:
    """The patterns within one parsed operator."""
    if isinstance(argument, re_parser.SubPattern):
        yield argument
    elif isinstance(argument, (tuple, list)):
        for part in argument:
            yield from _parts_of(part)


def _tokens(adapter: Adapter, name: str, view: TensorView) -> Edit:
    module = name.removeprefix(PREFIX).removesuffix(PART).removesuffix(".token_adapter")
    return token_edit(adapter.place(module), module, view, adapter.config)


def _replacement(adapter: Adapter, name: str, view: TensorView, modules: frozenset[str]) -> Edit:
    """A whole tensor of the trained model. Raises DeltaError for one that nothing in adapter_config.json accounts for."""
    target = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    module = target.rpartition(".")[0]
    # PEFT saves every module whose name ends in an entry: `norm` means input_layernorm too
    saved = any(re.search(rf"{re.escape(entry)}(\.|$)", module) for entry in adapter.config.get("modules_to_save") or ())
    bias = adapter.config.get("bias", "none") != "none" and target.endswith(".bias")
    embedding = target.endswith(".weight") and (module in modules or module.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte", "word_embeddings"))
    if not (saved or bias or embedding):
        expected = f"{str(adapter.config.get('peft_type')).lower()} factors, or a module that modules_to_save names"
        raise wrong_delta(adapter.place(name), expected, "a tensor of neither", "save the adapter again with save_pretrained")

    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        return view.rows(first, first + len(base))

    return Edit(target, view.shape, change, replaces=True, may_add=saved, brings=range(view.row_count))
