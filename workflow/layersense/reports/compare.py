"""Two results side by side: do they rank the layers alike, and do they differ beyond noise?"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt
import pandas as pd

from layersense.quantization.formats import NONE
from layersense.reports.result import Z95, Result

Floats = npt.NDArray[np.float64]

RESAMPLES = 200
"""Pairs of repeated measurements that are simulated to learn what noise alone does."""
QUANTILE = 0.05
"""Share of such pairs that agree less than the figure which a comparison is held against."""
LISTED = 10
"""Moved groups, and changed choices, that a comparison lists."""


@dataclass(frozen=True, eq=False)
class Profile:
    """What is compared of a result; arrays run over its layers."""

    run: str
    scheme: str
    layers: list[str]
    reached: npt.NDArray[np.bool_]
    scores: dict[str, Floats]
    """By format; NaN where there is none."""
    errors: dict[str, Floats]
    """Standard errors of ``scores``."""
    choice: list[str | None]
    places: dict[str, int] = field(init=False)
    """Layer → its index."""

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "places", {layer: index for index, layer in enumerate(self.layers)}
        )

    def worst(self, formats: Sequence[str]) -> tuple[Floats, Floats]:
        """Return each layer's largest score over ``formats``, and that score's error.

        NaN where a layer was not reached or has no score under one of them; all of them without any
        format, as in a foreign manifest that quantizes nothing.
        """
        if not formats:
            nothing = np.full(len(self.layers), np.nan)
            return nothing, nothing
        scores = np.stack([self.scores[name] for name in formats])
        errors = np.stack([self.errors[name] for name in formats])
        which = np.argmax(np.where(np.isnan(scores), -1.0, scores), axis=0)
        columns = np.arange(scores.shape[1])
        known = self.reached & ~np.isnan(scores).any(axis=0)
        worst = np.where(known, scores[which, columns], np.nan)
        return worst, np.where(known, errors[which, columns], np.nan)


@dataclass(frozen=True)
class Moved:
    """One layer in two results."""

    layer: str
    rank_a: int
    rank_b: int
    share_a: float
    share_b: float
    """Of the total over the common layers, 0 to 1."""
    beyond_noise: bool | None
    """Whether the shares differ by more than the errors of both; None where these are unknown."""


@dataclass(frozen=True)
class Comparison:
    """What two results have in common, and what not."""

    common: int
    """Layers with a score in both."""
    only_a: int
    only_b: int
    formats: list[str]
    """Formats whose scores were compared; empty if they share none, and each one's own count."""
    correlation: float | None
    """Spearman's ρ over the common layers; None with fewer than three."""
    expected: float | None
    """The ρ that two measurements of the same thing, with these standard errors, reach in 95 % of
    cases; None where the errors are unknown."""
    moved: list[Moved]
    """Layers whose share differs, the largest difference first."""
    moved_beyond_noise: int
    changed: list[tuple[str, str, str]]
    """Layer, choice in the one, choice in the other."""
    changed_count: int

    @property
    def exceeds_noise(self) -> bool | None:
        """Whether the rankings differ more than noise explains; None where that is unknown."""
        if self.correlation is None or self.expected is None:
            return None
        return self.correlation < self.expected

    @property
    def verdict(self) -> str:
        """One sentence that says it."""
        if self.correlation is None:
            return (
                f"Nothing to compare: {self.common} layers have a score in both results, and a "
                "rank correlation needs three."
            )
        if self.exceeds_noise is None:
            return "Whether they differ by more than noise is unknown: standard errors are missing."
        if self.exceeds_noise:
            return (
                "They rank the layers differently, by more than the noise of the scores explains."
            )
        if self.moved_beyond_noise:
            count = self.moved_beyond_noise
            return (
                "They rank the layers alike, within the noise of the scores; the share of "
                f"{count} layer{'' if count == 1 else 's'} differs by more than its noise."
            )
        return "They rank the layers alike: the difference is within the noise of the scores."


def profile(result: Result) -> Profile:
    """Return what is compared of a result."""
    scores = {
        name: [_number(group.scores[name].score) if name in group.scores else np.nan
               for group in result.groups]
        for name in result.formats
    }  # fmt: skip
    errors = {
        name: [_number(group.scores[name].error) if name in group.scores else np.nan
               for group in result.groups]
        for name in result.formats
    }  # fmt: skip
    return Profile(
        run=result.run,
        scheme=result.scheme,
        layers=[group.layer for group in result.groups],
        reached=np.array([group.reached in (None, "scored") for group in result.groups]),
        scores={name: np.array(values) for name, values in scores.items()},
        errors={name: np.array(values) for name, values in errors.items()},
        choice=[group.selected for group in result.groups],
    )


