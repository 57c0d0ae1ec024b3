"""The solver against brute force, dynamic programming, and ModelOpt's own."""

import itertools
from fractions import Fraction
from math import fsum

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layersense.errors import LayersenseError
from layersense.recipes import solver
from layersense.recipes.solver import Problem, hull, solve

score = st.builds(
    lambda digits, power: digits * 10.0**power, st.integers(0, 99), st.integers(-7, 3)
)
option = st.tuples(score, st.integers(0, 40))
groups = st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=6)


def brute_force(problem, budget, objective):
    """The least score of all choices within the budget, in exact arithmetic."""
    combine = sum if objective == "sum" else max
    totals = [
        combine(Fraction(score) for score, _ in choice)
        for choice in itertools.product(*problem)
        if sum(cost for _, cost in choice) <= budget
    ]
    return float(min(totals)) if totals else None


def as_problem(groups):
    return Problem.of(
        [[score for score, _ in group] for group in groups],
        [[cost for _, cost in group] for group in groups],
    )


@given(groups, st.integers(0, 160), st.sampled_from(["sum", "max"]))
@settings(max_examples=400, deadline=None)
def test_brute_force_agrees(groups, budget, objective):
    expected = brute_force(groups, budget, objective)
    if expected is None:
        lowest = sum(min(cost for _, cost in group) for group in groups)
        with pytest.raises(LayersenseError, match=f"lowest reachable cost is {lowest}$"):
            solve(as_problem(groups), budget, objective)
        return
    solution = solve(as_problem(groups), budget, objective)
    chosen = [group[index] for group, index in zip(groups, solution.choice, strict=True)]
    assert sum(cost for _, cost in chosen) == solution.cost <= budget
    combine = sum if objective == "sum" else max
    assert float(combine(Fraction(score) for score, _ in chosen)) == pytest.approx(solution.score)
    assert solution.score == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert solution.lower_bound <= expected * (1 + 1e-12)
    assert solution.gap <= 1e-9  # proven on problems of this size


@pytest.mark.parametrize(("core", "states"), [(0, 1), (1, 2), (2, 1), (3, 3)])
@given(groups, st.integers(0, 160))
@settings(max_examples=150, deadline=None)
def test_what_is_dropped_never_makes_the_bound_wrong(core, states, groups, budget):
    """With almost no room to search, the choice may be worse; the gap must then say so."""
    expected = brute_force(groups, budget, "sum")
    if expected is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "MAX_CORE_GROUPS", core)
        patch.setattr(solver, "MAX_STATES", states)
        solution = solve(as_problem(groups), budget)
    assert solution.cost <= budget
    assert solution.lower_bound <= expected * (1 + 1e-12)
    assert solution.score >= expected * (1 - 1e-12)
    rounding = 1e-9 * max(1.0, solution.score)
    expected_bound = solution.score * (1 - solution.gap)
    assert expected_bound == pytest.approx(solution.lower_bound, abs=rounding)


def wide_problem(seed, n_groups, n_options):
    """Layers of a few sizes, and scores over nine decades that fall with the bits."""
    random = np.random.default_rng(seed)
    weights = random.choice([512.0, 1024.0, 2816.0, 11008.0], size=n_groups) * 1024
    bits = np.sort(random.choice(np.arange(3, 17, 0.25), size=n_options - 1, replace=False))
    bits = np.append(bits, 16.5)
    damage = (
        10 ** random.uniform(-6, 3, size=(n_groups, 1))
        * 4.0 ** (4 - bits)
        * random.uniform(0.3, 3, size=(n_groups, n_options))
    )
    damage[:, -1] = 0
    return Problem(np.minimum.accumulate(damage, axis=1), weights[:, None] * bits / 16)


def dynamic_programming(problem, budget, unit):
    """The least sum, by a table over whole units of cost: slow, and plainly right."""
    costs = np.rint(problem.costs / unit).astype(int)
    assert np.allclose(costs * unit, problem.costs)
    table = np.zeros(int(budget / unit) + 1)
    for row_scores, row_costs in zip(problem.scores, costs, strict=True):
        best = np.full_like(table, np.inf)
        for value, cost in zip(row_scores, row_costs, strict=True):
            if cost < len(table):
                best[cost:] = np.minimum(best[cost:], table[: len(table) - cost] + value)
        table = best
    return table[-1]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("level", [0.05, 0.4, 0.8])
