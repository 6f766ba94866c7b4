"""LoRA (Hu et al. 2021, arXiv 2106.09685) and rsLoRA (Kalajdzievski 2023, arXiv 2312.03732), as PEFT 0.21 stores them.

    difference = s * B A        A [r, in], B [out, r], weight [out, in]
    s = alpha / r               rsLoRA: alpha / sqrt(r)
    embedding: s * (B A)^T      A [r, vocabulary], B [dim, r], weight [vocabulary, dim]

rank_pattern and alpha_pattern give a module its own r and alpha: the first pattern p for which `(.*\\.)?(p)$` matches the
module's name. modules_to_save, trained biases and saved embeddings are whole tensors that replace the base's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from compiler.checkpoints.files import sha256_file, sha256_parts
from compiler.checkpoints.view import TensorView
from compiler.deltas.base import Change, Delta, Edit, low_rank, wrong_delta

Whole = Callable[[TensorView], np.ndarray]  # reads a factor, and keeps the last few

PREFIX = "base_model.model."
FILES = ("adapter_config.json", "adapter_model.safetensors", "config.json")  # the last one, where it is there, names a head's labels
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(?P<kind>\.weight|\.bias)?")

# A field of adapter_config.json that changes the mathematics, and what it stands for
NOT_BUILT: Mapping[str, str] = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow routing",
    "alora_invocation_tokens": "activated LoRA (it depends on the prompt, so it cannot be merged)",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "trainable tokens",
}
# These start by taking the factors out of the base, so A and B fit a base that is nowhere stored
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Factors:
    """The stored halves of one module. module: its name in the trained model."""

    module: str
    embedding: bool
    a: TensorView
    b: TensorView
    bias: TensorView | None = None


def load_lora(folder: Path, origin: str, weight: float, config: Mapping[str, Any], tensors: Mapping[str, TensorView]) -> Delta:
    """A PEFT LoRA adapter. Raises DeltaError: variants not built, half a pair, rank 0, factors that do not fit together, NaN or infinity."""
    _refuse_variants(origin, config)
    _check_finite(origin, tensors.values())
    whole: Whole = lru_cache(maxsize=2)(TensorView.read)  # the two factors of the tensor at hand: more would let memory grow with the model
    factors, rest = _pairs(origin, tensors)
    replaced = [_replacement(origin, name, view, config, factors) for name, view in rest.items()]
    added = [edit for one in factors.values() for edit in _edits(origin, one, config, whole)]
    if not added and not replaced:
        raise wrong_delta(origin, "LoRA factors", "none: the file holds no tensors", "train the adapter, or gather sharded weights before saving it")
    files = [path for name in FILES if (path := folder / name).is_file()]
    return Delta(
        kind="lora",
        origin=origin,
        weight=weight,
        edits=(*replaced, *added),
        digest_of=lambda: sha256_parts({path.name: sha256_file(path) for path in files}),
        base_name=str(config.get("base_model_name_or_path") or ""),
        task=str(config.get("task_type") or ""),
        every_layer=_adapts_every_layer(config),
        tied=bool(config.get("ensure_weight_tying")),
    )


def _adapts_every_layer(config: Mapping[str, Any]) -> bool:
    """target_modules is a list of names without layer numbers, and nothing else picks layers."""
    modules = config.get("target_modules")
    if not isinstance(modules, list) or not modules or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return False
    return not any(part.isdigit() for module in modules for part in str(module).split("."))


def _refuse_variants(origin: str, config: Mapping[str, Any]) -> None:
    for key, name in NOT_BUILT.items():
        if config.get(key):
            raise wrong_delta(
                origin, "a plain LoRA", f"{name}: {key} is set", "merge this adapter with PEFT and compile the result: it is not built yet, LoRA is"
            )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGED_BASE):
        remedy = "save it again with save_pretrained(path_initial_model_for_weight_conversion=...), which makes it a plain LoRA"
        raise wrong_delta(origin, "a LoRA on the base as published", f"init_lora_weights {start!r}, which changed the base", remedy)


def _check_finite(origin: str, views: Iterable[TensorView]) -> None:
    for view in views:
        for first, block in view.blocks():
            if not np.isfinite(block).all():
                bad = int(block.size - np.isfinite(block).sum())
                raise wrong_delta(
                    f"{origin}: {view.name}", "finite numbers", f"{bad} NaN or infinite from row {first}", "train the adapter again: this one diverged"
                )


def _pairs(origin: str, tensors: Mapping[str, TensorView]) -> tuple[dict[str, Factors], dict[str, TensorView]]:
    """(factors by module, tensors that are no factor). Raises DeltaError for half a pair or a factor of another kind."""
    halves: dict[str, dict[str, TensorView]] = {}
    rest: dict[str, TensorView] = {}
    for name, view in tensors.items():
        if ".original_module." in name:
            continue
        match = FACTOR.fullmatch(name)
        if match:
            halves.setdefault(match["module"].removeprefix(PREFIX), {})[match["part"] + (".bias" if match["kind"] == ".bias" else "")] = view
        elif ".lora_" in name or "trainable_tokens" in name:
            kind = "DoRA magnitudes" if "magnitude" in name else "a factor that plain LoRA has not"
            raise wrong_delta(
                f"{origin}: {name}", "lora_A and lora_B", kind, "merge this adapter with PEFT and compile the result: it is not built yet, LoRA is"
            )
        else:
            rest[name] = view
    return {module: _pair(origin, module, parts) for module, parts in halves.items()}, rest


def _pair(origin: str, module: str, parts: Mapping[str, TensorView]) -> Factors:
    embedding = any(part.startswith("embedding") for part in parts)
    first, second = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    for part in (first, second):
        if part not in parts:
            raise wrong_delta(f"{origin}: {module}", "lora_A and lora_B", f"no lora_{part}", "save the adapter again: half of the pair is missing")
    a, b = parts[first], parts[second]
    place = f"{origin}: {module}"
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise wrong_delta(
            place,
            "factors of two dimensions (linear, Conv1D or embedding)",
            f"{list(a.shape)} and {list(b.shape)}",
            "convolutions are not built yet: merge with PEFT",
        )
    if a.shape[0] == 0 or 0 in b.shape or 0 in a.shape:
        raise wrong_delta(
            place, "a rank of at least 1", f"A {list(a.shape)}, B {list(b.shape)}", "gather sharded weights (ZeRO-3, FSDP) before saving the adapter"
        )
    if a.shape[0] != b.shape[1]:
        raise wrong_delta(place, "one rank in A and B", f"A {list(a.shape)}, B {list(b.shape)}", "save the adapter again: its halves belong to different runs")
    return Factors(module, embedding, a, b, parts.get("B.bias"))


def scale_of(module: str, config: Mapping[str, Any]) -> tuple[float, int]:
    """(s, r) of a module by the rules at the top: {"r": 8, "lora_alpha": 16} -> (2.0, 8)."""
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return float(alpha) / (float(rank) ** 0.5 if config.get("use_rslora") else float(rank)) if rank else 0.0, int(rank)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _edits(origin: str, factors: Factors, config: Mapping[str, Any], whole: Whole) -> list[Edit]:
    scale, rank = scale_of(factors.module, config)
    if rank < 1:
        raise wrong_delta(f"{origin}: {factors.module}", "a rank of at least 1", f"r {rank} in adapter_config.json", "correct r in adapter_config.json")
    if rank != factors.a.shape[0]:
        found = f"rank {factors.a.shape[0]} in the weights"
        raise wrong_delta(
            f"{origin}: {factors.module}",
            f"rank {rank} as adapter_config.json says",
            found,
            "put the adapter_config.json of this training run beside its weights",
        )
    target = f"{factors.module}.weight"
    if factors.embedding:
        shape = (factors.a.shape[1], factors.b.shape[0])
        return [Edit(target, shape, _embedding_change(factors, scale, whole))]
    shape = (factors.b.shape[0], factors.a.shape[1])
    weight = Edit(target, shape, _linear_change(factors, scale, whole), transposes=True, flipped=bool(config.get("fan_in_fan_out")))
    if factors.bias is None:
        return [weight]
    return [weight, Edit(f"{factors.module}.bias", factors.bias.shape, _bias_change(factors.bias, scale))]


def _linear_change(factors: Factors, scale: float, whole: Whole) -> Change:
    """s B[rows] A, or its transpose's rows s A[:, rows]^T B^T."""

    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        stop = first + len(base)
        if transposed:
            return low_rank(whole(factors.a)[:, first:stop].T * np.float32(scale), whole(factors.b).T)
        return low_rank(factors.b.rows(first, stop) * np.float32(scale), whole(factors.a))

    return change


