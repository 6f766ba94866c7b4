"""Two or more bundles beside each other: size, speed, memory, and how their answers differ, each with an interval of the *paired* difference.

The first bundle is the reference. Nothing else is needed: no base, no torch.

1. Answers: the same rows to every bundle. Decoders: KL(first || other) and agreement token by token, and right or wrong where rows have answers; encoders:
   cosine and, where rows have labels or scores, the same. Rows are paired: lost and won are bounded exactly (`paired_drop`), McNemar's test says whether rows
   lost and rows won differ by more than chance.
2. Speed and memory: rounds; in each, every bundle in a fresh process, in an order drawn anew. The ratio of each round is one sample, so what disturbs a round
   disturbs both sides of it; geometric mean and Student's interval over rounds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compiler.errors import BundleError
from compiler.evaluation import decoder, statistics
from compiler.evaluation.data import EvaluationSet, load_rows
from compiler.evaluation.run_decoder import divergence
from compiler.evaluation.run_encoder import neighbours, texts_for
from compiler.evaluation.sheet import Sheet, hits_of, prepare
from compiler.evaluation.subject import Answer, ChatFormat
from compiler.progress import Progress
from runtimes.bench import BenchOptions, BenchResult, measure_in_child
from runtimes.bundle import Bundle, open_bundle, verify_bundle
from targets.machine import fingerprint

REQUESTS = 6  # of one process
SPEEDS = ("ttft_ms", "tpot_ms", "prefill_tok_s", "decode_tok_s", "encode_ms")
COSTS = ("peak_rss_mb", "load_s")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Compared:
    """What `trimtab compare` says: identities of the bundles, rows {metric, unit, values, ratio?, low, high, p?, note} in the order of `bundles`."""

    bundles: Sequence[Mapping[str, Any]]
    rows: Rows
    samples: Rows

    def as_dict(self) -> dict[str, Any]:
        return {"schema": 1, "bundles": list(self.bundles), "rows": self.rows, "samples": self.samples, "machine": fingerprint()}


@dataclass(frozen=True)
class Ask:
    """How much to compare. rounds 0: no speed."""

    data: Path | None = None
    rows: int | None = None
    rounds: int = 5
    threads: int = 0
    seed: int = 0


def compare(folders: Sequence[Path], ask: Ask, progress: Progress) -> Compared:
    """Verify every bundle, let all answer, measure them in turn. Raises BundleError for bundles that cannot be compared, RecipeError for bad data."""
    with progress.stage("verify", f"{len(folders)} bundles"):
        bundles = [open_bundle(folder) for folder in folders]
        for folder in folders:
            verify_bundle(folder)
        _comparable(bundles)
    data = load_rows(ask.data, ask.rows, "--data")
    with progress.stage("answers", f"{len(data.rows)} rows of {data.origin}"):
        rows, samples = (_decoders if bundles[0].kind == "decoder" else _encoders)(bundles, data, ask, progress)
    sizes = [bundle.device_bytes / 1e6 for bundle in bundles]
    made = [_row("size_mb", "MB", sizes, _ratios(sizes), note="exact")]
    if ask.rounds:
        with progress.stage("speed", f"{ask.rounds} rounds, every bundle in a fresh process"):
            made += _speeds(folders, ask, progress)
    return Compared([_identity(bundle) for bundle in bundles], [*made, *rows], samples)


def _comparable(bundles: Sequence[Bundle]) -> None:
    """One kind, one task; decoders with the same tokens. Raises BundleError."""
    first = bundles[0]
    for other in bundles[1:]:
        found = next((f"{key} {other.model.get(key)!r}" for key in ("kind", "task") if other.model.get(key) != first.model.get(key)), "")
        if found:
            wanted = f"a {first.kind} for {first.model.get('task')} as {first.directory} is"
            raise BundleError(str(other.directory), expected=wanted, found=found, remedy="compare bundles of one kind and task")
        if first.kind == "decoder" and ChatFormat.of_bundle(other).vocabulary != ChatFormat.of_bundle(first).vocabulary:
            expected = f"the tokens of {first.directory}"
            raise BundleError(str(other.directory), expected=expected, found="another tokenizer", remedy="compare bundles of the same base model")


def _identity(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "folder": str(bundle.directory),
        "name": bundle.name,
        "target": manifest["target"]["id"],
        "digest": manifest["digest"],
        "scheme": bundle.model["scheme"],
        "base": manifest["lineage"]["base"]["origin"],
        "deltas": [row["origin"] for row in manifest["lineage"]["deltas"]],
    }


def _row(metric: str, unit: str, values: Sequence[float], others: Sequence[Mapping[str, Any]], note: str = "", samples: int = 1) -> dict[str, Any]:
    """others: for each bundle after the first, {difference or ratio, low, high, p}."""
    return {
        "metric": metric,
        "unit": unit,
        "values": [float(value) for value in values],
        "against_first": [dict(one) for one in others],
        "samples": samples,
        "note": note,
    }


def _ratios(values: Sequence[float]) -> Rows:
    return [{"ratio": value / values[0], "low": None, "high": None} for value in values[1:]]


# --- answers ---------------------------------------------------------------------------------------------------------------------------------------------


def _decoders(bundles: Sequence[Bundle], data: EvaluationSet, ask: Ask, progress: Progress) -> tuple[Rows, Rows]:
    chat = ChatFormat.of_bundle(bundles[0])
    sheet = prepare(data.rows, chat)
    models = [decoder.bundle_logits(decoder.open_all_logits(bundle.directory, bundle.model)) for bundle in bundles]
    tokens: list[dict[str, Any]] = []
    hits: list[Mapping[str, list[bool]]] = []
    for model in models[1:]:
        scores = decoder.score(sheet.sequences, models[0], model, progress.update)
        tokens.append(decoder.token_metrics(scores.of(scores.groups < sheet.counted), ask.seed))
        found = hits_of(sheet, scores)
        hits += [found.bundle] if hits else [found.reference, found.bundle]
    rows = [
        _paired(metric, unit, tokens)
        for metric, unit in (("kl_mean", "nats"), ("top1_agreement", "share"), ("top5_agreement", "share"), ("perplexity_ratio", ""))
    ]
    answers = [_answers(bundle, sheet, chat, progress) for bundle in bundles]
    if answers[0]:
        leaving = [divergence(answers[0], other, ask.seed) for other in answers[1:]]
        rows += [_paired("first_divergence", "tokens", leaving), _paired("unchanged_answers", "share", leaving)]
    if sheet.chats:
        right = [{"exact_match": [got.text.strip() == row.answer.strip() for got, row in zip(mine, sheet.chats, strict=True)]} for mine in answers]
        hits = [{**one, **more} for one, more in zip(hits or [{}] * len(right), right, strict=True)]
    return [*_right_or_wrong(hits), *rows], _samples(sheet, answers)


def _answers(bundle: Bundle, sheet: Sheet, chat: ChatFormat, progress: Progress) -> list[Answer]:
    """Greedy answers of one bundle to a sheet's prompts; nothing for items."""
    from runtimes.generate import Generator, Options
    from runtimes.session import SessionSettings

    prompts = sheet.prompts(chat)
    if not prompts:
        return []
    generator, options = Generator(bundle, SessionSettings(spinning=False)), Options(max_new_tokens=sheet.new_tokens(chat))
    made = []
    for number, prompt in enumerate(prompts):
        (answer,) = generator.generate([prompt], options)
        made.append(Answer(tuple(decoder.until(list(answer.token_ids), chat.eos_ids)), answer.text))
        progress.update(f"answers of {bundle.name}", number + 1, len(prompts))
    return made