def test_dynamic_programming_agrees(seed, level):
    problem = wide_problem(seed, 40, 5)
    low, high = problem.costs.min(axis=1).sum(), problem.costs.max(axis=1).sum()
    budget = low + level * (high - low)
    solution = solve(problem, budget)
    expected = dynamic_programming(problem, budget, 4096)
    assert solution.score == pytest.approx(expected, rel=1e-9)
    assert solution.lower_bound <= expected * (1 + 1e-9)


def alike_problem(seed, n_groups, largest):
    """Layers that differ little and a large one, under pairs of which many cost the same."""
    random = np.random.default_rng(seed)
    weights = random.choice([1.0, 3.0, 5.0, 20.0], size=n_groups)
    weights[-1] = largest
    bits = np.repeat([33.0, 36.0, 64.0, 128.0], [5, 5, 10, 1])
    pairs = 10 ** random.uniform(-1, 1, size=21) * 4.0 ** (-bits / 8)
    pairs[-1] = 0
    noise = random.normal(1, 0.03, size=(n_groups, 21))
    return Problem(weights[:, None] * pairs * noise, weights[:, None] * bits)


@pytest.mark.parametrize("seed", range(3))
def test_branch_and_bound_goes_on_where_layers_are_alike(seed, monkeypatch):
    problem = alike_problem(seed, 60, 240.0)
    low, high = fsum(problem.costs.min(axis=1)), fsum(problem.costs.max(axis=1))
    monkeypatch.setattr(solver, "MAX_CORE_GROUPS", 8)
    gaps = []
    for level in np.linspace(0.05, 0.6, 12):
        budget = float(np.floor(low + level * (high - low)))
        solution = solve(problem, budget)
        expected = dynamic_programming(problem, budget, 1)
        assert type(solution.lower_bound) is float
        assert problem.costs[np.arange(60), solution.choice].sum() <= budget
        assert expected * (1 - 1e-9) <= solution.score <= expected * (1 + 1e-3)
        assert solution.lower_bound <= expected * (1 + 1e-9)
        with monkeypatch.context() as patch:
            patch.setattr(solver, "MAX_BRANCHED_OPTIONS", 0)
            gaps.append((solve(problem, budget).gap, solution.gap))
    assert all(after <= before for before, after in gaps)
    assert sum(before > 1e-3 for before, _ in gaps) > sum(after > 1e-3 for _, after in gaps) == 0


@pytest.mark.parametrize("objective", ["sum", "max"])
def test_large_problem_has_a_small_proven_gap(objective):
    problem = wide_problem(7, 3000, 16)
    budget = 0.35 * problem.costs.max(axis=1).sum()
    solution = solve(problem, budget, objective)
    chosen = (np.arange(3000), solution.choice)
    assert problem.costs[chosen].sum() <= budget * (1 + 1e-9)
    values = problem.scores[chosen]
    total = values.sum() if objective == "sum" else values.max()
    assert solution.score == pytest.approx(total)
    assert 0 <= solution.gap <= 1e-4
    assert solution.gap == pytest.approx((total - solution.lower_bound) / total, abs=1e-9)


def test_equal_input_gives_equal_choice_and_ties_take_the_cheaper():
    problem = as_problem([[(1.0, 4), (1.0, 2), (1.0, 2)], [(0.0, 3), (0.0, 1)]])
    assert solve(problem, 100).choice.tolist() == [1, 1]
    wide = wide_problem(3, 200, 6)
    budget = 0.7 * wide.costs.max(axis=1).sum()
    assert solve(wide, budget).choice.tolist() == solve(wide, budget).choice.tolist()


def test_budget_met_exactly_in_spite_of_rounding():
    costs = [[0.1, 1.0]] * 10
    solution = solve(Problem.of([[1.0, 0.0]] * 10, costs), 0.1 * 10)
    assert solution.choice.tolist() == [0] * 10


def test_a_group_may_have_one_option_and_a_problem_no_group():
    assert solve(as_problem([[(3.0, 5)]]), 5).choice.tolist() == [0]
    empty = solve(Problem(np.zeros((0, 0)), np.zeros((0, 0))), 0)
    assert (empty.score, empty.cost, empty.gap) == (0, 0, 0)


