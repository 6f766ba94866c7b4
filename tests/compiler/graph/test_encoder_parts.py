"""Tasks, labels, pooling files, lengths and the 8-bit twin: everything of the encoder road that needs no trace."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.errors import ArchitectureError, CheckpointError
from compiler.graph.encoder_pooling import configured_pooling
from compiler.graph.encoder_quantize import PAIR_BOUND, dequantize_channels, quantize_channels, worst_pair
from compiler.graph.encoder_task import infer_task, labels_of, max_length, task_config
from compiler.reference import match_tensors, skeleton

BERT = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
}


def checkpoint(config: dict[str, Any], names: dict[str, tuple[int, ...]] | None = None, assets: dict[str, Any] | None = None) -> Checkpoint:
    tensors = {
        name: TensorView(name, shape, "F32", lambda start, stop, shape=shape: np.zeros((stop - start, *shape[1:]), np.float32))
        for name, shape in (names or {}).items()
    }
    return Checkpoint(tensors, config, {name: json.dumps(value).encode() for name, value in (assets or {}).items()}, "tiny", lambda: "digest")


@pytest.mark.parametrize(
    ("architecture", "names", "assets", "task"),
    [
        ("BertModel", {}, {}, "feature-extraction"),
        ("BertModel", {"classifier.weight": (3, 8)}, {}, "text-classification"),
        ("BertModel", {"classifier.weight": (3, 8)}, {"modules.json": []}, "text-classification"),
        ("BertForTokenClassification", {"classifier.weight": (3, 8)}, {}, "token-classification"),
        ("RobertaForSequenceClassification", {"classifier.out_proj.weight": (3, 8)}, {}, "text-classification"),
        ("MPNetForMaskedLM", {}, {"modules.json": []}, "feature-extraction"),
    ],
)
def test_task_by_architecture_and_tensors(architecture: str, names: dict[str, tuple[int, ...]], assets: dict[str, Any], task: str) -> None:
    assert infer_task(checkpoint({"model_type": "bert", "architectures": [architecture]}, names, assets)) == task


def test_labels_follow_the_config_where_they_fit_the_head() -> None:
    named = {"model_type": "bert", "id2label": {"1": "leak", "0": "noise", "10": "other"}}
    assert labels_of(checkpoint(named, {"classifier.weight": (3, 8)})) == ("noise", "leak", "other")
    assert labels_of(checkpoint(named, {"classifier.weight": (2, 8)})) == ("LABEL_0", "LABEL_1")
    assert task_config(checkpoint(named, {"classifier.weight": (2, 8)}), "text-classification")["id2label"] == {0: "LABEL_0", 1: "LABEL_1"}


def test_a_head_of_a_delta_fits_a_bare_base() -> None:
    """The base's names have no prefix, the head's neither: both match BertForSequenceClassification."""
    config = task_config(checkpoint(BERT, {"classifier.weight": (5, 8)}), "text-classification")
    model = skeleton(config, "text-classification")
    names = {name.removeprefix("bert."): tuple(value.shape) for name, value in model.state_dict().items() if not name.endswith("position_ids")}
    assert names["classifier.weight"] == (5, 8)
    matched = match_tensors(model, checkpoint(BERT, names))
    assert {view.name for view in matched.values()} == set(names)


@pytest.mark.parametrize("family", ["llama", "t5000", "None"])
def test_unknown_families_name_the_known_ones_and_the_other_road(family: str) -> None:
    with pytest.raises(ArchitectureError, match=rf"bert, roberta, distilbert, mpnet, deberta-v2.*{family}.*decoder road"):
        task_config(checkpoint({"model_type": family}), "feature-extraction")


MODULES = [{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]


@pytest.mark.parametrize(
    ("extra", "pooling", "expected"),
    [
        ([], {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ("mean", False)),
        ([{"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}], {"pooling_mode_cls_token": True}, ("cls", True)),
        ([], {"pooling_mode": "lasttoken", "word_embedding_dimension": 8}, ("lasttoken", False)),
    ],
)
def test_pooling_from_files(extra: list[Any], pooling: dict[str, Any], expected: tuple[str, bool]) -> None:
    assert configured_pooling(checkpoint(BERT, assets={"modules.json": MODULES + extra, "1_Pooling/config.json": pooling})) == expected


def test_pooling_that_would_be_left_out_is_refused() -> None:
    dense = [*MODULES, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    with pytest.raises(ArchitectureError, match="found Dense"):
        configured_pooling(checkpoint(BERT, assets={"modules.json": dense, "1_Pooling/config.json": {"pooling_mode": "mean"}}))
    two = {"pooling_mode_mean_tokens": True, "pooling_mode_mean_sqrt_len_tokens": True}
    with pytest.raises(ArchitectureError, match="pooling_mode_mean_sqrt_len_tokens"):
        configured_pooling(checkpoint(BERT, assets={"modules.json": MODULES, "1_Pooling/config.json": two}))
    broken = Checkpoint({}, BERT, {"modules.json": b"[{"}, "tiny", lambda: "digest")
    with pytest.raises(CheckpointError, match=r"modules\.json: expected JSON"):
        configured_pooling(broken)


def test_length_is_the_least_limit() -> None:
    assert max_length(checkpoint(BERT)) == 12
    assert max_length(checkpoint(BERT, assets={"sentence_bert_config.json": {"max_seq_length": 9}, "tokenizer_config.json": {"model_max_length": 10**30}})) == 9
    assert max_length(checkpoint({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1})) == 512


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31))
def test_pairs_are_bounded_and_near(rows: int, width: int, seed: int) -> None:
    """The search may always take codes within 64, so the error is never above that grid's."""
    weight = np.random.default_rng(seed).normal(0, 1, (rows, width)).astype(np.float32)
    weight[0] = 0
    codes, scales = quantize_channels(weight)
    assert codes.dtype == np.int8
    assert codes.shape == (width, rows)
    assert worst_pair(codes) <= PAIR_BOUND
    assert np.all(codes[:, 0] == 0)
    error = np.square(dequantize_channels(codes, scales) - weight).sum(axis=1)
    assert np.all(error <= width * np.square(np.abs(weight).max(axis=1) / 64 / 2) * 1.001)


def test_pairs_worked_case() -> None:
    """127 beside 63 is beyond 128, so the row's largest code falls; 127 beside 1 is not."""
    codes, scales = quantize_channels(np.array([[127.0, 1.0, 0.0], [127.0, -127.0, 0.0]], np.float32))
    assert codes.T.tolist() == [[127, 1, 0], [64, -64, 0]]
    assert np.allclose(scales, [1.0, 127 / 64])


def test_the_full_range_is_each_rows_own_127_steps() -> None:
    weight = np.random.default_rng(0).normal(0, 1, (9, 40)).astype(np.float32)
    codes, scales = quantize_channels(weight, full_range=True)
    assert np.all(np.abs(codes.astype(int)).max(axis=0) == 127) and worst_pair(codes) > PAIR_BOUND
    assert np.allclose(scales, np.abs(weight).max(axis=1) / 127)
    assert np.abs(dequantize_channels(codes, scales) - weight).max(axis=1) == pytest.approx(scales / 2, rel=0.1)
