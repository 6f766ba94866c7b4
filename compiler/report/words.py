"""The words and numbers of a report: what a metric is called, which way is better, how a figure is written.

A manager reads "Time to first token, 95th percentile", an engineer `ttft_p95_ms`: both stand side by side. A new metric
is one row of `METRICS`; a metric without a row is shown under its own name. Which way a limit bounds is told by
`compiler.limits`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from compiler import limits as known_limits
from compiler.report.document import CheckRow, Report
from compiler.report.verdict import FAIL, INCONCLUSIVE, INFO, PASS

LOWER, HIGHER = "lower", "higher"
PERCENTILE = re.compile(r"(?P<base>.+)_p(?P<percentile>\d+(?:\.\d+)?)(?:_(?P<unit>[a-z]+))?(?P<shape>@.+)?")
SERIES = re.compile(r"(?P<base>.+?)(?:_(?P<unit>ms|s|us))?(?P<shape>@.+)?")
NONE = "NONE"  # outcome of a headline where nothing was asked or nothing validated
UNITLESS = {"", "1", "ratio", "share", "fraction", "none"}
MARKS = {PASS: "✓", FAIL: "✗", INCONCLUSIVE: "?"}
RESULTS = {PASS: "holds", FAIL: "missed", INCONCLUSIVE: "not proven"}


@dataclass(frozen=True)
class Metric:
    """One row: a name in plain words, and one sentence for the glossary."""

    label: str
    meaning: str


METRICS: dict[str, Metric] = {
    "size_mb": Metric("Size on disk", "All files of the bundle together, in millions of bytes."),
    "peak_rss_mb": Metric("Peak memory", "The most memory the process held while it answered."),
    "load_s": Metric("Time to load", "From starting to being ready for the first request."),
    "ttft": Metric("Time to first token", "TTFT: how long a user waits before the first piece of the answer appears."),
    "tpot": Metric("Time per further token", "TPOT: how long each further piece of the answer takes."),
    "itl": Metric("Gap between tokens", "The pause between two pieces of the answer."),
    "server.latency": Metric(
        "Answer under load", "From the intended arrival of a request to the end of its answer, waiting included, at the stated rate of arrivals."
    ),
    "server.ttft": Metric("First token under load", "From the intended arrival of a request to the first piece of its answer, waiting included."),
    "batch.latency": Metric("Time of a batch", "How long one call with several requests takes."),
    "batch.ttft": Metric("First tokens of a batch", "From handing over a batch to its first tokens."),
    "batch.tok_s": Metric("Batch throughput", "Prompt and generated tokens per second of a batch."),
    "batch.texts_s": Metric("Batch throughput", "Texts encoded per second in a batch."),
    "cold_start": Metric("Cold start", "From starting a fresh process to the first token or vector, files read from storage."),
    "load_peak_rss_mb": Metric("Peak memory while loading", "The most memory the process held until it was ready."),
    "e2e": Metric("Time for the whole answer", "From the request to the last piece of the answer."),
    "encode": Metric("Time to encode", "How long one request takes; @8x128 means 8 texts of 128 tokens."),
    "decode_tok_s": Metric("Writing speed", "Tokens written per second after the first."),
    "prefill_tok_s": Metric("Reading speed", "Tokens of the prompt read per second."),
    "kl": Metric("Drift from the full model (KL)", "How far the predicted probabilities stray from the full model; 0 is identical."),
    "kl_mean": Metric("Drift from the full model (mean KL)", "Mean over all tokens of the evaluation text, in nats; 0 is identical."),
    "top1_agreement": Metric("Same first choice as the full model", "Share of tokens where both models pick the same next token."),
    "top5_agreement": Metric("First choice within the other's best five", "Share of tokens where the full model's choice is among the best five."),
    "perplexity": Metric("Perplexity", "How surprised the model is by the evaluation text."),
    "perplexity_ratio": Metric("Perplexity against the full model", "1 means that nothing was lost."),
    "cosine": Metric("Vectors like the full model's", "Cosine between both models' vectors; 1 is identical."),
    "cosine_mean": Metric("Vectors like the full model's (mean)", "Cosine between both models' vectors; 1 is identical."),
    "cosine_min": Metric("Vectors like the full model's (worst)", "The worst cosine of the evaluation set."),
    "accuracy": Metric("Accuracy", "Share of items answered right."),
    "f1": Metric("F1 score", "Balance of precision and recall."),
    "exact_match": Metric("Exact match", "Share of answers that equal the expected one."),
    "exact_match_drop": Metric("Exact match lost by compiling", "Exact match of the full model less that of the bundle."),
    "accuracy_drop": Metric("Accuracy lost by compiling", "Accuracy of the full model less that of the bundle."),
    "spearman": Metric("Rank correlation", "Spearman's correlation with human scores."),
    "export_faithful": Metric("Graph differs from the model", "Largest difference to the model in torch with the same stored weights, in standard deviations."),
    "choice_accuracy": Metric("Multiple choice", "Share of questions whose likeliest choice is the right one."),
    "choice_accuracy_norm": Metric("Multiple choice, by length", "The same, with likelihoods divided by the length of the choice."),
    "completion_accuracy": Metric("Completion", "Share of texts that the model would have ended as they really end."),
    "first_divergence": Metric("Tokens until answers part", "Mean number of tokens before the bundle's answer leaves the full model's."),
    "unchanged_answers": Metric("Answers without any change", "Share of answers that equal the full model's token by token."),
    "nll": Metric("Surprise", "Negative log-likelihood of the text, nats a token."),
    "flips": Metric("Flipped answers", "Share of items where compressed and full model disagree on right or wrong."),
}
# For names that `compiler.limits` does not hold, the last telling word decides: `accuracy_drop` is told by `drop`.
HIGHER_WORDS = ("accuracy", "agreement", "cosine", "f1", "match", "spearman", "correlation", "recall", "precision", "bleu", "rouge", "auc", "throughput")
LOWER_WORDS = ("kl", "drop", "loss", "error", "wer", "cer", "flips", "perplexity", "ppl", "mb", "gb", "ms", "us", "size", "rss", "drift", "difference", "diff")


SUFFIXES = (
    ("_drop_since_base", "lost since the base"),
    ("_since_base", "against the base"),
    ("_excess", "lost to noise beyond the full model"),
    ("_drop", "lost by compiling"),
)


def metric_of(name: str) -> Metric | None:
    """`ttft_p95_ms` -> the row of `ttft`; `encode_ms@1x32` -> the row of `encode`; `typos.kl_mean` -> the row of `kl_mean`; `accuracy_excess` -> the row of
    `accuracy`, with what the ending means; unknown -> None."""
    plain = known_limits.bare(name)
    if plain in METRICS:
        return METRICS[plain]
    root, said = next(((plain.removesuffix(suffix), said) for suffix, said in SUFFIXES if plain.endswith(suffix)), ("", ""))
    if root in METRICS:
        return Metric(f"{METRICS[root].label} {said}", f"{METRICS[root].meaning} Here: {said}.")
    match = PERCENTILE.fullmatch(plain) or SERIES.fullmatch(plain)
    return METRICS.get(match["base"]) if match else None


def label(name: str) -> str:
    """`ttft_p95_ms` -> "Time to first token, 95th percentile"; `typos.accuracy_excess` -> "Accuracy lost to noise beyond the full model (typos)"; an unknown
    name is shown as it stands."""
    metric, plain = metric_of(name), known_limits.bare(name)
    text = metric.label if metric else plain.removeprefix("custom.").replace("_", " ")
    match = PERCENTILE.fullmatch(plain)
    if match and metric:
        text += ", median" if match["percentile"] == "50" else f", {ordinal(match['percentile'])} percentile"
    told = ", ".join(part for part in (known_limits.needed_data(name), name.partition("@")[2]) if part)
    return f"{text} ({told})" if told else text


def ordinal(number_text: str) -> str:
    """ "95" -> "95th", "1" -> "1st"."""
    if number_text[-2:] in ("11", "12", "13"):
        return number_text + "th"
    return number_text + {"1": "st", "2": "nd", "3": "rd"}.get(number_text[-1], "th")


def better(check: CheckRow) -> str:
    """Whether lower or higher values are better: by the row of limits, by a word in the name, by the outcome, else lower."""
    plain = check.name.split("@")[0]
    if known := known_limits.lookup(plain):
        return LOWER if known.at_most else HIGHER
    plain = plain.lower()
    words = plain.split("_")
    if words[-2:] == ["tok", "s"]:
        return HIGHER
    for word in reversed(words):
        if word in HIGHER_WORDS or word in LOWER_WORDS:
            return HIGHER if word in HIGHER_WORDS else LOWER
    if check.limit is not None and check.outcome in (PASS, FAIL) and check.measured != check.limit:
        above = check.measured > check.limit
        return HIGHER if above == (check.outcome == PASS) else LOWER
    return LOWER


def number(value: float | None, *, digits: int = 3, against: float | None = None) -> str:
    """At least `digits` significant digits, whole numbers with thousands; more digits while it would look equal to `against`.

    104.6 against 105 -> "104.6", not "105".
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    text = significant(value, digits)
    while against is not None and math.isfinite(against) and value != against and text == significant(against, digits) and digits < 12:
        digits += 1
        text = significant(value, digits)
    return text


