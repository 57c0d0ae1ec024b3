"""Choose one option for each group at least total score within a budget of cost.

This is the multiple-choice knapsack problem. It is solved in two steps:

1. *Bound.* Pricing cost at ``λ`` separates the groups: ``L(λ) = Σ_g min_o (score + λ·cost) −
   λ·budget`` is a lower bound of every choice within the budget, for any ``λ ≥ 0``. The best ``λ``
   is the slope of the step at which a greedy walk along the groups' lower convex hulls runs out of
   budget (Sinha and Zoltners 1979; Kellerer, Pferschy and Pisinger, *Knapsack Problems*, ch. 11).
2. *Exact near the cut.* The excess of an option over its group's minimum in ``L(λ)`` is what it
   adds to the bound at least, so an option whose excess is more than the known gap can be in no
   better choice. The few that remain are combined by dynamic programming over undominated
   (cost, score) states. Whatever has to be dropped to keep this small lowers the reported bound, so
   that the gap is proven whatever happens.
3. *Branch and bound.* Where so many groups are alike that too much had to be dropped, HiGHS (by
   ``scipy.optimize.milp``) goes on with the options that are left.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Literal

import numpy as np
import numpy.typing as npt

from layersense.errors import LayersenseError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BUDGET_TOLERANCE = 1e-9
"""Relative excess over the budget that is put down to rounding."""
MAX_CORE_GROUPS = 256
"""Groups near the cut that are combined exactly; the others keep the bound's option."""
MAX_STATES = 20_000
"""Partial choices kept while they are combined."""
WANTED_GAP = 1e-4
"""Gap beyond which branch and bound goes on."""
MAX_BRANCHED_OPTIONS = 20_000
MAX_NODES = 200
"""Limits of branch and bound: counts, as a limit of time would give another answer each time."""
MILP_TOLERANCE = 2e-6
"""Twice HiGHS' own tolerances."""


@dataclass(frozen=True)
class Problem:
    """Groups and their options.

    Attributes:
        scores: predicted damage, shape (groups, options); infinite where a group has fewer options.
        costs: compressed weight size, in any unit, same shape and the same infinities.
    """

    scores: Floats
    costs: Floats

    @classmethod
    def of(cls, scores: Sequence[Sequence[float]], costs: Sequence[Sequence[float]]) -> "Problem":
        """Make a problem from one list a group; the lists may differ in length.

        Raises:
            ValueError: lengths of scores and costs differ, a group has no option, or a number is
                not finite.
        """
        if [len(row) for row in scores] != [len(row) for row in costs]:
            raise ValueError("scores and costs differ in shape")
        if not all(len(row) for row in scores):
            raise ValueError("every group needs at least one option")
        width = max((len(row) for row in scores), default=0)
        padded = np.full((2, len(scores), width), np.inf)
        for table, rows in zip(padded, (scores, costs), strict=True):
            for index, row in enumerate(rows):
                if not np.isfinite(row).all():
                    raise ValueError(f"group {index}: scores and costs must be finite")
                table[index, : len(row)] = row
        return cls(padded[0], padded[1])


@dataclass(frozen=True)
class Solution:
    """A choice and how good it is.

    Attributes:
        choice: index of the chosen option of each group.
        score: its total score (the largest score under the objective ``max``).
        cost: its total cost.
        lower_bound: no choice within the budget has a lower score.
        gap: ``(score − lower_bound) / score``, 0 where the score is 0.
        price: score that one more unit of cost would save, the ``λ`` of the bound; 0 where the
            budget does not bind, and under the objective ``max``.
    """

    choice: Ints
    score: float
    cost: float
    lower_bound: float
    gap: float
    price: float = 0.0


@dataclass(frozen=True)
class Hull:
    """Lower convex hulls of all groups in the plane of cost and score.

    Attributes:
        start: cheapest option of each group, shape (groups,).
        group, source, target: a step moves this group from one option to the next of its hull.
        slope: score saved for each unit of cost; steps are sorted by it, the steepest first.
    """

    start: Ints
    group: Ints
    source: Ints
    target: Ints
    slope: Floats


