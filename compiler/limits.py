"""What a recipe may limit: one row per quantity, with its unit, its direction and how it is measured.

Percentile limits are written `ttft_p95_ms`: any of p50, p90, p95, p99 of `ttft`, `tpot` and `encode`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from compiler.errors import RecipeError
from compiler.text import nearest

PERCENTILE = re.compile(r"(?P<series>ttft|tpot|encode)_p(?P<percentile>50|90|95|99)_ms")


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
    Quantity("kl_mean", "nats", True, "mean over scored tokens of KL(merged fp32 || bundle)"),
    Quantity("top1_agreement", "share", False, "share of scored tokens whose most likely next token is the merged fp32 model's"),
    Quantity("perplexity", "", True, "exp of the mean negative log-likelihood of the scored tokens under the bundle"),
    Quantity("perplexity_ratio", "", True, "perplexity of the bundle over that of the merged fp32 model"),
    Quantity("exact_match", "share", False, "share of evaluation rows whose greedy answer equals the expected one"),
    Quantity("exact_match_drop", "share", True, "exact match of the merged fp32 model less that of the bundle"),
    Quantity("cosine_min", "", False, "smallest cosine between sentence vectors of the bundle and of the merged fp32 model"),
    Quantity("cosine_mean", "", False, "mean cosine between sentence vectors (for classifiers: logits) of the bundle and of the merged fp32 model"),
    Quantity("accuracy", "share", False, "share of evaluation rows the bundle labels right"),
    Quantity("accuracy_drop", "share", True, "accuracy of the merged fp32 model less that of the bundle"),
    Quantity("prefill_tok_s", "tok/s", False, "prompt tokens per second, median over requests"),
    Quantity("decode_tok_s", "tok/s", False, "generated tokens per second after the first, median over requests"),
)
BY_NAME = {row.name: row for row in ROWS}


def plain(name: str) -> str:
    """The quantity of a measurement of one unmerged adapter: `kl_mean@support` -> `kl_mean`; any other name as it is."""
    return name.split("@")[0]


def quantity(name: str, place: str) -> Quantity:
    """The row of a limit's name. Raises RecipeError naming the nearest known quantity."""
    if match := PERCENTILE.fullmatch(name):
        return Quantity(name, "ms", True, f"{match['percentile']}th percentile of {match['series']} over requests")
    if name in BY_NAME:
        return BY_NAME[name]
    known = [*BY_NAME, "ttft_p95_ms", "tpot_p95_ms", "encode_p95_ms"]
    raise RecipeError(place, expected=f"a measurable quantity ({', '.join(known)})", found=repr(name), remedy=nearest(name, known))
