"""What to verify: which single groups, and which whole recipes (no torch)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from layersense.config import Verify
from layersense.manifests.schema import Manifest, plain_name
from layersense.quantization.formats import NONE
from layersense.recipes.baselines import baselines, outer_first, random_recipes
from layersense.recipes.frontier import frontier
from layersense.recipes.menu import Menu, Recipe, recipe_digest

Role = Literal[
    "cache", "scheme", "frontier", "uniform", "head_kept", "edges_kept", "rival",
    "outer_first", "random", "solved", "refined",
]  # fmt: skip
"""``rival``: the best recipe within the bits of a baseline, which it is compared with.
``outer_first``: the scheme's bits, spent from the outside in. ``cache``: the key-value cache alone,
of a scheme that quantizes it; its other recipes have it too. ``solved`` and ``refined`` follow from
what is measured: see :mod:`layersense.verification.refine`."""
AT_ITS_BITS = ("outer_first", "random")
"""Roles of recipes at the scheme's own bits, which its recipe is compared with."""
CACHE = "key-value cache"
"""Stands among the handles where a recipe's digest is taken."""
TUNED = ("solved", "refined")
"""Roles of recipes that half of the rows chose."""
UNNAMED = ("random", "rival")
"""Roles of recipes that are there to compare with, and not by themselves."""


@dataclass(frozen=True)
class Planned:
    """One recipe to measure, in one role for one scheme."""

    scheme: str
    role: Role
    label: str
    recipe: Recipe
    effective_bits: float
    predicted: float
    low: float | None
    high: float | None
    rival_of: str | None = None
    """Label of the baseline that a rival is compared with."""
    kv_cache: str = "none"
    """Format of the key-value cache."""

    @property
    def digest(self) -> str:
        """What identifies the recipe, whatever it is called."""
        return whole_digest(self.recipe, self.kv_cache)


def whole_digest(recipe: Mapping[str, str], kv_cache: str) -> str:
    """Return what identifies a recipe with its key-value cache, whatever it is called."""
    cache = {} if kv_cache == "none" else {CACHE: kv_cache}
    return recipe_digest({**recipe, **cache})


@dataclass(frozen=True)
class Whole:
    """A whole recipe to measure: of the groups that it quantizes, and of the key-value cache."""

    recipe: dict[str, str]
    kv_cache: str = "none"


@dataclass(frozen=True)
class Plan:
    """What a run verifies.

    Attributes:
        singles: format → handles of the groups to quantize alone, in model order.
        recipes: whole recipes; one may come in several roles.
    """

    singles: dict[str, list[str]]
    recipes: list[Planned] = field(default_factory=list)


def make_plan(manifests: Sequence[Manifest], options: Verify) -> Plan:
    """Return what to verify of a run's schemes."""
    singles: dict[str, list[str]] = {}
    for manifest in manifests:
        for name in manifest.run:
            singles.setdefault(name, pick_groups(manifest, name, options.groups))
    recipes = [planned for manifest in manifests for planned in _recipes(manifest, options)]
    return Plan(singles, recipes)


def pick_groups(manifest: Manifest, format: str, count: int) -> list[str]:
    """Return about ``count`` groups, spread over subsystems, kinds and scores.

    Every stratum of subsystem and kind gets its share of the groups, at least one, and in it the
    groups are spread evenly from the lowest score to the highest. Which groups a scheme allows
    does not matter, so that an edit of a scheme changes nothing.
    """
    strata: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for handle, group in manifest.layer_sensitivity.items():
        names = [plain_name(label) for label in group.formats]
        if group.reached != "scored" or format not in names:
            continue
        score = group.scores[names.index(format)]
        if score is not None:
            strata.setdefault((group.subsystem, group.kind), []).append((score, handle))
    total = sum(map(len, strata.values()))
    picked: set[str] = set()
    for members in strata.values():
        members.sort()
        share = min(len(members), max(1, round(count * len(members) / total)))
        spread = np.rint(np.linspace(0, len(members) - 1, share)).astype(int)
        picked |= {members[index][1] for index in spread}
    return [handle for handle in manifest.layer_sensitivity if handle in picked]


def plan_recipe(
    manifest: Manifest,
    menu: Menu,
    role: Role,
    label: str,
    recipe: Mapping[str, str],
    rival_of: str | None = None,
) -> Planned:
    """Return a recipe of a scheme as it is to be measured, with what is predicted of it."""
    choice = menu.choice(recipe)
    damage = menu.damage(choice)
    return Planned(
        scheme=manifest.scheme.name,
        role=role,
        label=label,
        recipe=dict(recipe),
        effective_bits=menu.effective_bits(choice),
        predicted=damage.score,
        low=damage.low,
        high=damage.high,
        rival_of=rival_of,
        kv_cache=manifest.scheme.kv_cache,
    )


def _recipes(manifest: Manifest, options: Verify) -> Iterator[Planned]:
    menu = Menu.of_manifest(manifest)
    planned = partial(plan_recipe, manifest, menu)
    name = manifest.scheme.name
    if manifest.scheme.kv_cache != "none":
        label = f"key-value cache in {manifest.scheme.kv_cache} alone"
        yield planned("cache", label, dict.fromkeys(menu.handles, NONE))
    yield planned("scheme", name, manifest.recipe)
    points = [menu.recipe(point.choice) for point in frontier(menu).points]
    points = [recipe for recipe in points if set(recipe.values()) != {NONE}]
    bits = np.array([menu.effective_bits(menu.choice(recipe)) for recipe in points])
    nearest = (
        {
            int(np.abs(bits - value).argmin())
            for value in np.linspace(bits[0], bits[-1], options.points)
        }
        if points
        else set()
    )
    for index in sorted(nearest):
        label = f"best at {bits[index]:.2f} bits"
        yield planned("frontier", label, points[index])
    for baseline in baselines(menu, manifest.layer_sensitivity):
        yield planned(baseline.kind, baseline.label, baseline.recipe)
        budget = menu.budget_cost(menu.choice(baseline.recipe))
        rival = menu.recipe(menu.best(budget).choice)
        if rival != baseline.recipe:
            yield planned(
                "rival", f"best within the bits of {baseline.label}", rival, baseline.label
            )
    own = menu.choice(manifest.recipe)
    outer = outer_first(menu, manifest.layer_sensitivity, menu.budget_cost(own))
    if outer is not None:
        counted = {"bits": "bits", "size": "size", "table": "cost"}
        label = f"outer blocks first, at its {counted[manifest.autoquant_state.budget.kind]}"
        yield planned("outer_first", label, outer)
    own_bits = menu.effective_bits(own)
    for number, recipe in enumerate(random_recipes(menu, own_bits, options.random), start=1):
        yield planned("random", f"random {number}", recipe)
