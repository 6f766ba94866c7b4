"""The decode loop: one IOBinding, one key/value buffer per layer that is past and present at once, nothing allocated per token.

Why it looks like this:

* onnxruntime copies the whole cache every step unless past and present are the same memory. GroupQueryAttention writes in place when they are.
* input_ids, attention_mask and logits are numpy arrays bound by address: a step writes one integer, runs, and reads the logits where they lie.
* The cache is [batch, kv_heads, capacity, head]; capacity grows by doubling, because a growth copies everything and because reserving the whole context
  would count in the memory of a device that never fills it.
* Rows of a batch are padded on the right. GroupQueryAttention takes a row's length from its mask, and later tokens overwrite the padding.
* A draft of tokens (`runtimes.lookup`) is checked in one run: the graph's `kept_positions`, 1 unless fed, says how many of the last tokens have logits; tokens
  that turn out wrong are forgotten by making the row shorter.
* Where the bundle has a second graph for prompts, runs of at least PROMPT_TOKENS go through it: its matrices multiply 8-bit integers, which is faster with many
  rows and slower with one. Both graphs write the same cache.
* A long prompt runs in chunks (batch of 1): attention of one huge chunk works on a [tokens, tokens] square of which half is masked, and its activations
  are the peak of the memory. A 135 M-parameter int4 decoder on a prompt of 1024 tokens, Zen 3: 489 MB at once, 306 MB in chunks of 256, 276 MB in chunks of
  128. 256 was chosen for memory. What it does to speed is not established: the times beside those figures were one run per setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.bundle import Bundle
from runtimes.session import SessionSettings, open_session
from targets.errors import BundleError, TrimtabError

Floats = NDArray[np.floating[Any]]
ALIGNMENT_BYTES = 64
FIRST_CAPACITY = 256
PREFILL_CHUNK = 256
PROMPT_TOKENS = 16  # positions of a run, rows together
SPIN_US = 200
KEPT_POSITIONS = "kept_positions"
_TYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
_REMEDY = "build the bundle again: decoders follow onnxruntime-genai's names"


@dataclass(frozen=True)
class CacheSlot:
    """One key or value buffer: the graph's names for it, its shape without batch and capacity, its type."""

    past: str
    present: str
    heads: int
    head_size: int
    dtype: type[np.floating[Any]]


@dataclass(frozen=True)
class Layout:
    """What the graph takes and gives, read from genai_config.json and checked against the session."""

    input_ids: str
    attention_mask: str
    position_ids: str
    logits: str
    logits_dtype: type[np.floating[Any]]
    vocab_size: int
    last_token_only: bool
    slots: tuple[CacheSlot, ...]
    keeps: bool = False  # the graph gives logits for as many of the last positions as it is asked for

    @property
    def checks_drafts(self) -> bool:
        """Logits after each token of a short run can be had."""
        return self.keeps or not self.last_token_only

    @property
    def cache_bytes_per_token(self) -> int:
        return sum(slot.heads * slot.head_size * np.dtype(slot.dtype).itemsize for slot in self.slots)


def read_layout(session: Any, genai: dict[str, Any], place: str) -> Layout:
    """The layout of a decoder graph. Raises BundleError when config and graph disagree."""
    decoder = genai.get("model", {}).get("decoder", {})
    inputs = {node.name: node for node in session.get_inputs()}
    outputs = {node.name: node for node in session.get_outputs()}
    given, made = decoder.get("inputs", {}), decoder.get("outputs", {})
    names = {key: given.get(key, key) for key in ("input_ids", "attention_mask", "position_ids")}
    logits = made.get("logits", "logits")
    missing = [names[key] for key in ("input_ids", "attention_mask") if names[key] not in inputs] + ([] if logits in outputs else [logits])
    slots = []
    for layer in range(int(decoder.get("num_hidden_layers", 0))):
        for part in ("key", "value"):
            past = given.get(f"past_{part}_names", f"past_key_values.%d.{part}").replace("%d", str(layer))
            present = made.get(f"present_{part}_names", f"present.%d.{part}").replace("%d", str(layer))
            if past not in inputs or present not in outputs:
                missing.append(past)
                continue
            shape, kind = inputs[past].shape, _TYPES.get(inputs[past].type)
            heads = shape[1] if isinstance(shape[1], int) else int(decoder["num_key_value_heads"])
            size = shape[3] if isinstance(shape[3], int) else int(decoder["head_size"])
            if kind not in (np.float32, np.float16):
                raise BundleError(f"{place}: {past}", expected="a float or float16 cache", found=inputs[past].type, remedy=_REMEDY)
            slots.append(CacheSlot(past, present, heads, size, kind))
    known = {*names.values(), *(slot.past for slot in slots)}
    missing += [f"a value for input {name}" for name in inputs if name not in known]
    if missing or not slots:
        raise BundleError(place, expected="the inputs and outputs that genai_config.json names", found=f"no {', '.join(missing) or 'cache'}", remedy=_REMEDY)
    shape = outputs[logits].shape
    vocab = shape[-1] if isinstance(shape[-1], int) else int(genai["model"]["vocab_size"])
    position = names["position_ids"] if names["position_ids"] in inputs else ""
    keeps = any(node.name == KEPT_POSITIONS for node in session.get_overridable_initializers())
    return Layout(names["input_ids"], names["attention_mask"], position, logits, _TYPES[outputs[logits].type], vocab, shape[1] == 1, tuple(slots), keeps)


