"""Run an encoder bundle: sentence vectors, classes of texts, classes of tokens. No torch.

Texts are sorted by length and run in batches, so that a long one does not make short ones pay for its padding; results come back in the order asked.
A batch runs in pieces, whose activations stay in the caches. all-MiniLM-L6-v2 on two cores of a Zen 4, by hand: int8-dynamic takes 1.25 times as long with 32
texts of 256 tokens in one piece as in pieces of 1024 tokens, which take 1.06 times as long as pieces of 512 (6 to 7 % at 8 x 128 and 64 x 32 too); int8 and
float32 are fastest at 1024 to 2048.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.bundle import Bundle, open_bundle
from runtimes.generate import load_tokenizer
from runtimes.session import SessionSettings, open_session
from targets.errors import BundleError, TargetError, TrimtabError
from targets.machine import ISA_OF_WIDE_SUMS, sums_in_32_bits, this_machine

Text = str | tuple[str, str]  # one text, or a pair for models that compare two
Floats = NDArray[np.float32]
DEFAULT_MAX_LENGTH = 512
RUN_TOKENS = 1024
RUN_TOKENS_OF = {"int8-dynamic": 512, "int8-dynamic-vnni": 512}
WIDE_SUMS = ("int8-dynamic-vnni",)  # schemes whose products would saturate in 16 bits
_ABSURD_LENGTH = 1_000_000  # tokenizer_config.json says 10**30 where nobody set a limit


@dataclass(frozen=True)
class Classification:
    """The most likely label of a text and the probabilities of all labels, [labels]."""

    label: str
    probabilities: Floats


@dataclass(frozen=True)
class TokenLabel:
    """The label of one token: characters start to end of the text, and the label's probability."""

    label: str
    start: int
    end: int
    probability: float


