"""LoRA (Hu et al. 2021, arXiv 2106.09685) and rsLoRA (Kalajdzievski 2023, arXiv 2312.03732), as PEFT 0.21 stores them.

    difference = s * B A        A [r, in], B [out, r], weight [out, in]
    s = alpha / r               rsLoRA: alpha / sqrt(r)
    embedding: s * (B A)^T      A [r, vocabulary], B [dim, r], weight [vocabulary, dim]

rank_pattern and alpha_pattern give a module its own r and alpha: the first pattern p for which `(.*\\.)?(p)$` matches the
module's name. modules_to_save, trained biases and saved embeddings are whole tensors that replace the base's. An adapter
with `use_dora` holds a magnitude beside each pair: see `dora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from compiler.checkpoints.view import TensorView
from compiler.deltas.base import Change, Delta, Edit, low_rank, wrong_delta
from compiler.deltas.dora import dora_edit
from compiler.deltas.names import HEADS
from compiler.deltas.peft import Adapter, Parts, Whole, by_pattern, check_rank, make_delta, modules_of, need

PARTS = ("lora_A", "lora_B", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

# A field of adapter_config.json that changes the mathematics, and what it stands for
NOT_BUILT: Mapping[str, str] = {
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow routing",
    "alora_invocation_tokens": "activated LoRA (it depends on the prompt, so it cannot be merged)",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
}
# These start by taking the factors out of the base, so A and B fit a base that is nowhere stored
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
LARGEST = 1e9  # rank or alpha; NaN is not at most this


@dataclass(frozen=True)
class Factors:
    """The stored halves of one module. module: its name in the trained model. magnitude: DoRA's, None for LoRA."""

    module: str
    embedding: bool
    a: TensorView
    b: TensorView
    bias: TensorView | None = None
    magnitude: TensorView | None = None


def load_lora(adapter: Adapter) -> Delta:
    """A PEFT LoRA adapter. Raises DeltaError: variants not built, half a pair, rank 0, factors that do not fit together."""
    refuse_variants(adapter.origin, adapter.config)
    modules, rest = modules_of(adapter, PARTS, "lora_")
    factors = [_factors(adapter, module, parts) for module, parts in modules.items()]
    edits = [edit for one in factors for edit in _edits(adapter, one)]
    return make_delta(adapter, "dora" if adapter.config.get("use_dora") else "lora", edits, modules, rest)


def refuse_variants(origin: str, config: Mapping[str, Any]) -> None:
    """Raises DeltaError for a field that changes the mathematics of LoRA, by name."""
    for key, name in NOT_BUILT.items():
        if config.get(key):
            raise wrong_delta(
                origin, "a plain LoRA", f"{name}: {key} is set", "merge this adapter with PEFT and compile the result: it is not built yet, LoRA is"
            )
    if config.get("use_dora") and config.get("lora_bias"):
        raise wrong_delta(origin, "DoRA without lora_bias, as PEFT trains it", "use_dora and lora_bias both set", "correct adapter_config.json")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGED_BASE):
        remedy = "save it again with save_pretrained(path_initial_model_for_weight_conversion=...), which makes it a plain LoRA"
        raise wrong_delta(origin, "a LoRA on the base as published", f"init_lora_weights {start!r}, which changed the base", remedy)


def _factors(adapter: Adapter, module: str, parts: Parts) -> Factors:
    place = adapter.place(module)
    embedding = any(part.startswith("lora_embedding") for part in parts)
    a, b = need(place, parts, "lora_embedding_A", "lora_embedding_B") if embedding else need(place, parts, "lora_A", "lora_B")
    check_pair(place, a, b)
    if a.shape[0] == 0:
        raise wrong_delta(
            place,
            "a rank of at least 1",
            f"A {list(a.shape)}, B {list(b.shape)}",
            "gather sharded weights (ZeRO-3, FSDP) before saving the adapter",
            "ADAPTER_SHAPE",
        )
    magnitude = parts.get("lora_magnitude_vector")
    if (magnitude is not None) != bool(adapter.config.get("use_dora")):
        found = "DoRA magnitudes, and use_dora not set" if magnitude is not None else "use_dora set, and no lora_magnitude_vector"
        raise wrong_delta(place, "magnitudes where use_dora is set", found, "put the adapter_config.json of this training run beside its weights")
    return Factors(module, embedding, a, b, parts.get("lora_B.bias"), magnitude)


