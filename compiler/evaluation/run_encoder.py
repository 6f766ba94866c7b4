"""One evaluation of an encoder: every set of texts by the merged model and the bundle, the control set by the base too; names as in `run_decoder`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compiler.checkpoints.view import Checkpoint
from compiler.errors import RecipeError
from compiler.evaluation import attribution, encoder, faithful, statistics
from compiler.evaluation.custom import Custom
from compiler.evaluation.data import Row
from compiler.evaluation.noise import NOISES, Noise
from compiler.evaluation.subject import BASE, BUNDLE, MERGED, Report, Subject, unpackaged
from compiler.evaluation.suite import CONTROL, Suite
from compiler.reference import reference_model
from runtimes.metrics import cosine

Metrics = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Texts:
    """Texts to encode, and what is known of them: a label each, or a score for each pair of neighbours (texts 0 and 1, 2 and 3 ...)."""

    texts: tuple[str, ...]
    rows: tuple[Row, ...]
    labels: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()


def texts_for(rows: Sequence[Row], noise: Noise | None, seed: int) -> Texts:
    """Raises RecipeError for rows of a decoder, and for pairs among other rows."""
    pairs = [row for row in rows if row.pair is not None]
    if pairs and len(pairs) < len(rows):
        raise RecipeError("evaluate.data", expected="pairs of sentences in every row or in none", found=f"{len(pairs)} of {len(rows)}", remedy="split the file")
    texts = [text for row in pairs for text in row.pair or ()] if pairs else encoder.texts_of(rows)
    if noise:
        texts = [noise.apply(text, seed, number) or text for number, text in enumerate(texts)]
    told = [row for row in rows if row.text]
    labels = tuple(str(row.label) for row in told) if all(row.label is not None for row in told) else ()
    return Texts(tuple(texts), tuple(pairs or told), labels, tuple(row.score for row in pairs))


class EncoderRun:
    """The models of one evaluation: merged and bundle on every set, then the base on the control set."""

    def __init__(self, subject: Subject, suite: Suite, report: Report, seed: int) -> None:
        from runtimes.encode import Encoder

        self.subject, self.suite, self.report, self.seed = subject, suite, report, seed
        self.spec = subject.exported.model
        self.runtime = Encoder(unpackaged(subject.exported.directory, self.spec))
        self.sets = {"": texts_for(suite.data.rows, None, seed)}
        self.sets |= {name: texts_for(suite.data.rows, NOISES[name], seed) for name in suite.noise}
        self.sets |= {CONTROL: texts_for(suite.control.rows, None, seed)} if suite.control else {}

    def run(self) -> dict[str, Any]:
        """Everything that `compiler.evaluation.run.evaluate` promises but for the data section."""
        model = reference_model(self.subject.merged, self.spec["task"])
        outputs = {name: {MERGED: self._reference(model, one.texts), BUNDLE: self.runtime.encode(one.texts)} for name, one in self.sets.items()}
        texts, main, student = self.sets[""].texts, outputs[""], self.subject.student
        places = attribution.picked([1] * len(texts), attribution.MOST_TEXTS)
        after = {}
        if student is not None:
            model = reference_model(student, self.spec["task"])
            after["distil"] = self._reference(model, [texts[place] for place in places])
        stored = self.subject.exported.weights_of(model, (student or self.subject.merged).config)
        after |= {"quantize": self._reference(stored, [texts[place] for place in places]), "export": main[BUNDLE][places]}
        stages = attribution.text_stages(main[MERGED][places], after)
        same = {**faithful.check(stored, self.subject.exported.directory, self.spec), "model": "student" if student else "merged"}
        del model, stored
        if CONTROL in outputs and self.subject.base is not None and answers_alone(self.subject.base, self.spec):
            before = reference_model(self.subject.base, self.spec["task"])
            outputs[CONTROL][BASE] = self._reference(before, self.sets[CONTROL].texts)
        metrics, hits = self._metrics(outputs)
        task = [{"system": system, "metric": name, **statistics.share(right)} for name, systems in hits[""].items() for system, right in systems.items()]
        for name in ("spearman", "f1"):
            if name in metrics:
                task += [{"system": MERGED, "metric": name, **metrics[f"{name}_reference"]}, {"system": BUNDLE, "metric": name, **metrics[name]}]
        return {"metrics": metrics, "task": task, "samples": [], "stages": attribution.ordered(stages), "faithful": same}

    def _reference(self, model: Any, texts: Sequence[str]) -> np.ndarray:
        return encoder.reference_outputs(model, self.runtime.tokenizer, texts, self.spec, self.report)

    def _metrics(self, outputs: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[Metrics, dict[str, dict[str, dict[str, list[bool]]]]]:
        metrics: Metrics = {}
        hits: dict[str, dict[str, dict[str, list[bool]]]] = {}
        for name, systems in outputs.items():
            mine, hits[name] = self._one(self.sets[name], systems)
            if name in NOISES:
                for key, rights in hits[name].items():
                    clean = hits[""][key]
                    mine[f"{key}_excess"] = statistics.excess((clean[MERGED], clean[BUNDLE]), (rights[MERGED], rights[BUNDLE]))
                if "spearman" in mine:
                    mine["spearman_excess"] = self._spearman_excess(outputs[""], systems)
            metrics |= {f"{name}.{key}" if name else key: value for key, value in mine.items()}
        return metrics, hits

    def _one(self, texts: Texts, outputs: Mapping[str, np.ndarray]) -> tuple[Metrics, dict[str, dict[str, list[bool]]]]:
        """Metrics of one set, and which rows each system has right."""
        reference, bundle = outputs[MERGED], outputs[BUNDLE]
        metrics: Metrics = encoder.output_metrics(reference, bundle)
        hits: dict[str, dict[str, list[bool]]] = {}
        if BASE in outputs:
            metrics["cosine_mean_since_base"] = {**encoder.output_metrics(outputs[BASE], bundle)["cosine_mean"], "stage": "merge"}
        if texts.labels and self.spec["labels"]:
            metrics |= encoder.label_metrics(reference, bundle, texts.labels, self.spec["labels"])
            truth = np.array([self.spec["labels"].index(label) for label in texts.labels])
            hits["accuracy"] = {system: (outputs[system].argmax(-1) == truth).tolist() for system in (BASE, MERGED, BUNDLE) if system in outputs}
            metrics["f1"] = statistics.f1_metric(truth, bundle.argmax(-1), self.seed)
            metrics["f1_reference"] = statistics.f1_metric(truth, reference.argmax(-1), self.seed)
            metrics["flips"] = statistics.flips(hits["accuracy"][MERGED], hits["accuracy"][BUNDLE])
            if BASE in hits["accuracy"]:
                before, merged = hits["accuracy"][BASE], hits["accuracy"][MERGED]
                drop = statistics.paired_drop(before, hits["accuracy"][BUNDLE])
                drop["stage"] = "merge" if sum(before) - sum(merged) >= sum(merged) - sum(hits["accuracy"][BUNDLE]) else None
                metrics |= {"accuracy_drop_since_base": drop, "accuracy_base": statistics.share(before)}
        if texts.scores:
            metrics |= self._similarity(texts, outputs)
        for one in self.suite.custom if bool(texts.scores) == bool(self.sets[""].scores) else ():  # written for rows of one form
            metrics |= self._custom(one, texts, outputs)
        return metrics, hits

    def _similarity(self, texts: Texts, outputs: Mapping[str, np.ndarray]) -> Metrics:
        scores = np.array(texts.scores)
        near = {system: neighbours(output) for system, output in outputs.items()}
        made = {"spearman": statistics.spearman_metric(scores, near[BUNDLE]), "spearman_reference": statistics.spearman_metric(scores, near[MERGED])}
        made["spearman_drop"] = statistics.spearman_drop(scores, near[MERGED], near[BUNDLE], self.seed)
        if BASE in near:
            drop = statistics.spearman_drop(scores, near[BASE], near[BUNDLE], self.seed)
            lost = made["spearman_reference"]["value"] - made["spearman"]["value"]
            made["spearman_drop_since_base"] = {**drop, "stage": "merge" if drop["value"] - lost >= lost else None}
            made["spearman_base"] = statistics.spearman_metric(scores, near[BASE])
        return made

    def _spearman_excess(self, clean: Mapping[str, np.ndarray], noisy: Mapping[str, np.ndarray]) -> dict[str, Any]:
        scores = np.array(self.sets[""].scores)
        drops = [statistics.spearman_drop(scores, neighbours(one[MERGED]), neighbours(one[BUNDLE]), self.seed) for one in (noisy, clean)]
        low, high = drops[0]["low"] - drops[1]["high"], drops[0]["high"] - drops[1]["low"]
        return statistics.metric(drops[0]["value"] - drops[1]["value"], (low, high), len(scores))

    def _custom(self, one: Custom, texts: Texts, outputs: Mapping[str, np.ndarray]) -> Metrics:
        rows, values = [row.raw for row in texts.rows], {}
        for system in (MERGED, BUNDLE):
            told = neighbours(outputs[system]).tolist() if texts.scores else outputs[system].tolist()
            if rows and len(rows) == len(told):
                values[system] = one.values(rows, told)
        if not values:
            return {}
        made = {f"custom.{one.name}": statistics.mean_of_rows(values[BUNDLE], self.seed)}
        made[f"custom.{one.name}_reference"] = statistics.mean_of_rows(values[MERGED], self.seed)
        return made | {f"custom.{one.name}_drop": statistics.drop_of_rows(values[MERGED], values[BUNDLE], self.seed)}


def neighbours(vectors: np.ndarray) -> np.ndarray:
    """Cosine of texts 0 and 1, 2 and 3 ...: [2 n, width] -> [n]."""
    return cosine(vectors[0::2], vectors[1::2])


def answers_alone(base: Checkpoint, spec: Mapping[str, Any]) -> bool:
    """Whether the base does the task without the deltas: encoders of vectors always, classifiers where they came with a head."""
    architectures = base.config.get("architectures") or [""]
    return spec["task"] == "feature-extraction" or str(architectures[0]).endswith("Classification")
