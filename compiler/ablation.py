"""Ablation: what each group of modules of a mixture of deltas contributes to the evaluation (`trimtab delta ablate`).

    loss        mean negative log-likelihood: of the scored tokens (decoder), of the right label (classifier)
    leave_out   loss(all groups but this) - loss(all): what the rest misses without it
    alone       loss(base) - loss(base and this group): what it brings by itself

Both are positive where the group helps; they differ where groups do the same work twice, or need each other. The loss is that of the merged fp32
model in eager transformers, loaded once: between two evaluations only the tensors of one group change, and a pass begins at the first layer that
they are in (compiler.resume). Intervals are 95 % paired bootstraps over
sequences (`cluster_interval`). A classification head that the base lacks is part of every model compared, for a base without one has no loss.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.deltas.names import EMBEDDINGS, HEADS
from compiler.deltas.select import module_of
from compiler.deltas.vocabulary import with_added
from compiler.errors import DeltaError, RecipeError
from compiler.evaluation import decoder, encoder
from compiler.evaluation.data import EvaluationSet
from compiler.evaluation.run import ChatFormat
from compiler.evaluation.statistics import cluster_interval, paired_drop
from compiler.progress import Progress
from compiler.reference import match_tensors, reference_model
from compiler.resume import Resumable
from compiler.sources import Sources

BY = ("layer", "kind", "layer-kind")
LAYER = re.compile(r"\.(\d+)\.")
# kind -> what its module names hold, the first that matches: norms before the blocks they stand in
KINDS: Mapping[str, str] = {
    "norm": r"(norm|(^|\.)ln_\w+)(\.|$)",
    "embedding": r"(embed|(^|\.)wte$|(^|\.)wpe$)",
    "head": r"(lm_head|embed_out|classifier|(^|\.)score|pooler|qa_outputs)",
    "attn": r"(attn|attention)",
    "mlp": r"(mlp|intermediate|ffn|feed_forward|output\.dense$|fc[12]$|lin[12]$)",
}


def kind_of(name: str) -> str:
    """attn, mlp, embedding, head, norm or other of a parameter. `model.layers.3.mlp.down_proj.weight` -> mlp."""
    if name.endswith(HEADS):
        return "head"
    module = module_of(name)
    if name.endswith(EMBEDDINGS):
        return "embedding"
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, module, re.IGNORECASE)), "other")


def group_of(name: str, by: str) -> str:
    """`model.layers.3.mlp.down_proj.weight` -> `layer 3`, `mlp`, or `layer 3 mlp`; outside of the layers the kind."""
    layer, kind = LAYER.search(name), kind_of(name)
    if by == "kind" or layer is None:
        return kind
    return f"layer {layer[1]}" if by == "layer" else f"layer {layer[1]} {kind}"


@dataclass(frozen=True)
class Losses:
    """Losses [n] of tokens or rows, `groups` [n] numbers the sequence of each; right: per answered row, None where rows have no answers."""

    values: np.ndarray
    groups: np.ndarray
    right: tuple[bool, ...] | None

    @property
    def mean(self) -> float:
        return float(self.values.mean())


Evaluator = Callable[[], Losses]


@dataclass(frozen=True)
class Swap:
    """One parameter of the loaded model, with and without the deltas."""

    parameter: Any
    merged: TensorView
    base: TensorView

    def put(self, view: TensorView) -> None:
        """Its values in place, block by block."""
        import torch

        with torch.no_grad():
            flat = self.parameter.reshape(view.row_count, -1)
            for first, block in view.blocks():
                flat[first : first + len(block)] = torch.from_numpy(np.ascontiguousarray(block)).reshape(len(block), -1)


def ablate(sources: Sources, data: EvaluationSet, by: str, task: str, seed: int, progress: Progress) -> dict[str, Any]:
    """{"rows": [...], "all": {...}, "base": {...}, ...}: one row a group, in the order of the model. See the top for what the numbers are.

    Raises DeltaError where nothing can be taken out, RecipeError for data that has no loss.
    """
    with progress.stage("load", sources.merged.origin):
        model = reference_model(sources.merged, task)
        groups = _groups(sources, model, by)
        runner = Resumable(model, [_parameters(swaps) for swaps in groups.values()])
        evaluator = _decoder(sources.merged, model, runner, data) if task == "text-generation" else _classifier(sources.merged, runner, data)
    total = 2 * len(groups) + 2
    with progress.stage("ablate", f"{len(groups)} groups by {by}, {len(data.rows)} rows"):
        steps = iter(range(1, total + 1))

        def measure(item: str, changed: Sequence[Swap] | None = None) -> Losses:
            with runner.recording() if changed is None else runner.resuming(_parameters(changed)):
                found = evaluator()
            progress.update(item, next(steps), total)
            return found

        every = measure("all groups")
        without = dict(_each(groups, False, measure))
        _put([one for swaps in groups.values() for one in swaps], merged=False)
        base = measure("no group")
        alone = dict(_each(groups, True, measure))
    rows = [_row(name, swaps, (without[name], every), (base, alone[name]), seed) for name, swaps in groups.items()]
    return {"by": by, "unit": "nats", "all": _summary(every), "base": _summary(base), "sequences": len(np.unique(every.groups)), "rows": rows}


def _groups(sources: Sources, model: Any, by: str) -> dict[str, list[Swap]]:
    """Group -> the parameters that the deltas change and the base has, in the model's order."""
    plan = sources.merge
    before = {plan.merged_name(name): view for name, view in plan.base.tensors.items()}
    if plan.head:
        before[plan.head[0]] = plan.base.tensors[plan.head[1]]
    before = {name: with_added(view, sources.merged.tensors[name]) for name, view in before.items()}
    touched = {plan.merged_name(name) for name in plan.bound}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, list[Swap]] = {}
    for name, view in match_tensors(model, sources.merged).items():
        if view.name in touched and view.name in before and name in parameters:
            found.setdefault(group_of(view.name, by), []).append(Swap(parameters[name], view, before[view.name]))
    if not found:
        raise DeltaError(sources.merged.origin, expected="a delta that changes the base's tensors", found="none", remedy="name a recipe with deltas")
    return found


