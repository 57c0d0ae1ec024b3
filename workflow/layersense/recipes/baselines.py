"""Recipes that need no measurement: what anyone would try first, to compare with."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from layersense.manifests.schema import LayerSensitivity
from layersense.quantization.formats import NONE
from layersense.recipes.menu import Menu, Recipe, recipe_digest
from layersense.recipes.solver import BUDGET_TOLERANCE
from layersense.scoring.scores import NONE_BITS

Kind = Literal["uniform", "head_kept", "edges_kept"]
"""``uniform``: one format wherever the scheme allows it. ``head_kept``: the same without the output
head. ``edges_kept``: without the head and the first and last block of every subsystem."""


@dataclass(frozen=True)
class Baseline:
    """A recipe with a name."""

    kind: Kind
    format: str
    recipe: Recipe

    @property
    def label(self) -> str:
        """What it is, in words."""
        kept = {
            "uniform": "everywhere",
            "head_kept": "with the head kept",
            "edges_kept": "with first and last block and head kept",
        }
        return f"{self.format} {kept[self.kind]}"


def baselines(menu: Menu, sensitivity: Mapping[str, LayerSensitivity]) -> Iterator[Baseline]:
    """Yield the baselines of a scheme, each recipe once.

    A group that may not take the format stays unquantized, as it does in every other recipe of
    the scheme.

    Args:
        menu: what each group may take.
        sensitivity: the manifest's groups, for subsystem and block.
    """
    head = {handle for handle, group in sensitivity.items() if group.subsystem == "head"}
    edges = {handle for handle, depth in _depths(sensitivity).items() if depth <= 0}
    seen: list[Recipe] = []
    formats = dict.fromkeys(name for options in menu.options for name in options if name != NONE)
    for format in formats:
        kept_by_kind: dict[Kind, set[str]] = {
            "uniform": set(),
            "head_kept": head,
            "edges_kept": edges,
        }
        for kind, kept in kept_by_kind.items():
            recipe = menu.legal(
                {handle: NONE if handle in kept else format for handle in menu.handles}
            )
            if recipe not in seen and any(name != NONE for name in recipe.values()):
                seen.append(recipe)
                yield Baseline(kind, format, recipe)


def outer_first(
    menu: Menu, sensitivity: Mapping[str, LayerSensitivity], budget: float
) -> Recipe | None:
    """Return the recipe that spends a budget from the outside in, as is done without any scores.

    All groups start in their cheapest format. Then the output head, the first and last block of
    every subsystem, the second and last but one, and so on, take the dearest format that the rest
    of the budget pays for (of equally dear ones that of the lowest score); groups outside of
    blocks come last.

    Args:
        menu: what each group may take.
        sensitivity: the manifest's groups, for subsystem and block.
        budget: limit, as a sum of budget costs.

    Returns:
        None if no recipe fits the budget.
    """
    depths = _depths(sensitivity)
    found: list[tuple[float, Recipe]] = []
    for arrangement in menu.arrangements:
        problem = arrangement.merge(menu.scores, menu.budget_costs)
        depth = np.full(arrangement.count, np.inf)
        np.minimum.at(depth, arrangement.row, [depths[handle] for handle in menu.handles])
        choice = problem.costs.argmin(axis=1)
        left = budget * (1 + BUDGET_TOLERANCE) - float(problem.costs.min(axis=1).sum())
        if left < 0:
            continue
        for row in np.argsort(depth, kind="stable"):
            extra = problem.costs[row] - problem.costs[row, choice[row]]
            paid = np.flatnonzero(extra <= left)
            choice[row] = paid[np.lexsort((problem.scores[row, paid], -extra[paid]))[0]]
            left -= float(extra[choice[row]])
        found.append((left, menu.recipe(arrangement.spread(choice))))
    return min(found, key=lambda entry: entry[0])[1] if found else None


def _depths(sensitivity: Mapping[str, LayerSensitivity]) -> dict[str, float]:
    """Return how far each group is from the outside of its subsystem, in blocks.

    -1 for the output head, 0 for the first and last block; infinite outside of blocks.
    """
    blocks: dict[str, list[int]] = {}
    for group in sensitivity.values():
        if group.block is not None:
            blocks.setdefault(group.subsystem, []).append(group.block)
    ends = {subsystem: (min(own), max(own)) for subsystem, own in blocks.items()}

    def depth(group: LayerSensitivity) -> float:
        if group.subsystem == "head":
            return -1
        if group.block is None:
            return math.inf
        first, last = ends[group.subsystem]
        return min(group.block - first, last - group.block)

    return {handle: depth(group) for handle, group in sensitivity.items()}


def random_recipes(menu: Menu, bits: float, count: int, width: float = 0.05) -> list[Recipe]:
    """Return random recipes within ``width`` of ``bits``, at most ``count``, all different.

    Each starts from a format drawn for every group and then draws single groups anew, keeping
    what brings it nearer to ``bits``. The same menu and bits give the same recipes.
    """
    generator = np.random.default_rng(int(recipe_digest({"bits": f"{bits:.6f}"})[:8], 16))
    drawn = [
        (arrangement, costs, [np.flatnonzero(np.isfinite(row)) for row in costs])
        for arrangement in menu.arrangements
        for costs in [arrangement.merge(menu.scores, menu.costs).costs]
    ]
    found: list[Recipe] = []
    for _ in range(4 * count):
        which = int(generator.integers(len(drawn))) if len(drawn) > 1 else 0
        arrangement, costs, options = drawn[which]
        sizes = np.array([len(row) for row in options])
        choice = np.array(
            [row[index] for row, index in zip(options, generator.integers(0, sizes), strict=True)],
            dtype=np.int64,
        )
        cost = float(costs[np.arange(len(sizes)), choice].sum())
        for _ in range(50 * len(sizes)):
            distance = cost / menu.total * NONE_BITS - bits
            if abs(distance) <= width:
                break
            row = int(generator.integers(len(sizes)))
            option = int(options[row][int(generator.integers(sizes[row]))])
            changed = cost + costs[row, option] - costs[row, choice[row]]
            if abs(changed / menu.total * NONE_BITS - bits) < abs(distance):
                choice[row], cost = option, changed
        taken = arrangement.spread(choice)
        recipe = menu.recipe(taken)
        if abs(menu.effective_bits(taken) - bits) <= width and recipe not in found:
            found.append(recipe)
        if len(found) == count:
            break
    return found
