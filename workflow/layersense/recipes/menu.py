"""What each layer group of a scheme may take, and what a recipe made of it costs and damages."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum
from typing import Literal

import numpy as np

from layersense.errors import LayersenseError
from layersense.files import digest_json
from layersense.manifests.schema import LayerSensitivity, Manifest, plain_name
from layersense.quantization.formats import NONE
from layersense.recipes.solver import (
    BUDGET_TOLERANCE,
    Floats,
    Ints,
    Problem,
    Solution,
    corners,
    lower_bounds,
    proven,
    relaxed,
    solve,
)
from layersense.scoring.scores import NONE_BITS

CONFIDENCE = 0.95
"""Of the interval around a predicted damage."""
RESAMPLES = 100
"""How often the batches are resampled to see which choices flip; a fifth where it takes long."""
SMALL = 100_000
"""Options up to which that takes seconds."""
MOST_BEHIND = 1e-3
"""Gap from which on a point of the frontier is solved anew."""
FLIP_SHARE = 0.05
"""Share of the resamples with another format from which on a choice counts as flipping."""

Recipe = dict[str, str]
"""Handle of every layer group → its format, ``NONE`` included, in model order."""


@dataclass(frozen=True)
class Batched:
    """Scores by batch of the formats that were measured on the same batches.

    Attributes:
        tokens: supervised tokens of each batch, shape (batches,).
        scores: summed score of each batch, shape (groups, options, batches); 0 where an option's
            score comes from other batches.
    """

    tokens: Floats
    scores: Floats

    def error(self, summed: Floats) -> Floats:
        """Return the standard error of ``Σ summed / Σ tokens`` over the last axis.

        That of a ratio estimator; see :func:`layersense.scoring.scores.score_per_token`.
        """
        count, total = len(self.tokens), self.tokens.sum()
        ratio = summed.sum(axis=-1, keepdims=True) / total
        squares = ((summed - ratio * self.tokens) ** 2).sum(axis=-1)
        return np.asarray(np.sqrt(count / (count - 1) * squares) / total)


@dataclass(frozen=True)
class Damage:
    """Predicted damage of a recipe, with its interval.

    Attributes:
        score: sum of the scores as the solver sees them (their maximum under ``objective: max``).
        error: standard error of the sum (of the largest score under ``max``); None with fewer
            than two batches.
        low, high: interval of confidence :data:`CONFIDENCE`, by Student's t; None like ``error``.
    """

    score: float
    error: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Arrangement:
    """The menu as far as one checkpoint can hold it: fewer options, and groups that go together.

    Attributes:
        row: index of the row that each group belongs to, shape (groups,); the groups of a row
            take one format.
        pick: option of each group where its row takes option ``o``, shape (groups, options); -1
            where the group does not have it.
        count: number of rows.
        objective: ``sum`` or ``max``, by which the scores of a row's groups are combined.
    """

    row: Ints
    pick: Ints
    count: int
    objective: str

    def merge(self, scores: Floats, costs: Floats) -> Problem:
        """Return the problem of the rows for scores and costs of the groups' options."""
        groups = np.arange(len(self.row))[:, None]
        merged = []
        for table, combine in (
            (scores, np.maximum if self.objective == "max" else np.add),
            (costs, np.add),
        ):
            picked = np.where(self.pick >= 0, table[groups, self.pick], np.inf)
            rows = np.zeros((self.count, self.pick.shape[1]))
            combine.at(rows, self.row, picked)
            merged.append(rows)
        lost = ~(np.isfinite(merged[0]) & np.isfinite(merged[1]))
        return Problem(*(np.where(lost, np.inf, rows) for rows in merged))

    def spread(self, choice: Ints) -> Ints:
        """Return the options of the groups for the options of the rows."""
        return np.asarray(self.pick[np.arange(len(self.row)), choice[self.row]])


