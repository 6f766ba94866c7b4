"""Combine methods against slow twins that see whole arrays, and against PEFT's own functions where its rule is the same."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.deltas import mix
from compiler.deltas.base import Delta, Edit
from compiler.deltas.combine import METHODS, Combine, combine_named
from compiler.deltas.mix import LastBlock, Term, Threshold, kept_count, kth_magnitude, mixed_rows, survivors
from compiler.errors import RecipeError
from compiler.recipe import parse_recipe
from compiler.stages.merge import merged_view, plan_merge

NAME = "model.layers.0.self_attn.q_proj.weight"


def f32(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("<f4")


def coarse(*shape: int, seed: int = 0) -> np.ndarray:
    """Few distinct values, many equal magnitudes and zeros."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype("<f4")


# the slow twins: one line of the docstring each, entry by entry


def slow_top(difference: np.ndarray, density: float) -> np.ndarray:
    flat, out = difference.reshape(-1), np.zeros(difference.size, np.float32)
    order = sorted(range(flat.size), key=lambda i: (-abs(float(flat[i])), i))
    for i in order[: max(1, int(density * flat.size))]:
        out[i] = flat[i]
    return out.reshape(difference.shape)


def slow_drop(difference: np.ndarray, density: float, seed: int, key: str) -> np.ndarray:
    flat, out = difference.reshape(-1), np.zeros(difference.size, np.float32)
    for i in range(flat.size):
        if survivors((seed, NAME, key), i, 1, density)[0]:
            out[i] = flat[i] / np.float32(density)
    return out.reshape(difference.shape)


def slow_elect(weights: Sequence[float], differences: Sequence[np.ndarray]) -> np.ndarray:
    out = np.zeros_like(differences[0])
    for place in np.ndindex(out.shape):
        total = np.float32(0)
        for difference in differences:
            total += difference[place]
        sign = 1 if total >= 0 else -1
        agreeing = [(weight, difference[place]) for weight, difference in zip(weights, differences, strict=True) if np.sign(difference[place]) == sign]
        value = np.float32(0)
        for weight, entry in agreeing:
            value += np.float32(weight) * entry
        out[place] = value / np.float32(max(len(agreeing), 1))
    return out


def slow_sum(weights: Sequence[float], differences: Sequence[np.ndarray]) -> np.ndarray:
    total = np.zeros_like(differences[0])
    for weight, difference in zip(weights, differences, strict=True):
        total = total + np.float32(weight) * difference
    return total


def slow(combine: Combine, base: np.ndarray, weights: Sequence[float], differences: Sequence[np.ndarray]) -> np.ndarray:
    density, seed = combine.density or 1.0, combine.seed or 0
    if combine.row.prune == "magnitude":
        differences = [slow_top(one, density) for one in differences]
    elif combine.row.prune == "random":
        differences = [slow_drop(one, density, seed, f"key {number}") for number, one in enumerate(differences)]
    mixture = slow_elect(weights, differences) if combine.row.elect else slow_sum(weights, differences)
    if combine.row.truncate and base.ndim == 2:
        u, s, v = np.linalg.svd(mixture.astype(np.float64), full_matrices=False)
        mixture = ((u * s)[:, : combine.rank] @ v[: combine.rank]).astype(np.float32)
    return base + mixture


def fast(combine: Combine, base: np.ndarray, weights: Sequence[float], differences: Sequence[np.ndarray]) -> Any:
    terms = [
        Term(weight, f"key {number}", lambda first, rows, one=one: one[first : first + len(rows)].copy())
        for number, (weight, one) in enumerate(zip(weights, differences, strict=True))
    ]
    return mixed_rows(NAME, base.shape, lambda start, stop: base[start:stop].copy(), terms, combine, LastBlock())


CASES = {
    "svd": combine_named("svd", rank=2),
    "magnitude_prune": combine_named("magnitude_prune", 0.3),
    "ties": combine_named("ties", 0.3),
    "ties, all kept": combine_named("ties", 1.0),
    "ties, hardly any": combine_named("ties", 0.001),
    "dare_linear": combine_named("dare_linear", 0.4, 7),
    "dare_ties": combine_named("dare_ties", 0.6, 1),
}


@pytest.mark.parametrize("make", [f32, coarse])
@pytest.mark.parametrize("shape", [(13, 7), (5, 11), (9,)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("grid", [4, 100, 1 << 20])
def test_equals_the_slow_twin(case: str, shape: tuple[int, ...], make: Any, grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix, "GRID_BYTES", grid)
    combine, base, weights = CASES[case], f32(*shape, seed=9), [1.0, -0.5, 0.3]
    differences = [make(*shape, seed=number) for number in range(3)]
    expected = slow(combine, base, weights, differences)
    found = fast(combine, base, weights, differences)(0, shape[0])
    if combine.row.truncate:
        np.testing.assert_allclose(found, expected, atol=1e-5)
    else:
        np.testing.assert_array_equal(found, expected)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(1, 9), cuts=st.lists(st.integers(0, 40), max_size=5), case=st.sampled_from(sorted(CASES)))
def test_any_row_blocks_in_any_order_give_the_same_bits(rows: int, width: int, cuts: list[int], case: str) -> None:
    combine, base = CASES[case], f32(rows, width, seed=9)
    differences = [coarse(rows, width, seed=1), f32(rows, width, seed=2)]
    whole = fast(combine, base, [0.7, 0.2], differences)(0, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mix, "GRID_BYTES", 12 * width)
        view = fast(combine, base, [0.7, 0.2], differences)
        edges = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
        blocks = {start: view(start, stop) for start, stop in reversed(list(itertools.pairwise(edges)))}
    np.testing.assert_array_equal(np.concatenate([blocks[start] for start in sorted(blocks)]), whole)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60), keep=st.integers(1, 60), step=st.integers(1, 20))
