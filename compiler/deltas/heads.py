"""Classification heads that a delta brings: the class, the labels, and what the class needs beside them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from compiler.checkpoints.view import Checkpoint
from compiler.deltas.base import Delta, wrong_delta
from compiler.deltas.bind import Bound
from compiler.deltas.load import labels_as_config
from compiler.deltas.names import Names

# PEFT task type -> what transformers calls the class with that head
TASK_CLASSES = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification", "QUESTION_ANS": "ForQuestionAnswering"}
CLASSIFIERS = re.compile(r"(.+\.)?(classifier|classifier\.out_proj|score)\.weight")  # the last layer, [labels, width]; not DistilBERT's pre_classifier
# model_type -> a layer between encoder and classifier that PEFT does not save by itself, so it may be in neither file (SEQ_CLS)
BETWEEN = {
    "albert": "albert.pooler.weight",
    "bert": "bert.pooler.dense.weight",
    "deberta": "pooler.dense.weight",
    "deberta-v2": "pooler.dense.weight",
}


def check_head(base: Checkpoint, names: Names, delta: Delta, added: Collection[str]) -> None:
    """Raises DeltaError when the head needs a layer that neither the base nor the delta holds: it was random when the delta was trained."""
    needed = BETWEEN.get(str(base.config.get("model_type"))) if delta.task == "SEQ_CLS" else None
    if needed is None or needed in added or names.find(needed) or not any(CLASSIFIERS.fullmatch(name) for name in added):
        return
    module = needed.removesuffix(".weight").removesuffix(".dense").rpartition(".")[2]
    remedy = f'train it again with modules_to_save=["classifier", "{module}"], so that the adapter holds the whole head'
    raise wrong_delta(
        delta.origin, f"{needed} in the base or in the adapter", "it in neither: it was random when the adapter was trained, and not saved", remedy
    )


def head_config(config: Mapping[str, Any], delta: Delta, bound: Mapping[str, Sequence[Bound]]) -> dict[str, Any]:
    """Class name and labels of the model with the delta's classification head; nothing for a delta without one."""
    outputs = [one.edit for name, edits in bound.items() for one in edits if one.delta is delta and one.edit.replaces and CLASSIFIERS.fullmatch(name)]
    suffix = TASK_CLASSES.get(delta.task)
    if not outputs or suffix is None:
        return {}
    classes = [re.sub(r"(Model|LMHeadModel|For[A-Z]\w*)$", "", str(name)) + suffix for name in (config.get("architectures") or ())[:1]]
    result: dict[str, Any] = {"architectures": classes} if classes else {}
    count = outputs[-1].shape[0]
    if len(delta.labels) == count:
        result.update(labels_as_config(delta.labels))
    elif len(config.get("id2label") or {}) != count:
        result.update(labels_as_config({number: f"LABEL_{number}" for number in range(count)}))
    return result