def significant(value: float, digits: int) -> str:
    """Round to `digits` significant digits but never before the decimal point: 1234.5 -> "1,234", 0.04321 -> "0.0432"."""
    if value == 0:
        return "0"
    places = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    if places > 9:
        return f"{value:.{digits - 1}e}"
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def figure(value: float | None, unit: str = "", against: float | None = None) -> str:
    """A number with its unit: "231 ms", "0.0432 nats", "0.91"."""
    text = number(value, against=against)
    return text if unit in UNITLESS or value is None or not math.isfinite(value) else f"{text} {unit}"


def percent(share: float | None) -> str:
    """0.99 -> "99 %", 0.0098 -> "0.98 %"; tiny shares by their power of ten."""
    if share is None:
        return "–"
    if 0 < share < 1e-5:
        return f"< {10 ** math.ceil(math.log10(share * 100)):g} %"
    return f"{significant(share * 100, 2 if share < 0.9 else 4)} %"


def size(count: int | None) -> str:
    """Bytes in words: 86412345 -> "86.4 MB" (powers of ten)."""
    if count is None:
        return "–"
    for scale, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= scale:
            return f"{significant(count / scale, 3)} {unit}"
    return f"{count} B"


def seconds(value: float | None) -> str:
    """0.034 -> "34 ms", 7.42 -> "7.42 s", 431 -> "7 min 11 s"."""
    if value is None:
        return "–"
    if value < 1:
        return f"{significant(value * 1000, 2)} ms"
    return f"{significant(value, 3)} s" if value < 120 else f"{int(value // 60)} min {int(value % 60)} s"


