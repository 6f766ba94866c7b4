"""Generate text with a decoder bundle: prompts in, tokens out one by one. No torch.

generator = Generator.open(Path("out/support-assistant/here"))
for piece in generator.stream("The spindle does not turn", Options(max_new_tokens=64)):
    print(piece.text, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.adapters import Adapters
from runtimes.bundle import Bundle, open_bundle
from runtimes.chat import render_chat
from runtimes.decode import PREFILL_CHUNK, DecodeLoop, Floats, open_graphs, read_layout
from runtimes.lookup import Lookup, Pace
from runtimes.sampling import Sampler, Sampling
from runtimes.session import SessionSettings
from runtimes.text import Detokenizer, StopStrings
from targets.errors import BundleError, TrimtabError

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]  # text, a conversation, or token ids


@dataclass(frozen=True)
class Options:
    """How much to generate and how.

    stop           texts that end the answer and are not part of it
    prefill_chunk  tokens per run of a prompt, 0 = all at once
    adapter        the bundle's unmerged adapter to answer with, "" for the base alone
    lookup         draft tokens from the text so far and check them together, while that is faster (`runtimes.lookup`): for one prompt, greedy, without
                   repetition penalty
    """

    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    prefill_chunk: int = PREFILL_CHUNK
    adapter: str = ""
    lookup: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise TrimtabError("max_new_tokens", expected="a count >= 1", found=str(self.max_new_tokens), remedy="change the option")
        if self.lookup and not (self.sampling.greedy and self.sampling.repetition_penalty == 1.0):
            raise TrimtabError("lookup", expected="greedy choice without repetition penalty", found="other sampling", remedy="leave one of them out")


@dataclass(frozen=True)
class Piece:
    """One token of one row. `text` is what became certain with it (often ""); `finish` is "" until the last piece: "stop" or "length"."""

    row: int
    index: int
    token_id: int
    text: str
    finish: str
    ms: float  # since the prompts were handed over


@dataclass(frozen=True)
class Generation:
    """A finished answer. token_ids ends with the stop token where there was one; text does not hold it."""

    prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str
    finish: str
    token_ms: tuple[float, ...]  # when each token was there, since the prompts were handed over

    @property
    def ttft_ms(self) -> float:
        """Time to the first token."""
        return self.token_ms[0]

    @property
    def tpot_ms(self) -> float:
        """Time per output token after the first: (last - first) / (n - 1); 0.0 for a single token."""
        return (self.token_ms[-1] - self.token_ms[0]) / (len(self.token_ms) - 1) if len(self.token_ms) > 1 else 0.0


class _Row:
    """One sequence on its way: its tokens, its text, and whether it has finished."""

    def __init__(self, tokenizer: Any, prompt: list[int], options: Options, room: int) -> None:
        self._text, self._stops = Detokenizer(tokenizer, prompt), StopStrings(options.stop)
        self._limit = min(options.max_new_tokens, room)
        self.count, self.finish = 0, ""

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return self._limit - self.count

    def push(self, token_id: int, ends: bool) -> str:
        """Take a token; returns the text that became certain."""
        self.count += 1
        text = "" if ends else self._stops.push(self._text.push(token_id))
        if not ends and not self._stops.hit and self.count < self._limit:
            return text
        text += self._stops.push(self._text.flush()) + self._stops.flush()
        self.finish = "stop" if ends or self._stops.hit else "length"
        return text


class Generator:
    """A decoder bundle, ready to run. One stream at a time shares the cache buffers; a second one, begun meanwhile, makes its own."""

    def __init__(self, bundle: Bundle, settings: SessionSettings | None = None) -> None:
        if bundle.kind != "decoder":
            raise BundleError(str(bundle.directory), expected="a decoder", found=f"an {bundle.kind}", remedy="use runtimes.encode for it")
        self.bundle = bundle
        genai = bundle.read_json("genai_config.json")
        self.tokenizer = load_tokenizer(bundle)
        self.context_length = int(genai["model"]["context_length"])
        self.stop_ids = _stop_ids(genai, bundle.read_json("generation_config.json", optional=True))
        self._session, self._prompts = open_graphs(bundle, settings)
        self.layout = read_layout(self._session, genai, str(bundle.directory))
        self.adapters = Adapters(bundle, self._session)
        self._idle: list[DecodeLoop] = []
        self.pace = Pace()  # of the latest answer with lookup

    @classmethod
    def open(cls, directory: Path, settings: SessionSettings | None = None) -> Generator:
        """Raises BundleError when it is no decoder bundle."""
        return cls(open_bundle(directory), settings)

    def default_options(self) -> Options:
        """What the model's own generation_config.json recommends: greedy unless it says do_sample."""
        config = self.bundle.read_json("generation_config.json", optional=True)
        if not config.get("do_sample"):
            return Options(sampling=Sampling(repetition_penalty=float(config.get("repetition_penalty") or 1.0)))
        values = {key: config[key] for key in ("temperature", "top_k", "top_p", "repetition_penalty") if config.get(key) is not None}
        return Options(sampling=Sampling(**{"temperature": 1.0, **values}))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a text (with the tokenizer's special tokens), of a conversation (through the chat template), or ids as they are."""
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt).ids)
        if prompt and isinstance(prompt[0], Mapping):
            return list(self.tokenizer.encode(self.chat_text(prompt), add_special_tokens=False).ids)  # type: ignore[arg-type]
        ids = [int(value) for value in prompt]  # type: ignore[arg-type]  # what is neither text nor messages is ids
        wrong = [value for value in ids if not 0 <= value < self.layout.vocab_size]
        if wrong:
            raise TrimtabError("prompt", expected=f"token ids below {self.layout.vocab_size}", found=str(wrong[0]), remedy="use this bundle's own tokenizer")
        return ids

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of a conversation, by the bundle's chat template. Raises BundleError when it has none."""
        config = self.bundle.read_json("tokenizer_config.json", optional=True)
        template = self._template()
        if not template:
            raise BundleError(
                str(self.bundle.directory),
                expected="a chat template",
                found="neither chat_template.jinja nor one in tokenizer_config.json",
                remedy="give a plain text prompt",
            )
        tokens = {key: _token_text(config[key]) for key in ("bos_token", "eos_token", "pad_token", "unk_token") if config.get(key)}
        return render_chat(template, messages, variables={**tokens, **variables})

    @property
    def has_chat_template(self) -> bool:
        return bool(self._template())

    def stream(self, prompt: Prompt, options: Options | None = None) -> Iterator[Piece]:
        """Tokens of one answer as they are made. Raises TrimtabError for a prompt that leaves no room."""
        yield from self._run([self.prompt_ids(prompt)], options or Options())

    def generate(self, prompts: Sequence[Prompt], options: Options | None = None) -> list[Generation]:
        """Answers to a batch of prompts, in their order. Each equals the answer that the prompt would get alone, up to the kernels' rounding."""
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        rows: list[list[Piece]] = [[] for _ in ids]
        for piece in self._run(ids, options or Options()) if ids else ():
            rows[piece.row].append(piece)
        return [
            Generation(len(prompt), tuple(p.token_id for p in row), "".join(p.text for p in row), row[-1].finish, tuple(p.ms for p in row))
            for prompt, row in zip(ids, rows, strict=True)
        ]

    def all_logits(self, ids: np.ndarray[Any, Any], adapter: str = "") -> Floats:
        """Teacher-forced logits [batch, tokens, vocab] for token ids [batch, tokens] (see DecodeLoop.all_logits)."""
        loop = self._take(adapter)
        try:
            return loop.all_logits(ids)
        finally:
            self._idle.append(loop)

    def next_logits(self, ids: Sequence[int], chunk: int = PREFILL_CHUNK, adapter: str = "") -> Floats:
        """The logits [vocab] after token ids, read `chunk` at a time. Raises TrimtabError when there are none, or more than the context holds."""
        loop = self._take(adapter)
        try:
            return loop.start([list(ids)], chunk=chunk)[0].copy()
        finally:
            self._idle.append(loop)

    def _template(self) -> str:
        return _chat_template(self.bundle.directory / "chat_template.jinja", self.bundle.read_json("tokenizer_config.json", optional=True))

    def _run(self, prompts: list[list[int]], options: Options) -> Iterator[Piece]:
        longest = max(len(prompt) for prompt in prompts)
        if longest >= self.context_length:
            found, remedy = f"{longest} tokens", f"shorten the prompt: the context of {self.context_length} tokens must hold the answer too"
            raise TrimtabError("prompt", expected=f"at most {self.context_length - 1} tokens", found=found, remedy=remedy)
        started = time.perf_counter()
        rows = [_Row(self.tokenizer, prompt, options, self.context_length - len(prompt)) for prompt in prompts]
        if options.lookup:
            yield from self._run_lookup(prompts, rows[0], options, started)
            return
        sampler = Sampler(options.sampling, prompts, self.layout.vocab_size)
        loop = self._take(options.adapter)
        try:
            logits = loop.start(prompts, chunk=options.prefill_chunk, expect_new=options.max_new_tokens)
            while True:
                ids = sampler.choose(logits)
                ms = (time.perf_counter() - started) * 1e3
                for at, row in enumerate(rows):
                    if not row.finish:
                        text = row.push(int(ids[at]), not options.ignore_eos and int(ids[at]) in self.stop_ids)
                        yield Piece(at, row.count - 1, int(ids[at]), text, row.finish, ms)
                active = [not row.finish for row in rows]
                if not any(active):
                    return
                logits = loop.step(ids, active)
        finally:
            self._idle.append(loop)

    def _run_lookup(self, prompts: list[list[int]], row: _Row, options: Options, started: float) -> Iterator[Piece]:
        """One row whose drafts come from the text so far. Raises TrimtabError for several prompts and for a graph that cannot check drafts."""
        if len(prompts) != 1 or not self.layout.checks_drafts:
            found = f"{len(prompts)} prompts" if len(prompts) != 1 else "a graph with logits for the last token alone"
            raise TrimtabError("lookup", expected="one prompt, and a bundle built by this version", found=found, remedy="leave lookup out")
        lookup, self.pace, sampler = Lookup(prompts[0]), Pace(), Sampler(options.sampling, prompts, self.layout.vocab_size)
        loop = self._take(options.adapter)
        try:
            fresh = sampler.choose(loop.start(prompts, chunk=options.prefill_chunk, expect_new=options.max_new_tokens)).tolist()
            while True:
                ms = (time.perf_counter() - started) * 1e3
                for token in fresh:
                    text = row.push(token, not options.ignore_eos and token in self.stop_ids)
                    yield Piece(0, row.count - 1, token, text, row.finish, ms)
                    if row.finish:
                        return
                lookup.push(fresh)
                fresh = self._next(loop, sampler, lookup, fresh[-1], row.room)
        finally:
            self._idle.append(loop)

    def _next(self, loop: DecodeLoop, sampler: Sampler, lookup: Lookup, last: int, room: int) -> list[int]:
        """The tokens after `last`: one, or as many of a draft as greedy choice agrees with and one more."""
        began = time.perf_counter()
        draft = lookup.draft(min(self.pace.draft_length, room - 1))
        if not draft:
            chosen: list[int] = sampler.choose(loop.step([last])).tolist()
            self.pace.stepped(time.perf_counter() - began)
            return chosen
        chosen = sampler.choose(loop.check([last, *draft])).tolist()
        right = next((at for at, (guess, token) in enumerate(zip(draft, chosen, strict=False)) if guess != token), len(draft))
        loop.forget(len(draft) - right)
        self.pace.checked(len(draft), right, time.perf_counter() - began)
        return chosen[: right + 1]

    def _take(self, adapter: str) -> DecodeLoop:
        values = self.adapters.values(adapter)
        try:
            loop = self._idle.pop()
        except IndexError:  # all are in use: another thread may have taken the last one since
            loop = DecodeLoop(self._session, self.layout, self.context_length, self._prompts)
        loop.use(values)
        return loop


