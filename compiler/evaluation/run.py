"""Evaluate an exported model against the merged fp32 model: one call, one dict, cached by what it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiler.checkpoints.view import Checkpoint
from compiler.evaluation import decoder, encoder
from compiler.evaluation.data import EvaluationSet, Row
from runtimes.bundle import Bundle

Report = Callable[[str, int, int], None]
SHOWN_SAMPLES = 6
BASE, MERGED, BUNDLE = "base", "base+delta fp32", "bundle"  # the systems of a task table, as the report knows them


@dataclass(frozen=True)
class Subject:
    """What is compared: a merged checkpoint and the exported files, with one of their unmerged adapters where `adapter` names it.

    base  the base before the deltas, to show what they bring; None when there are none
    """

    merged: Checkpoint
    base: Checkpoint | None
    directory: Path
    model: Mapping[str, Any]
    adapter: str = ""


def evaluate(merged: Checkpoint, base: Checkpoint | None, directory: Path, data: EvaluationSet, report: Report, seed: int = 0) -> dict[str, Any]:
    """{"metrics": {name: {value, low, high, samples}}, "task": [...], "samples": [...], "data": {...}}.

    merged     the reference: the merged fp32 weights
    base       the base before the deltas, to show what they bring; None when there are none
    directory  the exported files, with export.json
    """
    model = json.loads((directory / "export.json").read_text())["model"]
    subject = Subject(merged, base, directory, model)
    part = _decoder(subject, data, report, seed) if model["kind"] == "decoder" else _encoder(merged, directory, model, data, report)
    return {**part, "data": told(data)}


def evaluate_attached(twins: Mapping[str, Checkpoint], base: Checkpoint, directory: Path, data: EvaluationSet, report: Report, seed: int = 0) -> dict[str, Any]:
    """The same for unmerged adapters: each is compared with its merged twin on the same data, and its metrics are called `kl_mean@NAME`.

    twins  name of the adapter -> the merged fp32 weights it stands for
    """
    model = json.loads((directory / "export.json").read_text())["model"]
    whole: dict[str, Any] = {"metrics": {}, "task": [], "samples": []}
    for name, twin in twins.items():

        def named(what: str, done: int, most: int, name: str = name) -> None:
            report(f"{what}, {name}", done, most)

        part = _decoder(Subject(twin, base, directory, model, name), data, named, seed)
        whole["metrics"] |= {f"{metric}@{name}": value for metric, value in part["metrics"].items()}
        whole["task"] += [{**row, "metric": f"{row['metric']}@{name}"} for row in part["task"]]
        whole["samples"] += [{**row, "adapter": name} for row in part["samples"][: max(1, SHOWN_SAMPLES // len(twins))]]
    return {**whole, "data": told(data)}


def told(data: EvaluationSet) -> dict[str, Any]:
    """What the report says about the data."""
    return {"origin": data.origin, "digest": data.digest, "rows": len(data.rows)}


def unpackaged(directory: Path, model: Mapping[str, Any]) -> Bundle:
    """Exported files as the runtime sees a bundle, before there is a manifest."""
    return Bundle(directory, {"model": model}, model["kind"], ())


def _decoder(subject: Subject, data: EvaluationSet, report: Report, seed: int) -> dict[str, Any]:
    from compiler.reference import reference_model

    chat = ChatFormat(subject.merged)
    sequences = decoder.scored_sequences(data.rows, chat.tokenizer, chat.render, chat.eos_text)
    loop = decoder.open_all_logits(subject.directory, subject.model, subject.adapter)
    reference = reference_model(subject.merged, "text-generation")
    scores = decoder.score(sequences, decoder.merged_logits(reference), decoder.bundle_logits(loop), report)
    metrics = decoder.token_metrics(scores, seed)
    rows = [row for row in data.rows if row.messages]
    task: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    if rows:
        answers = {MERGED: chat.answers_by_reference(reference, rows, report)}
        del reference
        if subject.base is not None:
            answers[BASE] = chat.answers_by_reference(reference_model(subject.base, "text-generation"), rows, report)
        answers[BUNDLE] = chat.answers_by_bundle(subject, rows, report)
        hits = {system: [got.strip() == row.answer.strip() for got, row in zip(texts, rows, strict=True)] for system, texts in answers.items()}
        task = [{"system": system, "metric": "exact_match", **decoder.share(hit)} for system, hit in sorted(hits.items())]
        metrics["exact_match"] = decoder.share(hits[BUNDLE])
        metrics["exact_match_drop"] = decoder.paired_drop(hits[MERGED], hits[BUNDLE])
        samples = _samples(rows, answers)
    return {"metrics": metrics, "task": task, "samples": samples}


def _samples(rows: Sequence[Row], answers: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": rows[index].messages[-2]["content"],  # type: ignore[index]  # only chats come here
            "expected": rows[index].answer,
            "reference": answers[MERGED][index],
            "bundle": answers[BUNDLE][index],
        }
        for index in range(min(SHOWN_SAMPLES, len(rows)))
    ]


class ChatFormat:
    """How one model writes conversations: its tokenizer, template and end token, read from the checkpoint's own files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(checkpoint.assets["tokenizer.json"].decode())
        self._config = json.loads(checkpoint.assets.get("tokenizer_config.json", b"{}"))
        template = checkpoint.assets.get("chat_template.jinja", b"").decode() or self._config.get("chat_template") or ""
        self._template = template if isinstance(template, str) else next((part["template"] for part in template if part["name"] == "default"), "")
        generation = json.loads(checkpoint.assets.get("generation_config.json", b"{}"))
        eos = generation.get("eos_token_id", checkpoint.config.get("eos_token_id"))
        self.eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        self.eos_text = str(self.tokenizer.id_to_token(self.eos_ids[0])) if self.eos_ids else ""

    @property
    def render(self) -> Callable[..., str] | None:
        if not self._template:
            return None
        from runtimes.chat import render_chat

        named = {key: self._config[key] for key in ("bos_token", "eos_token", "pad_token") if isinstance(self._config.get(key), str)}

        def render(messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
            return render_chat(self._template, messages, variables=named, add_generation_prompt=add_generation_prompt)

        return render

    def prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """Token ids of each chat up to its last message."""
        render = self.render
        if render is None:
            raise ValueError("chats without a template are refused before this")
        return [self.tokenizer.encode(render((row.messages or ())[:-1]), add_special_tokens=False).ids for row in rows]

    def new_tokens(self, rows: Sequence[Row]) -> int:
        """Room for the longest expected answer and a little more."""
        return 8 + max(len(self.tokenizer.encode(row.answer).ids) for row in rows)

    def answers_by_reference(self, model: Any, rows: Sequence[Row], report: Report) -> list[str]:
        ids = decoder.reference_answers(model, self.prompts(rows), self.eos_ids, self.new_tokens(rows), report)
        return [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in ids]

    def answers_by_bundle(self, subject: Subject, rows: Sequence[Row], report: Report) -> list[str]:
        """Greedy answers of the exported model in our own runtime, one prompt at a time as a device would."""
        from runtimes.generate import Generator, Options
        from runtimes.session import SessionSettings

        generator = Generator(unpackaged(subject.directory, subject.model), SessionSettings(spinning=False))
        options = Options(max_new_tokens=self.new_tokens(rows), adapter=subject.adapter)
        answers = []
        for number, prompt in enumerate(self.prompts(rows)):
            answers.append(generator.generate([prompt], options)[0].text)
            report("answers by the bundle", number + 1, len(rows))
        return answers


def _encoder(merged: Checkpoint, directory: Path, model: Mapping[str, Any], data: EvaluationSet, report: Report) -> dict[str, Any]:
    from compiler.reference import reference_model
    from runtimes.encode import Encoder

    texts = encoder.texts_of(data.rows)
    runtime = Encoder(unpackaged(directory, model))
    reference = encoder.reference_outputs(reference_model(merged, model["task"]), runtime.tokenizer, texts, model, report)
    bundle = runtime.encode(texts)
    metrics = encoder.output_metrics(reference, bundle)
    task: list[dict[str, Any]] = []
    wanted = [row.label for row in data.rows if row.text]
    if all(label is not None for label in wanted) and model["labels"]:
        metrics |= encoder.label_metrics(reference, bundle, [str(label) for label in wanted], model["labels"])
        task = [
            {"system": MERGED, "metric": "accuracy", **metrics["accuracy_reference"]},
            {"system": BUNDLE, "metric": "accuracy", **metrics["accuracy"]},
        ]
    return {"metrics": metrics, "task": task, "samples": []}