def one_line(text: object, limit: int = 0) -> str:
    """Any value on one line, cut at `limit` characters when given."""
    joined = " ".join(str(text).split())
    return joined if not limit or len(joined) <= limit else joined[: limit - 1] + "…"


def limit_sign(check: CheckRow) -> str:
    return "≤" if better(check) == LOWER else "≥"


def allowed(check: CheckRow) -> str:
    """ "at most 105 MB" or "at least 0.8"."""
    word = "at most" if better(check) == LOWER else "at least"
    return f"{word} {figure(check.limit, check.unit, against=check.measured)}"


def interval(check: CheckRow) -> str:
    """ "221 to 247", "at least 221", or "exact" for a quantity without sampling error."""
    if check.low is None and check.high is None:
        return "exact" if check.samples <= 1 and check.confidence is None else "–"
    if check.high is None:
        return f"from {number(check.low)}"
    if check.low is None:
        return f"up to {number(check.high, against=check.limit)}"
    return f"{number(check.low, against=check.limit)} to {number(check.high, against=check.limit)}"


@dataclass(frozen=True)
class Headline:
    """The verdict for someone who reads nothing else. `outcome` may also be NONE: nothing was decided."""

    outcome: str
    title: str
    sentence: str


def headline(report: Report) -> Headline:
    """May this model go on that machine? In one title and one sentence."""
    target = machine_name(report)
    if report.verdict is None:
        return Headline(NONE, f"No verdict: {report.name} has not been validated on {target}.", "Nothing in this report says that it may be released.")
    limits = report.verdict.limits
    broken = [check for check in report.verdict.behaviours if check.outcome == FAIL]
    if broken:
        faults = f"{len(broken)} of {len(report.verdict.behaviours)} behaviours {'is' if len(broken) == 1 else 'are'} broken: {listed(broken)}."
        missed = [check for check in limits if check.outcome == FAIL]
        rest = f" {counted(missed, limits)} missed: {listed(missed)}." if missed else ""
        return Headline(FAIL, f"No: {report.name} must not go on {target}.", f"{faults}{rest}")
    if not limits:
        return Headline(NONE, f"No decision: no limits were set for {report.name} on {target}.", "The figures below were measured, but nothing was promised.")
    failed = [check for check in limits if check.outcome == FAIL]
    unproven = [check for check in limits if check.outcome == INCONCLUSIVE]
    if failed:
        rest = f" {len(unproven)} more {'is' if len(unproven) == 1 else 'are'} not proven." if unproven else ""
        return Headline(FAIL, f"No: {report.name} must not go on {target}.", f"{counted(failed, limits)} missed: {listed(failed)}.{rest}")
    if unproven:
        sentence = f"No limit is clearly missed, but {counted(unproven, limits)} not proven: {listed(unproven)}."
        return Headline(INCONCLUSIVE, f"Not yet: {report.name} is not proven fit for {target}.", sentence)
    return Headline(PASS, f"Yes: {report.name} may go on {target}.", f"{held(limits)}{luck(limits)}")


