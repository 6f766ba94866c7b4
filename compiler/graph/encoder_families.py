"""Encoder families that are built here, as rows of data: the names of their tensors and where their graphs differ.

All of them are the post-norm encoder of BERT (Devlin et al., 2018):

    x = LayerNorm(words + positions [+ kinds])
    x = LayerNorm(x + Attention(x));  x = LayerNorm(x + down(activation(up(x))))        for every layer

A config that asks for anything else (`plan_encoder` returns None) takes transformers' exporter instead, which is slower and follows the code itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gelu": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}
# Keys of config.json that must say so, where they are there: anything else is another computation.
PLAIN = {"position_embedding_type": (None, "absolute"), "is_decoder": (None, False), "add_cross_attention": (None, False), "pruned_heads": (None, {})}


@dataclass(frozen=True)
class Family:
    """Names under the base model's prefix; `{}` in `layer` is the layer's number.

    positions  "counted": 0, 1, 2, ...; "behind padding": pad + 1, pad + 2, ... for tokens that are not the padding token
    head       of a classifier of texts: (matrix in front of the last one, its activation, the last one), over the first token
    keys       config's names of hidden, layers, heads, inner and activation
    """

    prefix: str
    layer: str
    projections: tuple[str, str, str, str]  # query, key, value, output
    attention_norm: str
    up: str
    down: str
    norm: str
    head: tuple[str, str, str]
    positions: str = "counted"
    kinds: bool = True
    relative: bool = False
    keys: tuple[str, str, str, str, str] = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")


BERT = Family(
    prefix="bert",
    layer="encoder.layer.{}.",
    projections=("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    norm="output.LayerNorm",
    head=("pooler.dense", "Tanh", "classifier"),
)
ROBERTA = replace(BERT, prefix="roberta", positions="behind padding", head=("classifier.dense", "Tanh", "classifier.out_proj"))
FAMILIES: Mapping[str, Family] = {
    "bert": BERT,
    "roberta": ROBERTA,  # Liu et al., 2019
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "electra": replace(BERT, prefix="electra", head=("classifier.dense", "Gelu", "classifier.out_proj")),  # Clark et al., 2020
    "distilbert": Family(  # Sanh et al., 2019
        prefix="distilbert",
        layer="transformer.layer.{}.",
        projections=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        norm="output_layer_norm",
        head=("pre_classifier", "Relu", "classifier"),
        kinds=False,
        keys=("dim", "n_layers", "n_heads", "hidden_dim", "activation"),
    ),
    "mpnet": replace(  # Song et al., 2020
        ROBERTA,
        prefix="mpnet",
        projections=("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"),
        attention_norm="attention.LayerNorm",
        kinds=False,
        relative=True,
    ),
}


@dataclass(frozen=True)
class EncoderPlan:
    """One config bound to its family: sizes, and the numbers that config.json leaves out."""

    family: Family
    task: str
    hidden: int
    layers: int
    heads: int
    inner: int
    activation: str
    epsilon: float
    vocabulary: int
    embedding: int  # width of the word table; `embeddings_project` brings it to hidden
    positions: int
    pad: int
    kinds: int  # rows of the table of token types; 0: none
    buckets: int  # of relative positions; 0: none
    labels: int


def plan_encoder(config: Mapping[str, Any], task: str) -> EncoderPlan | None:
    """The plan for a config, None where no row covers it: another family, another activation, or a key of PLAIN that says otherwise."""
    name = str(config.get("model_type"))
    family = FAMILIES.get(name)
    if family is None or any(config.get(key) not in allowed for key, allowed in PLAIN.items()):
        return None
    sizes = [config.get(key) for key in family.keys[:4]]
    activation = config.get(family.keys[4], "gelu")
    needed = (*sizes, config.get("vocab_size"), config.get("max_position_embeddings"))
    if activation not in ACTIVATIONS or not all(isinstance(size, int) and size > 0 for size in needed):
        return None
    hidden, layers, heads, inner = (int(size) for size in sizes if size is not None)
    if hidden % heads:
        return None
    return EncoderPlan(
        family=family,
        task=task,
        hidden=hidden,
        layers=layers,
        heads=heads,
        inner=inner,
        activation=str(activation),
        epsilon=float(config.get("layer_norm_eps", 1e-12)),
        vocabulary=int(config["vocab_size"]),
        embedding=int(config.get("embedding_size", hidden)) if name == "electra" else hidden,
        positions=int(config["max_position_embeddings"]),
        pad=1 if name == "mpnet" else int(config.get("pad_token_id") or 0),
        kinds=int(config.get("type_vocab_size", 2)) if family.kinds else 0,
        buckets=int(config.get("relative_attention_num_buckets", 32)) if family.relative else 0,
        labels=len(config.get("id2label") or {}),
    )
