"""The torch reference: filled from lazy tensors, prefixes optional, never a random weight left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.errors import ArchitectureError, CheckpointError
from compiler.reference import reference_model

BERT = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
}


def view(name: str, array: np.ndarray) -> TensorView:
    return TensorView(name, array.shape, "F32", lambda start, stop: array[start:stop])


def checkpoint_of(model: Any, config: dict[str, Any], rename: Callable[[str], str | None] = str) -> Checkpoint:
    """A model's state under other names; None drops a tensor."""
    state = {rename(name): value.numpy().copy() for name, value in model.state_dict().items()}
    return Checkpoint({name: view(name, array) for name, array in state.items() if name is not None}, config, {}, "tiny", lambda: "digest")


@pytest.fixture(scope="module")
def bert() -> Any:
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(1)
    return AutoModel.from_config(AutoConfig.for_model(**BERT)).eval()


@pytest.mark.parametrize(
    "rename", [str, lambda name: "bert." + name, lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")]
)
def test_names_match_with_or_without_prefix_and_in_the_old_spelling(bert: Any, rename: Callable[[str], str]) -> None:
    loaded = reference_model(checkpoint_of(bert, BERT, rename), "feature-extraction")
    ids = torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).last_hidden_state, bert(ids).last_hidden_state)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert not loaded.training


def test_missing_tensors_are_named(bert: Any) -> None:
    broken = checkpoint_of(bert, BERT, lambda name: None if name.endswith("query.weight") else name)
    with pytest.raises(CheckpointError, match=r"none for encoder\.layer\.0\.attention\.self\.query\.weight"):
        reference_model(broken, "feature-extraction")


def test_a_head_without_weights_is_no_random_head(bert: Any) -> None:
    with pytest.raises(CheckpointError, match="none for classifier"):
        reference_model(checkpoint_of(bert, BERT), "text-classification")


def test_left_over_tensors_are_named(bert: Any) -> None:
    broken = checkpoint_of(bert, BERT, lambda name: name)
    broken = Checkpoint({**broken.tensors, "encoder.layer.7.extra": view("encoder.layer.7.extra", np.zeros(3, np.float32))}, BERT, {}, "tiny", lambda: "d")
    with pytest.raises(CheckpointError, match=r"unused encoder\.layer\.7\.extra"):
        reference_model(broken, "feature-extraction")


def test_wrong_shapes_are_named(bert: Any) -> None:
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight: expected shape \[21, 8\].*found \[20, 8\]"):
        reference_model(checkpoint_of(bert, BERT | {"vocab_size": 21}), "feature-extraction")


def test_a_pooler_is_optional(bert: Any) -> None:
    loaded = reference_model(checkpoint_of(bert, BERT, lambda name: None if name.startswith("pooler") else name), "feature-extraction")
    assert loaded(torch.tensor([[1, 2]])).pooler_output is None


@pytest.mark.parametrize("tied", [True, False])
def test_decoders_keep_tied_weights_tied_and_buffers_real(tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = LLAMA | {"tie_word_embeddings": tied}
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    loaded = reference_model(checkpoint_of(model, config, lambda name: None if tied and name == "lm_head.weight" else name), "text-generation")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    with torch.no_grad():
        assert torch.allclose(loaded(torch.tensor([[1, 5, 7]])).logits, model(torch.tensor([[1, 5, 7]])).logits, atol=1e-6)


def test_unknown_family_and_foreign_code() -> None:
    empty = Checkpoint({}, {"model_type": "nosuch", "auto_map": {"AutoModel": "evil.Model"}}, {}, "tiny", lambda: "d")
    with pytest.raises(ArchitectureError, match="'nosuch'"):
        reference_model(empty, "feature-extraction")
    with pytest.raises(ArchitectureError, match="'juggling'"):
        reference_model(empty, "juggling")