class Encoder:
    """An encoder bundle, ready to run.

    encode(["a", "b"]) -> float32 [2, hidden]; classify(["a"]) -> [Classification(label="repair", probabilities=[0.9, 0.1])]
    """

    def __init__(self, bundle: Bundle, settings: SessionSettings | None = None, *, batch_size: int = 8) -> None:
        if bundle.kind != "encoder":
            raise BundleError(str(bundle.directory), expected="an encoder", found=f"a {bundle.kind}", remedy="use runtimes.generate for it")
        if batch_size < 1:
            raise TrimtabError("batch_size", expected="a count >= 1", found=str(batch_size), remedy="change the option")
        if bundle.model.get("scheme") in WIDE_SUMS and not sums_in_32_bits(this_machine().isa):
            raise TargetError(
                f"{bundle.directory}: {bundle.model['scheme']}",
                expected=f"a processor with one of {', '.join(ISA_OF_WIDE_SUMS)}",
                found="none of them: sums would saturate",
                remedy="compile it with scheme int8-dynamic, which is right on every processor",
            )
        self.bundle, self.batch_size = bundle, batch_size
        self.max_length = _max_length(bundle)
        self.run_tokens = RUN_TOKENS_OF.get(str(bundle.model.get("scheme")), RUN_TOKENS)
        self.labels = _labels(bundle)
        self.tokenizer = load_tokenizer(bundle)
        self.tokenizer.enable_truncation(self.max_length)
        self.pad_id = _pad_id(bundle, self.tokenizer)
        self._session = open_session(bundle.model_path, settings)
        self._inputs = [node.name for node in self._session.get_inputs()]
        self._output, self._rank = self._pick_output()

    @classmethod
    def open(cls, directory: Path, settings: SessionSettings | None = None, *, batch_size: int = 8) -> Encoder:
        """Raises BundleError when it is no encoder bundle."""
        return cls(open_bundle(directory), settings, batch_size=batch_size)

    def encode(self, texts: Sequence[Text]) -> Floats:
        """Sentence vectors [texts, hidden]. A graph that gives token vectors is pooled as the manifest says (mean or cls) and normalised if it says so."""
        rows: list[Any] = [None] * len(texts)
        for places, feeds, output in self._batches(texts):
            vectors = self._pool(output, feeds["attention_mask"]) if output.ndim == 3 else output
            for place, vector in zip(places, vectors, strict=True):
                rows[place] = vector
        width = self._session.get_outputs()[0].shape[-1]
        return np.stack(rows).astype(np.float32, copy=False) if rows else np.zeros((0, width if isinstance(width, int) else 0), np.float32)

    def logits(self, texts: Sequence[Text]) -> Floats:
        """Class scores before the softmax, [texts, labels]. Raises BundleError when the graph does not classify texts."""
        if self._rank != 2:
            raise BundleError(
                str(self.bundle.directory),
                expected="a graph that classifies texts",
                found=f"output {self._output} per token",
                remedy="use classify_tokens or encode",
            )
        return self.encode(texts)

    def classify(self, texts: Sequence[Text]) -> list[Classification]:
        """The label of each text with all probabilities (softmax; one output alone is a score through the logistic function)."""
        if not len(texts):
            return []
        scores = self.logits(texts)
        shares = _softmax(scores) if scores.shape[1] > 1 else 1.0 / (1.0 + np.exp(-scores))
        best = shares.argmax(axis=-1)
        return [Classification(self._label(int(at)), row.astype(np.float32)) for at, row in zip(best, shares, strict=True)]

    def classify_tokens(self, texts: Sequence[str]) -> list[list[TokenLabel]]:
        """The label of each token of each text; special tokens are left out."""
        if self._rank != 3:
            raise BundleError(
                str(self.bundle.directory), expected="a graph that classifies tokens", found=f"output {self._output} per text", remedy="use classify"
            )
        rows: list[list[TokenLabel]] = [[] for _ in texts]
        encodings = self.tokenizer.encode_batch(list(texts))
        for places, _, output in self._batches(texts):
            shares = _softmax(output)
            for at, place in enumerate(places):
                encoding = encodings[place]
                for token, (start, end) in enumerate(encoding.offsets):
                    if not encoding.special_tokens_mask[token]:
                        best = int(shares[at, token].argmax())
                        rows[place].append(TokenLabel(self._label(best), start, end, float(shares[at, token, best])))
        return rows

    def run_text(self, text: str) -> NDArray[Any]:
        """The graph's own output for one text, cut to the model's length. Raises TrimtabError for a text without tokens."""
        (_, _, output) = next(self._batches([text]))
        return output

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """The graph on ready tensors [batch, length], `run_tokens` at a time or one text; the chosen output as it is. What a benchmark times."""
        batch, length = next(iter(feeds.values())).shape
        step = max(1, self.run_tokens // max(1, length))
        pieces = ({name: array[at : at + step] for name, array in feeds.items()} for at in range(0, max(1, batch), step))
        try:
            outputs: list[NDArray[Any]] = [self._session.run([self._output], piece)[0] for piece in pieces]
        except RuntimeError as error:
            found = " ".join(str(error).split())[:300]
            raise BundleError("model.onnx", expected="a graph that runs", found=found, remedy="check the bundle with `trimtab verify`") from error
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def feeds(self, ids: NDArray[np.int64], mask: NDArray[np.int64], types: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Tensors [batch, length] under the names that this graph has. Raises BundleError for a name that is not known."""
        known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        unknown = [name for name in self._inputs if name not in known and name != "position_ids"]
        if unknown:
            raise BundleError("model.onnx", expected=f"inputs among {', '.join(known)}", found=", ".join(unknown), remedy="export the encoder again")
        chosen = {name: known[name] for name in self._inputs if name in known}
        if "position_ids" in self._inputs:
            chosen["position_ids"] = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
        return chosen

    def _batches(self, texts: Sequence[Text]) -> Iterator[tuple[list[int], dict[str, NDArray[Any]], NDArray[Any]]]:
        """(places in `texts`, tensors, output) of each batch, shortest texts first."""
        encodings = self.tokenizer.encode_batch(list(texts))
        lengths = [len(encoding.ids) for encoding in encodings]
        if lengths and min(lengths) == 0:
            raise TrimtabError(f"text {lengths.index(0)}", expected="at least one token", found="an empty text", remedy="leave empty texts out")
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        for at in range(0, len(order), self.batch_size):
            places = order[at : at + self.batch_size]
            width = lengths[places[-1]]
            ids = np.full((len(places), width), self.pad_id, np.int64)
            mask, types = np.zeros_like(ids), np.zeros_like(ids)
            for row, place in enumerate(places):
                size = lengths[place]
                ids[row, :size], mask[row, :size], types[row, :size] = encodings[place].ids, 1, encodings[place].type_ids
            feeds = self.feeds(ids, mask, types)
            yield places, {**feeds, "attention_mask": mask}, self.run(feeds)

    def _pick_output(self) -> tuple[str, int]:
        """(name, rank) of the output to use: the one the task calls for when there are several."""
        outputs = {node.name: len(node.shape) for node in self._session.get_outputs()}
        wanted = next((name for name in ("sentence_embedding", "logits", "last_hidden_state") if name in outputs), next(iter(outputs)))
        return wanted, outputs[wanted]

    def _pool(self, tokens: NDArray[Any], mask: NDArray[Any]) -> Floats:
        """Token vectors [batch, length, hidden] -> [batch, hidden]."""
        pooling = self.bundle.model.get("pooling") or "mean"
        if pooling == "cls":
            vectors = tokens[:, 0]
        elif pooling == "mean":
            weights = mask[:, :, None].astype(np.float32)
            vectors = (tokens * weights).sum(1) / np.maximum(weights.sum(1), 1e-9)
        else:
            raise BundleError("manifest.json: model.pooling", expected="mean or cls", found=repr(pooling), remedy="build the bundle again")
        if self.bundle.model.get("normalize"):
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return vectors.astype(np.float32)

    def _label(self, index: int) -> str:
        return self.labels[index] if index < len(self.labels) else f"LABEL_{index}"


def _softmax(scores: NDArray[Any]) -> NDArray[Any]:
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def _labels(bundle: Bundle) -> tuple[str, ...]:
    """Labels in order: the manifest's list, or config.json's id2label."""
    listed = bundle.model.get("labels")
    if listed:
        return tuple(str(label) for label in listed)
    mapping = bundle.read_json("config.json", optional=True).get("id2label") or {}
    return tuple(str(mapping[key]) for key in sorted(mapping, key=int))


def _max_length(bundle: Bundle) -> int:
    """Tokens per text: the manifest's max_length, else the smallest sensible one that the configs name."""
    if bundle.model.get("max_length"):
        return int(bundle.model["max_length"])
    named = (
        bundle.read_json("tokenizer_config.json", optional=True).get("model_max_length"),
        bundle.read_json("config.json", optional=True).get("max_position_embeddings"),
    )
    return min((int(value) for value in named if value and value < _ABSURD_LENGTH), default=DEFAULT_MAX_LENGTH)


def _pad_id(bundle: Bundle, tokenizer: Any) -> int:
    token = bundle.read_json("tokenizer_config.json", optional=True).get("pad_token")
    text = token["content"] if isinstance(token, dict) else token
    found = tokenizer.token_to_id(text) if text else None
    return 0 if found is None else int(found)