def check_pair(place: str, a: TensorView, b: TensorView) -> None:
    """A [r, in] and B [out, r] of one rank, which may be 0. Raises DeltaError."""
    shapes = f"{list(a.shape)} and {list(b.shape)}"
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise wrong_delta(place, "factors of two dimensions (linear, Conv1D or embedding)", shapes, "convolutions are not built yet: merge with PEFT")
    if a.shape[1] == 0 or b.shape[0] == 0:
        raise wrong_delta(
            place,
            "a rank of at least 1",
            f"A {list(a.shape)}, B {list(b.shape)}",
            "gather sharded weights (ZeRO-3, FSDP) before saving the adapter",
            "ADAPTER_SHAPE",
        )
    if a.shape[0] != b.shape[1]:
        raise wrong_delta(
            place,
            "one rank in A and B",
            f"A {list(a.shape)}, B {list(b.shape)}",
            "save the adapter again: its halves belong to different runs",
            "ADAPTER_SHAPE",
        )


def scale_of(module: str, config: Mapping[str, Any]) -> tuple[float, int]:
    """(s, r) of a module by the rules at the top: {"r": 8, "lora_alpha": 16} -> (2.0, 8)."""
    rank = by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    for name, value in (("r", rank), ("lora_alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
            code = "ADAPTER_SHAPE" if name == "r" else "ADAPTER_SCALE"
            raise wrong_delta(
                f"adapter_config.json: {name} of {module}", f"a number of at most {LARGEST:.0e}", repr(value)[:60], "correct adapter_config.json", code
            )
    return float(alpha) / (float(rank) ** 0.5 if config.get("use_rslora") else float(rank)) if rank > 0 else 0.0, int(rank)


def _edits(adapter: Adapter, factors: Factors) -> list[Edit]:
    scale, rank = scale_of(factors.module, adapter.config)
    place = adapter.place(factors.module)
    check_rank(place, rank, factors.a.shape[0])
    target = f"{factors.module}.weight"
    if factors.embedding:
        weight = Edit(target, (factors.a.shape[1], factors.b.shape[0]), _embedding_change(factors, scale, adapter.whole))
    else:
        change = linear_change(factors.a, factors.b, scale, adapter.whole)
        shape = (factors.b.shape[0], factors.a.shape[1])
        flipped = bool(adapter.config.get("fan_in_fan_out"))
        weight = Edit(target, shape, change, transposes=True, flipped=flipped, factors=lambda _: (factors.b.read() * np.float32(scale), factors.a.read()))
    if factors.magnitude is not None:
        if adapter.config.get("ensure_weight_tying") and (factors.embedding or target.endswith(HEADS)):
            # the embedding's norms run down the columns, the head's along the rows: no one tensor is both
            found = f"{factors.module}, with ensure_weight_tying"
            raise wrong_delta(adapter.origin, "DoRA on layers other than a tied embedding or head", found, "leave these modules out of target_modules")
        weight = dora_edit(weight, factors.magnitude, place, by_columns=factors.embedding)
    if factors.bias is None:
        return [weight]
    return [weight, Edit(f"{factors.module}.bias", factors.bias.shape, _bias_change(factors.bias, scale))]


def linear_change(a: TensorView, b: TensorView, scale: float, whole: Whole) -> Change:
    """s B[rows] A, or its transpose's rows s A[:, rows]^T B^T."""

    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        stop = first + len(base)
        if transposed:
            return low_rank(whole(a)[:, first:stop].T * np.float32(scale), whole(b).T)
        return low_rank(b.rows(first, stop) * np.float32(scale), whole(a))

    return change


def _embedding_change(factors: Factors, scale: float, whole: Whole) -> Change:
    def change(first: int, base: np.ndarray, transposed: bool) -> np.ndarray:
        return low_rank(whole(factors.a)[:, first : first + len(base)].T * np.float32(scale), whole(factors.b).T)

    return change


def _bias_change(bias: TensorView, scale: float) -> Change:
    return lambda first, base, transposed: bias.rows(first, first + len(base)) * np.float32(scale)
