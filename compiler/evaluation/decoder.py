"""A decoder bundle against the merged fp32 model: KL, agreement, perplexity, and the task itself where rows have answers.

What is scored is the exported graph in onnxruntime, kernels and all, not a simulation of it; the reference is eager
transformers, which shares no code with our graph builder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compiler.errors import RecipeError
from compiler.evaluation.data import Row
from runtimes.metrics import log_softmax

WINDOW = 512  # tokens of a scored text window; its second half is scored, the first is context
MAX_WINDOWS = 12
LEAST_SEQUENCES = 5
GENERATE_BATCH = 12
BATCH_TOKENS = 1024  # logits of a batch: 1024 x 49,152 x 4 B = 200 MB

Report = Callable[[str, int, int], None]
Model = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]  # ids [n] of each sequence -> logits [n, vocab] of each


@dataclass(frozen=True)
class Scored:
    """A token sequence [n] of which predictions of tokens first..n-1 count."""

    ids: np.ndarray
    first: int


def scored_sequences(rows: Sequence[Row], tokenizer: Any, render: Callable[..., str] | None, eos: str) -> list[Scored]:
    """Rows -> scored sequences. A chat is scored on its last message, a text in windows on their second halves.

    render  (messages, add_generation_prompt=...) -> prompt text; None when the model has no chat template
    Raises RecipeError when chats meet a model without a template, or when nothing is long enough to score.
    """
    sequences = []
    for row in rows:
        if row.messages is None:
            sequences += _windows(np.array(tokenizer.encode(row.text, add_special_tokens=False).ids, np.int64))
            continue
        if render is None:
            raise RecipeError("evaluate.data", expected="plain text", found="chats, and a model without a chat template", remedy="give rows of {text}")
        prompt = tokenizer.encode(render(row.messages[:-1], add_generation_prompt=True), add_special_tokens=False).ids
        answer = tokenizer.encode(row.answer + eos, add_special_tokens=False).ids
        sequences.append(Scored(np.array(prompt + answer, np.int64), len(prompt)))
    if not sequences:
        raise RecipeError("evaluate.data", expected="at least 16 tokens of text", found="less", remedy="give more text")
    return sequences


def _windows(ids: np.ndarray) -> list[Scored]:
    if len(ids) < WINDOW:
        return [Scored(ids, max(1, len(ids) // 2))] if len(ids) >= 16 else []
    starts = range(0, len(ids) // WINDOW * WINDOW, WINDOW)
    return [Scored(ids[start : start + WINDOW], WINDOW // 2) for start in starts][:MAX_WINDOWS]


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, all sequences joined: KL in nats, same top-1, both negative log-likelihoods; `groups` numbers the sequence."""

    kl: np.ndarray
    same: np.ndarray
    reference_nll: np.ndarray
    bundle_nll: np.ndarray
    groups: np.ndarray


