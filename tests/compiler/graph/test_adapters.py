"""Products beside a graph's matrices: the stacking of A and B, the graph's own scales, and what cannot be reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from compiler.errors import ArchitectureError
from compiler.graph.adapters import Site, Tenant, model_version
from compiler.graph.decoder import export_decoder
from compiler.scheme import Schemes, parse_scheme

DRAW = np.random.default_rng(3)
FP32 = Schemes(parse_scheme("fp32"))


def product(rows: int, width: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    return DRAW.standard_normal((rows, rank)).astype(np.float32), DRAW.standard_normal((width, rank)).astype(np.float32).T


def test_factors_of_one_matrix_stand_side_by_side_and_b_is_block_diagonal() -> None:
    site = Site("qkv", {"q": 6, "k": 2, "v": 3}, 5, scale=0.5)
    changes = {"q.weight": product(6, 5, 2), "v.weight": product(3, 5, 1)}
    filled = site.parameters(Tenant("a", {name: lambda pair=pair: pair for name, pair in changes.items()}))
    down, up = filled["qkv.lora_A"], filled["qkv.lora_B"]
    assert down.shape == (5, 3) and up.shape == (3, 11)
    assert not up[:2, 6:].any() and not up[2, :8].any()  # q's rank reaches q alone, v's v
    want = np.zeros((11, 5), np.float32)
    want[:6], want[8:] = (left @ right for left, right in changes.values())
    np.testing.assert_allclose((down @ up).T, 0.5 * want, rtol=1e-5, atol=1e-6)


def test_a_tenant_that_changes_nothing_here_has_no_parameters() -> None:
    assert Site("o", {"o": 4}, 5).parameters(Tenant("a", {"q.weight": lambda: product(4, 5, 2)})) == {}
    assert Site("o", {"o": 4}, 5).parameters(Tenant("a", {"o.weight": lambda: product(4, 5, 0)})) == {}  # AdaLoRA prunes to rank 0


@pytest.mark.parametrize("scheme", ["fp32", "int4-g32"])
def test_without_an_adapter_the_graph_gives_the_base_to_the_last_bit(make_checkpoint: Any, tmp_path: Path, scheme: str) -> None:
    changes = {f"model.layers.{layer}.mlp.up_proj.weight": lambda: product(112, 80, 4) for layer in range(2)}
    logits = []
    for name, tenants in (("plain", ()), ("served", (Tenant("a", changes),))):
        (tmp_path / name).mkdir()
        export_decoder(make_checkpoint(), Schemes(parse_scheme(scheme)), tmp_path / name, tenants=tenants)
        session = ort.InferenceSession(tmp_path / name / "model.onnx", providers=["CPUExecutionProvider"])
        past = {item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32) for item in session.get_inputs() if item.name.startswith("past")}
        ids = np.array([[3, 1, 4, 1, 5]], np.int64)
        logits.append(session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **past})[0])
    assert np.array_equal(*logits)


def test_the_graphs_own_scale_of_a_matrix_applies_to_the_product_too(make_checkpoint: Any, tmp_path: Path) -> None:
    """granite multiplies each branch by residual_multiplier, which the builder folds into o_proj and down_proj."""
    name = "model.layers.0.mlp.down_proj.weight"
    left, right = product(80, 112, 3)
    extra = {"model_type": "granite", "residual_multiplier": 0.25, "attention_multiplier": 0.2, "embedding_multiplier": 2.0, "logits_scaling": 1.0}
    found = []
    for folder, tenants, change in (("merged", (), left @ right), ("served", (Tenant("a", {name: lambda: (left, right)}),), 0)):
        (tmp_path / folder).mkdir()

        def add(arrays: dict[str, np.ndarray], change: Any = change) -> None:
            arrays[name] += change

        export_decoder(make_checkpoint(add, **extra), FP32, tmp_path / folder, tenants=tenants)
        session = ort.InferenceSession(tmp_path / folder / "model.onnx", providers=["CPUExecutionProvider"])
        past = {item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32) for item in session.get_inputs() if item.name.startswith("past")}
        options = ort.RunOptions()
        if tenants:
            adapter = ort.LoraAdapter()
            adapter.Load(str(tmp_path / folder / "a.onnx_adapter"))
            options.add_active_adapter(adapter)
        ids = np.array([[3, 1, 4, 1, 5]], np.int64)
        found.append(session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **past}, options)[0])
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)


def test_a_tensor_that_the_graph_does_not_multiply_with_is_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    lost = Tenant("a", {"model.layers.7.mlp.up_proj.weight": lambda: product(112, 80, 4)})
    with pytest.raises(ArchitectureError, match=r"adapter a: model.layers.7.mlp.up_proj.weight.*merge this delta instead"):
        export_decoder(make_checkpoint(), FP32, tmp_path, tenants=(lost,))


def test_the_version_tells_bases_apart() -> None:
    assert model_version("0" * 64) == 0 and 0 < model_version("f" * 64) < 2**31
