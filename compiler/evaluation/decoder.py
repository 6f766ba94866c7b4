"""A decoder bundle against the merged fp32 model: KL, agreement, perplexity, and the task itself where rows have answers.

What is scored is the exported graph in onnxruntime, kernels and all, not a simulation of it; the reference is eager
transformers, which shares no code with our graph builder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from compiler.errors import RecipeError
from compiler.evaluation.data import Row
from compiler.evaluation.statistics import cluster_interval, metric, percentile_interval
from runtimes.metrics import log_softmax

WINDOW = 512  # tokens of a scored text window; its second half is scored, the first is context
MAX_WINDOWS = 12
GENERATE_BATCH = 12
BEST = 5
BATCH_TOKENS = 1024  # logits of a batch: 1024 x 49,152 x 4 B = 200 MB

Report = Callable[[str, int, int], None]
Model = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]  # ids [n] of each sequence -> logits [n, vocab] of each


@dataclass(frozen=True)
class Scored:
    """A token sequence [n] of which predictions of tokens first..n-1 count."""

    ids: np.ndarray
    first: int


def scored_sequences(rows: Sequence[Row], tokenizer: Any, render: Callable[..., str] | None, eos: str) -> list[Scored]:
    """Rows -> scored sequences. A chat is scored on its last message, a text in windows on their second halves, a choice or completion on the right ending.

    render  (messages, add_generation_prompt=...) -> prompt text; None when the model has no chat template
    Raises RecipeError when chats meet a model without a template, or when nothing is long enough to score.
    """
    sequences = []
    for row in rows:
        if row.messages is not None:
            sequences.append(chat_sequence(row, tokenizer, render, eos))
        elif row.context is not None:
            sequences.append(continued(row.context, row.choices[row.gold] if row.choices else row.continuation, tokenizer))
        elif row.text is not None:
            sequences += windows(np.array(tokenizer.encode(row.text, add_special_tokens=False).ids, np.int64))
    if not sequences:
        raise RecipeError("evaluate.data", expected="at least 16 tokens of text", found="less", remedy="give more text")
    return sequences


def chat_sequence(row: Row, tokenizer: Any, render: Callable[..., str] | None, eos: str) -> Scored:
    """A chat, scored on its last message and the end token."""
    if render is None or row.messages is None:
        raise RecipeError("evaluate.data", expected="plain text", found="chats, and a model without a chat template", remedy="give rows of {text}")
    prompt = tokenizer.encode(render(row.messages[:-1], add_generation_prompt=True), add_special_tokens=False).ids
    answer = tokenizer.encode(row.answer + eos, add_special_tokens=False).ids
    return Scored(np.array(prompt + answer, np.int64), len(prompt))


def continued(context: str, ending: str, tokenizer: Any) -> Scored:
    """A context and how it goes on, scored on the latter: "2 + 2 =", "4" -> the tokens of "2 + 2 = 4", of which those behind "2 + 2 =" count.

    Both are joined by a space unless there is one. Tokens that the joint changes count as the ending's, as in EleutherAI's lm-evaluation-harness. What the
    tokenizer puts in front of every text (a start token) stays in front.
    """
    space = "" if context[-1:].isspace() or ending[:1].isspace() else " "
    whole = tokenizer.encode(f"{context}{space}{ending}", add_special_tokens=False).ids
    alone = tokenizer.encode(context, add_special_tokens=False).ids
    marked = tokenizer.encode(context).ids
    front = marked[: len(marked) - len(alone)] if marked[len(marked) - len(alone) :] == alone else []
    same = next((at for at, (one, other) in enumerate(zip(whole, alone, strict=False)) if one != other), min(len(whole) - 1, len(alone)))
    return Scored(np.array([*front, *whole], np.int64), max(1, len(front) + same))


def windows(ids: np.ndarray) -> list[Scored]:
    """A text [n] in windows, each scored on its second half."""
    if len(ids) < WINDOW:
        return [Scored(ids, max(1, len(ids) // 2))] if len(ids) >= 16 else []
    starts = range(0, len(ids) // WINDOW * WINDOW, WINDOW)
    return [Scored(ids[start : start + WINDOW], WINDOW // 2) for start in starts][:MAX_WINDOWS]


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, all sequences joined: KL in nats, same top-1, both negative log-likelihoods; `groups` numbers the sequence.

    best5             whether the reference's first choice is among the bundle's best five
    reference_first   whether the wanted token is the reference's first choice; bundle_first: the bundle's
    """

    kl: np.ndarray
    same: np.ndarray
    reference_nll: np.ndarray
    bundle_nll: np.ndarray
    groups: np.ndarray
    best5: np.ndarray
    reference_first: np.ndarray
    bundle_first: np.ndarray

    def of(self, mine: np.ndarray) -> TokenScores:
        """Those of some tokens: mine is boolean [tokens]."""
        return TokenScores(*(getattr(self, column.name)[mine] for column in fields(self)))


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
    first, second = left.argmax(-1), right.argmax(-1)
    chosen = right[rows, first]
    best5 = ((right > chosen[:, None]).sum(axis=-1) < BEST) & np.isfinite(chosen)
    numbers = np.full(len(wanted), number)
    return kl, first == second, -left[rows, wanted], -right[rows, wanted], numbers, best5, first == wanted, (second == wanted) & np.isfinite(chosen)


