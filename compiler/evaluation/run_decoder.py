"""One evaluation of a decoder: every sheet by the merged model and the bundle, the control set by the base too; then metrics by name.

1. A sheet is scored token by token with both models at hand (`decoder.score`), its prompts are answered by each.
2. Names: the task's own metrics are plain, those with noise `typos.NAME`, those of the control set `control.NAME`; `X_reference` is the merged model's own.
3. `X_excess` compares a noisy sheet with the clean one, `X_since_base` a control sheet with the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compiler.evaluation import attribution, decoder, faithful, statistics
from compiler.evaluation.custom import Custom
from compiler.evaluation.data import Row
from compiler.evaluation.decoder import TokenScores, token_metrics
from compiler.evaluation.noise import NOISES
from compiler.evaluation.sheet import Hits, Sheet, hits_of, likelihoods, nll_excess, prepare
from compiler.evaluation.subject import BASE, BUNDLE, MERGED, Answer, ChatFormat, Report, Subject
from compiler.evaluation.suite import CONTROL, Suite
from compiler.graph.decoder import PROMPTS
from compiler.reference import reference_model

SHOWN_SAMPLES = 6
Metrics = dict[str, dict[str, Any]]


@dataclass
class Found:
    """What the systems said about one sheet. base: scores with the base in place of the merged model."""

    sheet: Sheet
    scores: TokenScores
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    base: TokenScores | None = None

    def hits(self) -> dict[str, dict[str, list[bool]]]:
        """metric -> system -> right or wrong by row."""
        of_items = hits_of(self.sheet, self.scores)
        made = {name: {MERGED: hits, BUNDLE: of_items.bundle[name]} for name, hits in of_items.reference.items()}
        if self.base is not None:
            before: Hits = hits_of(self.sheet, self.base)
            made = {name: {BASE: before.reference[name], **systems} for name, systems in made.items()}
        if self.sheet.chats and self.answers:
            right = {
                system: [got.text.strip() == row.answer.strip() for got, row in zip(texts, self.sheet.chats, strict=True)] for system, texts in self._told()
            }
            made["exact_match"] = right
        return made

    def _told(self) -> list[tuple[str, list[Answer]]]:
        return sorted(self.answers.items())

    def outputs(self, system: str) -> tuple[list[Row], list[Any]]:
        """Rows that have an output, and the output: what `compiler.evaluation.custom` promises."""
        if self.sheet.chats:
            return self.sheet.chats, [answer.text for answer in self.answers.get(system, ())]
        scores = self.base if system == BASE else self.scores
        if scores is None:
            return [], []
        nll = scores.bundle_nll if system == BUNDLE else scores.reference_nll
        likely = likelihoods(scores, nll, len(self.sheet.sequences))
        rows = [self.sheet.rows[item.row] for item in self.sheet.items]
        return rows, [likely[list(item.places)].tolist() if item.is_choice else float(likely[item.places[0]]) for item in self.sheet.items]


class DecoderRun:
    """The loaded models of one evaluation, in the order in which they fit into memory: bundle throughout, merged, then base."""

    def __init__(self, subject: Subject, suite: Suite, report: Report, seed: int) -> None:
        self.subject, self.suite, self.report, self.seed = subject, suite, report, seed
        self.chat = ChatFormat(subject.merged)
        loop = decoder.open_all_logits(subject.exported.directory, subject.exported.model, subject.adapter)
        self.context, self._bundle = int(loop.context_length), decoder.bundle_logits(loop)
        self.sheets = {"": prepare(suite.data.rows, self.chat)}
        self.sheets |= {name: prepare(suite.data.rows, self.chat, NOISES[name], seed, self.context) for name in suite.noise}
        self.sheets |= {CONTROL: prepare(suite.control.rows, self.chat)} if suite.control else {}
        self.stages = attribution.TokenStages(self.sheets[""].sequences[: self.sheets[""].counted], lambda ids: self._reference(ids))
        self.found: dict[str, Found] = {}

    def run(self) -> dict[str, Any]:
        """Everything that `compiler.evaluation.run.evaluate` promises but for the data section."""
        model = reference_model(self.subject.merged, "text-generation")
        self._reference = decoder.merged_logits(model)
        for name, sheet in self.sheets.items():
            reference = self._reference if name else self.stages.reference
            self.found[name] = Found(sheet, decoder.score(sheet.sequences, reference, self._bundle, self.report))
            self._answer(name, MERGED, model)
        self.stages.scored(self.found[""].scores)
        same: dict[str, Any] = {}
        if not self.subject.adapter:
            if self.subject.student is not None:
                del model, self._reference
                model = reference_model(self.subject.student, "text-generation")
                self.stages.after("distil", decoder.merged_logits(model))
            self.subject.exported.weights_of(model, (self.subject.student or self.subject.merged).config)
            self.stages.after("quantize", decoder.merged_logits(model))
            same = {**self._faithful(model), "model": "student" if self.subject.student else "merged"}
        del model
        if self.subject.base is not None:
            self._before(self.subject.base)
        for name in self.sheets:
            self._answer(name, BUNDLE, None)
        return {**self._document(), "faithful": same}

    def _faithful(self, model: Any) -> dict[str, Any]:
        """`faithful.check` of every graph; the worst of them counts. model: torch, with the weights that model.onnx stores."""
        exported = self.subject.exported
        found = faithful.check(model, exported.directory, exported.model)
        if exported.model.get("prompts"):
            source = self.subject.student or self.subject.merged
            second = exported.weights_of(reference_model(source, "text-generation"), source.config, prompts=True)
            other = faithful.check(second, exported.directory, exported.model, PROMPTS)
            found = {**found, "value": faithful.worse(found["value"], other["value"]), "tokens": found["tokens"] + other["tokens"]}
        return found

    def _before(self, checkpoint: Any) -> None:
        """The base on the task and on the control set."""
        model = reference_model(checkpoint, "text-generation")
        self.stages.after("base", decoder.merged_logits(model))
        self._answer("", BASE, model)
        if CONTROL in self.found:
            control = self.found[CONTROL]
            control.base = decoder.score(control.sheet.sequences, decoder.merged_logits(model), self._bundle, self.report)
            self._answer(CONTROL, BASE, model)

    def _answer(self, name: str, system: str, model: Any) -> None:
        """Greedy answers to a sheet's prompts. Continuations of plain text serve the first divergence alone, so the base gives none."""
        sheet, noisy = self.sheets[name], name in NOISES
        if not sheet.chats and (name or system == BASE):
            return
        new_tokens = sheet.new_tokens(self.chat)
        prompts = sheet.prompts(self.chat, self.context - new_tokens if noisy else 0)
        if not prompts:
            return
        if system == BUNDLE:
            answers = self.chat.answers_by_bundle(self.subject, prompts, new_tokens, self.report)
        else:
            answers = self.chat.answers_by_reference(model, prompts, new_tokens, self.report)
        self.found[name].answers[system] = answers

    def _document(self) -> dict[str, Any]:
        metrics: Metrics = {}
        hits = {name: found.hits() for name, found in self.found.items()}
        for name, found in self.found.items():
            mine = {**sheet_metrics(found, hits[name], self.seed), **self._customs(found)}
            if name in NOISES:
                mine |= {"nll_excess": nll_excess(counted(self.found[""]), counted(found), self.seed)}
                mine |= {f"{key}_excess": statistics.excess(*(_pair(rows[key]) for rows in (hits[""], hits[name]))) for key in hits[name]}
            elif name == CONTROL and found.base is not None:
                mine |= since_base(found, hits[name], self.seed)
            metrics |= {f"{name}.{key}" if name else key: value for key, value in mine.items()}
        task = [
            {"system": system, "metric": name, **statistics.share(rights)} for name, systems in hits[""].items() for system, rights in sorted(systems.items())
        ]
        main = self.found[""]
        samples = shown(main.sheet.chats, main.answers) if main.sheet.chats else []
        return {"metrics": metrics, "task": task, "samples": samples, "stages": attribution.ordered(self.stages.rows)}

    def _customs(self, found: Found) -> Metrics:
        """The user's metrics; not on a control set of another form than the data, for which they were not written."""
        made: Metrics = {}
        forms = [{type(output) for output in one.outputs(MERGED)[1]} for one in (found, self.found[""])]
        if forms[0] != forms[1]:
            return made
        for one in self.suite.custom:
            values = custom_values(one, found)
            made |= custom_metrics(one.name, values, self.seed)
        return made