def score(sequences: Sequence[Scored], reference: Model, bundle: Model, report: Report) -> TokenScores:
    """Compare two models over sequences, a few of similar length at a time."""
    parts = []
    for numbers in batches([len(sequence.ids) for sequence in sequences]):
        ids = [sequences[number].ids for number in numbers]
        for number, left, right in zip(numbers, reference(ids), bundle(ids), strict=True):
            parts.append(_compare(number, sequences[number], left, right))
        report("sequences compared", len(parts), len(sequences))
    return TokenScores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Places of sequences by length, in batches of at most BATCH_TOKENS padded tokens. [3, 500, 4], 1000 -> [[0, 2], [1]] at most."""
    made: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if not made or (len(made[-1]) + 1) * lengths[place] > BATCH_TOKENS:
            made.append([])
        made[-1].append(place)
    return made


def _compare(number: int, sequence: Scored, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, ...]:
    """The columns of TokenScores for one sequence, from the logits [n, vocab] of both models."""
    left, right = (log_softmax(logits[sequence.first - 1 : -1]) for logits in (left, right))
    wanted = sequence.ids[sequence.first :]
    rows = np.arange(len(wanted))
    kl = (np.exp(left) * (left - right)).sum(axis=-1, dtype=np.float64)  # not finite where `right` is not: such a row must not pass
    return kl, left.argmax(-1) == right.argmax(-1), -left[rows, wanted], -right[rows, wanted], np.full(len(wanted), number)


def cluster_interval(values: np.ndarray, groups: np.ndarray, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap of a mean over tokens, drawing whole sequences: tokens of one sequence are not independent.

    Fewer than LEAST_SEQUENCES say nothing about others: the interval is then everything, and no limit can pass on it.
    """
    if len(np.unique(groups)) < LEAST_SEQUENCES:
        return float("-inf"), float("inf")
    sums, counts = np.bincount(groups, values), np.bincount(groups)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (resamples, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def token_metrics(scores: TokenScores, seed: int = 0) -> dict[str, Any]:
    """The named metrics of TokenScores, each with its 95 % interval."""

    def interval(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
        return cluster_interval(values, groups, seed)

    drift = scores.bundle_nll - scores.reference_nll
    rows = {
        "kl_mean": (scores.kl.mean(), interval(scores.kl, scores.groups)),
        "top1_agreement": (scores.same.mean(), interval(scores.same.astype(np.float64), scores.groups)),
        "perplexity": (np.exp(scores.bundle_nll.mean()), tuple(np.exp(interval(scores.bundle_nll, scores.groups)))),
        "perplexity_ratio": (np.exp(drift.mean()), tuple(np.exp(interval(drift, scores.groups)))),
    }
    metrics: dict[str, Any] = {name: _metric(value, bounds, len(scores.kl)) for name, (value, bounds) in rows.items()}
    metrics["kl_p99"] = _metric(np.quantile(scores.kl, 0.99), (None, None), len(scores.kl))
    metrics["perplexity_reference"] = _metric(np.exp(scores.reference_nll.mean()), (None, None), len(scores.kl))
    return metrics


def _metric(value: Any, bounds: tuple[Any, ...], samples: int) -> dict[str, Any]:
    low, high = (None if bound is None else float(bound) for bound in bounds)
    return {"value": float(value), "low": low, "high": high, "samples": samples}


def reference_answers(model: Any, prompts: Sequence[Sequence[int]], eos_ids: Sequence[int], new_tokens: int, report: Report) -> list[list[int]]:
    """Greedy continuations by eager transformers, in batches with left padding; the end token is cut off."""
    import torch

    answers: list[list[int]] = []
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), GENERATE_BATCH):
        part = order[start : start + GENERATE_BATCH]
        width = max(len(prompts[index]) for index in part)
        ids = torch.zeros((len(part), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(part):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=list(eos_ids), pad_token_id=eos_ids[0]
            )
        for row, index in enumerate(part):
            found[index] = _until(out[row, width:].tolist(), eos_ids)
        report("reference answers", min(start + GENERATE_BATCH, len(order)), len(order))
    answers.extend(found[index] for index in range(len(prompts)))
    return answers


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids before the first end token. [5, 6, 2, 9], ends [2] -> [5, 6]"""
    return next((ids[:at] for at, token in enumerate(ids) if token in ends), ids)


def exact_bounds(hits: int, samples: int, tail: float) -> tuple[float, float]:
    """Clopper-Pearson bounds of a share, `tail` on each side. No hit in 5 rows is still compatible with many: (0, 0.52) at 0.025."""
    from scipy.stats import beta

    low = float(beta.ppf(tail, hits, samples - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, samples - hits)) if hits < samples else 1.0
    return low, high


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """A share with its exact 95 % interval."""
    low, high = exact_bounds(int(sum(hits)), len(hits), 0.025)
    return {"value": sum(hits) / len(hits), "low": low, "high": high, "samples": len(hits), "exact": True}


def paired_drop(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """Share lost less share won, over the same rows, with a 95 % interval.

    Rows lost and rows won are each bounded exactly at half the risk (Bonferroni), so agreement on few rows proves little: a
    bootstrap would give an interval of width 0 there.
    """
    n = len(before)
    lost = sum(was and not is_ for was, is_ in zip(before, after, strict=True))
    won = sum(is_ and not was for was, is_ in zip(before, after, strict=True))
    (lost_low, lost_high), (won_low, won_high) = exact_bounds(lost, n, 0.0125), exact_bounds(won, n, 0.0125)
    return {"value": (lost - won) / n, "low": lost_low - won_high, "high": lost_high - won_low, "samples": n, "exact": True}


def open_all_logits(directory: Path, model: Mapping[str, Any] | None = None, adapter: str = "") -> Any:
    """The exported graph with logits at every position, as a decode loop; the twin graph lies beside the model while it is open.

    model, adapter  the manifest's section and the unmerged adapter to bind; "" for the base alone
    """
    from compiler.graph.passes import all_logits
    from runtimes.adapters import Adapters
    from runtimes.bundle import Bundle, read_json_object
    from runtimes.decode import DecodeLoop, read_layout
    from runtimes.session import SessionSettings, open_session

    twin = directory / "all_logits.onnx"
    all_logits(directory / "model.onnx", twin)
    try:
        session = open_session(twin, SessionSettings(spinning=False))  # torch takes turns with it on the same cores
    finally:
        twin.unlink(missing_ok=True)
    genai: Mapping[str, Any] = read_json_object(directory / "genai_config.json")
    loop = DecodeLoop(session, read_layout(session, dict(genai), str(directory)), int(genai["model"]["context_length"]))
    loop.use(Adapters(Bundle(directory, {"model": model or {}}, "decoder", ()), session).values(adapter))
    return loop


def merged_logits(model: Any) -> Model:
    """Eager transformers as a Model: one right-padded batch a call; causal attention never looks at the padding."""
    import torch

    def forward(sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        ids = torch.zeros((len(sequences), max(map(len, sequences))), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.from_numpy(sequence)
        with torch.inference_mode():
            logits = model(input_ids=ids).logits.float().numpy()
        return [logits[row, : len(sequence)] for row, sequence in enumerate(sequences)]

    return forward


def bundle_logits(loop: Any) -> Model:
    """A decode loop as a Model: one sequence at a time, as a device runs them."""
    return lambda sequences: [np.asarray(loop.all_logits(ids[None]))[0] for ids in sequences]