def solve(problem: Problem, budget: float, objective: Literal["sum", "max"] = "sum") -> Solution:
    """Choose one option for each group at the least score with total cost within ``budget``.

    Equal problems give equal choices; of options that are equally good, the cheaper one is taken,
    then the first. Under ``max``, the sum is minimised among the choices of least maximum.

    Raises:
        LayersenseError: no choice fits the budget; the message names the lowest cost there is.
    """
    if not len(problem.scores):
        return Solution(np.zeros(0, np.int64), 0.0, 0.0, 0.0, 0.0)
    lowest = fsum(problem.costs.min(axis=1))
    if lowest > budget * (1 + BUDGET_TOLERANCE):
        raise LayersenseError(
            f"the budget of {budget:g} cannot be met: the lowest reachable cost is {lowest:g}"
        )
    return _solve_max(problem, budget) if objective == "max" else _solve_sum(problem, budget)


def hull(problem: Problem) -> Hull:
    """Return the lower convex hulls of all groups: the frontier of the relaxed problem.

    The first n steps, taken together, are the best relaxed choice at their total cost.
    """
    scores, costs = problem.scores, problem.costs
    rows = np.arange(len(scores))
    cheapest = costs == costs.min(axis=1, keepdims=True)
    start = np.where(cheapest, scores, np.inf).argmin(axis=1)
    current, previous = start.copy(), np.full(len(scores), np.inf)
    found: list[tuple[Ints, Ints, Ints, Floats]] = []
    for _ in range(scores.shape[1]):
        # The next corner is the option of steepest descent from here; the farthest of equals.
        with np.errstate(invalid="ignore", divide="ignore"):
            saved = scores[rows, current][:, None] - scores[rows]
            added = costs[rows] - costs[rows, current][:, None]
            slopes = np.where((saved > 0) & (added > 0), saved / added, -1.0)
        steepest = slopes.max(axis=1, initial=-1.0)
        descends = steepest > 0
        if not descends.any():
            break
        farthest = np.where(slopes == steepest[:, None], added, -np.inf).argmax(axis=1)
        rows, source, target = rows[descends], current[descends], farthest[descends]
        # Exactly, slopes fall along a hull; rounding must not let a later step overtake.
        previous = np.minimum(previous[descends], steepest[descends])
        found.append((rows, source, target, previous))
        current = target
    if not found:
        empty = np.zeros(0, np.int64)
        return Hull(start, empty, empty, empty, np.zeros(0))
    group, source, target = (np.concatenate([step[i] for step in found]) for i in range(3))
    slope = np.concatenate([step[3] for step in found])
    order = np.lexsort((np.arange(len(slope)), -slope))
    return Hull(start, group[order], source[order], target[order], slope[order])


def corners(problem: Problem, count: int) -> list[Solution]:
    """Return choices along the whole hull, by rising cost: the frontier of the sum.

    Each corner of the hull is the best choice at its own cost. All of them are returned where
    there are at most ``count``; else at least ``count`` and at most twice as many, half spread
    evenly over the corners and half over the cost.
    """
    if not len(problem.scores):
        return []
    steps = hull(problem)
    rows = np.arange(len(problem.scores))
    added = problem.costs[steps.group, steps.target] - problem.costs[steps.group, steps.source]
    spent = np.concatenate(([0.0], np.cumsum(added)))
    if len(spent) <= count:
        wanted = np.arange(len(spent))
    else:
        by_corner = np.linspace(0, len(spent) - 1, count)
        by_cost = np.searchsorted(spent, np.linspace(0.0, spent[-1], count))
        wanted = np.union1d(np.rint(by_corner).astype(np.int64), np.minimum(by_cost, len(added)))
    choice, taken, found = steps.start.copy(), 0, []
    for corner in wanted:
        passed = slice(taken, int(corner))
        choice[steps.group[passed]] = steps.target[passed]  # of equal groups the last one stays
        taken = int(corner)
        price = float(steps.slope[taken]) if taken < len(added) else 0.0
        bound, _ = _lagrangian(problem, price, fsum(problem.costs[rows, choice]))
        found.append(_solution(problem, choice.copy(), bound, price))
    return found


