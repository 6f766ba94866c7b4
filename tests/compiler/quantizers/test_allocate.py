"""Allocation: the least loss within limits, against an exact solver, and what happens when nothing fits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.errors import RecipeError
from compiler.quantizers.allocate import Allocation, allocate


def random_problem(seed: int, items: int, limits: int = 1, tightness: float = 0.4) -> Allocation:
    """Rows as quantization has them: the dearer a choice, the less it loses, but not always."""
    rng = np.random.default_rng(seed)
    size = rng.lognormal(0, 1, (items, 1))
    bits = np.array([4.25, 4.5, 5.0, 8.25, 8.5, 9.0])
    loss = rng.lognormal(0, 1.5, (items, 1)) * 4.0 ** -(bits - 4) * rng.uniform(0.8, 1.2, (items, 6))
    cost = {f"q{at}": size * bits * rng.uniform(0.8, 1.2, (items, 6)) for at in range(limits)}
    bounds = {name: float(c.min(1).sum() + tightness * (c.max(1).sum() - c.min(1).sum())) for name, c in cost.items()}
    return Allocation(loss, cost, bounds)


def milp_loss(problem: Allocation) -> float:
    """The optimum by scipy's branch and bound."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    items, choices = problem.loss.shape
    one_each = LinearConstraint(np.kron(np.eye(items), np.ones(choices)), 1, 1)
    within = [LinearConstraint(problem.cost[name].reshape(1, -1), -np.inf, limit) for name, limit in problem.limits.items()]
    found = milp(problem.loss.reshape(-1), constraints=[one_each, *within], integrality=np.ones(items * choices), bounds=Bounds(0, 1))
    assert found.success
    return float(found.fun)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tightness", [0.02, 0.3, 0.8])
def test_one_limit_is_solved_almost_exactly(seed: int, tightness: float) -> None:
    problem = random_problem(seed, 40, tightness=tightness)
    chosen = allocate(problem)
    assert problem.holds(chosen)
    assert problem.total_loss(chosen) <= 1.005 * milp_loss(problem)


@pytest.mark.parametrize("seed", range(4))
def test_two_limits_at_once(seed: int) -> None:
    problem = random_problem(seed, 30, limits=2)
    chosen = allocate(problem)
    assert problem.holds(chosen)
    assert problem.total_loss(chosen) <= 1.05 * milp_loss(problem)


@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0.0, 1.0))
@settings(max_examples=30, deadline=None)
def test_every_limit_holds_and_no_single_change_helps(seed: int, items: int, tightness: float) -> None:
    problem = random_problem(seed, items, tightness=tightness)
    chosen = allocate(problem)
    assert problem.holds(chosen)
    for item in range(items):
        for column in range(problem.loss.shape[1]):
            other = chosen.copy()
            other[item] = column
            assert not problem.holds(other) or problem.total_loss(other) >= problem.total_loss(chosen) - 1e-12


def test_worked_case() -> None:
    """Two matrices of 1 and 10 MB at 4 bits, twice that at 8: with 13 MB the small one is worth its 8 bits, the large one does not fit."""
    loss, size = np.array([[1.0, 0.1], [1.2, 0.1]]), np.array([[1.0, 2.0], [10.0, 20.0]])
    assert allocate(Allocation(loss, {"size_mb": size}, {"size_mb": 13.0})).tolist() == [1, 0]
    assert allocate(Allocation(loss, {"size_mb": size}, {"size_mb": 21.0})).tolist() == [0, 1]
    assert allocate(Allocation(loss, {"size_mb": size}, {})).tolist() == [1, 1]


def test_more_room_never_loses_more() -> None:
    losses = []
    for tightness in np.linspace(0, 1, 8):
        problem = random_problem(3, 25, tightness=float(tightness))
        losses.append(problem.total_loss(allocate(problem)))
    assert losses == sorted(losses, reverse=True)


def test_a_limit_below_the_smallest_choices_says_so() -> None:
    problem = random_problem(0, 5)
    with pytest.raises(RecipeError, match=r"limit q0: expected at least .* what the cheapest choices take"):
        allocate(Allocation(problem.loss, problem.cost, {"q0": 1e-3}))