@pytest.mark.parametrize(
    ("scores", "costs", "message"),
    [
        ([[1.0, float("nan")]], [[1.0, 2.0]], "finite"),
        ([[1.0]], [[1.0, 2.0]], "shape"),
        ([[]], [[]], "at least one"),
    ],
)
def test_unusable_numbers_are_refused(scores, costs, message):
    with pytest.raises(ValueError, match=message):
        Problem.of(scores, costs)


@given(groups)
@settings(max_examples=200, deadline=None)
def test_hull_is_the_convex_frontier_of_the_relaxed_problem(groups):
    """At every corner, no mix of options has a lower score for its cost."""
    steps = hull(as_problem(groups))
    assert (np.diff(steps.slope) <= 0).all()
    for index, group in enumerate(groups):
        corners = [int(steps.start[index])]
        for step in np.flatnonzero(steps.group == index):
            assert steps.source[step] == corners[-1]
            corners.append(int(steps.target[step]))
        assert group[corners[0]][1] == min(cost for _, cost in group)
        assert group[corners[-1]][0] == min(score for score, _ in group)
        for left, right in itertools.pairwise(corners):
            (score0, cost0), (score1, cost1) = group[left], group[right]
            for value, cost in group:
                if cost0 <= cost <= cost1:
                    line = score0 + (score1 - score0) * (cost - cost0) / (cost1 - cost0)
                    assert value >= line - 1e-9 * max(1, abs(line))


@pytest.mark.slow
def test_never_worse_than_modelopts_own_solver():
    """ModelOpt's `LPS` (PuLP, CBC), driven with the bounds that its gradient searcher tries."""
    lps = pytest.importorskip("modelopt.torch.opt.searcher").LPS
    compared = 0
    for seed in range(12):
        problem = wide_problem(seed, 30 + 10 * seed, 2 + seed % 5)
        budget = problem.costs.min(axis=1).sum() * (1.1 + 0.1 * (seed % 6))
        ours = solve(problem, budget)
        for lower in (None, 0.99, 0.90):
            choice, status = lps(
                name="AutoQuantize",
                constraints={"size": (lower * budget if lower else lower, budget)},
                constraints_to_candidate_costs={"size": problem.costs.tolist()},
                candidate_scores=problem.scores.tolist(),
            )()
            if status == "Optimal":
                break
        chosen = (np.arange(len(problem.scores)), np.array(choice))
        if status == "Optimal" and problem.costs[chosen].sum() <= budget * (1 + 1e-9):
            compared += 1
            assert ours.score <= problem.scores[chosen].sum() * (1 + 1e-12)
    assert compared >= 6


def test_never_worse_than_modelopts_search_for_the_least_maximum():
    """ModelOpt's `kl_div` searcher, which bisects a threshold on the largest score."""
    algorithms = pytest.importorskip("modelopt.torch.quantization.algorithms")
    compared = equal = 0
    for seed in range(20):
        problem = wide_problem(seed, 20 + 10 * seed, 2 + seed % 5)
        budget = float(problem.costs.min(axis=1).sum() * (1.1 + 0.1 * (seed % 6)))
        searcher = object.__new__(algorithms.AutoQuantizeKLDivSearcher)
        # Options by rising cost: the first within the threshold is taken.
        order = np.argsort(problem.costs, axis=1, kind="stable")
        rows = np.arange(len(order))[:, None]
        searcher.candidate_stats = {
            str(group): {"formats": list(indices), "scores": list(scores), "costs": list(costs)}
            for group, (indices, scores, costs) in enumerate(
                zip(order, problem.scores[rows, order], problem.costs[rows, order], strict=True)
            )
        }
        best, satisfied = searcher.run_search_with_stats(budget)
        if not satisfied:
            continue
        compared += 1
        ours = solve(problem, budget, "max")
        theirs = max(entry["scores"] for entry in best.values())
        assert ours.score <= theirs * (1 + 1e-12)
        assert ours.gap == 0
        total = problem.scores[np.arange(len(ours.choice)), ours.choice].sum()
        if ours.score == theirs:  # of equal maxima ours is the one of least sum
            equal += 1
            assert total <= sum(entry["scores"] for entry in best.values()) * (1 + 1e-12)
    assert compared >= 10
    assert equal >= 5
