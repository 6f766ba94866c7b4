"""`DecoderSpec`: everything the graph needs, read once from config.json by the row of its family.

Both spellings of transformers are read: `rope_parameters` (5.x, gemma3 keyed by kind of layer) and `rope_theta` with `rope_scaling` (4.x).
A value that would change the mathematics and is not covered is an ArchitectureError with its name, never a silent default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compiler.errors import ArchitectureError
from compiler.graph.architectures import COMMON_DEFAULTS, REFUSED_KEYS, Family, family_of
from compiler.graph.rope import Rope, rope_of

# activation of config.json -> (operator, domain, attributes)
ACTIVATIONS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "silu": ("QuickGelu", "com.microsoft", {"alpha": 1.0}),  # x * sigmoid(1.0 * x), one kernel
    "swish": ("QuickGelu", "com.microsoft", {"alpha": 1.0}),
    "gelu_pytorch_tanh": ("Gelu", "", {"approximate": "tanh"}),
    "gelu_new": ("Gelu", "", {"approximate": "tanh"}),
    "gelu": ("Gelu", "", {"approximate": "none"}),
    "relu": ("Relu", "", {}),
}


@dataclass(frozen=True)
class LayerSpec:
    """window: tokens a query sees, itself included (None: all). rope: index into DecoderSpec.ropes (None: no rotation)."""

    window: int | None
    rope: int | None


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder in numbers; sizes in elements, scales as multipliers."""

    family: Family
    layers: tuple[LayerSpec, ...]
    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    norm_eps: float
    activation: str
    ropes: tuple[Rope, ...]
    max_positions: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    embedding_scale: float
    attention_scale: float
    residual_scale: float
    logits_scale: float
    final_softcap: float | None

    @property
    def q_width(self) -> int:
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_size