def compare(a: Profile, b: Profile) -> Comparison:
    """Compare two results over the layers that have the same name in both.

    Of each layer counts the worst score over the formats that both measured, or, if they share
    none, over each one's own; as a share of the total over the common layers, because models,
    datasets and methods differ in scale.
    """
    shared = [name for name in a.scores if name in b.scores]
    names = [layer for layer in a.layers if layer in b.places]
    in_a = np.array([a.places[layer] for layer in names], dtype=int)
    in_b = np.array([b.places[layer] for layer in names], dtype=int)
    score_a, error_a = (values[in_a] for values in a.worst(shared or list(a.scores)))
    score_b, error_b = (values[in_b] for values in b.worst(shared or list(b.scores)))
    known = ~np.isnan(score_a) & ~np.isnan(score_b)
    layers = [layer for layer, there in zip(names, known, strict=True) if there]
    score_a, error_a = _shares(score_a[known], error_a[known])
    score_b, error_b = _shares(score_b[known], error_b[known])
    moved = _moved(layers, score_a, error_a, score_b, error_b)
    changed = [
        (layer, before, after)
        for layer, i, j in zip(names, in_a, in_b, strict=True)
        if (before := a.choice[i]) is not None
        and (after := b.choice[j]) is not None
        and before != after
    ]
    noise = [repeatability(tuple(score_a), tuple(error_a)),
             repeatability(tuple(score_b), tuple(error_b))]  # fmt: skip
    known_noise = [value for value in noise if value is not None]
    return Comparison(
        common=len(layers),
        only_a=len(a.layers) - len(names),
        only_b=len(b.layers) - len(names),
        formats=shared,
        correlation=spearman(score_a, score_b),
        expected=min(known_noise) if len(known_noise) == 2 else None,
        moved=moved[:LISTED],
        moved_beyond_noise=sum(entry.beyond_noise is True for entry in moved),
        changed=changed[:LISTED],
        changed_count=len(changed),
    )


def spearman(a: Floats, b: Floats) -> float | None:
    """Return Spearman's ρ, ties at their mean rank; None with fewer than three or all alike."""
    if len(a) < 3:
        return None
    ranks = [pd.Series(values).rank().to_numpy() for values in (a, b)]
    if any(values.std() == 0 for values in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


@cache
def repeatability(scores: tuple[float, ...], errors: tuple[float, ...]) -> float | None:
    """Return the ρ that two repetitions of a measurement reach in 95 % of cases.

    Both are drawn from normal distributions around the scores, cut at zero, which hold the noise of
    the scores themselves as well: the figure errs towards calling a difference noise.

    Args:
        scores: scores of the layers.
        errors: their standard errors; NaN where unknown.
    """
    values, spread = np.array(scores), np.array(errors)
    if len(values) < 3 or np.isnan(spread).any():
        return None
    draws = np.random.default_rng(0).normal(values, spread, (2 * RESAMPLES, len(values)))
    ranks = np.argsort(np.argsort(draws.clip(0), axis=1, kind="stable"), axis=1).astype(float)
    ranks -= (len(values) - 1) / 2
    one, two = ranks[:RESAMPLES], ranks[RESAMPLES:]
    found = (one * two).sum(axis=1) / (one**2).sum(axis=1)
    return float(np.quantile(found, QUANTILE))


def _moved(
    layers: list[str], a: Floats, error_a: Floats, b: Floats, error_b: Floats
) -> list[Moved]:
    rank_a, rank_b = (pd.Series(-values).rank(method="first").astype(int) for values in (a, b))
    limit = Z95 * np.hypot(error_a, error_b)
    order = np.argsort(-np.abs(a - b), kind="stable")
    return [
        Moved(
            layer=layers[index],
            rank_a=int(rank_a[index]),
            rank_b=int(rank_b[index]),
            share_a=float(a[index]),
            share_b=float(b[index]),
            beyond_noise=None
            if np.isnan(limit[index])
            else bool(abs(a[index] - b[index]) > limit[index]),
        )
        for index in order
        if a[index] != b[index]
    ]


def _shares(scores: Floats, errors: Floats) -> tuple[Floats, Floats]:
    total = scores.sum()
    return (scores / total, errors / total) if total > 0 else (scores, errors)


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def changed_label(choice: str) -> str:
    """Return a chosen format as a reader says it."""
    return "unquantized" if choice == NONE else choice
