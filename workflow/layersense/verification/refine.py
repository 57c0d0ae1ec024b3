"""Better recipes by measuring whole ones on the held-out rows (no torch).

Damage that is measured group by group gives a recipe of its own, by the same solver. What is left
then are interactions between layers: swaps of formats at equal bits are measured as whole recipes,
and what is better is kept. Both go by one half of the rows, and are judged on the other.

Everything here follows from what is measured already, so that a search which was interrupted goes
on where it stood, and a finished one is told again without a measurement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum
from pathlib import Path

import numpy as np

from layersense.config import Verify
from layersense.errors import LayersenseError
from layersense.files import atomic_write
from layersense.manifests.read import read_own_manifest
from layersense.manifests.schema import Manifest, encode_manifest
from layersense.quantization.formats import NONE
from layersense.recipes.decide import with_recipe
from layersense.recipes.menu import Arrangement, Menu, Recipe
from layersense.recipes.solver import BUDGET_TOLERANCE, Floats, Ints
from layersense.verification.analysis import difference_interval
from layersense.verification.plan import make_plan, whole_digest
from layersense.verification.store import (
    Damage,
    Verification,
    by_photograph,
    read_verification,
)

LEAST_UNITS = 4
"""Held-out units below which a half of them says nothing."""
LEAST_MEASURED = 3
"""Groups of a subsystem that have to be measured for a ratio of its own."""
TOGETHER = 4
"""Recipes of one round: they share the unquantized outputs, and none knows of the others."""
MAX_MOVES = 750
"""Changes of single groups, upwards and downwards, that are paired into swaps."""
RUINED = 1e6
"""Stands for a KL that is not finite, in nats per position."""


@dataclass(frozen=True)
class Search:
    """Where the search for a better recipe of one scheme stands.

    Attributes:
        solved: the recipe that measured damage gives; None where there are too few rows.
        refined: the best recipe so far by the tuning half; None where no swap was asked for.
        measured: how many recipes the search has measured beside ``solved``.
        wanted: what has to be measured before it can go on; empty when it is through.
    """

    solved: Recipe | None = None
    refined: Recipe | None = None
    measured: int = 0
    wanted: list[Recipe] = field(default_factory=list)


def halves(units: int) -> tuple[Ints, Ints]:
    """Return the units that recipes are tuned on and those that they are judged on: in turn."""
    return np.arange(0, units, 2), np.arange(1, units, 2)


def mean_kl(damage: Damage, positions: Sequence[int], half: Ints) -> float:
    """Return the KL per position over the units of a half; :data:`RUINED` if it is not finite."""
    values = [damage.kl[unit] for unit in half]
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return RUINED
    return fsum(finite) / fsum(positions[unit] for unit in half)


def search(
    manifest: Manifest, found: Verification, singles: Mapping[str, Sequence[str]], swaps: int
) -> Search:
    """Return where the search for a better recipe stands, at the bits of the scheme's own.

    Args:
        manifest: the scheme.
        found: what is measured, by photograph where the rows are of photographs.
        singles: format → handles whose measured damage counts; the others' is their score, scaled
            by how the two go together.
        swaps: how many recipes to measure beside the one that is solved from measured damage.
    """
    if len(found.before.positions) < LEAST_UNITS:
        return Search()
    menu = Menu.of_manifest(manifest)
    own = menu.choice(manifest.recipe)
    positions = found.before.positions
    tuning, _ = halves(len(positions))
    damages = single_damages(menu, manifest, found, singles, tuning)
    # Damage of groups adds up, whatever the scheme minimises.
    by_damage = replace(
        menu, scores=damages, errors=np.zeros_like(damages), batched=[], objective="sum", risk=0.0
    )
    limit = menu.budget_cost(own)
    solved = by_damage.best(limit).choice

    def damage(choice: Ints) -> Damage | None:
        entry = found.recipes.get(whole_digest(menu.recipe(choice), manifest.scheme.kv_cache))
        return None if entry is None else entry.damage

    recipe = menu.recipe(solved)
    best, other = damage(own), damage(solved)
    if best is None or other is None:
        missing = [own] * (best is None) + [solved] * (other is None)
        return Search(recipe, wanted=[menu.recipe(choice) for choice in missing])
    if not swaps:
        return Search(recipe)

    def is_better(this: Damage, than: Damage) -> bool:
        """Beyond what the rows of the tuning half leave open: noise is not worth a swap."""
        ours, theirs = ([entry.kl[unit] for unit in tuning] for entry in (this, than))
        return difference_interval(ours, theirs, [positions[unit] for unit in tuning])[0] > 0

    start = own
    if mean_kl(other, positions, tuning) < mean_kl(best, positions, tuning):
        start, best = solved, other
    arrangement, rows = _rows_of(by_damage, start)
    problem = arrangement.merge(by_damage.scores, by_damage.budget_costs)
    climb = _Climb(problem.scores, problem.costs, rows, limit)
    measured = 0
    while measured < swaps:
        candidates = climb.candidates(min(TOGETHER, swaps - measured))
        if not candidates:
            break
        results = [damage(arrangement.spread(candidate)) for candidate in candidates]
        known = [result for result in results if result is not None]
        if len(known) < len(results):
            refined = menu.recipe(arrangement.spread(climb.current))
            wanted = [
                menu.recipe(arrangement.spread(candidate))
                for candidate, result in zip(candidates, results, strict=True)
                if result is None
            ]
            return Search(recipe, refined, measured, wanted)
        measured += len(candidates)
        changes = [mean_kl(r, positions, tuning) - mean_kl(best, positions, tuning) for r in known]
        taken = climb.learn(candidates, changes, [is_better(result, best) for result in known])
        best = best if taken is None else known[taken]
    return Search(recipe, menu.recipe(arrangement.spread(climb.current)), measured)


def write_refined(manifest_file: Path, measured: Path, options: Verify, out: Path) -> None:
    """Write the manifest of a scheme with its refined recipe.

    Args:
        manifest_file: the scheme's own manifest.
        measured: ``verification.json`` of its run.
        options: what was verified; ``refine`` says how far.
        out: manifest to write.

    Raises:
        LayersenseError: an input cannot be read, or the search is not through.
    """
    manifest = read_own_manifest(manifest_file)
    found = by_photograph(read_verification(measured))
    singles = make_plan([manifest], options).singles
    state = search(manifest, found, singles, options.refine)
    if state.wanted or state.refined is None:
        why = (
            "what the search for it needs is not all measured; run `snakemake` without `frozen`"
            if state.wanted
            else f"its rows have fewer than {LEAST_UNITS} photographs or samples; hold out more"
            if state.solved is None
            else "`refine` of the run's `verify` is 0; set it to 20, say"
        )
        raise LayersenseError(f"{measured}: has no refined recipe: {why}")
    atomic_write(out, encode_manifest(with_recipe(manifest, state.refined)))


def single_damages(
    menu: Menu,
    manifest: Manifest,
    found: Verification,
    singles: Mapping[str, Sequence[str]],
    half: Ints,
) -> Floats:
    """Return the damage of every option of the menu, in nats per position.

    That of a group which was quantized alone is measured. Of others it is the score times the
    ratio of measured damage to score over the groups of the same format and subsystem (of the same
    format, where fewer than :data:`LEAST_MEASURED` of them are measured; of all formats, where none
    is).

    Returns:
        Shape and infinities of ``menu.scores``.
    """
    measured: dict[tuple[str, str], float] = {}
    for format, handles in singles.items():
        for handle in handles:
            if entry := found.singles.get(format, {}).get(handle):
                measured[format, handle] = mean_kl(entry.damage, found.before.positions, half)
    subsystems = [manifest.layer_sensitivity[handle].subsystem for handle in menu.handles]
    pairs: dict[tuple[str, str] | str, list[tuple[float, float]]] = {}
    for row, (handle, options) in enumerate(zip(menu.handles, menu.options, strict=True)):
        for column, name in enumerate(options):
            if (name, handle) in measured:
                pair = (measured[name, handle], float(menu.scores[row, column]))
                for key in ((name, subsystems[row]), name, ""):
                    pairs.setdefault(key, []).append(pair)

    def ratio(format: str, subsystem: str) -> float:
        for key, least in (((format, subsystem), LEAST_MEASURED), (format, 1), ("", 1)):
            known = [pair for pair in pairs.get(key, []) if pair[0] < RUINED]
            total = fsum(score for _, score in known)
            if len(known) >= least and total > 0:
                return fsum(damage for damage, _ in known) / total
        return 1.0

    damages = menu.scores.copy()
    for row, (handle, options) in enumerate(zip(menu.handles, menu.options, strict=True)):
        for column, name in enumerate(options):
            if name == NONE:
                damages[row, column] = 0.0
            elif (name, handle) in measured:
                damages[row, column] = measured[name, handle]
            else:
                damages[row, column] *= ratio(name, subsystems[row])
    return damages


class _Climb:
    """Swaps at equal cost, the most promising first; what is measured corrects what is expected.

    Args:
        damages: what each option of a row is expected to do, shape (rows, options); infinite where
            there is none.
        costs: what it costs, the same.
        start: options to start from, shape (rows,).
        limit: cost that none may go over.
    """

    def __init__(self, damages: Floats, costs: Floats, start: Ints, limit: float) -> None:
        self.damages, self.costs = damages.copy(), costs
        self.current, self.limit = start.copy(), limit
        self._rows = np.arange(len(start))
        self._tried = {start.tobytes()}
        self._joint: Ints | None = None

    def candidates(self, count: int) -> list[Ints]:
        """Return up to ``count`` choices that were not tried, no two of which change one row."""
        found = [self._joint] if self._joint is not None else []
        changed: set[int] = set()
        if found:
            changed.update(map(int, np.flatnonzero(found[0] != self.current)))
        for moves in self._swaps():
            if len(found) == count:
                break
            choice = self.current.copy()
            for row, option in moves:
                choice[row] = option
            if changed.isdisjoint(row for row, _ in moves) and choice.tobytes() not in self._tried:
                changed |= {row for row, _ in moves}
                found.append(choice)
        return found

    def learn(
        self, candidates: Sequence[Ints], changes: Sequence[float], better: Sequence[bool]
    ) -> int | None:
        """Go on to the best candidate that is better; return its index, None if none is.

        Args:
            candidates: what was measured.
            changes: KL of each, less that of the current choice.
            better: whether each is better than the current choice.
        """
        before = self.current.copy()
        joint = before.copy()
        for candidate, change, is_better in zip(candidates, changes, better, strict=True):
            self._tried.add(candidate.tobytes())
            rows = np.flatnonzero(candidate != before)
            expected = self.damages[rows, candidate[rows]] - self.damages[rows, before[rows]]
            self.damages[rows, candidate[rows]] += (change - float(expected.sum())) / len(rows)
            if is_better:
                joint[rows] = candidate[rows]
        taken = min(
            (index for index in range(len(candidates)) if better[index]),
            key=lambda index: changes[index],
            default=None,
        )
        if taken is not None:
            self.current = candidates[taken]
        self._joint = joint if self._fits(joint) and joint.tobytes() not in self._tried else None
        return taken

    def _fits(self, choice: Ints) -> bool:
        return float(self.costs[self._rows, choice].sum()) <= self.limit * (1 + BUDGET_TOLERANCE)

    def _swaps(self) -> list[list[tuple[int, int]]]:
        """Return single changes and pairs of them within the limit, the best expected first."""
        rows, options = np.nonzero(np.isfinite(self.costs) & np.isfinite(self.damages))
        other = options != self.current[rows]
        rows, options = rows[other], options[other]
        current = self.current[rows]
        cost = self.costs[rows, options] - self.costs[rows, current]
        damage = self.damages[rows, options] - self.damages[rows, current]
        slack = self.limit * (1 + BUDGET_TOLERANCE) - float(
            self.costs[self._rows, self.current].sum()
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            worth = np.where(cost == 0, damage, damage / np.abs(cost))
        better, cheaper = (
            chosen[np.argsort(worth[chosen], kind="stable")][:MAX_MOVES]
            for chosen in (np.flatnonzero((damage < 0) & (cost > 0)), np.flatnonzero(cost < 0))
        )
        total = damage[better][:, None] + damage[cheaper]
        allowed = (cost[better][:, None] + cost[cheaper] <= slack) & (
            rows[better][:, None] != rows[cheaper]
        )
        ups, downs = np.nonzero(allowed)
        alone = np.flatnonzero(cost <= slack)
        moves = [
            *((float(damage[move]), (int(move),)) for move in alone),
            *(
                (float(total[up, down]), (int(better[up]), int(cheaper[down])))
                for up, down in zip(ups, downs, strict=True)
            ),
        ]
        moves.sort(key=lambda entry: entry[0])
        return [
            [(int(rows[move]), int(options[move])) for move in together] for _, together in moves
        ]


def _rows_of(menu: Menu, choice: Ints) -> tuple[Arrangement, Ints]:
    """Return an arrangement that holds a choice, and the options of its rows there."""
    for arrangement in menu.arrangements:
        first = np.unique(arrangement.row, return_index=True)[1]
        rows = (arrangement.pick[first] == choice[first][:, None]).argmax(axis=1)
        if np.array_equal(arrangement.spread(rows), choice):
            return arrangement, rows
    raise ValueError("the recipe is none that the scheme allows")
