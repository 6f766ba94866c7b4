"""What a student is trained on: rows of losses between what the teacher says and what it says itself.

Over the next token (decoders) or the label (classifiers), with p the teacher's and q the student's distribution at temperature T, times T^2 so that gradients
keep their size (Hinton et al., arXiv 1503.02531):

    kl            sum p log(p / q)                                     forward: q covers all that p does
    reverse-kl    sum q log(q / p)                                     q keeps to what p is sure of (MiniLLM, arXiv 2306.08543)
    jsd           (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2   between them (GKD, arXiv 2306.13649)
    cross-entropy - log q(next token)                                  the text itself; no teacher

Over the vectors of a batch of texts (encoders), v the student's and w the teacher's:

    cosine        1 - cos(v, w)
    similarity    mean squared difference of the cosines between all pairs of the batch: which texts are near each other

Over the states of tokens (encoders): `hidden`, mean squared difference of the last layer's states over the teacher's mean square; `relations`, KL between the
softmax of scaled products of queries, of keys and of values of the last layer, head by head (MiniLMv2, arXiv 2012.15828).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

TOKENS, VECTORS, STATES = "next token or label", "vectors of texts", "states of tokens"
RELATION_HEADS = 12


@dataclass(frozen=True)
class Objective:
    """One row. over: TOKENS, VECTORS or STATES. loss: by the kind; `distribution_loss`, `vector_loss` and `relations` say with what it is called."""

    name: str
    over: str
    loss: Callable[..., torch.Tensor]


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """log-probabilities [n, classes] twice -> nats [n]. [log .5, log .5] and [log .25, log .75] -> 0.1438."""
    return (p.exp() * (p - q)).sum(-1)


def jsd(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    middle = torch.logsumexp(torch.stack([p, q]), dim=0) - torch.log(torch.tensor(2.0))
    return (kl(p, middle) + kl(q, middle)) / 2


def cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (1 - cosine_similarity(student, teacher, dim=-1)).mean()


def similarity(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    mine, theirs = (normalize(vectors, dim=-1) for vectors in (student, teacher))
    return (mine @ mine.T - theirs @ theirs.T).square().mean()


def hidden(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Last states [batch, length, width]."""
    return (student - teacher)[mask].square().mean() / teacher[mask].square().mean()


def relations(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Queries, keys or values [batch, length, width], split into RELATION_HEADS whatever the model's own number: KL of their relations, nats a token."""
    of = [relation(x, mask) for x in (teacher, student)]
    each = (of[0].exp() * (of[0] - of[1])).sum(-1)  # [batch, heads, length]
    kept = mask[:, None, :].expand_as(each)
    return each[kept].mean()


def relation(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log softmax of x x^T / sqrt(d) by head, [batch, heads, length, length]; padded tokens are nobody's relation."""
    heads = next(heads for heads in range(RELATION_HEADS, 0, -1) if x.shape[-1] % heads == 0)
    split = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
    return scores.masked_fill(~mask[:, None, None, :], -1e9).log_softmax(-1)


OBJECTIVES = {
    row.name: row
    for row in (
        Objective("kl", TOKENS, kl),
        Objective("reverse-kl", TOKENS, lambda p, q: kl(q, p)),
        Objective("jsd", TOKENS, jsd),
        Objective("cross-entropy", TOKENS, cross_entropy),
        Objective("cosine", VECTORS, cosine),
        Objective("similarity", VECTORS, similarity),
        Objective("hidden", STATES, hidden),
        Objective("relations", STATES, relations),
    )
}


def at(temperature: float, logits: torch.Tensor) -> torch.Tensor:
    return logits if temperature == 1 else logits / temperature


def distribution_loss(
    weights: Mapping[str, float], teacher: torch.Tensor | None, student: torch.Tensor, next_ids: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """Weighted sum over the rows of TOKENS in `weights`, summed over n tokens.

    teacher, student  logits [n, classes]
    next_ids          [n], or [n - 1] at the end of a text: its last token has no next one
    """
    total = student.new_zeros(())
    p: Any = None if teacher is None else at(temperature, teacher).log_softmax(-1)
    q = at(temperature, student).log_softmax(-1)
    for name, weight in weights.items():
        row = OBJECTIVES[name]
        if row.over != TOKENS:
            continue
        if name == "cross-entropy":
            if next_ids is not None and len(next_ids):
                total = total + weight * row.loss(student[: len(next_ids)], next_ids, reduction="sum")
        else:
            total = total + weight * temperature**2 * row.loss(p, q).sum()
    return total


def vector_loss(weights: Mapping[str, float], student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Weighted sum over the rows of VECTORS in `weights`; [batch, width] twice."""
    total = student.new_zeros(())
    for name, weight in weights.items():
        if OBJECTIVES[name].over == VECTORS:
            total = total + weight * OBJECTIVES[name].loss(student, teacher)
    return total