def counted(found: Found) -> TokenScores:
    """Scores of the tokens that token metrics take: not those of wrong choices."""
    return found.scores.of(found.scores.groups < found.sheet.counted)


def sheet_metrics(found: Found, hits: Mapping[str, Mapping[str, list[bool]]], seed: int) -> Metrics:
    """Metrics of the bundle against the merged model on one sheet."""
    metrics: Metrics = token_metrics(counted(found), seed)
    for name, systems in hits.items():
        metrics[name] = statistics.share(systems[BUNDLE])
        metrics[f"{name}_reference"] = statistics.share(systems[MERGED])
        metrics[f"{name}_drop"] = statistics.paired_drop(systems[MERGED], systems[BUNDLE])
    decisive = [systems for name, systems in hits.items() if name != "choice_accuracy_norm"]
    if decisive:
        before, after = ([right for systems in decisive for right in systems[system]] for system in (MERGED, BUNDLE))
        metrics["flips"] = statistics.flips(before, after)
    if MERGED in found.answers:
        metrics |= divergence(found.answers[MERGED], found.answers[BUNDLE], seed)
    return metrics


def divergence(reference: Sequence[Answer], bundle: Sequence[Answer], seed: int) -> Metrics:
    """Greedy tokens before the first one that differs (all of them where none does), and the share of answers without any difference."""
    steps = [float(first_difference(left.ids, right.ids)) for left, right in zip(reference, bundle, strict=True)]
    same = [left.ids == right.ids for left, right in zip(reference, bundle, strict=True)]
    mean = statistics.metric(np.mean(steps), statistics.cluster_interval(np.array(steps), np.arange(len(steps)), seed), len(steps))
    return {"first_divergence": mean, "unchanged_answers": statistics.share(same)}