def test_kth_magnitude_is_exact(values: list[float], keep: int, step: int) -> None:
    flat = np.array(values, np.float32)
    keep = min(keep, len(flat))
    found = kth_magnitude(lambda: [flat[i : i + step] for i in range(0, len(flat), step)], keep)
    expected = np.sort(np.abs(flat))[::-1][keep - 1]
    assert np.array(found.bits, np.uint32).view(np.float32) == expected
    if expected:
        kept = mix.trimmed(flat.copy(), 0, found)
        above = [i for i in range(len(flat)) if abs(flat[i]) > expected]
        equal = [i for i in range(len(flat)) if abs(flat[i]) == expected]
        assert sorted(np.flatnonzero(kept)) == sorted(above + equal[: keep - len(above)])


def test_kth_magnitude_by_hand() -> None:
    two = int(np.array(2, np.float32).view(np.uint32))
    assert kth_magnitude(lambda: [np.array([3, -1, 2], np.float32)], 2) == Threshold(two)
    assert kth_magnitude(lambda: [np.array([2, -2], np.float32), np.array([2, 1], np.float32)], 2) == Threshold(two, 1)
    assert (kept_count(10, 0.25), kept_count(3, 0.2), kept_count(4, 1.0)) == (2, 1, 4)


def test_ties_by_hand() -> None:
    """The worked case of `elect`, and figure 1 of the paper in small: the largest stay, the sign with more mass wins, its entries are averaged."""
    base = np.zeros((1, 4), np.float32)
    first, second = np.array([[3, 1, 1, 0.1]], np.float32), np.array([[-1, 3, 0.1, -4]], np.float32)
    np.testing.assert_array_equal(fast(combine_named("ties", 1.0), base, [1, 1], [first, second])(0, 1), np.array([[3, 2, 0.55, -4]], np.float32))
    np.testing.assert_array_equal(fast(combine_named("ties", 0.75), base, [1, 1], [first, second])(0, 1), np.array([[3, 2, 1, -4]], np.float32))


def test_survivors_depend_on_place_alone() -> None:
    whole = survivors((3, "a", "k"), 0, 1000, 0.3)
    for first, count in ((0, 1), (1, 8), (7, 9), (8, 8), (493, 507), (999, 1)):
        np.testing.assert_array_equal(survivors((3, "a", "k"), first, count, 0.3), whole[first : first + count])
    assert survivors((0, "a", "k"), 5, 100, 1.0).all()
    many = survivors((3, "a", "k"), 0, 200_000, 0.3)
    assert abs(many.mean() - 0.3) < 5 * (0.3 * 0.7 / 200_000) ** 0.5
    for other in ((4, "a", "k"), (3, "b", "k"), (3, "a", "l")):
        agreement = (survivors(other, 0, 200_000, 0.3) == many).mean()
        assert abs(agreement - (0.3**2 + 0.7**2)) < 0.01  # independent
    # golden: the stream must not move between versions of numpy, or a cached build and a new one differ
    assert "".join(str(int(one)) for one in survivors((0, "w", "d"), 0, 24, 0.5)) == GOLDEN


GOLDEN = "101000001001001011100000"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("method", ["magnitude_prune", "ties"])
def test_equals_the_functions_of_peft_on_whole_differences(method: str, density: float) -> None:
    """PEFT calls them on LoRA factors; called on differences, they are the same rule."""
    torch = pytest.importorskip("torch")
    theirs = getattr(pytest.importorskip("peft.utils.merge_utils"), method)
    base, weights = np.zeros((17, 10), np.float32), [1.0, 0.4, -0.7]
    differences = [f32(17, 10, seed=number) for number in range(3)]
    expected = theirs([torch.from_numpy(one) for one in differences], torch.tensor(weights), density).numpy()
    np.testing.assert_allclose(fast(combine_named(method, density), base, weights, differences)(0, 17), expected, rtol=1e-6, atol=1e-6)


# in a merge


def delta(difference: np.ndarray, weight: float, key: str, target: str = NAME) -> Delta:
    edit = Edit(target, difference.shape, lambda first, base, transposed: difference[first : first + len(base)].copy())
    return Delta("test", key, weight, (edit,), lambda: key)


