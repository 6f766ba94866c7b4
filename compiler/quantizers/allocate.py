"""Which row of choices each matrix gets: least loss within limits, over all matrices together.

    minimise  sum_i loss[i, x_i]    subject to   sum_i cost_q[i, x_i] <= limit_q   for every limited quantity q

The relaxation's optimum lies on the convex hull of each matrix's (cost, loss) points, where one price per limit picks a point of every matrix at once:

1. For prices p the cheapest choice of matrix i is argmin_c loss[i, c] + sum_q p_q cost_q[i, c]. All matrices are independent given p.
2. The price of each limit is the smallest at which it holds, found by bisection; with several limits in turn,
   until no price moves (coordinate ascent of the dual).
3. Repair: what a limit leaves over is spent on single changes, then on pairs (one matrix up, another down), the most useful first, until none lowers the loss.
4. With one limit, the rest of the gap is searched. A choice whose reduced cost at the price exceeds the gap between the repaired loss and the dual bound is
   in no better solution; what is left is enumerated matrix by matrix, keeping (cost, loss) pairs that no other beats in both, at most STATES of them.
   A test holds the result to scipy's milp.

Sizes: a model of 121 matrices and 8 choices takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from compiler.errors import RecipeError

BISECTIONS = 60
SWEEPS = 30
PAIRS_MOST = 400  # repairs
STATES = 20_000


@dataclass(frozen=True)
class Allocation:
    """What a choice is made from. loss, cost[q]: float64 [items, choices]; limits[q]: the most that the sum of cost[q] may be."""

    loss: np.ndarray
    cost: Mapping[str, np.ndarray]
    limits: Mapping[str, float]

    def spent(self, chosen: np.ndarray) -> dict[str, float]:
        """Sum of each cost under a choice int [items]."""
        rows = np.arange(len(chosen))
        return {name: float(cost[rows, chosen].sum()) for name, cost in self.cost.items()}

    def total_loss(self, chosen: np.ndarray) -> float:
        return float(self.loss[np.arange(len(chosen)), chosen].sum())

    def holds(self, chosen: np.ndarray) -> bool:
        spent = self.spent(chosen)
        return all(spent[name] <= limit * (1 + 1e-12) for name, limit in self.limits.items())


def allocate(problem: Allocation) -> np.ndarray:
    """The chosen column of every item, int64 [items], by rules 1-3. Raises RecipeError when even the cheapest choices exceed a limit."""
    for name, limit in problem.limits.items():
        least = float(problem.cost[name].min(axis=1).sum())
        if least > limit:
            raise RecipeError(
                f"limit {name}",
                expected=f"at least {least:.6g}, what the cheapest choices take",
                found=f"{limit:.6g}",
                remedy="raise the limit or shrink the model",
            )
    prices, chosen = by_prices(problem)
    chosen = repair(problem, chosen)
    if len(problem.limits) == 1:
        ((name, limit),) = problem.limits.items()
        return close_gap(problem.loss, problem.cost[name], limit, prices[name], chosen)
    return chosen


def by_prices(problem: Allocation) -> tuple[dict[str, float], np.ndarray]:
    """Rules 1 and 2: the prices and what is chosen at them."""
    names = list(problem.limits)
    scale = {name: float(problem.loss.max() - problem.loss.min() + 1e-30) / float(np.ptp(problem.cost[name]) + 1e-30) for name in names}
    prices = dict.fromkeys(names, 0.0)

    def chosen(given: Mapping[str, float]) -> np.ndarray:
        total = problem.loss.copy()
        for name, price in given.items():
            total += price * problem.cost[name]
        return total.argmin(axis=1)

    for _ in range(SWEEPS if len(names) > 1 else 1):
        before = dict(prices)
        for name in names:
            prices[name] = _smallest(lambda price, name=name: problem.spent(chosen({**prices, name: price}))[name] <= problem.limits[name], scale[name])
        if all(abs(prices[name] - before[name]) <= 1e-9 * (scale[name] + prices[name]) for name in names):
            break
    found = chosen(prices)
    return prices, found if problem.holds(found) else _cheapest(problem)


def _smallest(fits: object, scale: float) -> float:
    """The smallest price at which a limit holds; costs fall as their price rises."""
    assert callable(fits)
    if fits(0.0):
        return 0.0
    low, high = 0.0, scale * 1e-6
    while not fits(high) and high < scale * 1e12:
        low, high = high, high * 4
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _cheapest(problem: Allocation) -> np.ndarray:
    """A choice that holds every limit where prices found none: the least sum of costs as shares of their limits."""
    shares = sum(problem.cost[name] / limit for name, limit in problem.limits.items())
    found = np.asarray(shares).argmin(axis=1)
    if not problem.holds(found):
        names = ", ".join(problem.limits)
        raise RecipeError(f"limits {names}", expected="limits that can hold together", found="none of the choices does", remedy="raise one of them")
    return found


def repair(problem: Allocation, chosen: np.ndarray) -> np.ndarray:
    """Rule 3: single changes, then pairs, each the one that lowers the loss most while every limit holds."""
    chosen = chosen.copy()
    for _ in range(PAIRS_MOST):
        rows = np.arange(len(chosen))
        gain = problem.loss - problem.loss[rows, chosen][:, None]  # [items, choices] change of the loss
        more = {name: problem.cost[name] - problem.cost[name][rows, chosen][:, None] for name in problem.limits}
        spent = problem.spent(chosen)
        room = {name: limit - spent[name] for name, limit in problem.limits.items()}
        if not (_single(chosen, gain, more, room) or _pair(chosen, gain, more, room)):
            break
    return chosen


def close_gap(loss: np.ndarray, cost: np.ndarray, limit: float, price: float, chosen: np.ndarray) -> np.ndarray:
    """Rule 4."""
    rows = np.arange(len(loss))
    priced = loss + price * cost
    reduced = priced - priced.min(axis=1, keepdims=True)
    best = float(loss[rows, chosen].sum())
    gap = best - (float(priced.min(axis=1).sum()) - price * limit)
    open_items = [item for item in rows if (reduced[item] <= gap).sum() > 1]
    closed = np.setdiff1d(rows, open_items)
    found = chosen.copy()
    found[closed] = reduced[closed].argmin(axis=1)
    spent, lost, over = (np.array([float(table[closed, found[closed]].sum())]) for table in (cost, loss, reduced))
    trail: list[tuple[np.ndarray, np.ndarray]] = []  # of each open item: which state a state came from, and the column it took
    for item in open_items:
        columns = np.flatnonzero(reduced[item] <= gap)
        origin, column = np.repeat(np.arange(len(spent)), len(columns)), np.tile(columns, len(spent))
        spent, lost, over = spent[origin] + cost[item, column], lost[origin] + loss[item, column], over[origin] + reduced[item, column]
        order = np.lexsort((lost, spent))
        order = order[(over[order] <= gap) & (lost[order] < np.minimum.accumulate(np.concatenate([[np.inf], lost[order][:-1]])))]  # beaten in neither
        order = order[np.sort(np.argsort(over[order], kind="stable")[:STATES])]
        spent, lost, over = spent[order], lost[order], over[order]
        trail.append((origin[order], column[order]))
    fits = np.flatnonzero(spent <= limit)
    if not len(fits) or lost[fits].min() >= best:
        return chosen
    at = fits[lost[fits].argmin()]
    for item, (origin, column) in zip(reversed(open_items), reversed(trail), strict=True):
        found[item], at = column[at], origin[at]
    return found


def _single(chosen: np.ndarray, gain: np.ndarray, more: Mapping[str, np.ndarray], room: Mapping[str, float]) -> bool:
    fits = gain < -1e-15
    for name, extra in more.items():
        fits &= extra <= room[name]
    if not fits.any():
        return False
    item, column = np.unravel_index(np.where(fits, gain, np.inf).argmin(), gain.shape)
    chosen[item] = column
    return True


def _pair(chosen: np.ndarray, gain: np.ndarray, more: Mapping[str, np.ndarray], room: Mapping[str, float]) -> bool:
    """One item changes for the better, another for the worse; together the loss falls and every limit holds."""
    flat, width = gain.reshape(-1), gain.shape[1]
    better, worse = np.flatnonzero(flat < -1e-15), np.flatnonzero(flat >= 0)
    together = flat[better][:, None] + flat[worse][None, :]
    fits = (together < -1e-12 * max(1e-30, np.abs(flat).max())) & (better[:, None] // width != worse[None, :] // width)
    for name, extra in more.items():
        fits &= extra.reshape(-1)[better][:, None] + extra.reshape(-1)[worse][None, :] <= room[name]
    if not fits.any():
        return False
    up, down = np.unravel_index(np.where(fits, together, np.inf).argmin(), together.shape)
    for place in (better[up], worse[down]):
        chosen[place // width] = place % width
    return True