def token_metrics(scores: TokenScores, seed: int = 0) -> dict[str, Any]:
    """The named metrics of TokenScores, each with its 95 % interval."""

    def interval(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
        return cluster_interval(values, groups, seed)

    drift = scores.bundle_nll - scores.reference_nll
    rows = {
        "kl_mean": (scores.kl.mean(), interval(scores.kl, scores.groups)),
        "kl_p99": (np.quantile(scores.kl, 0.99), percentile_interval(scores.kl, scores.groups, 0.99)),
        "top1_agreement": (scores.same.mean(), interval(scores.same.astype(np.float64), scores.groups)),
        "top5_agreement": (scores.best5.mean(), interval(scores.best5.astype(np.float64), scores.groups)),
        "perplexity": (np.exp(scores.bundle_nll.mean()), tuple(np.exp(interval(scores.bundle_nll, scores.groups)))),
        "perplexity_ratio": (np.exp(drift.mean()), tuple(np.exp(interval(drift, scores.groups)))),
        "perplexity_reference": (np.exp(scores.reference_nll.mean()), (None, None)),
    }
    return {name: metric(value, (bounds[0], bounds[1]), len(scores.kl)) for name, (value, bounds) in rows.items()}


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
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=list(eos_ids) or None,
                pad_token_id=eos_ids[0] if eos_ids else 0,
            )
        for row, index in enumerate(part):
            found[index] = until(out[row, width:].tolist(), eos_ids)
        report("reference answers", min(start + GENERATE_BATCH, len(order)), len(order))
    answers.extend(found[index] for index in range(len(prompts)))
    return answers


def until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids before the first end token. [5, 6, 2, 9], ends [2] -> [5, 6]"""
    return next((ids[:at] for at, token in enumerate(ids) if token in ends), ids)


def open_all_logits(directory: Path, model: Mapping[str, Any] | None = None, adapter: str = "") -> Any:
    """The exported graph with logits at every position, as a decode loop; the folder is only read. Where there is a graph for prompts it is that one, as for a
    text that is read.

    model, adapter  the manifest's section and the unmerged adapter to bind; "" for the base alone
    """
    import onnx_ir as ir

    from compiler.graph.passes import with_all_logits
    from runtimes.adapters import Adapters
    from runtimes.bundle import Bundle, read_json_object
    from runtimes.decode import DecodeLoop, read_layout
    from runtimes.session import SessionSettings, open_session

    path = directory / ("prompt.onnx" if (directory / "prompt.onnx").is_file() else "model.onnx")
    twin = ir.to_proto(with_all_logits(path)).SerializeToString()
    session = open_session(path, SessionSettings(spinning=False), twin)  # torch takes turns with it on the same cores
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
