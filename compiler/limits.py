"""What may be limited: one row per quantity, with its unit, its direction and how it is measured.

Percentiles are written `ttft_p95_ms`: any of p50, p90, p95, p99 of `ttft`, `tpot` and `encode`; of the other scenarios `server.latency_p99_ms`,
`server.ttft_p95_ms`, `batch.latency_p95_ms`. An accuracy metric may be asked of other data than the task's own:

    typos.accuracy_drop          with noise: a row of `compiler.evaluation.noise.NOISES`; `noise.accuracy_drop` must hold for each of them
    typos.accuracy_excess        what noise costs the bundle, less what it costs the merged fp32 model
    control.exact_match_drop     on the control set; control.exact_match_drop_since_base against the base, before the deltas
    custom.politeness            a metric of the user's own; greater is better; custom.politeness_drop: merged fp32 model less bundle
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from compiler.errors import RecipeError
from compiler.evaluation.noise import NOISES
from compiler.text import nearest

PERCENTILE = re.compile(r"(?P<series>ttft|tpot|encode)_p(?P<percentile>50|90|95|99)_ms")
SCENE_PERCENTILE = re.compile(r"(?P<series>(?:server|batch)\.(?:latency|ttft))_p(?P<percentile>50|90|95|99)_ms")
CONTROL, EVERY_NOISE = "control", "noise"
DATA = re.compile(rf"(?P<data>{'|'.join([CONTROL, EVERY_NOISE, *NOISES])})\.(?P<name>.+)")
CUSTOM = re.compile(r"custom\.[A-Za-z][A-Za-z0-9_]*")
EXCESS, SINCE_BASE = "_excess", "_since_base"


@dataclass(frozen=True)
class Quantity:
    """A measurable quantity; `at_most` tells whether a limit bounds it from above."""

    name: str
    unit: str
    at_most: bool
    meaning: str


ROWS = (
    Quantity("size_mb", "MB", True, "bytes of every bundle file that a device needs to run, /1e6"),
    Quantity("peak_rss_mb", "MB", True, "peak resident memory of a fresh process that loads the bundle and answers, /1e6"),
    Quantity("load_s", "s", True, "seconds from opening the files to a session that is ready"),
    Quantity("load_peak_rss_mb", "MB", True, "peak resident memory of a fresh process up to a session that is ready, /1e6"),
    Quantity("cold_start_ms", "ms", True, "from the start of a fresh process to the first token or vector"),
    Quantity("batch.tok_s", "tok/s", False, "prompt and generated tokens per second of one batch, median over batches"),
    Quantity("batch.texts_s", "texts/s", False, "texts encoded per second in one batch, median over batches"),
    Quantity("kl_mean", "nats", True, "mean over scored tokens of KL(merged fp32 || bundle)"),
    Quantity("kl_p99", "nats", True, "99th percentile over scored tokens of KL(merged fp32 || bundle)"),
    Quantity("top1_agreement", "share", False, "share of scored tokens whose most likely next token is the merged fp32 model's"),
    Quantity("top5_agreement", "share", False, "share of scored tokens where the merged fp32 model's most likely token is among the bundle's best five"),
    Quantity("first_divergence", "tokens", False, "mean number of greedy tokens before the bundle's answer leaves the merged fp32 model's"),
    Quantity("unchanged_answers", "share", False, "share of greedy answers that equal the merged fp32 model's token by token"),
    Quantity("flips", "share", True, "share of rows that one of merged fp32 model and bundle has right and the other wrong"),
    Quantity("perplexity", "", True, "exp of the mean negative log-likelihood of the scored tokens under the bundle"),
    Quantity("perplexity_ratio", "", True, "perplexity of the bundle over that of the merged fp32 model"),
    Quantity("exact_match", "share", False, "share of evaluation rows whose greedy answer equals the expected one"),
    Quantity("exact_match_drop", "share", True, "exact match of the merged fp32 model less that of the bundle"),
    Quantity("choice_accuracy", "share", False, "share of multiple-choice rows whose likeliest choice is the right one"),
    Quantity("choice_accuracy_drop", "share", True, "the same of the merged fp32 model less that of the bundle"),
    Quantity("choice_accuracy_norm", "share", False, "the same with log-likelihoods divided by the characters of the choice"),
    Quantity("choice_accuracy_norm_drop", "share", True, "the same of the merged fp32 model less that of the bundle"),
    Quantity("completion_accuracy", "share", False, "share of completions of which every token is the most likely one"),
    Quantity("completion_accuracy_drop", "share", True, "the same of the merged fp32 model less that of the bundle"),
    Quantity("cosine_min", "", False, "smallest cosine between sentence vectors of the bundle and of the merged fp32 model"),
    Quantity("cosine_mean", "", False, "mean cosine between sentence vectors (for classifiers: logits) of the bundle and of the merged fp32 model"),
    Quantity("accuracy", "share", False, "share of evaluation rows the bundle labels right"),
    Quantity("accuracy_drop", "share", True, "accuracy of the merged fp32 model less that of the bundle"),
    Quantity("f1", "share", False, "mean over labels of the harmonic mean of precision and recall"),
    Quantity("spearman", "", False, "rank correlation of the cosine of both texts of a pair with its score"),
    Quantity("spearman_drop", "", True, "rank correlation of the merged fp32 model less that of the bundle"),
    Quantity("prefill_tok_s", "tok/s", False, "prompt tokens per second, median over requests"),
    Quantity("decode_tok_s", "tok/s", False, "generated tokens per second after the first, median over requests"),
)
BY_NAME = {row.name: row for row in ROWS}
MACHINE = ("size_mb", "peak_rss_mb", "load_s", "load_peak_rss_mb", "cold_start_ms", "batch.tok_s", "batch.texts_s", "prefill_tok_s", "decode_tok_s")
COST_UNITS = ("MB", "ms", "s")  # no machine runs on 0 of these
ACCURACY = tuple(row.name for row in ROWS if row.name not in MACHINE)


# Metrics that have a partner `X_excess` under noise, and those that the control set compares with the base too.
EXCESSES = (*(row.name.removesuffix("_drop") for row in ROWS if row.name.endswith("_drop")), "nll")
AGAINST_BASE = (*(row.name for row in ROWS if row.name.endswith("_drop")), "kl_mean", "perplexity_ratio", "cosine_mean")


def plain(name: str) -> str:
    """The quantity of a measurement of one unmerged adapter: `kl_mean@support` -> `kl_mean`; any other name as it is."""
    return name.split("@")[0]


def bare(name: str) -> str:
    """A measurement's metric, without adapter and data: `typos.kl_mean@support` -> `kl_mean`."""
    match = DATA.fullmatch(plain(name))
    return match["name"] if match else plain(name)