def _embedding_change(factors: Factors, scale: float, whole: Whole) -> Change:
    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        return low_rank(whole(factors.a)[:, first : first + len(base)].T * np.float32(scale), whole(factors.b).T)

    return change


def _bias_change(bias: TensorView, scale: float) -> Change:
    return lambda first, base, transposed: bias.rows(first, first + len(base)) * np.float32(scale)


def _replacement(origin: str, name: str, view: TensorView, config: Mapping[str, Any], factors: Mapping[str, Factors]) -> Edit:
    """A whole tensor of the trained model. Raises DeltaError for one that nothing in adapter_config.json accounts for."""
    target = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    module = target.rpartition(".")[0]
    # PEFT saves every module whose name ends in an entry: `norm` means input_layernorm too
    saved = any(re.search(rf"{re.escape(entry)}(\.|$)", module) for entry in config.get("modules_to_save") or ())
    bias = config.get("bias", "none") != "none" and target.endswith(".bias")
    embedding = module in factors or module.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte", "word_embeddings")
    if not (saved or bias or embedding):
        raise wrong_delta(
            f"{origin}: {name}", "lora factors, or a module that modules_to_save names", "a tensor of neither", "save the adapter again with save_pretrained"
        )
    return Edit(target, view.shape, lambda first, base, transposed: view.rows(first, first + len(base)), replaces=True, may_add=saved)