def aligned_zeros(shape: Sequence[int], dtype: Any) -> NDArray[Any]:
    """Zeros whose first element lies on a 64-byte boundary, as the kernels' loads want it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + size].view(dtype).reshape(shape)


def open_graphs(bundle: Bundle, settings: SessionSettings | None) -> tuple[Any, Any]:
    """Sessions of the bundle's graph and of its graph for prompts. The second is None where it has none, on other providers than the CPU (they lack its
    kernels), and where no rounding of activations is asked for (`SessionSettings.exact`). Raises BundleError as `open_session` does.

    The threads of one spin for SPIN_US at most after a run, since the other may run next: with the default, prompts took 1.15 times as long (by hand).
    """
    settings = settings or SessionSettings()
    if bundle.prompt_path is None or settings.exact or settings.provider != "cpu":
        return open_session(bundle.model_path, settings), None
    shared = replace(settings, entries=(*settings.entries, ("session.intra_op.spin_duration_us", str(SPIN_US))))
    return open_session(bundle.model_path, shared), open_session(bundle.prompt_path, shared)


class DecodeLoop:
    """Runs one batch of sequences through the graph, step by step. Not for use from several threads at once.

    start([[5, 6, 7]]) -> logits [1, vocab] after token 7; step([8]) -> logits after token 8.
    """

    def __init__(self, session: Any, layout: Layout, context_length: int, prompts: Any = None) -> None:
        """prompts: a session of the graph for runs of many tokens, with the same inputs and outputs."""
        self.layout, self.context_length = layout, context_length
        self._session, self._binding = session, session.io_binding()
        self._prompts, self._prompt_binding = prompts, prompts.io_binding() if prompts is not None else None
        self._cache: list[NDArray[Any]] = []
        self._lengths: list[int] = []  # tokens in the cache of each row, without padding
        self._capacity = 0
        self._ids = aligned_zeros((0, 1), np.int64)
        self._logits = aligned_zeros((0, 1, 0), layout.logits_dtype)
        self._last = self._logits[:, 0]
        self._adapter: Mapping[str, Any] = {}
        self._kept = np.ones((), np.int64)

    def use(self, adapter: Mapping[str, Any]) -> None:
        """Bind the inputs of an adapter (`runtimes.adapters.Adapters.values`), from the next `start` on. The one in use costs nothing to choose again."""
        if adapter is not self._adapter:
            for name, value in adapter.items():
                self._binding.bind_ortvalue_input(name, value)
            self._adapter = adapter

    @property
    def capacity(self) -> int:
        """Tokens per row that the cache has room for now."""
        return self._capacity

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per row in the cache, [batch]."""
        return np.array(self._lengths, np.int64)

    def start(self, prompts: Sequence[Sequence[int]], *, chunk: int = 0, expect_new: int = 0) -> Floats:
        """Forget what was, run the prompts, return the logits after each last token [batch, vocab].

        chunk       tokens per run of a single prompt; 0 = all at once
        expect_new  tokens that will follow: room for up to that many is made ahead where it costs little
        Raises TrimtabError for an empty prompt and for one that fills the context.
        """
        for prompt in prompts:
            if not prompt or len(prompt) > self.context_length:
                found = "no tokens" if not prompt else f"{len(prompt)} tokens"
                raise TrimtabError(
                    "prompt", expected=f"1 to {self.context_length} tokens", found=found, remedy="shorten the prompt: that is this model's context"
                )
        longest = max(len(prompt) for prompt in prompts)
        self._reserve(len(prompts), longest + min(expect_new, FIRST_CAPACITY))
        self._lengths = [0] * len(prompts)
        if len(prompts) > 1 or chunk <= 0:
            return self._prefill([list(prompt) for prompt in prompts])
        logits: Floats = np.zeros((1, self.layout.vocab_size), self.layout.logits_dtype)
        for at in range(0, longest, chunk):
            logits = self._prefill([list(prompts[0][at : at + chunk])])
        return logits

    def step(self, ids: NDArray[np.int64] | Sequence[int], active: Sequence[bool] | None = None) -> Floats:
        """Append one token per row, return the logits after it [batch, vocab]: a view that the next step overwrites.

        active [batch]: rows that are False have finished; they keep their length and their logits mean nothing.

        Between two runs nothing is in the processor's caches, and the first call of each numpy function takes some 20 microseconds: hence plain Python.
        """
        self._lengths = [length + on for length, on in zip(self._lengths, active or [True] * len(self._lengths), strict=True)]
        total = max(self._lengths)
        if total > self.context_length:
            raise TrimtabError(
                "generation", expected=f"at most {self.context_length} tokens", found=f"{total}", remedy="shorten the prompt or ask for fewer new tokens"
            )
        if total > self._capacity:
            self._grow(total)
        self._ids[:, 0] = ids
        self._bind_mask(self._binding, total)
        if self.layout.position_ids:
            self._positions[:, 0] = [length - 1 for length in self._lengths]
        self._run(self._session, self._binding)
        return self._last

    def check(self, ids: Sequence[int]) -> Floats:
        """Append tokens to the only row; logits after each of them [tokens, vocab].

        Raises ValueError when the graph gives none (`Layout.checks_drafts`) or there are several rows.
        """
        if not self.layout.checks_drafts or len(self._lengths) != 1:
            raise ValueError("a draft needs one row and logits for several positions")
        return self._run_prompt(np.array([ids], np.int64), [len(ids)], kept=len(ids))[0]

    def forget(self, tokens: int) -> None:
        """Take the last tokens of the only row back: their keys and values lie beyond its mask, and the next ones overwrite them."""
        self._lengths = [length - tokens for length in self._lengths]

    def seek(self, tokens: int) -> None:
        """Go on as if `tokens` tokens had been read (their keys and values are what the cache holds, zeros at first): tries a late position at no cost."""
        self._reserve(1, tokens + 1)
        self._lengths = [tokens]
        self._bind_step(1)

    def all_logits(self, ids: NDArray[np.int64]) -> Floats:
        """Teacher-forced logits [batch, tokens, vocab] for ids [batch, tokens]: position t holds the logits after token t.

        One run where the graph keeps all positions; a graph with last-token logits is stepped, all rows in lock step.
        """
        batch, tokens = ids.shape
        if not self.layout.last_token_only:
            self._reserve(batch, tokens)
            self._lengths = [0] * batch
            return self._run_prompt(ids.astype(np.int64), [tokens] * batch)
        logits = np.empty((batch, tokens, self.layout.vocab_size), self.layout.logits_dtype)
        logits[:, 0] = self.start([[int(first)] for first in ids[:, 0]], expect_new=tokens - 1)
        for at in range(1, tokens):
            logits[:, at] = self.step(ids[:, at])
        return logits

    def _prefill(self, prompts: list[list[int]]) -> Floats:
        """Append prompts (a chunk of one, or whole ones padded on the right); logits after the last tokens [batch, vocab]."""
        counts = [len(prompt) for prompt in prompts]
        if counts == [1] and self._lengths[0] > 0:
            return self.step(prompts[0])
        ids = np.zeros((len(prompts), max(counts)), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        logits = self._run_prompt(ids, counts)
        return logits[:, 0] if self.layout.last_token_only else logits[np.arange(len(prompts)), np.array(counts) - 1]

    def _run_prompt(self, ids: NDArray[np.int64], counts: Sequence[int], kept: int = 0) -> Floats:
        """Append ids [batch, tokens] and run. kept: positions that shall have logits where the graph can choose; 0: its own choice."""
        before = max(self._lengths)
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        total = before + ids.shape[1]
        if total > self._capacity:
            self._grow(total)
        if kept and self.layout.keeps:
            self._bind_run(self._binding, ids, before)
            return self._run_kept(kept)
        integers = self._prompts is not None and ids.size >= PROMPT_TOKENS
        session, binding = (self._prompts, self._prompt_binding) if integers else (self._session, self._binding)
        self._bind_run(binding, ids, before)
        width = 1 if self.layout.last_token_only else ids.shape[1]
        logits = aligned_zeros((len(ids), width, self.layout.vocab_size), self.layout.logits_dtype)
        _bind_output(binding, self.layout.logits, logits)
        self._run(session, binding)
        self._bind_step(len(ids))
        return logits

    def _bind_run(self, binding: Any, ids: NDArray[np.int64], before: int) -> None:
        """Tokens ids [batch, tokens] behind `before` positions, and the mask over both."""
        total = before + ids.shape[1]
        self._fed = np.ascontiguousarray(ids)
        _bind_input(binding, self.layout.input_ids, self._fed)
        self._bind_mask(binding, total)
        if self.layout.position_ids:
            self._positions = np.tile(np.arange(before, total), (len(ids), 1))
            _bind_input(binding, self.layout.position_ids, self._positions)

    def _run_kept(self, kept: int) -> Floats:
        """Run what is bound, with logits [batch, kept, vocab]. The graph declares one position, as onnxruntime-genai wants it: onnxruntime makes room."""
        self._keep(kept)
        self._binding.bind_output(self.layout.logits, "cpu")
        self._run(self._session, self._binding)
        logits: Floats = self._binding.get_outputs()[len(self.layout.slots)].numpy()  # outputs stand in the order they were first bound: the cache, then logits
        self._keep(1)
        self._bind_step(len(logits))
        return logits

    def _keep(self, positions: int) -> None:
        if self.layout.keeps and int(self._kept) != positions:
            self._kept[...] = positions
            _bind_input(self._binding, KEPT_POSITIONS, self._kept)

    def _run(self, session: Any, binding: Any) -> None:
        try:
            session.run_with_iobinding(binding)
        except RuntimeError as error:
            found = " ".join(str(error).split())
            name = "model.onnx" if session is self._session else "prompt.onnx"
            raise BundleError(name, expected="a graph that runs", found=found[:300], remedy="check the bundle with `trimtab verify`") from error

    def _bind_step(self, batch: int) -> None:
        """Back to the buffers of single steps."""
        if len(self._ids) != batch:
            self._ids = aligned_zeros((batch, 1), np.int64)
            self._logits = aligned_zeros((batch, 1, self.layout.vocab_size), self.layout.logits_dtype)
            self._last = self._logits[:, 0]
        _bind_input(self._binding, self.layout.input_ids, self._ids)
        _bind_output(self._binding, self.layout.logits, self._logits)
        if self.layout.position_ids:
            self._positions = aligned_zeros((batch, 1), np.int64)
            _bind_input(self._binding, self.layout.position_ids, self._positions)

    def _bind_mask(self, binding: Any, total: int) -> None:
        """attention_mask [batch, total]: ones up to each row's length."""
        if len(self._lengths) == 1:  # all ones: more of one buffer
            binding.bind_input(self.layout.attention_mask, "cpu", 0, np.int64, (1, total), self._ones_at)
        else:
            self._mask = (np.arange(total) < np.array(self._lengths)[:, None]).astype(np.int64)
            _bind_input(binding, self.layout.attention_mask, self._mask)

    def _reserve(self, batch: int, tokens: int) -> None:
        """A cache for `batch` rows with room for `tokens`; one that is there and fits is used again (old values lie beyond every mask)."""
        if self._cache and len(self._cache[0]) == batch and self._capacity >= tokens:
            return
        self._allocate(batch, min(max(FIRST_CAPACITY, _round_up(tokens)), self.context_length))

    def _grow(self, tokens: int) -> None:
        """Room for at least `tokens`, by doubling; the tokens so far are kept."""
        old, used = self._cache, self._capacity
        self._allocate(len(self._lengths), min(max(2 * used, _round_up(tokens)), self.context_length))
        for new, before in zip(self._cache, old, strict=True):
            new[:, :, :used] = before

    def _allocate(self, batch: int, capacity: int) -> None:
        self._capacity = capacity
        self._ones = np.ones(capacity, np.int64)
        self._ones_at = self._ones.ctypes.data
        self._cache = [aligned_zeros((batch, slot.heads, capacity, slot.head_size), slot.dtype) for slot in self.layout.slots]
        for slot, buffer in zip(self.layout.slots, self._cache, strict=True):
            for binding in filter(None, (self._binding, self._prompt_binding)):
                _bind_input(binding, slot.past, buffer)
                _bind_output(binding, slot.present, buffer)


def _bind_input(binding: Any, name: str, array: NDArray[Any]) -> None:
    """By address: onnxruntime keeps no reference, so every array bound here is an attribute of the loop or lives until the run returns."""
    binding.bind_input(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)


def _bind_output(binding: Any, name: str, array: NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)


def _round_up(tokens: int) -> int:
    return -(-tokens // FIRST_CAPACITY) * FIRST_CAPACITY
