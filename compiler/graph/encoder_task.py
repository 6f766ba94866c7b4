"""What an encoder checkpoint is for: its task, labels, inputs' length, and the config that its graph is traced from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compiler.checkpoints.view import Checkpoint
from compiler.errors import ArchitectureError
from compiler.graph.encoder_families import FAMILIES
from compiler.graph.encoder_pooling import read_json

TASKS = ("feature-extraction", "text-classification", "token-classification")  # names of optimum's TasksManager
SUFFIXES = {"ForSequenceClassification": "text-classification", "ForTokenClassification": "token-classification"}
HEADS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")  # the last matrix of a classifier, [labels, hidden]
TESTED = (
    "bert",
    "roberta",
    "distilbert",
    "mpnet",
    "deberta-v2",
    "xlm-roberta",
    "electra",
    "camembert",
)  # each has a conformance test against eager transformers
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")  # positions start behind the padding id
UNLIMITED = 1 << 20  # tokenizers say 1e30 where they know no limit


def infer_task(checkpoint: Checkpoint) -> str:
    """The task by these rules, first match:

    1. modules.json of sentence-transformers and no classifier tensor: feature-extraction
    2. config's architectures ends in ForSequenceClassification or ForTokenClassification
    3. a classifier tensor (its own, or one a delta added): text-classification
    4. otherwise feature-extraction
    """
    head = head_rows(checkpoint) is not None
    if "modules.json" in checkpoint.assets and not head:
        return "feature-extraction"
    for name in checkpoint.config.get("architectures") or []:
        for suffix, task in SUFFIXES.items():
            if str(name).endswith(suffix):
                return task
    return "text-classification" if head else "feature-extraction"


def head_rows(checkpoint: Checkpoint) -> int | None:
    """Number of labels by the classifier's rows, None without a classifier."""
    for name in HEADS:
        for key, view in checkpoint.tensors.items():
            if (key == name or key.endswith("." + name)) and len(view.shape) == 2:
                return int(view.shape[0])
    return None


def labels_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """id2label of the config where it has as many as the head has rows; LABEL_0, LABEL_1, ... otherwise."""
    count = head_rows(checkpoint)
    named = checkpoint.config.get("id2label")
    labels = [str(named[key]) for key in sorted(named, key=int)] if isinstance(named, Mapping) else []
    if count is None:
        return tuple(labels)
    return tuple(labels) if len(labels) == count else tuple(f"LABEL_{index}" for index in range(count))


def task_config(checkpoint: Checkpoint, task: str) -> dict[str, Any]:
    """The checkpoint's config with labels that fit its head. Raises ArchitectureError for an unknown task or a decoder."""
    if task not in TASKS:
        raise ArchitectureError("task", expected=" | ".join(TASKS), found=repr(task), remedy="choose one of these tasks")
    family = str(checkpoint.config.get("model_type"))
    known = f"an encoder ({', '.join(TESTED)}; other encoders that transformers exports are tried)"
    if not is_encoder(family):
        remedy = "a decoder takes the decoder road (compiler.graph.decoder); other kinds have no road yet"
        raise ArchitectureError(f"{checkpoint.origin}: model_type", expected=known, found=repr(family), remedy=remedy)
    config = dict(checkpoint.config)
    if task != "feature-extraction":
        labels = labels_of(checkpoint)
        config["id2label"] = dict(enumerate(labels))
        config["label2id"] = {label: index for index, label in enumerate(labels)}
        config.pop("num_labels", None)
    return config


def is_encoder(family: str) -> bool:
    """A family of ours, or one that transformers has a masked language model for, and no causal-only decoder."""
    if family in FAMILIES:
        return True
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return family in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def max_length(checkpoint: Checkpoint) -> int:
    """Tokens a sentence may have: the least of sentence-transformers', the tokenizer's and the position table's limits."""
    limits = []
    positions = checkpoint.config.get("max_position_embeddings")
    if positions:
        family = checkpoint.config.get("model_type")
        limits.append(int(positions) - (int(checkpoint.config.get("pad_token_id") or 1) + 1 if family in OFFSET_POSITIONS else 0))
    sentences = read_json(checkpoint, "sentence_bert_config.json") or {}
    tokenizer = read_json(checkpoint, "tokenizer_config.json") or {}
    for limit in (sentences.get("max_seq_length"), tokenizer.get("model_max_length")):
        if limit and int(limit) < UNLIMITED:
            limits.append(int(limit))
    return min(limits, default=512)