def relaxed(problem: Problem, budget: float) -> Ints:
    """Return the last corner of the hull within ``budget``: a quick choice, good but not best.

    Where nothing fits, it is the cheapest choice.
    """
    steps = hull(problem)
    added = problem.costs[steps.group, steps.target] - problem.costs[steps.group, steps.source]
    start = fsum(problem.costs[np.arange(len(problem.costs)), steps.start])
    limit = budget * (1 + BUDGET_TOLERANCE)
    fitting = int(np.searchsorted(start + np.cumsum(added), limit, side="right"))
    choice = steps.start.copy()
    choice[steps.group[:fitting]] = steps.target[:fitting]  # of equal groups the last one stays
    return choice


def lower_bounds(problem: Problem, budgets: Sequence[float]) -> list[float]:
    """Return for each budget a sum that no choice within it is below; infinite if none fits."""
    if not len(problem.scores):
        return [0.0] * len(budgets)
    steps = hull(problem)
    added = problem.costs[steps.group, steps.target] - problem.costs[steps.group, steps.source]
    start = fsum(problem.costs[np.arange(len(problem.costs)), steps.start])
    spent = start + np.cumsum(added)
    bounds = []
    for budget in budgets:
        limit = budget * (1 + BUDGET_TOLERANCE)
        fitting = int(np.searchsorted(spent, limit, side="right"))
        price = float(steps.slope[fitting]) if fitting < len(added) else 0.0
        bounds.append(_lagrangian(problem, price, limit)[0] if start <= limit else float("inf"))
    return bounds


def proven(
    choice: Ints, score: float, cost: float, lower_bound: float, price: float = 0.0
) -> Solution:
    """Return a solution with the gap that follows from a lower bound."""
    bound = min(lower_bound, score)
    gap = (score - bound) / abs(score) if score else 0.0
    return Solution(choice, score, cost, bound, gap, price)


def _total(table: Floats, choice: Ints) -> float:
    return fsum(table[np.arange(len(table)), choice])


def _solution(problem: Problem, choice: Ints, lower_bound: float, price: float = 0.0) -> Solution:
    score = _total(problem.scores, choice)
    return proven(choice, score, _total(problem.costs, choice), lower_bound, price)


def _solve_max(problem: Problem, budget: float) -> Solution:
    limit = budget * (1 + BUDGET_TOLERANCE)
    thresholds = np.unique(problem.scores[np.isfinite(problem.scores)])
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        allowed = np.where(problem.scores <= thresholds[middle], problem.costs, np.inf)
        if fsum(allowed.min(axis=1)) <= limit:
            high = middle
        else:
            low = middle + 1
    outside = problem.scores > thresholds[high]
    inner = _solve_sum(
        Problem(
            np.where(outside, np.inf, problem.scores), np.where(outside, np.inf, problem.costs)
        ),
        budget,
    )
    worst = float(problem.scores[np.arange(len(problem.scores)), inner.choice].max())
    return Solution(inner.choice, worst, inner.cost, worst, 0.0)


def _solve_sum(problem: Problem, budget: float) -> Solution:
    limit = budget * (1 + BUDGET_TOLERANCE)
    steps = hull(problem)
    added = problem.costs[steps.group, steps.target] - problem.costs[steps.group, steps.source]
    spent = fsum(problem.costs[np.arange(len(problem.costs)), steps.start]) + np.cumsum(added)
    fitting = int(np.searchsorted(spent, limit, side="right"))
    choice = steps.start.copy()
    choice[steps.group[:fitting]] = steps.target[:fitting]  # of equal groups the last one stays
    if fitting == len(added):
        return _solution(problem, choice, _total(problem.scores, choice))

    price = float(steps.slope[fitting])
    bound, excess = _lagrangian(problem, price, limit)
    greedy = _fill(problem, steps, choice, fitting, limit)
    known = _total(problem.scores, greedy)
    better, core_bound = _improve(problem, choice, excess, price, limit, bound, known)
    if better is not None and _total(problem.scores, better) < known:
        greedy = better
    found = _solution(problem, greedy, core_bound, price)
    if found.gap > WANTED_GAP:
        found = _branch(problem, excess, limit, bound, found)
    return found