@dataclass(frozen=True)
class Menu:
    """The options of every layer group: those that the scheme allows it, ``NONE`` last.

    Attributes:
        handles: the groups, in model order.
        options: names of the formats that each group may take.
        scores: score of each option as the solver sees it, shape (groups, options), infinite
            where a group has fewer options.
        errors: standard error of these scores, NaN where there is none.
        costs: ModelOpt's cost, elements × bits / 16; same shape and infinities as ``scores``.
        budget_costs: cost in the unit of the scheme's budget, the same.
        batched: scores by batch, one entry for each set of batches; empty if a batch was lost or
            there was but one.
        total: cost of leaving everything unquantized.
        objective: ``sum`` or ``max``.
        risk: standard errors that count as damage.
        together: sets of formats, one of which all formats of a recipe come from; None: any may
            stand together.
        fused: sets of groups that take one format.
    """

    handles: list[str]
    options: list[list[str]]
    scores: Floats
    errors: Floats
    costs: Floats
    budget_costs: Floats
    batched: list[Batched]
    total: float
    objective: str
    risk: float
    together: Sequence[Collection[str]] | None = None
    fused: Sequence[Sequence[str]] = ()

    @classmethod
    def of(
        cls,
        sensitivity: Mapping[str, LayerSensitivity],
        tokens: Mapping[str, Sequence[int]],
        *,
        objective: str,
        risk: float,
        together: Sequence[Collection[str]] | None = None,
        fused: Sequence[Sequence[str]] = (),
    ) -> "Menu":
        """Collect the options.

        Args:
            sensitivity: every layer group by handle.
            tokens: format → supervised tokens of each of its batches.
            objective: ``sum`` or ``max``.
            risk: standard errors that count as damage.
            together: sets of formats that may stand together; None: any.
            fused: sets of groups that take one format.

        Raises:
            LayersenseError: ``risk`` is set and a score has no standard error.
        """
        handles = list(sensitivity)
        picks = [
            [index for index, allowed in enumerate(group.allowed) if allowed]
            for group in sensitivity.values()
        ]
        shape = (len(handles), max(map(len, picks), default=0))
        scores, errors, costs, budget = (np.full(shape, np.inf) for _ in range(4))
        layouts = {
            layout: index for index, layout in enumerate(sorted(set(map(tuple, tokens.values()))))
        }
        batched = [np.zeros((*shape, len(layout))) for layout in layouts]
        sound = all(len(layout) > 1 for layout in layouts)
        for row, (group, allowed) in enumerate(zip(sensitivity.values(), picks, strict=True)):
            names = [plain_name(label) for label in group.formats]
            for column, index in enumerate(allowed):
                source = _source(group, index)
                error = group.scores_se[source]
                scores[row, column] = group.scores_solver[index] or 0.0
                unknown = 0.0 if names[source] == NONE else np.nan
                errors[row, column] = unknown if error is None else error
                costs[row, column] = group.costs[index]
                budget[row, column] = (group.budget_costs or group.costs)[index]
                if names[source] == NONE:
                    continue
                values = group.batch_scores[source]
                if any(value is None for value in values):
                    sound = False
                else:
                    batched[layouts[tuple(tokens[names[source]])]][row, column] = values
        if risk and np.isnan(errors).any():
            raise LayersenseError(
                f"`risk: {risk:g}` needs a standard error of every score, and there is none with "
                "fewer than two scoring batches; lower `batch_size` or raise `score_samples` of "
                "the run, or leave `risk` out"
            )
        return cls(
            handles=handles,
            options=[
                [plain_name(group.formats[index]) for index in allowed]
                for group, allowed in zip(sensitivity.values(), picks, strict=True)
            ],
            scores=scores,
            errors=errors,
            costs=costs,
            budget_costs=budget,
            batched=[
                Batched(np.array(layout, dtype=float), values)
                for layout, values in zip(layouts, batched, strict=True)
            ]
            if sound
            else [],
            total=fsum(group.costs[-1] for group in sensitivity.values()),
            objective=objective,
            risk=risk,
            together=together,
            fused=fused,
        )

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> "Menu":
        """Return the menu that a manifest was decided over."""
        target = manifest.autoquant_state.deployment
        return cls.of(
            manifest.layer_sensitivity,
            {name: run.batches.tokens for name, run in manifest.run.items()},
            objective=manifest.scheme.objective,
            risk=manifest.scheme.risk,
            together=target.together if target else None,
            fused=target.fused if target else (),
        )

    @cached_property
    def problem(self) -> Problem:
        """What is minimised: scores, with their errors under ``risk``, by budget cost.

        A recipe also has to be one that a checkpoint can hold: solve by :meth:`best`.
        """
        scores = self.scores + self.risk * self.errors if self.risk else self.scores
        return Problem(scores, self.budget_costs)

    @cached_property
    def arrangements(self) -> list[Arrangement]:
        """The sets of recipes that a checkpoint can hold; together they hold all such recipes.

        One for each set of formats that may stand together.
        """
        row = np.arange(len(self.handles))
        if self.fused:
            place = {handle: index for index, handle in enumerate(self.handles)}
            for handles in self.fused:
                row[[place[handle] for handle in handles]] = place[handles[0]]
            row = np.unique(row, return_inverse=True)[1].reshape(-1)
            # Groups that go together name an option alike, whatever their own numbers for it.
            names = dict.fromkeys(
                name for options in self.options for name in options if name != NONE
            )
            columns = [[*names, NONE]] * len(self.handles)
        else:
            columns = self.options
        width = max(map(len, columns), default=0)
        found = []
        for together in self.together if self.together is not None else [None]:
            pick = np.full((len(self.handles), width), -1)
            for group, (options, wanted) in enumerate(zip(self.options, columns, strict=True)):
                own = {name: index for index, name in enumerate(options)}
                for column, name in enumerate(wanted):
                    if together is None or name == NONE or name in together:
                        pick[group, column] = own.get(name, -1)
            arrangement = Arrangement(row, pick, int(row.max(initial=-1)) + 1, self.objective)
            rows = arrangement.merge(self.scores, self.budget_costs).costs
            if np.isfinite(rows).any(axis=1).all():
                found.append(arrangement)
        if not found:
            raise LayersenseError(
                "no recipe can satisfy the scheme: groups that its target loads as one have no "
                "format in common; allow them one, or leave them out of the search"
            )
        return found

    @cached_property
    def _problems(self) -> list[tuple[Arrangement, Problem]]:
        whole = self.problem
        if self.together is None and not self.fused:
            return [(arrangement, whole) for arrangement in self.arrangements]
        return [
            (arrangement, arrangement.merge(whole.scores, whole.costs))
            for arrangement in self.arrangements
        ]

    @property
    def lowest(self) -> float:
        """The least budget cost of all recipes."""
        return min(fsum(problem.costs.min(axis=1)) for _, problem in self._problems)

    def best(self, budget: float) -> Solution:
        """Return the recipe of least damage within ``budget``, as options of the groups.

        Each set of formats that may stand together is solved for itself; no recipe is better than
        the least of their bounds.

        Raises:
            LayersenseError: no recipe fits the budget.
        """
        objective: Literal["sum", "max"] = "max" if self.objective == "max" else "sum"
        fitting = [
            (arrangement, problem)
            for arrangement, problem in self._problems
            if fsum(problem.costs.min(axis=1)) <= budget * (1 + BUDGET_TOLERANCE)
        ]
        solved = [
            (arrangement, solve(problem, budget, objective))
            for arrangement, problem in fitting or self._problems
        ]
        arrangement, solution = min(solved, key=lambda pair: (pair[1].score, pair[1].cost))
        return proven(
            arrangement.spread(solution.choice),
            solution.score,
            solution.cost,
            min(other.lower_bound for _, other in solved),
            solution.price,
        )

    def bounds(self, budgets: Sequence[float]) -> list[float]:
        """Return for each budget what no recipe within it is below; infinite if none fits."""
        if self.objective == "max":
            return [
                self.best(budget).lower_bound
                if self.lowest <= budget * (1 + BUDGET_TOLERANCE)
                else float("inf")
                for budget in budgets
            ]
        found = [lower_bounds(problem, budgets) for _, problem in self._problems]
        return [min(bounds) for bounds in zip(*found, strict=True)]

    def corners(self, count: int) -> list[Solution]:
        """Return recipes over all budgets, by rising cost: the frontier of the sum.

        Corners of one hull are the best at their cost. Of several sets of formats each has its own:
        what another set does better there is solved anew.
        """
        found = [
            Solution(
                arrangement.spread(point.choice),
                point.score, point.cost, point.lower_bound, point.gap, point.price,
            )
            for arrangement, problem in self._problems
            for point in corners(problem, count)
        ]  # fmt: skip
        if len(self._problems) == 1:
            return found
        found = _falling(found)
        solved = []
        for point, bound in zip(found, self.bounds([point.cost for point in found]), strict=True):
            told = proven(point.choice, point.score, point.cost, bound, point.price)
            solved.append(self.best(point.cost) if told.gap > MOST_BEHIND else told)
        return _falling(solved)

    def legal(self, recipe: Mapping[str, str]) -> Recipe:
        """Return the recipe nearest to another one that a checkpoint can hold.

        A group that may not take its format, or is to agree with others and does not, stays
        unquantized; where it may not, it takes its dearest format.
        """
        if self.together is None and not self.fused:
            return self.recipe(self.choice(recipe))
        numbers = {name: number for number, name in enumerate(self._names)}
        asked = np.array([numbers.get(recipe[handle], 0) for handle in self.handles])
        found = []
        for arrangement, places, dearest in self._places:
            rows = np.arange(arrangement.count)
            lowest, highest = np.full(arrangement.count, len(numbers)), np.full(len(rows), -1)
            np.minimum.at(lowest, arrangement.row, asked)
            np.maximum.at(highest, arrangement.row, asked)
            choice = places[rows, np.where(lowest == highest, lowest, 0)]
            choice = np.where(choice < 0, places[:, 0], choice)
            taken = arrangement.spread(np.where(choice < 0, dearest, choice))
            near = self.recipe(taken)
            found.append((sum(near[handle] == name for handle, name in recipe.items()), near))
        return max(found, key=lambda entry: entry[0])[1]

    @cached_property
    def _names(self) -> list[str]:
        """``NONE`` and the names of all options."""
        return list(dict.fromkeys([NONE, *(name for own in self.options for name in own)]))

    @cached_property
    def _places(self) -> list[tuple[Arrangement, Ints, Ints]]:
        """Of each arrangement, which option of a row each name is, -1 for none; and its dearest."""
        numbers = {name: number for number, name in enumerate(self._names)}
        found = []
        for arrangement, problem in self._problems:
            places = np.full((arrangement.count, len(numbers)), -1)
            first = np.unique(arrangement.row, return_index=True)[1]
            for row, group in enumerate(first):
                for option in np.flatnonzero(np.isfinite(problem.costs[row])):
                    name = self.options[group][arrangement.pick[group, option]]
                    places[row, numbers[name]] = option
            costs = np.where(np.isfinite(problem.costs), problem.costs, -np.inf)
            found.append((arrangement, places, costs.argmax(axis=1)))
        return found

    @property
    def rows(self) -> Ints:
        """Indices of the groups."""
        return np.arange(len(self.handles))

    def recipe(self, choice: Ints) -> Recipe:
        """Return the recipe that takes option ``choice[g]`` of each group."""
        return {
            handle: options[int(option)]
            for handle, options, option in zip(self.handles, self.options, choice, strict=True)
        }

    def choice(self, recipe: Mapping[str, str]) -> Ints:
        """Return the options that a recipe takes; a format that a group may not take is NONE."""
        return np.array(
            [
                options.index(recipe[handle]) if recipe[handle] in options else len(options) - 1
                for handle, options in zip(self.handles, self.options, strict=True)
            ],
            dtype=np.int64,
        )

    def cost(self, choice: Ints) -> float:
        """Return ModelOpt's cost of a choice."""
        return fsum(self.costs[self.rows, choice])

    def budget_cost(self, choice: Ints) -> float:
        """Return the cost of a choice in the unit of the budget."""
        return fsum(self.budget_costs[self.rows, choice])

    def effective_bits(self, choice: Ints) -> float:
        """Return the average bits per searched weight."""
        return self.cost(choice) / self.total * NONE_BITS

    def damage(self, choice: Ints) -> Damage:
        """Return the predicted damage of a choice.

        All groups were scored on the same batches, so that their errors go together: the error
        of the sum is that of the batches' sums. Where formats were measured on different batches,
        the errors of each set are added, which is never too small.
        """
        scores = self.scores[self.rows, choice]
        score = float(scores.max(initial=0.0)) if self.objective == "max" else fsum(scores)
        if not self.batched:
            return Damage(score, None, None, None)
        if self.objective == "max":
            worst = int(scores.argmax())
            error = float(self.errors[worst, choice[worst]])
        else:
            error = fsum(
                float(part.error(part.scores[self.rows, choice].sum(axis=0)))
                for part in self.batched
            )
        margin = error * self._quantile
        return Damage(score, error, max(0.0, score - margin), score + margin)

    def flips(self, choice: Ints, budget: float) -> dict[str, str]:
        """Return the groups whose choice the noise of the scores could flip → to which format.

        The batches are resampled with replacement, and the problem is solved again to the nearest
        corner of the hull; a group flips that takes another format than under all batches in at
        least a share :data:`FLIP_SHARE` of the resamples. Noise that all groups share flips
        nothing.

        Args:
            choice: the option that was chosen of each group, which is no flip either.
            budget: the budget as a sum of budget costs.
        """
        if not self.batched or self.objective == "max":
            return {}
        small = self.scores.size <= SMALL
        generator = np.random.default_rng(0)
        usual = self._relaxed(self.problem, budget)
        taken = np.zeros(self.scores.shape, dtype=np.int64)
        resamples = RESAMPLES if small else RESAMPLES // 5
        for _ in range(resamples):
            scores = np.where(np.isfinite(self.scores), 0.0, np.inf)
            for part in self.batched:
                count = len(part.tokens)
                weights = generator.multinomial(count, np.full(count, 1 / count))
                scores += part.scores @ weights / (weights @ part.tokens)
            if self.risk:
                scores += self.risk * self.errors
            taken[self.rows, self._relaxed(Problem(scores, self.budget_costs), budget)] += 1
        taken[self.rows, usual] = taken[self.rows, choice] = 0
        often = taken.sum(axis=1) >= FLIP_SHARE * resamples
        return {
            self.handles[row]: self.options[row][int(taken[row].argmax())]
            for row in np.flatnonzero(often)
        }

    def _relaxed(self, whole: Problem, budget: float) -> Ints:
        """Return a quick choice for other scores than the menu's own, good but not best."""
        if self.together is None and not self.fused:
            return relaxed(whole, budget)
        found = []
        for arrangement in self.arrangements:
            problem = arrangement.merge(whole.scores, whole.costs)
            choice = relaxed(problem, budget)
            rows = np.arange(len(choice))
            over = fsum(problem.costs[rows, choice]) > budget * (1 + BUDGET_TOLERANCE)
            found.append((over, fsum(problem.scores[rows, choice]), arrangement.spread(choice)))
        return min(found, key=lambda entry: entry[:2])[2]

    @property
    def _quantile(self) -> float:
        from scipy import stats  # here, because Snakemake imports this module while it parses

        degrees = min(len(part.tokens) for part in self.batched) - 1
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees))


def recipe_digest(recipe: Mapping[str, str]) -> str:
    """Return the SHA-256 (hex) of a recipe; groups left unquantized may be there or not."""
    return digest_json({handle: name for handle, name in recipe.items() if name != NONE})


def _falling(solutions: Sequence[Solution]) -> list[Solution]:
    """Return solutions by rising cost, without those that do no less damage than a cheaper one."""
    kept: list[Solution] = []
    for one in sorted(solutions, key=lambda one: (one.cost, one.score)):
        if not kept or one.score < kept[-1].score:
            kept.append(one)
    return kept


def _source(group: LayerSensitivity, index: int) -> int:
    """Return the index of the format whose measured score the solver sees for ``index``."""
    solver = group.scores_solver[index]
    for earlier in range(index, -1, -1):
        if group.scores[earlier] is not None and group.scores[earlier] == solver:
            return earlier
    return index
