"""Where a loss arises: the same tokens or texts, scored with the model as it stands after each stage.

    base      before the deltas: what merging changed was asked for, so it is told apart and never blamed for a drift
    merge     the merged fp32 weights: the reference
    distil    the student of it, in float32, where there is one
    quantize  torch, float32, with the weights that the scheme leaves (`faithful.see_through`): the rounding of weights alone
    export    the graph as it ships: kernels and rounding of activations on top

Forward passes of torch are the price, so at most MOST_TOKENS tokens (MOST_TEXTS texts) take part, evenly picked; the report says how many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compiler.evaluation.decoder import Model, Scored, TokenScores
from runtimes.metrics import cosine, log_softmax

MOST_TOKENS = 1024
MOST_TEXTS = 64
LOSSES = ("kl_mean", "cosine_loss")  # metrics that are 0 after the merge


def picked(lengths: Sequence[int], most: int) -> list[int]:
    """Places of entries, spread evenly, whose lengths together are at most `most`; the shortest one where none fits. [600] * 4, 1024 -> [0]."""
    count = len(lengths)
    while count > 1:
        places = np.linspace(0, len(lengths) - 1, count).round().astype(int).tolist()
        if sum(lengths[place] for place in places) <= most:
            return places
        count = max(1, min(count - 1, int(count * most / sum(lengths[place] for place in places))))
    return [int(np.argmin(lengths))]


class TokenStages:
    """Decoders. Wraps the merged model while everything is scored, and remembers what it said about the picked sequences."""

    def __init__(self, sequences: Sequence[Scored], reference: Model) -> None:
        self.places = picked([len(sequence.ids) for sequence in sequences], MOST_TOKENS)
        self._sequences, self._model = [sequences[place] for place in self.places], reference
        self._known: dict[int, np.ndarray] = {}
        self.rows: list[dict[str, Any]] = []

    def reference(self, ids: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """The merged model as a Model."""
        answers = self._model(ids)
        for sequence in self._sequences:
            for one, logits in zip(ids, answers, strict=True):
                if one is sequence.ids:
                    self._known[id(one)] = log_softmax(logits[sequence.first - 1 : -1]).astype(np.float32)
        return answers

    def after(self, stage: str, model: Model) -> None:
        """Score another model on the picked sequences: mean KL(merged || model) and mean negative log-likelihood, nats a token."""
        kl, nll = [], []
        for sequence in self._sequences:
            (logits,) = model([sequence.ids])
            known, found = self._known[id(sequence.ids)].astype(np.float64), log_softmax(logits[sequence.first - 1 : -1])
            kl.append((np.exp(known) * (known - found)).sum(axis=-1))
            nll.append(-found[np.arange(len(found)), sequence.ids[sequence.first :]])
        self._tell(stage, np.concatenate(kl), np.concatenate(nll))

    def scored(self, scores: TokenScores) -> None:
        """The rows of merge and export, from what was scored anyway."""
        mine = np.isin(scores.groups, self.places)
        self._tell("merge", np.zeros(int(mine.sum())), scores.reference_nll[mine])
        self._tell("export", scores.kl[mine], scores.bundle_nll[mine])

    def _tell(self, stage: str, kl: np.ndarray, nll: np.ndarray) -> None:
        facts = {"samples": len(kl), "sequences": len(self.places)}
        self.rows += [{"stage": stage, "metric": "kl_mean", "value": float(kl.mean()), **facts}]
        self.rows += [{"stage": stage, "metric": "nll_mean", "value": float(nll.mean()), **facts}]


def text_stages(reference: np.ndarray, after: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Encoders: 1 - mean cosine to the merged model's output, [texts, width] each, of the model as it stands after each stage."""
    stages = {"merge": reference, **after}
    return [
        {"stage": stage, "metric": "cosine_loss", "value": float(1 - cosine(reference, output).mean()), "samples": len(output)}
        for stage, output in stages.items()
    ]


def ordered(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows by metric, then in the order of the stages."""
    order = ("base", "merge", "distil", "quantize", "export")
    return sorted((dict(row) for row in rows), key=lambda row: (row["metric"], order.index(row["stage"])))


def blamed(rows: Sequence[Mapping[str, Any]]) -> str:
    """The stage that cost most of the drift: distil, quantize or export; "quantize + export" where nothing was attributed."""
    values = {row["stage"]: row["value"] for row in rows if row["metric"] in LOSSES}
    if "quantize" not in values or "export" not in values:
        return "quantize + export"
    costs = {"quantize": values["quantize"] - values.get("distil", 0.0), "export": values["export"] - values["quantize"]}
    costs |= {"distil": values["distil"]} if "distil" in values else {}
    return max(costs, key=lambda stage: costs[stage])