def _put(swaps: Sequence[Swap], merged: bool) -> None:
    for one in swaps:
        one.put(one.merged if merged else one.base)


def _parameters(swaps: Sequence[Swap]) -> list[Any]:
    return [one.parameter for one in swaps]


def _each(groups: Mapping[str, list[Swap]], merged: bool, measure: Callable[[str, Sequence[Swap]], Losses]) -> Iterator[tuple[str, Losses]]:
    """Each group in turn set to merged (or base), measured, and set back."""
    for name, swaps in groups.items():
        _put(swaps, merged)
        yield name, measure(f"{'only' if merged else 'without'} {name}", swaps)
        _put(swaps, not merged)


def _decoder(merged: Checkpoint, model: Any, runner: Resumable, data: EvaluationSet) -> Evaluator:
    chat = ChatFormat(merged)
    sequences = decoder.scored_sequences(data.rows, chat.tokenizer, chat.render, chat.eos_text)
    answered = all(row.messages for row in data.rows)
    cut = "logits_to_keep" in inspect.signature(model.forward).parameters

    def evaluate() -> Losses:
        values: list[np.ndarray] = [np.empty(0)] * len(sequences)
        right = [False] * len(sequences)
        for numbers in decoder.batches([len(one.ids) for one in sequences]):
            for number, rows in zip(numbers, _scored_logits(runner, [sequences[number] for number in numbers], cut), strict=True):
                wanted = sequences[number].ids[sequences[number].first :]
                values[number] = _nll(rows, wanted)
                right[number] = bool((rows.argmax(-1) == wanted).all())
        groups = np.concatenate([np.full(len(one), number) for number, one in enumerate(values)])
        return Losses(np.concatenate(values), groups, tuple(right) if answered else None)

    return evaluate