def behaviours(report: Report) -> str:
    """ "15 of 16 behaviours hold; not tried here: threads_2"."""
    rows = report.verdict.behaviours if report.verdict else []
    held, skipped = [row for row in rows if row.outcome == PASS], [row.name for row in rows if row.outcome == INFO]
    return f"{len(held)} of {len(rows)} behaviours hold" + (f"; not tried here: {', '.join(skipped)}" if skipped else "") if rows else ""


def emulation(report: Report) -> str:
    """One sentence where another machine stood in for the target; "" where none did."""
    told = report.target.emulation
    return f"Emulation: another machine stood in for the target ({told}). Its figures decide no limit." if told else ""


def machine_name(report: Report) -> str:
    """The target in a sentence: a profile's name; the profile `here` means little to who reads this elsewhere."""
    return {"here": "the machine it was compiled on", "": "the target"}.get(report.target_id, report.target_id)


def held(limits: Sequence[CheckRow]) -> str:
    return "The one limit holds." if len(limits) == 1 else f"All {len(limits)} limits hold."


def luck(limits: Sequence[CheckRow]) -> str:
    """The largest false-pass probability over the exact tests, and how many limits rest on intervals that are only approximate."""
    chances = [check.false_pass for check in limits if check.false_pass is not None]
    rough = sum(check.false_pass is None and check.confidence is not None for check in limits)
    said = f" If one were really missed, the chance of this pass would be at most {percent(max(chances))}." if chances else ""
    if rough and chances:
        said = f" Of those tested exactly: if one were really missed, the chance of this pass would be at most {percent(max(chances))}."
    return said + (f" {rough} {'rests on an interval that is' if rough == 1 else 'rest on intervals that are'} approximate (bootstrap)." if rough else "")


def counted(some: Sequence[CheckRow], limits: Sequence[CheckRow]) -> str:
    if len(limits) == 1:
        return "the only limit is" if some[0].outcome == INCONCLUSIVE else "The only limit is"
    return f"{len(some)} of {len(limits)} limits {'is' if len(some) == 1 else 'are'}"


def listed(checks: Sequence[CheckRow], at_most: int = 3) -> str:
    """ "size on disk is 112 MB, allowed is at most 105 MB; ..."."""
    parts = [
        f"{in_sentence(label(check.name))} is {figure(check.measured, check.unit, check.limit)}, allowed is {allowed(check)}" for check in checks[:at_most]
    ]
    return "; ".join(parts) + (f"; and {len(checks) - at_most} more" if len(checks) > at_most else "")


def in_sentence(text: str) -> str:
    """Lower the first letter unless the word is an abbreviation: "Size" -> "size", "F1 score" stays."""
    return text[0].lower() + text[1:] if text[1:2].islower() else text