def base_of(**arrays: np.ndarray) -> Checkpoint:
    tensors = {name: TensorView(name, one.shape, "F32", lambda start, stop, one=one: one[start:stop].copy()) for name, one in arrays.items()}
    return Checkpoint(tensors, {"model_type": "llama"}, {}, "the base", lambda: "b" * 64)


@pytest.mark.parametrize("case", CASES)
def test_a_merge_uses_the_method(case: str) -> None:
    base, differences, weights = f32(12, 8, seed=9), [f32(12, 8, seed=1), f32(12, 8, seed=2)], [0.6, 0.4]
    deltas = [delta(one, weight, f"key {number}") for number, (one, weight) in enumerate(zip(differences, weights, strict=True))]
    plan = plan_merge(base_of(**{NAME: base, "other": base}), deltas, CASES[case])
    merged = plan.view()
    np.testing.assert_allclose(merged.tensors[NAME].read(), slow(CASES[case], base, weights, differences), atol=1e-5)
    np.testing.assert_array_equal(merged.tensors["other"].read(), base)
    assert plan.record()["combine"] == str(CASES[case])
    json.dumps(plan.record())


def test_cat_is_linear_and_every_parameter_moves_the_digest() -> None:
    base, deltas = base_of(**{NAME: f32(6, 4)}), [delta(f32(6, 4, seed=1), 0.5, "a"), delta(f32(6, 4, seed=2), 2.0, "b")]
    read = {method: merged_view(base, deltas, method).tensors[NAME].read() for method in ("linear", "cat")}
    np.testing.assert_array_equal(read["linear"], read["cat"])
    methods = [*CASES.values(), combine_named("linear"), combine_named("dare_ties", 0.6, 2), combine_named("ties", 0.31), combine_named("svd", rank=3)]
    assert len({merged_view(base, deltas, one).digest for one in methods}) == len(methods)


def test_order_of_deltas_does_not_move_the_draws() -> None:
    base, one, two = base_of(**{NAME: f32(6, 4)}), delta(f32(6, 4, seed=1), 0.5, "a"), delta(f32(6, 4, seed=2), 2.0, "b")
    method = combine_named("dare_linear", 0.5)
    found = [merged_view(base, deltas, method).tensors[NAME].read() for deltas in ([one, two], [two, one])]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_two_edits_of_one_delta_are_one_difference() -> None:
    halves = [f32(6, 4, seed=1), f32(6, 4, seed=2)]
    edits = tuple(Edit(NAME, (6, 4), lambda first, base, transposed, one=one: one[first : first + len(base)].copy()) for one in halves)
    both = Delta("test", "both", 1.0, edits, lambda: "both")
    found = merged_view(base_of(**{NAME: np.zeros((6, 4), np.float32)}), [both], combine_named("ties", 1.0)).tensors[NAME].read()
    np.testing.assert_allclose(found, halves[0] + halves[1], atol=1e-6)


# what a recipe may say


def recipe(combine: Any) -> Any:
    return parse_recipe({"name": "x", "base": "base", "combine": combine}, Path("recipe.yaml"))


def test_recipe_takes_a_name_or_a_mapping() -> None:
    assert str(recipe("ties").combine.checked) == "ties density=0.2"
    assert str(recipe("linear").combine.checked) == "linear" == str(parse_recipe({"name": "x", "base": "b"}, Path("recipe.yaml")).combine.checked)
    assert str(recipe({"method": "dare_ties", "density": 0.5, "seed": 3}).combine.checked) == "dare_ties density=0.5 seed=3"
    assert str(recipe({"method": "svd", "rank": 8}).combine.checked) == "svd rank=8"


BAD: dict[str, tuple[Any, str]] = {
    "unknown": ("tise", r"combine: expected one of linear, cat, svd, .* found 'tise'; did you mean 'ties'\?"),
    "parameter of another": ({"method": "linear", "density": 0.5}, "combine.density: expected no parameter for linear, found 0.5; remove density"),
    "seed of another": ({"method": "ties", "seed": 1}, "combine.seed: expected density for ties, found 1"),
    "density 0": ({"method": "ties", "density": 0}, "combine.density: expected a number above 0 and at most 1, found 0"),
    "density 2": ({"method": "dare_ties", "density": 2}, "combine.density: expected a number above 0 and at most 1, found 2"),
    "no rank": ("svd", "combine.rank: expected a whole number of at least 1 for svd, found None"),
    "rank 0": ({"method": "svd", "rank": 0}, "combine.rank: expected a whole number of at least 1"),
    "negative seed": ({"method": "dare_linear", "seed": -1}, "combine.seed: expected a whole number of at least 0"),
    "unknown key": (
        {"method": "ties", "denstiy": 0.1},
        r"combine.denstiy: expected one of density, method, rank, seed, found unknown key 'denstiy'; did you mean 'density'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_combines_are_told_in_one_line(case: str) -> None:
    value, message = BAD[case]
    with pytest.raises(RecipeError, match=message) as caught:
        recipe(value)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_every_method_has_a_case() -> None:
    assert {one.method for one in CASES.values()} | {"linear", "cat"} == set(METHODS)
