"""Encoders: pooling, order, truncation and labels against numpy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes import encode
from runtimes.encode import Encoder
from runtimes.session import SessionSettings
from targets.errors import BundleError, TargetError, TrimtabError
from targets.machine import this_machine

QUIET = SessionSettings(threads=1, spinning=False)
TEXTS = ["Once upon a time there was a pump on line 4.", "a", "The pump", "価格", "time time time", "a pump on line", "x y z", "upon", "there was a pump"]


def expected_mean(folder: Path, tokenizer: Any, text: str, limit: int = 512) -> np.ndarray:
    table = np.load(folder.parent / "table.npy")
    return table[tokenizer.encode(text).ids[:limit]].mean(0)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_vectors_come_back_in_order_whatever_the_batches(encoder_bundle: Callable[..., Path], byte_tokenizer: Any, batch_size: int) -> None:
    folder = encoder_bundle("sentence_embedding", pooled=True, task="feature-extraction", max_length=64)
    vectors = Encoder.open(folder, QUIET, batch_size=batch_size).encode(TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), 5)
    np.testing.assert_allclose(vectors, [expected_mean(folder, byte_tokenizer, text) for text in TEXTS], atol=1e-6)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(("run_tokens", "runs"), [(1, 7), (16, 4), (1000, 1)])
def test_a_large_batch_runs_in_pieces(encoder_bundle: Callable[..., Path], pooled: bool, run_tokens: int, runs: int) -> None:
    """7 texts of 8 tokens: two at a time fit 16 tokens, one is the least."""
    encoder = Encoder.open(encoder_bundle("sentence_embedding" if pooled else "last_hidden_state", pooled=pooled), QUIET)
    ids = np.random.default_rng(0).integers(0, 50, (7, 8))
    feeds = encoder.feeds(ids, np.ones_like(ids), np.zeros_like(ids))
    whole, session, sizes = encoder.run(feeds), encoder._session, []

    class Counting:
        def run(self, names: list[str], piece: dict[str, Any]) -> Any:
            sizes.append(len(piece["input_ids"]))
            return session.run(names, piece)

    encoder._session, encoder.run_tokens = Counting(), run_tokens
    np.testing.assert_allclose(encoder.run(feeds), whole, atol=1e-6)
    assert len(sizes) == runs and sum(sizes) == 7


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", False), ("mean", True), ("cls", True), (None, None)])
def test_token_vectors_are_pooled_as_the_manifest_says(
    encoder_bundle: Callable[..., Path], byte_tokenizer: Any, pooling: str | None, normalize: bool | None
) -> None:
    folder = encoder_bundle("last_hidden_state", pooled=False, pooling=pooling, normalize=normalize)
    table = np.load(folder.parent / "table.npy")
    want = np.array([table[byte_tokenizer.encode(text).ids[0]] if pooling == "cls" else expected_mean(folder, byte_tokenizer, text) for text in TEXTS])
    if normalize:
        want /= np.linalg.norm(want, axis=-1, keepdims=True)
    np.testing.assert_allclose(Encoder.open(folder, QUIET).encode(TEXTS), want, atol=1e-6)


def test_long_texts_are_cut_at_max_length(encoder_bundle: Callable[..., Path], byte_tokenizer: Any) -> None:
    folder = encoder_bundle("sentence_embedding", pooled=True, max_length=7)
    encoder = Encoder.open(folder, QUIET)
    assert encoder.max_length == 7
    np.testing.assert_allclose(encoder.encode([TEXTS[0]])[0], expected_mean(folder, byte_tokenizer, TEXTS[0], 7), atol=1e-6)


def test_pairs_reach_the_graph_as_two_types(encoder_bundle: Callable[..., Path], byte_tokenizer: Any) -> None:
    folder = encoder_bundle("sentence_embedding", pooled=True)
    both = Encoder.open(folder, QUIET).encode([("a pump", "time"), "a pump"])
    first, second = (len(byte_tokenizer.encode(text).ids) for text in ("a pump", "time"))
    table = np.load(folder.parent / "table.npy")
    ids = byte_tokenizer.encode("a pump", "time").ids
    np.testing.assert_allclose(both[0], table[ids].mean(0) + second / (first + second), atol=1e-6)


def test_classes(encoder_bundle: Callable[..., Path]) -> None:
    folder = encoder_bundle("logits", pooled=True, width=3, task="text-classification", labels=["repair", "billing", "other"])
    encoder = Encoder.open(folder, QUIET)
    scores = encoder.logits(TEXTS)
    for score, found in zip(scores, encoder.classify(TEXTS), strict=True):
        assert found.label == ["repair", "billing", "other"][int(score.argmax())]
        np.testing.assert_allclose(found.probabilities, np.exp(score) / np.exp(score).sum(), rtol=1e-5)
    assert encoder.classify([]) == [] and encoder.encode([]).shape == (0, 3)
    with pytest.raises(BundleError, match="expected a graph that classifies tokens"):
        encoder.classify_tokens(["a"])


def test_one_output_is_a_probability_of_its_own(encoder_bundle: Callable[..., Path]) -> None:
    encoder = Encoder.open(encoder_bundle("logits", pooled=True, width=1, labels=["related"]), QUIET)
    (found,) = encoder.classify(["a pump"])
    assert found.label == "related" and 0 < found.probabilities[0] < 1


def test_labels_of_config_json_and_token_classes(encoder_bundle: Callable[..., Path], byte_tokenizer: Any, write_manifest: Callable[..., Path]) -> None:
    folder = encoder_bundle("logits", pooled=False, width=3)
    (folder / "config.json").write_text(json.dumps({"id2label": {"10": "B", "2": "I", "0": "O"}, "max_position_embeddings": 77}))
    write_manifest(folder, kind="encoder", task="token-classification")
    encoder = Encoder.open(folder, QUIET)
    assert encoder.labels == ("O", "I", "B") and encoder.max_length == 77
    texts = ["a pump on line", "time"]
    rows = encoder.classify_tokens(texts)
    table = np.load(folder.parent / "table.npy")
    for text, row in zip(texts, rows, strict=True):
        encoding = byte_tokenizer.encode(text)
        assert [token.label for token in row] == [encoder.labels[int(table[token].argmax())] for token in encoding.ids]
        assert "".join(text[token.start : token.end] for token in row) == text
    with pytest.raises(BundleError, match="expected a graph that classifies texts"):
        encoder.classify(["a"])


def test_mistakes_are_told(encoder_bundle: Callable[..., Path], write_manifest: Callable[..., Path]) -> None:
    folder = encoder_bundle("last_hidden_state", pooled=False, pooling="max")
    encoder = Encoder.open(folder, QUIET)
    with pytest.raises(BundleError, match=r"model\.pooling: expected mean or cls, found 'max'"):
        encoder.encode(["a"])
    with pytest.raises(TrimtabError, match="text 1: expected at least one token, found an empty text"):
        encoder.encode(["a", ""])
    with pytest.raises(TrimtabError, match="batch_size: expected a count >= 1"):
        Encoder.open(folder, QUIET, batch_size=0)
    (folder / "tokenizer.json").write_text("{}")
    write_manifest(folder, kind="encoder")
    with pytest.raises(BundleError, match=r"expected a tokenizer\.json of the tokenizers library"):
        Encoder.open(folder, QUIET)


@pytest.mark.parametrize(("isa", "runs"), [("avx512_vnni", True), ("avx_vnni", True), ("asimd", True), ("avx2", False), ("avx512f", False)])
def test_codes_that_would_saturate_here_are_refused(encoder_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, isa: str, runs: bool) -> None:
    machine = dataclasses.replace(this_machine(), isa=(isa,))
    monkeypatch.setattr(encode, "this_machine", lambda: machine)
    folder = encoder_bundle("sentence_embedding", pooled=True, task="feature-extraction", max_length=64, scheme="int8-dynamic-vnni")
    if runs:
        assert Encoder.open(folder, QUIET).encode(TEXTS[:1]).shape == (1, 5)
        return
    with pytest.raises(TargetError, match="avx512_vnni, amx_int8, asimd, found none of them: sums would saturate; compile it with scheme int8-dynamic"):
        Encoder.open(folder, QUIET)