def covers(limit: str, name: str) -> bool:
    """Whether a limit must hold for a measurement: `kl_mean` for `kl_mean@support`, `noise.kl_mean` for `typos.kl_mean`."""
    if plain(name) == limit:
        return True
    asked, found = DATA.fullmatch(limit), DATA.fullmatch(plain(name))
    return bool(asked and found) and asked["data"] == EVERY_NOISE and found["data"] in NOISES and asked["name"] == found["name"]  # type: ignore[index]


def quantity(name: str, place: str) -> Quantity:
    """The row of a limit's name. Raises RecipeError naming the nearest known quantity."""
    if found := lookup(name):
        return found
    known = [*BY_NAME, "ttft_p95_ms", "tpot_p95_ms", "encode_p95_ms", "server.latency_p99_ms", "batch.latency_p95_ms"]
    if match := DATA.fullmatch(name):
        known = [f"{match['data']}.{row}" for row in ACCURACY]
    raise RecipeError(place, expected=f"a measurable quantity ({', '.join(known)})", found=repr(name), remedy=nearest(name, known))


def lookup(name: str) -> Quantity | None:
    """The row of a name, None where it is none."""
    if match := PERCENTILE.fullmatch(name) or SCENE_PERCENTILE.fullmatch(name):
        return Quantity(name, "ms", True, f"{match['percentile']}th percentile of {match['series']} over requests")
    found = _accuracy(name) or BY_NAME.get(name)
    return replace(found, name=name) if found else None


def _accuracy(name: str) -> Quantity | None:
    """An accuracy metric on other data, one relative to the base or to fp32 under noise, or the user's own."""
    match = DATA.fullmatch(name)
    data, metric = (match["data"], match["name"]) if match else ("", name)
    if CUSTOM.fullmatch(metric):
        return Quantity(name, "", metric.endswith("_drop"), "a metric of the user's own")
    root = metric.removesuffix(EXCESS)
    if root != metric and data not in ("", CONTROL) and root in EXCESSES:
        return Quantity(name, "nats" if root == "nll" else "share", True, f"what noise costs the bundle in {root}, less what it costs the merged fp32 model")
    root = metric.removesuffix(SINCE_BASE)
    if root != metric and data == CONTROL and root in AGAINST_BASE:
        return replace(BY_NAME[root], name=name, meaning=f"{root}, with the base in place of the merged fp32 model")
    return BY_NAME[metric] if data and metric in ACCURACY else None


def needed_data(name: str) -> str:
    """Which other data a limit asks for: "typos", "noise", "control", or "" for none."""
    match = DATA.fullmatch(name)
    return match["data"] if match else ""
