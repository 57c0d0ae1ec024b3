"""The frontier of a scheme: predicted damage against bits over the whole range of budgets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from layersense.files import atomic_path, canonical_json
from layersense.manifests.read import read_own_manifest
from layersense.manifests.schema import Manifest
from layersense.manifests.tables import BYTES_PER_COST
from layersense.recipes.baselines import baselines
from layersense.recipes.menu import Menu, recipe_digest
from layersense.recipes.solver import Ints, Solution

FRONTIER_VERSION = 2
POINTS = 64
"""Points at least, or every corner of the hull where there are fewer."""
ROUNDING = 1e-12
"""Relative gap that is put down to rounding."""

UNITS = {
    "point": "0 for the smallest choice and up by cost; null off the frontier",
    "effective_bits": "average bits per searched weight",
    "cost": "elements × bits / 16, that is, units of 2 bytes",
    "searched_bytes": "bytes of the searched weights, scales included",
    "budget_used": "in the unit of the scheme's budget, which the metadata name",
    "predicted_damage": "total score (the largest score under objective max)",
    "damage_low": "lower end of the 95 % interval of predicted_damage",
    "damage_high": "upper end of the 95 % interval of predicted_damage",
    "minimized": "predicted_damage, with risk × standard errors of the chosen scores",
    "lower_bound": "no choice of the same budget_used has a lower value of minimized",
    "gap": "(minimized − lower_bound) / minimized: how much better a choice could be at most",
    "recipe": "format of each layer group, in the order of the metadata's layersense.handles",
}

_NAME = pa.dictionary(pa.int32(), pa.string())
FRONTIER = pa.schema(
    [
        ("run", _NAME),
        ("scheme", _NAME),
        ("kind", _NAME),
        ("label", pa.string()),
        ("format", _NAME),
        ("point", pa.int32()),
        *((name, pa.float64()) for name in ("effective_bits", "cost", "searched_bytes")),
        *((name, pa.float64()) for name in ("budget_used", "predicted_damage")),
        *((name, pa.float64()) for name in ("damage_low", "damage_high", "minimized")),
        *((name, pa.float64()) for name in ("lower_bound", "gap")),
        ("within_budget", pa.bool_()),
        ("knee", pa.bool_()),
        ("recipe_digest", pa.string()),
        ("recipe", pa.list_(pa.string())),
    ],
    metadata={
        "layersense.table": "frontier",
        "layersense.schema_version": str(FRONTIER_VERSION),
        "layersense.units": canonical_json(UNITS),
    },
)
"""A row for each recipe. ``kind`` is ``frontier`` (a corner of the hull), ``scheme`` (the scheme's
own choice, once), or a baseline: ``uniform``, ``head_kept``, ``edges_kept`` (of ``format``)."""


@dataclass(frozen=True)
class Frontier:
    """The points of one objective by rising cost, and the index of the knee, if there is one."""

    points: list[Solution]
    knee: int | None


def frontier(menu: Menu) -> Frontier:
    """Return the frontier of a menu.

    For the sum it is made of corners of the hull, each the best choice at its own cost; for the
    maximum, of the best choices at budgets spread evenly.
    """
    if menu.objective == "sum":
        points = menu.corners(POINTS)
    else:
        lowest, highest = menu.lowest, menu.budget_cost(_last(menu))
        solved = (
            menu.best(float(budget)) for budget in np.linspace(lowest, max(lowest, highest), POINTS)
        )
        points = list({tuple(point.choice.tolist()): point for point in solved}.values())
    return Frontier(points, knee([p.cost for p in points], [p.score for p in points]))


def knee(costs: list[float], damages: list[float]) -> int | None:
    """Return the index of the knee: the point farthest below the straight line between the ends.

    There the slope passes the frontier's average: to the left of it a saved bit costs more damage
    than on average over the whole range, to the right less (Satopää et al., *Finding a "Kneedle"
    in a Haystack*, 2011, without the smoothing). None if no point is below the line.
    """
    if len(costs) < 3 or costs[-1] <= costs[0] or damages[0] <= damages[-1]:
        return None
    x = (np.array(costs) - costs[0]) / (costs[-1] - costs[0])
    y = (np.array(damages) - damages[-1]) / (damages[0] - damages[-1])
    below = 1 - x - y
    best = int(below.argmax())
    return best if below[best] > 0 else None


def frontier_table(manifest: Manifest) -> pa.Table:
    """Return the frontier of a scheme as a table: columns :data:`FRONTIER`."""
    menu = Menu.of_manifest(manifest)
    found = frontier(menu)
    budget = manifest.autoquant_state.budget
    state = manifest.autoquant_state

    def row(choice: Ints, minimized: float, bound: float, **more: Any) -> dict[str, Any]:
        damage, cost = menu.damage(choice), menu.cost(choice)
        used = budget.fixed + budget.per_cost * menu.budget_cost(choice)
        # The bound is safe against rounding, which alone would look like a gap.
        bound = minimized if minimized - bound <= ROUNDING * minimized else bound
        return {
            "run": manifest.run_name,
            "scheme": manifest.scheme.name,
            "format": None,
            "point": None,
            "effective_bits": menu.effective_bits(choice),
            "cost": cost,
            "searched_bytes": cost * BYTES_PER_COST,
            "budget_used": used,
            "predicted_damage": damage.score,
            "damage_low": damage.low,
            "damage_high": damage.high,
            "minimized": minimized,
            "lower_bound": bound,
            "gap": (minimized - bound) / minimized if minimized else 0.0,
            "within_budget": used <= budget.limit * (1 + 1e-9),
            "knee": False,
            "recipe_digest": recipe_digest(menu.recipe(choice)),
            "recipe": list(menu.recipe(choice).values()),
            **more,
        }

    rows = [
        row(
            point.choice,
            point.score,
            point.lower_bound,
            kind="frontier",
            label=f"best at {menu.effective_bits(point.choice):.2f} bits",
            point=index,
            knee=index == found.knee,
        )
        for index, point in enumerate(found.points)
    ]
    chosen = menu.choice(manifest.recipe)
    rows.append(
        row(
            chosen,
            state.minimized,
            state.lower_bound,
            kind="scheme",
            label=f"{manifest.scheme.name}, at most {budget.limit:g} {budget.unit}",
        )
    )
    compared = list(baselines(menu, manifest.layer_sensitivity))
    bounds = menu.bounds([menu.budget_cost(menu.choice(other.recipe)) for other in compared])
    for baseline, bound in zip(compared, bounds, strict=True):
        choice = menu.choice(baseline.recipe)
        scores = menu.problem.scores[menu.rows, choice]
        minimized = float(scores.sum() if menu.objective == "sum" else scores.max(initial=0.0))
        rows.append(
            row(
                choice,
                minimized,
                bound,
                kind=baseline.kind,
                label=baseline.label,
                format=baseline.format,
            )
        )
    table = pa.Table.from_pylist(rows, schema=FRONTIER)
    return table.replace_schema_metadata(
        {
            **FRONTIER.metadata,
            b"layersense.handles": canonical_json(menu.handles).encode(),
            b"layersense.budget_unit": budget.unit.encode(),
        }
    )


def write_frontier(manifest: str | Path, out: str | Path) -> None:
    """Write the frontier of one manifest.

    Raises:
        LayersenseError: the manifest cannot be read, or is none of layersense's own.
    """
    table = frontier_table(read_own_manifest(manifest))
    with atomic_path(out) as temporary:
        pq.write_table(table, temporary, compression="zstd", use_dictionary=True)


def _last(menu: Menu) -> Ints:
    """Return the index of ``NONE`` in every group."""
    return np.array([len(options) - 1 for options in menu.options], dtype=np.int64)