def _lagrangian(problem: Problem, price: float, budget: float) -> tuple[float, Floats]:
    """Return the bound at ``price``, safe against rounding, and each option's excess over it."""
    # Padding costs infinitely much, and nothing times that is no number.
    priced = problem.scores + price * problem.costs if price else problem.scores
    least = priced.min(axis=1)
    rounding = 4 * sys.float_info.epsilon * (fsum(np.abs(least)) + price * budget)
    bound = fsum(least) - price * budget - rounding
    return max(bound, fsum(problem.scores.min(axis=1))), priced - least[:, None]


def _fill(problem: Problem, steps: Hull, base: Ints, fitting: int, limit: float) -> Ints:
    """Go on along the hulls beyond the step that did not fit, taking what still does."""
    choice = base.copy()
    slack = limit - _total(problem.costs, choice)
    costs = problem.costs
    for index in range(fitting, len(steps.group)):
        if slack <= 0:
            break
        group, target = steps.group[index], steps.target[index]
        added = costs[group, target] - costs[group, choice[group]]
        if 0 < added <= slack and (
            problem.scores[group, target] < problem.scores[group, choice[group]]
        ):
            choice[group] = target
            slack -= added
    # Rounding of the running slack must not carry the choice over the budget.
    return choice if _total(costs, choice) <= limit else base


def _improve(
    problem: Problem,
    base: Ints,
    excess: Floats,
    price: float,
    limit: float,
    bound: float,
    known: float,
) -> tuple[Ints | None, float]:
    """Search the choices near ``base`` that could be better than ``known``.

    Returns:
        The best choice found, if any, and a proven lower bound of all choices.
    """
    room = known - bound
    if room <= 0:
        return None, known
    rows = np.arange(len(base))
    candidates = excess <= room
    candidates[rows, base] = False
    closeness = np.where(candidates, excess, np.inf).min(axis=1)
    order = np.lexsort((rows, closeness))
    core = order[: min(MAX_CORE_GROUPS, int(np.isfinite(closeness).sum()))]
    dropped = float(closeness[order[len(core)]]) if len(core) < len(order) else np.inf

    # A state is a partial choice: the cost and the excess that it adds to the base.
    cost, over = np.zeros(1), np.full(1, fsum(excess[rows, base]))
    slack = limit - _total(problem.costs, base)
    options = [np.flatnonzero(candidates[group]) for group in core]
    extra = [
        problem.costs[g, o] - problem.costs[g, base[g]] for g, o in zip(core, options, strict=True)
    ]
    # How much cost the groups still to come can give back at most, and add at most.
    falls = np.array([min(0.0, float(change.min())) for change in extra])
    rises = np.array([max(0.0, float(change.max())) for change in extra])
    give_back = np.append(np.cumsum(falls[::-1])[::-1], 0.0)[1:]
    take_up = np.append(np.cumsum(rises[::-1])[::-1], 0.0)[1:]
    trail: list[tuple[Ints, Ints]] = []
    for stage, (group, choices) in enumerate(zip(core, options, strict=True)):
        changes = np.concatenate(([0.0], extra[stage]))
        overs = np.concatenate(([0.0], excess[group, choices] - excess[group, base[group]]))
        picked = np.concatenate(([base[group]], choices))
        all_costs = (cost[:, None] + changes).ravel()
        all_over = (over[:, None] + overs).ravel()
        parent = np.repeat(np.arange(len(cost)), len(changes))
        option = np.tile(picked, len(cost))
        # Budget left unused is priced too, so it adds to what a state costs at least.
        unused = np.maximum(0.0, slack - all_costs - take_up[stage])
        floor = all_over + price * unused
        keep = np.flatnonzero((all_costs + give_back[stage] <= slack) & (floor <= room))
        keep = keep[_undominated(all_costs[keep], all_over[keep] - price * all_costs[keep])]
        if len(keep) > MAX_STATES:
            ranked = keep[np.argsort(floor[keep], kind="stable")]
            dropped = min(dropped, float(floor[ranked[MAX_STATES]]))
            keep = np.sort(ranked[:MAX_STATES])
        cost, over = all_costs[keep], all_over[keep]
        trail.append((parent[keep], option[keep]))
        if not len(keep):
            break

    proven = min(known, bound + dropped)
    if not len(cost):
        return None, proven
    total = over + price * (slack - cost)
    for state in np.argsort(total, kind="stable")[:16]:
        choice = base.copy()
        index = int(state)
        for stage in range(len(trail) - 1, -1, -1):
            parents, picks = trail[stage]
            choice[core[stage]] = picks[index]
            index = int(parents[index])
        if _total(problem.costs, choice) <= limit:
            score = _total(problem.scores, choice)
            return choice, min(proven, score)
    return None, min(proven, bound)