def generate(directory: Path, prompts: Sequence[Prompt], options: Options | None = None, *, threads: int = 0) -> list[Generation]:
    """Open a bundle and answer: for scripts that need one call. Raises BundleError, TrimtabError."""
    return Generator.open(directory, SessionSettings(threads=threads)).generate(prompts, options)


def load_tokenizer(bundle: Bundle) -> Any:
    """The bundle's tokenizers.Tokenizer, with padding and truncation off: those are ours to do. Raises BundleError."""
    from tokenizers import Tokenizer

    path = bundle.directory / "tokenizer.json"
    if not path.is_file():
        raise BundleError(str(path), expected="a tokenizer", found="none", remedy="build the bundle again from a base that has tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every bad file; nothing carries on
        raise BundleError(
            str(path), expected="a tokenizer.json of the tokenizers library", found=" ".join(str(error).split())[:200], remedy="build the bundle again"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _stop_ids(genai: Mapping[str, Any], generation: Mapping[str, Any]) -> frozenset[int]:
    """Every id that ends an answer: of genai_config.json and of generation_config.json, each a number or a list."""
    found: set[int] = set()
    for value in (genai["model"].get("eos_token_id"), generation.get("eos_token_id")):
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)


def _chat_template(path: Path, config: Mapping[str, Any]) -> str:
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # several named ones: [{"name": "default", "template": ...}]
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default") or next(iter(named.values()), "")
    return str(template)


def _token_text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token)