@dataclass(frozen=True)
class Reader:
    """config.json with the defaults of its family behind it. An explicit null stays null."""

    config: Mapping[str, Any]
    family: Family

    def get(self, key: str) -> Any:
        for source in (self.config, self.family.defaults, COMMON_DEFAULTS):
            if key in source:
                return source[key]
        return None

    def size(self, key: str) -> int:
        """A positive whole number. Raises ArchitectureError naming the key."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise wrong(key, "a positive whole number", repr(value))
        return value

    def flag(self, value: bool | str) -> bool:
        return value if isinstance(value, bool) else bool(self.get(value))


def wrong(key: str, expected: str, found: str, remedy: str = "check the base model's config.json") -> ArchitectureError:
    return ArchitectureError(f"config.json: {key}", expected=expected, found=found, remedy=remedy)


def decoder_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """config.json as a dict -> DecoderSpec. Raises ArchitectureError for what no row covers."""
    family = family_of(config.get("model_type"))
    reader = Reader(config, family)
    refuse_unknown(reader)
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    kv_heads = heads if reader.get("num_key_value_heads") is None else reader.size("num_key_value_heads")
    head_size = hidden // heads if reader.get("head_dim") is None else reader.size("head_dim")
    if heads % kv_heads:
        raise wrong("num_key_value_heads", f"a divisor of num_attention_heads {heads}", str(kv_heads))
    ropes, layers = layer_specs(reader, head_size)
    return DecoderSpec(
        family=family,
        layers=layers,
        vocab=reader.size("vocab_size"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        intermediate=reader.size("intermediate_size"),
        norm_eps=float(reader.get("rms_norm_eps")),
        activation=reader.get(family.activation_key),
        ropes=ropes,
        max_positions=reader.size("max_position_embeddings"),
        tied=bool(reader.get("tie_word_embeddings")),
        qkv_bias=reader.flag(family.bias_keys.get("qkv", False)),
        o_bias=reader.flag(family.bias_keys.get("o", False)),
        mlp_bias=reader.flag(family.bias_keys.get("mlp", False)),
        embedding_scale=scale_of(reader, "embedding", 1.0),
        attention_scale=scale_of(reader, "attention", head_size**-0.5),
        residual_scale=scale_of(reader, "residual", 1.0),
        logits_scale=scale_of(reader, "logits", 1.0),
        final_softcap=reader.get("final_logit_softcapping"),
    )


def refuse_unknown(reader: Reader) -> None:
    """Raises ArchitectureError for an activation or a key outside what the rows cover."""
    for key, harmless in REFUSED_KEYS.items():
        if reader.get(key) not in harmless:
            known = " or ".join(repr(value) for value in harmless)
            raise wrong(key, known, repr(reader.get(key))[:80], "this changes the model's mathematics and the decoder builder does not cover it")
    activation = reader.get(reader.family.activation_key)
    if activation not in ACTIVATIONS:
        raise wrong(reader.family.activation_key, f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    if reader.get("final_logit_softcapping") is not None and not reader.family.final_softcap:
        raise wrong("final_logit_softcapping", f"nothing for {reader.family.model_type}", repr(reader.get("final_logit_softcapping")))


def scale_of(reader: Reader, name: str, default: float) -> float:
    """The multiplier of a place.

    1. `sqrt(hidden_size)`: that number (in float32: transformers rounds it to the weights' type, which is float32 here)
    2. `query_pre_attn_scalar` s: s ** -0.5
    3. `logits_scaling` s: 1 / s, because transformers divides
    4. any other key: its value, 1.0 when absent
    """
    key = reader.family.scales.get(name)
    if key is None:
        return default
    if key == "sqrt(hidden_size)":
        return math.sqrt(reader.size("hidden_size"))
    value = 1.0 if reader.get(key) is None else float(reader.get(key))
    if not math.isfinite(value) or value == 0:
        raise wrong(key, "a finite number other than 0", repr(value))
    if key == "query_pre_attn_scalar":
        return value**-0.5
    return 1.0 / value if key == "logits_scaling" else value


def layer_types(reader: Reader, windowed: Callable[[int], bool]) -> list[bool]:
    """Which layers see a window: the config's own `layer_types`, or the family's rule `windowed(index)`."""
    count = reader.size("num_hidden_layers")
    given = reader.get("layer_types")
    if given is None:
        return [windowed(index) for index in range(count)]
    unknown = sorted(set(given) - {"full_attention", "sliding_attention"})
    if unknown or len(given) != count:
        raise wrong("layer_types", f"{count} of full_attention and sliding_attention", f"{len(given)} with {', '.join(unknown) or 'known kinds'}")
    return [kind == "sliding_attention" for kind in given]


def no_windows(reader: Reader) -> list[bool]:
    kinds = layer_types(reader, lambda index: False)
    if any(kinds):
        raise wrong("layer_types", f"full_attention in every layer of {reader.family.model_type}", "sliding_attention")
    return kinds


def all_windows(reader: Reader) -> list[bool]:
    kinds = layer_types(reader, lambda index: True)
    if not all(kinds):
        raise wrong("layer_types", f"one kind of attention in every layer of {reader.family.model_type}", "a mixture")
    return kinds


def upper_windows(reader: Reader) -> list[bool]:
    """qwen2, qwen3: layers from `max_window_layers` on, when `use_sliding_window`."""
    on = bool(reader.get("use_sliding_window"))
    return [on and kind for kind in layer_types(reader, lambda index: on and index >= (reader.get("max_window_layers") or 0))]


def pattern_windows(reader: Reader) -> list[bool]:
    """gemma3: every `sliding_window_pattern`-th layer is global."""
    return layer_types(reader, lambda index: (index + 1) % reader.size("sliding_window_pattern") != 0)


def nope_windows(reader: Reader) -> list[bool]:
    """smollm3: the layers without rope, when `use_sliding_window`."""
    on, roped = bool(reader.get("use_sliding_window")), rope_flags(reader)
    return [on and kind for kind in layer_types(reader, lambda index: not roped[index])]


WINDOWS: Mapping[str, Callable[[Reader], list[bool]]] = {
    "none": no_windows,
    "all": all_windows,
    "upper": upper_windows,
    "pattern": pattern_windows,
    "nope": nope_windows,
}


def rope_flags(reader: Reader) -> list[bool]:
    """Which layers rotate: all, or as `no_rope_layers` (1 = rotates) and `no_rope_layer_interval` say."""
    count = reader.size("num_hidden_layers")
    if not reader.family.rope_skips:
        return [True] * count
    given = reader.get("no_rope_layers")
    if given is None:
        return [(index + 1) % reader.size("no_rope_layer_interval") != 0 for index in range(count)]
    if len(given) < count:
        raise wrong("no_rope_layers", f"{count} values, one a layer", str(len(given)))
    return [bool(value) for value in given[:count]]


def layer_specs(reader: Reader, head_size: int) -> tuple[tuple[Rope, ...], tuple[LayerSpec, ...]]:
    """The distinct ropes, and for every layer its window and rope."""
    windowed, roped = WINDOWS[reader.family.windows](reader), rope_flags(reader)
    window = None if reader.get("sliding_window") is None else reader.size("sliding_window")
    kinds = sorted(set(windowed)) if reader.family.local_rope else [False]
    ropes = [rope_of(rope_parameters(reader, local), head_size, reader.size("max_position_embeddings")) for local in kinds]
    layers = []
    for local, rotates in zip(windowed, roped, strict=True):
        rope = kinds.index(local if reader.family.local_rope else False) if rotates else None
        layers.append(LayerSpec(window if local else None, rope))
    return tuple(ropes), tuple(layers)


def rope_parameters(reader: Reader, local: bool) -> dict[str, Any]:
    """One flat dict of rope parameters from either spelling of the config. `local`: for the windowed layers of gemma3."""
    given = reader.get("rope_parameters") or {}
    scaling = reader.get("rope_scaling") or {}
    if reader.family.local_rope:
        found = dict(given.get("sliding_attention" if local else "full_attention") or {})
        found |= {} if local else scaling
        theta = reader.get("rope_local_base_freq" if local else "rope_theta")
    else:
        found, theta = dict(scaling or given), reader.get("rope_theta")
    if any(isinstance(value, Mapping) for value in found.values()):
        raise wrong("rope_parameters", f"one set for all layers of {reader.family.model_type}", f"keys {', '.join(sorted(found))}")
    if found.get("rope_theta") is None:
        found["rope_theta"] = theta
    kind = found.get("rope_type") or found.get("type") or "default"
    found["rope_type"] = reader.family.rope_aliases.get(kind, kind)
    if reader.get("original_max_position_embeddings") is not None:  # beside the rope parameters it has priority (phi3)
        found["original_max_position_embeddings"] = reader.get("original_max_position_embeddings")
    partial = found.get("partial_rotary_factor") or reader.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0) and not reader.family.partial_rotary:
        raise wrong("partial_rotary_factor", f"1.0 for {reader.family.model_type}", repr(partial))
    found["partial_rotary_factor"] = partial
    return found