def _branch(
    problem: Problem, excess: Floats, limit: float, bound: float, known: Solution
) -> Solution:
    """Return a better solution or a better proof for ``known``, by branch and bound.

    What a choice costs over the bound is the excess of its options and the price of what it leaves
    of the budget; in units of the room that is left, so that HiGHS' tolerances are relative to it.
    """
    from scipy import optimize, sparse

    room = known.score - bound
    groups, options = np.nonzero((excess <= room) & _worthwhile(problem))
    if len(groups) > MAX_BRANCHED_OPTIONS:
        return known
    count = len(groups)
    unit = float(problem.costs[groups, options].max())
    one_each = sparse.csr_array(
        (np.ones(count), (groups, np.arange(count))), (len(excess), count + 1)
    )
    spent = sparse.csr_array(np.append(problem.costs[groups, options] / unit, 1.0)[None, :])
    best, proven_bound = known, known.lower_bound
    # A choice may be over the budget by the tolerance: then once more, with less of it.
    for budget in (limit / unit, limit / unit - MILP_TOLERANCE):
        found = optimize.milp(
            np.append(excess[groups, options], known.price * unit) / room,
            constraints=[
                optimize.LinearConstraint(one_each, 1.0, 1.0),
                optimize.LinearConstraint(spent, budget, budget),
            ],
            integrality=np.append(np.ones(count), 0.0),
            bounds=optimize.Bounds(0.0, np.append(np.ones(count), np.inf)),
            options={"node_limit": MAX_NODES, "mip_rel_gap": WANTED_GAP},
        )
        if budget == limit / unit and found.mip_dual_bound is not None:
            proven_bound = max(proven_bound, bound + room * (found.mip_dual_bound - MILP_TOLERANCE))
        if found.x is None:
            break
        taken = found.x[:-1] > 0.5
        choice = np.empty(len(excess), dtype=np.int64)
        choice[groups[taken]] = options[taken]
        if _total(problem.costs, choice) <= limit:
            if _total(problem.scores, choice) < best.score:
                best = _solution(problem, choice, proven_bound, known.price)
            break
    return proven(best.choice, best.score, best.cost, proven_bound, best.price)


def _worthwhile(problem: Problem) -> npt.NDArray[np.bool_]:
    """Tell of each option whether no other of its group costs no more and scores lower."""
    order = np.lexsort((problem.scores, problem.costs), axis=1)
    scores = np.take_along_axis(problem.scores, order, axis=1)
    before = np.minimum.accumulate(scores, axis=1)
    keep = np.ones_like(scores, dtype=np.bool_)
    keep[:, 1:] = scores[:, 1:] < before[:, :-1]
    found = np.empty_like(keep)
    np.put_along_axis(found, order, keep, axis=1)
    return found


def _undominated(cost: Floats, score: Floats) -> Ints:
    """Return the indices of the states that no cheaper or equal one beats, by rising cost."""
    order = np.lexsort((np.arange(len(cost)), score, cost))
    best = np.minimum.accumulate(np.concatenate(([np.inf], score[order])))[:-1]
    return order[score[order] < best]
