"""Selective restore: only, scale, and what they mean for kinds that add, multiply and replace."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.deltas.base import Delta, Edit
from compiler.deltas.select import EVERYTHING, Selection, module_of, selection
from compiler.errors import DeltaError, RecipeError
from compiler.stages.merge import merged_view, plan_merge

MODULES = ("model.layers.0.mlp.up", "model.layers.0.attn.q", "model.layers.1.mlp.up", "model.norm")


def f32(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("<f4")


BASE = {f"{module}.weight": f32(4, 3, seed=number) for number, module in enumerate(MODULES)}


def base_of(arrays: dict[str, np.ndarray] = BASE) -> Checkpoint:
    def view(name: str, array: np.ndarray) -> TensorView:
        return TensorView(name, array.shape, "F32", lambda start, stop: array[start:stop].copy())

    return Checkpoint({name: view(name, array) for name, array in arrays.items()}, {"model_type": "llama"}, {}, "the base", lambda: "b" * 64)


def adds(weight: float = 1.0, names: tuple[str, ...] = tuple(BASE), select: Selection = EVERYTHING, name: str = "d") -> Delta:
    """Adds 1 to every entry; kind and digest only tell it apart."""
    edits = tuple(Edit(one, (4, 3), lambda first, base, turned: np.ones_like(base)) for one in names)
    return Delta("lora", name, weight, edits, lambda: name * 8, name=name, select=select)


def doubles(select: Selection) -> Delta:
    """A kind that multiplies: f(W) = 2 W."""
    edits = tuple(Edit(one, (4, 3), lambda first, base, turned: base.copy(), reads_base=True) for one in BASE)
    return Delta("ia3", "twice", 1.0, edits, lambda: "2" * 8, select=select)


def change(deltas: list[Delta], select: Selection = EVERYTHING, **more: Any) -> dict[str, float]:
    """Module -> what was added to its first entry."""
    merged = plan_merge(base_of(), deltas, select=select, **more).view()
    return {module_of(name): round(float(view.read()[0, 0] - BASE[name][0, 0]), 4) for name, view in merged.tensors.items()}


def test_only_and_scale_by_hand() -> None:
    own = selection(["*.layers.*"], {"*.mlp.*": 0.5, "model.layers.1.*": -2}, "d")
    assert change([adds(2.0, select=own)]) == {MODULES[0]: 1.0, MODULES[1]: 2.0, MODULES[2]: -4.0, MODULES[3]: 0.0}


def test_the_mixtures_patterns_come_before_each_deltas_own() -> None:
    everywhere = selection(["*.layers.*"], {"*.mlp.*": 0.5}, "deltas")
    own = selection(["*.0.*"], {"*.up": 3}, "d")
    assert change([adds(select=own), adds(10.0, name="e")], everywhere) == {MODULES[0]: 3 + 5, MODULES[1]: 1 + 10, MODULES[2]: 5.0, MODULES[3]: 0.0}


def test_a_factor_is_a_straight_line_for_kinds_that_multiply() -> None:
    merged = merged_view(base_of(), [doubles(selection([], {"*.up": 0.25, "model.norm": 0}, "d"))])
    for name, factor in zip(BASE, (1.25, 2.0, 1.25, 1.0), strict=True):
        np.testing.assert_allclose(merged.tensors[name].read(), factor * BASE[name], rtol=1e-6)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "magnitude_prune"])
def test_every_method_of_combination_scales(method: str) -> None:
    from compiler.deltas.combine import combine_named

    select = selection([], {"*.0.mlp.*": 0.5}, "d")
    whole, half = (change([adds(select=one)], combine=combine_named(method, None if method == "linear" else 1.0)) for one in (Selection(), select))
    assert half == {**whole, MODULES[0]: 0.5}


@given(st.floats(-4, 4, width=32), st.floats(-4, 4, width=32))
def test_scale_is_a_weight_of_its_own(weight: float, factor: float) -> None:
    scaled = merged_view(base_of(), [adds(weight, select=selection([], {"*": factor}, "d"))])
    weighted = merged_view(base_of(), [adds(weight * factor)])
    for name in BASE:
        np.testing.assert_array_equal(scaled.tensors[name].read(), weighted.tensors[name].read())


def test_a_replaced_module_needs_weight_times_factor_one() -> None:
    new = f32(4, 3, seed=9)
    edit = Edit("model.norm.weight", (4, 3), lambda first, base, turned: new[first : first + len(base)], replaces=True)
    delta = replace(adds(0.5), edits=(edit,))
    with pytest.raises(DeltaError, match=r"expected weight 1.0 for a module that is replaced or added whole, found 0.5"):
        change([delta])
    merged = merged_view(base_of(), [replace(delta, select=selection([], {"model.norm": 2}, "d"))])
    np.testing.assert_array_equal(merged.tensors["model.norm.weight"].read(), new)


@pytest.mark.parametrize(
    ("own", "everywhere", "message"),
    [
        (
            selection(["*.mlpp.*"], {}, "d"),
            Selection(),
            r"d: '\*.mlpp.\*': expected a pattern of a module that .* found no match; the nearest is 'model.layers.[01].mlp.up'",
        ),
        (selection([], {"*.mlp.down": 2.0}, "d"), Selection(), r"d: '\*.mlp.down': .* found no match; the nearest is 'model.layers.[01].mlp.up'"),
        (Selection(), selection(["lm_head"], {}, "d"), r"deltas: 'lm_head': .* no match"),
        (selection(["*.mlp.*"], {}, "d"), selection(["*.attn.*"], {}, "d"), r"d: expected a module that \*.attn.\*, \*.mlp.\* keeps, found none"),
        (selection([], {"*": 1e308}, "d"), Selection(), r"expected a finite weight, found 100.0 x 1e\+308"),
    ],
)
def test_selections_that_say_nothing_are_refused(own: Selection, everywhere: Selection, message: str) -> None:
    with pytest.raises(DeltaError, match=message):
        plan_merge(base_of(), [adds(100.0, select=own)], select=everywhere)


def test_a_mixtures_pattern_may_leave_one_delta_alone() -> None:
    attention, mlp = adds(names=(f"{MODULES[1]}.weight",)), adds(names=(f"{MODULES[0]}.weight",), name="e")
    assert change([attention, mlp], selection([], {"*.mlp.*": 0.5}, "d"))[MODULES[0]] == 0.5


def test_record_and_digest_know_the_selection() -> None:
    own, everywhere = selection(["*.mlp.*"], {"*.0.*": 0.5}, "d"), selection([], {"*": 2}, "deltas")
    plans = [plan_merge(base_of(), [adds(select=one)], select=all_) for one in (Selection(), own) for all_ in (Selection(), everywhere)]
    assert len({plan.view().digest for plan in plans}) == 4
    record = json.loads(json.dumps(plans[3].record()))
    assert record["select"] == {"scale": [["*", 2.0]]}
    assert record["deltas"][0]["select"] == {"only": ["*.mlp.*"], "scale": [["*.0.*", 0.5]]}
    assert record["deltas"][0]["name"] == "d" and record["deltas"][0]["tensors"] == [f"{MODULES[0]}.weight", f"{MODULES[2]}.weight"]


def test_merge_command_takes_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from compiler import model_tools
    from compiler.cli import cli

    seen: list[Any] = []
    monkeypatch.setattr(model_tools, "merge_files", lambda mixture, *rest: seen.append(mixture) or {})
    options = ["merge", "base", "--delta", "a/b=0.5", "--only", "*.mlp.*", "--scale", "*.0.*=0.5", "--scale", "a=b=2", "--out", str(tmp_path)]
    assert CliRunner().invoke(cli, options, catch_exceptions=False).exit_code == 0
    assert seen[0].select == Selection(("*.mlp.*",), (("*.0.*", 0.5), ("a=b", 2.0)))
    assert [(one.path, one.weight, one.name) for one in seen[0].deltas] == [("a/b", 0.5, "b")]
    with pytest.raises(RecipeError, match=r"--scale \*.mlp.\*: expected PATTERN=number, found '\*.mlp.\*'"):
        CliRunner().invoke(cli, ["merge", "base", "--scale", "*.mlp.*", "--out", "x"], catch_exceptions=False)