def first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    """[5, 6, 7], [5, 6, 9] -> 2; where one ends, the end is a difference; equal ones: their length."""
    return next((place for place, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), min(len(left), len(right)))


def since_base(found: Found, hits: Mapping[str, Mapping[str, list[bool]]], seed: int) -> Metrics:
    """The bundle against the base, before the deltas. `stage` says whose doing more of a drop is: merge (the deltas) or what comes after."""
    if found.base is None:
        return {}
    base = found.base.of(found.base.groups < found.sheet.counted)
    scored = token_metrics(base, seed)
    mine = {f"{name}_since_base": scored[name] for name in ("kl_mean", "perplexity_ratio")}
    merged = counted(found)
    parts = [float((later - earlier).mean()) for earlier, later in ((base.reference_nll, merged.reference_nll), (merged.reference_nll, merged.bundle_nll))]
    for metric in mine.values():
        metric["stage"] = "merge" if parts[0] >= parts[1] else None
    mine["perplexity_base"] = scored["perplexity_reference"]
    for name, systems in hits.items():
        if BASE in systems:
            drop = statistics.paired_drop(systems[BASE], systems[BUNDLE])
            from_merge = sum(systems[BASE]) - sum(systems[MERGED])
            drop["stage"] = "merge" if from_merge >= sum(systems[MERGED]) - sum(systems[BUNDLE]) else None
            mine |= {f"{name}_drop_since_base": drop, f"{name}_base": statistics.share(systems[BASE])}
    return mine


def custom_values(one: Custom, found: Found) -> dict[str, list[float]]:
    """System -> a number a row; nothing for rows without an output."""
    made = {}
    for system in (BASE, MERGED, BUNDLE):
        rows, outputs = found.outputs(system)
        if rows and outputs:
            made[system] = one.values([row.raw for row in rows], outputs)
    return made


def custom_metrics(name: str, values: Mapping[str, Sequence[float]], seed: int) -> Metrics:
    """`custom.NAME` of the bundle, of the merged model, and the drop."""
    if not values:
        return {}
    made = {f"custom.{name}": statistics.mean_of_rows(values[BUNDLE], seed), f"custom.{name}_reference": statistics.mean_of_rows(values[MERGED], seed)}
    return made | {f"custom.{name}_drop": statistics.drop_of_rows(values[MERGED], values[BUNDLE], seed)}


def shown(rows: Sequence[Row], answers: Mapping[str, Sequence[Answer]]) -> list[dict[str, Any]]:
    """The first answers side by side."""
    return [
        {
            "prompt": (row.messages or ())[-2]["content"],
            "expected": row.answer,
            "reference": answers[MERGED][place].text,
            "bundle": answers[BUNDLE][place].text,
        }
        for place, row in enumerate(rows[:SHOWN_SAMPLES])
    ]


def _pair(systems: Mapping[str, list[bool]]) -> tuple[list[bool], list[bool]]:
    return systems[MERGED], systems[BUNDLE]
