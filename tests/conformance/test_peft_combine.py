"""Mixtures of several LoRAs against PEFT's add_weighted_adapter, where its rule is the same: cat and svd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from compiler.checkpoints.resolve import open_checkpoint  # noqa: E402
from compiler.deltas.combine import combine_named  # noqa: E402
from compiler.deltas.load import load_delta  # noqa: E402
from compiler.stages.merge import merged_view  # noqa: E402

WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.3}
RANKS = {"a": 4, "b": 2, "c": 3}
MODULES = ["q_proj", "v_proj", "down_proj"]


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Any, Path]:
    """(a PEFT model with three adapters, every factor random; the folder with `base` and the saved adapters)."""
    llama().save_pretrained(tmp_path / "base")
    wrapped = None
    for name, rank in RANKS.items():
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MODULES)
        if wrapped is None:
            wrapped = peft.get_peft_model(llama(), config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    assert wrapped is not None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    wrapped.save_pretrained(tmp_path)
    return wrapped, tmp_path


def ours(folder: Path, method: Any) -> Any:
    deltas = [load_delta(str(folder / name), weight=weight) for name, weight in WEIGHTS.items()]
    return merged_view(open_checkpoint(str(folder / "base")), deltas, method)


def theirs(wrapped: Any, method: str, **options: Any) -> dict[str, np.ndarray]:
    wrapped.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "mixed", combination_type=method, **options)
    wrapped.set_adapter("mixed")
    return {name: tensor.float().numpy() for name, tensor in wrapped.merge_and_unload(adapter_names=["mixed"]).state_dict().items()}


def worst(found: Any, expected: dict[str, np.ndarray]) -> float:
    """Largest difference of any tensor relative to its largest entry."""
    names = set(found.tensors) & set(expected)
    assert sum("_proj" in name for name in names) == 14
    return max(float(np.abs(found.tensors[name].read() - expected[name]).max() / np.abs(expected[name]).max()) for name in names)


@pytest.mark.filterwarnings("ignore")
def test_cat_and_linear_equal_pefts_cat(trained: tuple[Any, Path]) -> None:
    wrapped, folder = trained
    expected = theirs(wrapped, "cat")
    assert worst(ours(folder, "cat"), expected) < 1e-6 and worst(ours(folder, "linear"), expected) < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_svd_equals_pefts_svd(trained: tuple[Any, Path]) -> None:
    wrapped, folder = trained
    expected = theirs(wrapped, "svd", svd_rank=3)
    assert worst(ours(folder, combine_named("svd", rank=3)), expected) < 2e-6  # PEFT takes its decomposition in float32
    assert worst(ours(folder, "linear"), expected) > 1e-2  # rank 3 of 9 does cut something
