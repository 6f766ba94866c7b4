"""What is evaluated: merged checkpoint, base, exported files, and how the model writes conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from compiler.checkpoints.view import Checkpoint
from compiler.evaluation import decoder, faithful
from compiler.evaluation.data import Row
from compiler.quantizers import affine
from compiler.quantizers.pack import Packed, unpack
from compiler.quantizers.smooth import changes_of
from compiler.scheme import parse_scheme, prompt_scheme
from runtimes.bundle import Bundle

Report = Callable[[str, int, int], None]
BASE, MERGED, BUNDLE = "base", "base+delta fp32", "bundle"  # the systems of a task table, as the report knows them


@dataclass(frozen=True)
class Subject:
    """What is compared: a merged checkpoint and the exported files, with one of their unmerged adapters where `adapter` names it.

    base     the base before the deltas, to show what they bring; None when there are none
    student  what was distilled from the merged model and exported in its place; None where that itself was
    """

    merged: Checkpoint
    base: Checkpoint | None
    exported: Exported
    adapter: str = ""
    student: Checkpoint | None = None


@dataclass(frozen=True)
class Exported:
    """A folder of exported files, with export.json.

    codes   what a calibrated quantizer made of a matrix, by name; None where there was none
    scales  of the smoothing that came before (`quantizers.smooth`), by fused matrix
    """

    directory: Path
    codes: Callable[[str], Packed | None] | None = None
    scales: Mapping[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.directory / "export.json").read_text())
        return summary

    @property
    def model(self) -> Mapping[str, Any]:
        model: Mapping[str, Any] = self.summary["model"]
        return model

    def weights_of(self, reference: Any, config: Mapping[str, Any], prompts: bool = False) -> Any:
        """The torch model with the weights that these files store, in place. prompts: those of the graph for prompts."""
        if self.scales:
            parameters = dict(reference.named_parameters())
            for name, change in changes_of(parameters, config, self.scales).items():
                parameters[name].data.numpy()[...] = change.of(parameters[name].data.numpy())
        layers, made = self.summary["layers"], self.made if self.codes else None
        if prompts:
            first = {row["name"]: row["scheme"] for row in layers}
            layers = [{**row, "scheme": str(prompt_scheme(row["name"], parse_scheme(row["scheme"])))} for row in layers]
            by_row = {row["name"] for row in layers if row["scheme"] != first[row["name"]]}
            made = (lambda name: None if name in by_row else self.made(name)) if self.codes else None
        return faithful.see_through(reference, layers, self.model, config, made, self.factors)

    @property
    def factors(self) -> dict[str, Any]:
        return faithful.input_factors(self.directory) if self.model["kind"] == "encoder" else {}

    def made(self, name: str) -> Any:
        """float32 [out, in] of a matrix whose codes a calibrated quantizer made; None for others."""
        row = next((row for row in self.summary["layers"] if row["name"] == name), None)
        packed = self.codes(name) if self.codes is not None and row is not None else None
        return None if packed is None or row is None else affine.dequantize(unpack(packed, parse_scheme(row["scheme"]), row["shape"][1]))


def unpackaged(directory: Path, model: Mapping[str, Any]) -> Bundle:
    """Exported files as the runtime sees a bundle, before there is a manifest."""
    return Bundle(directory, {"model": model}, model["kind"], ())


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its tokens without the end token, and its text."""

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Files:
    """The files of a bundle that a ChatFormat reads, under the names that a checkpoint has for them."""

    assets: Mapping[str, bytes]
    config: Mapping[str, Any]


class ChatFormat:
    """How one model writes conversations: its tokenizer, template and end token, read from the checkpoint's own files."""

    def __init__(self, checkpoint: Checkpoint | Files) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(checkpoint.assets["tokenizer.json"].decode())
        self._config = json.loads(checkpoint.assets.get("tokenizer_config.json", b"{}"))
        template = checkpoint.assets.get("chat_template.jinja", b"").decode() or self._config.get("chat_template") or ""
        self._template = template if isinstance(template, str) else next((part["template"] for part in template if part["name"] == "default"), "")
        generation = json.loads(checkpoint.assets.get("generation_config.json", b"{}"))
        eos = generation.get("eos_token_id", checkpoint.config.get("eos_token_id"))
        self.eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        self.eos_text = str(self.tokenizer.id_to_token(self.eos_ids[0])) if self.eos_ids else ""

    @staticmethod
    def of_bundle(bundle: Bundle) -> ChatFormat:
        """As a bundle's own files say."""
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
        assets = {name: (bundle.directory / name).read_bytes() for name in names if (bundle.directory / name).is_file()}
        return ChatFormat(Files(assets, bundle.read_json("config.json", optional=True)))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id."""
        words: dict[str, int] = self.tokenizer.get_vocab()
        return words

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

    def answers_by_reference(self, model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, report: Report) -> list[Answer]:
        ids = decoder.reference_answers(model, prompts, self.eos_ids, new_tokens, report)
        return [Answer(tuple(answer), self.tokenizer.decode(answer, skip_special_tokens=True)) for answer in ids]

    def answers_by_bundle(self, subject: Subject, prompts: Sequence[Sequence[int]], new_tokens: int, report: Report) -> list[Answer]:
        """Greedy answers of the exported model in our own runtime, one prompt at a time as a device would."""
        from runtimes.generate import Generator, Options
        from runtimes.session import SessionSettings

        generator = Generator(unpackaged(subject.exported.directory, subject.exported.model), SessionSettings(spinning=False))
        options = Options(max_new_tokens=new_tokens, adapter=subject.adapter)
        answers = []
        for number, prompt in enumerate(prompts):
            (made,) = generator.generate([prompt], options)
            answers.append(Answer(tuple(decoder.until(list(made.token_ids), self.eos_ids)), made.text))
            report("answers by the bundle", number + 1, len(prompts))
        return answers