def _scored_logits(runner: Resumable, sequences: Sequence[decoder.Scored], cut: bool) -> Iterator[np.ndarray]:
    """Logits [scored tokens, vocabulary] of each sequence, right-padded to one batch. cut: the model can leave out positions that no sequence scores."""
    import torch

    ids = torch.zeros((len(sequences), max(len(one.ids) for one in sequences)), dtype=torch.long)
    for row, one in enumerate(sequences):
        ids[row, : len(one.ids)] = torch.from_numpy(one.ids)
    begin = min(one.first - 1 for one in sequences) if cut else 0
    with torch.inference_mode():
        logits = runner(input_ids=ids, use_cache=False, **({"logits_to_keep": ids.shape[1] - begin} if cut else {})).logits.float().numpy()
    for row, one in enumerate(sequences):
        yield logits[row, one.first - 1 - begin : len(one.ids) - 1 - begin]


def _classifier(merged: Checkpoint, model: Any, data: EvaluationSet) -> Evaluator:
    from tokenizers import Tokenizer

    from compiler.graph.encoder_task import labels_of, max_length

    labels, rows = labels_of(merged), [row for row in data.rows if row.text]
    unknown = sorted({str(row.label) for row in rows if row.label not in labels})
    if not rows or unknown:
        expected = f"rows of text with a label of {', '.join(labels)}" if labels else "a model with a language or classification head"
        raise RecipeError("evaluate.data", expected=expected, found=f"label {unknown[0]}" if unknown else "none", remedy="an encoder's loss needs labels")
    truth = np.array([labels.index(str(row.label)) for row in rows])
    tokenizer, spec = Tokenizer.from_str(merged.assets["tokenizer.json"].decode()), {"max_length": max_length(merged)}

    def evaluate() -> Losses:
        logits = encoder.reference_outputs(model, tokenizer, [str(row.text) for row in rows], spec, lambda *_: None)
        return Losses(_nll(logits, truth), np.arange(len(rows)), tuple((logits.argmax(-1) == truth).tolist()))

    return evaluate


def _nll(logits: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """logits [n, k], wanted [n] -> negative log-likelihoods, float64 [n]."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(wanted)), wanted])


def _summary(found: Losses) -> dict[str, Any]:
    accuracy = None if found.right is None else float(np.mean(found.right))
    return {"loss": found.mean, "accuracy": accuracy, "samples": len(found.values)}


def _row(name: str, swaps: Sequence[Swap], out: tuple[Losses, Losses], alone: tuple[Losses, Losses], seed: int) -> dict[str, Any]:
    """One group. out, alone: (worse, better) if the group helps."""
    row: dict[str, Any] = {"group": name, "tensors": len(swaps)}
    for key, (worse, better) in (("leave_out", out), ("alone", alone)):
        change = worse.values - better.values
        low, high = cluster_interval(change, worse.groups, seed)
        bounds = [bound if np.isfinite(bound) else None for bound in (low, high)]
        row[key] = {"value": float(change.mean()), "low": bounds[0], "high": bounds[1]}
        row[key]["accuracy"] = None if worse.right is None or better.right is None else paired_drop(better.right, worse.right)
    return row


def plot(found: Mapping[str, Any], title: str, path: Path) -> None:
    """Both contributions by group as bars with their intervals, in the format of the file's ending (svg, png, pdf). The caller turns OSError into its own."""
    from matplotlib.figure import Figure

    rows = found["rows"]
    places = np.arange(len(rows))
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for shift, key, colour, label in ((-0.2, "leave_out", "#4c72b0", "without it the rest loses"), (0.2, "alone", "#dd8452", "alone it brings")):
        values = np.array([row[key]["value"] for row in rows])
        ends = np.array([[row[key][end] if row[key][end] is not None else row[key]["value"] for row in rows] for end in ("low", "high")])
        axes.barh(places + shift, values, 0.38, color=colour, label=label)
        axes.errorbar(values, places + shift, xerr=np.abs(ends - values), fmt="none", ecolor="#333333", elinewidth=0.8, capsize=2)
    axes.set_yticks(places, [row["group"] for row in rows])
    axes.invert_yaxis()
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.set_xlabel("loss, nats per scored token or row (95 % interval)")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