def _samples(sheet: Sheet, answers: Sequence[Sequence[Answer]]) -> Rows:
    """The first answers that are not all alike."""
    differ = [place for place in range(len(answers[0])) if len({one[place].text for one in answers}) > 1] if sheet.chats else []
    return [
        {"prompt": (sheet.chats[place].messages or ())[-2]["content"], "expected": sheet.chats[place].answer, "answers": [one[place].text for one in answers]}
        for place in differ[:6]
    ]


def _encoders(bundles: Sequence[Bundle], data: EvaluationSet, ask: Ask, progress: Progress) -> tuple[Rows, Rows]:
    from compiler.evaluation import encoder
    from runtimes.encode import Encoder

    texts = texts_for(data.rows, None, ask.seed)
    outputs = []
    for number, bundle in enumerate(bundles):
        outputs.append(Encoder(bundle).encode(list(texts.texts)))
        progress.update("bundles", number + 1, len(bundles))
    near = [encoder.output_metrics(outputs[0], other) for other in outputs[1:]]
    rows = [_paired("cosine_mean", "", near), _paired("cosine_min", "", near)]
    labels = bundles[0].model.get("labels") or []
    if texts.labels and labels:
        hits = [{"accuracy": [labels[at] == wanted for at, wanted in zip(output.argmax(-1), texts.labels, strict=True)]} for output in outputs]
        rows = [*_right_or_wrong(hits), *rows]
    if texts.scores:
        scores, cosines = np.array(texts.scores), [neighbours(output) for output in outputs]
        drops = [statistics.spearman_drop(scores, cosines[0], other, ask.seed) for other in cosines[1:]]
        values = [statistics.spearman(scores, one) for one in cosines]
        others = [{"difference": -drop["value"], "low": -drop["high"], "high": -drop["low"]} for drop in drops]
        rows = [_row("spearman", "", values, others, samples=len(scores)), *rows]
    return rows, []


def _paired(metric: str, unit: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A metric that is about the first bundle and another: it has no value for the first."""
    others = [{"value": one[metric]["value"], "low": one[metric]["low"], "high": one[metric]["high"]} for one in found]
    note = "against the first" + (", exact interval" if found[0][metric].get("exact") else "")
    return _row(metric, unit, [float("nan"), *(one["value"] for one in others)], others, note, found[0][metric]["samples"])


def _right_or_wrong(hits: Sequence[Mapping[str, list[bool]]]) -> Rows:
    """Scores of every bundle, and the difference to the first over the same rows."""
    rows: Rows = []
    for metric in hits[0] if hits else ():
        values = [sum(one[metric]) / len(one[metric]) for one in hits]
        others = []
        for other in hits[1:]:
            drop = statistics.paired_drop(hits[0][metric], other[metric])
            lost, won = changed(hits[0][metric], other[metric])
            others.append({"difference": -drop["value"], "low": -drop["high"], "high": -drop["low"], "p": mcnemar(lost, won), "lost": lost, "won": won})
        rows.append(_row(metric, "share", values, others, "paired rows: exact interval, McNemar's test", len(hits[0][metric])))
    return rows


def changed(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    """Rows lost and rows won."""
    pairs = list(zip(before, after, strict=True))
    return sum(was and not is_ for was, is_ in pairs), sum(is_ and not was for was, is_ in pairs)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p of McNemar's test: were a change as likely either way, so uneven a split or worse (Psychometrika 12, 1947). No change: 1."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0


# --- speed -----------------------------------------------------------------------------------------------------------------------------------------------


def _speeds(folders: Sequence[Path], ask: Ask, progress: Progress) -> Rows:
    options = BenchOptions(threads=ask.threads, least=REQUESTS, most=REQUESTS, seconds=20.0, max_seconds=40.0)
    found: list[list[BenchResult]] = [[] for _ in folders]
    for number in range(ask.rounds):
        order = list(range(len(folders)))
        random.Random(f"{ask.seed}:{number}").shuffle(order)
        for place in order:
            found[place].append(measure_in_child(folders[place], replace(options, seed=number)))
        progress.update("rounds", number + 1, ask.rounds)
    names = [name for name in SPEEDS if name in found[0][0].series]  # empty where every window was disturbed
    rows = [
        _timed(name, [[float(np.median(one.series[name])) if len(one.series[name]) else float("nan") for one in rounds] for rounds in found]) for name in names
    ]
    return rows + [_timed(name, [[float(getattr(one, name)) for one in rounds] for rounds in found]) for name in COSTS]


def _timed(name: str, values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """values [bundles][rounds]. Rounds in which a side has no undisturbed sample are left out."""
    unit = "tok/s" if name.endswith("tok_s") else name.rpartition("_")[2].replace("mb", "MB")
    sound = [number for number in range(len(values[0])) if all(math.isfinite(one[number]) for one in values)]
    kept = [[one[number] for number in sound] for one in values]
    others = [ratio_of_rounds(kept[0], other) for other in kept[1:]]
    middles = [float(np.median(one)) if one else float("nan") for one in kept]
    return _row(name, unit, middles, others, "median over rounds; ratio paired by round", len(sound))


def ratio_of_rounds(first: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """other / first: geometric mean over rounds with Student's 95 % interval, and the p of "no difference". Fewer than 3 rounds have no interval."""
    from scipy.stats import t

    logs = np.log(np.asarray(other, np.float64) / np.asarray(first, np.float64))
    if not len(logs):
        return {"ratio": float("nan"), "low": None, "high": None}
    mean = float(logs.mean())
    if len(logs) < 3:
        return {"ratio": math.exp(mean), "low": None, "high": None}
    error = float(logs.std(ddof=1)) / math.sqrt(len(logs))
    reach = float(t.ppf(0.975, len(logs) - 1)) * error
    p = float(2 * t.sf(abs(mean) / error, len(logs) - 1)) if error else float(mean == 0)
    return {"ratio": math.exp(mean), "low": math.exp(mean - reach), "high": math.exp(mean + reach), "p": p}
