"""How sure a ranking is: would other rows put other layer groups at the top? (no torch)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

from layersense.scoring.scores import FormatScores

TOP = 10
"""Size of the set of most sensitive groups whose stability is judged."""
RESAMPLES = 1000
"""Bootstrap resamples of the batches."""
SURE = 0.9
"""Share of resamples in which a group has to stay in the set to belong to it safely."""
MOST_SAMPLES = 1_000_000
"""A number of samples above which none is named: the groups are alike."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Stability:
    """The set of most sensitive groups, and how it stands against other rows.

    Attributes:
        top: handles of the set, the most sensitive first.
        probability: handle → share of resamples in which it belongs to the set; of all groups that
            could get there.
        other_set: share of resamples with another set.
        unsure: members that stay in it in less than :data:`SURE` of the resamples.
        halves: handles that are in the set of one half of the batches and not in the other's.
        samples_needed: samples after which the last member would differ from the first outsider by
            1.96 standard errors; None if that is out of reach.
    """

    top: list[str]
    probability: dict[str, float]
    other_set: float
    unsure: list[str]
    halves: list[str]
    samples_needed: int | None


def ranking_stability(
    importance: Mapping[str, float], formats: Mapping[str, FormatScores]
) -> Stability | None:
    """Judge the set of the most sensitive groups by resampling the batches.

    A paired bootstrap (Efron and Tibshirani, *An Introduction to the Bootstrap*, ch. 6): all groups
    see the same batches, so a batch that raises all scores changes no order.

    Args:
        importance: handle → worst score over the formats, of the groups that were reached.
        formats: the formats' measurements.

    Returns:
        None where there is nothing to rank or fewer than two batches.
    """
    ranking = sorted(importance, key=lambda handle: -importance[handle])
    size = min(TOP, len(ranking) // 4)
    counts = {len(entry.batches.tokens) for entry in formats.values()}
    if not size or len(counts) != 1 or min(counts) < 2:
        return None
    (n_batches,) = counts
    # Far down the list nothing can reach the top: a resample multiplies a score by at most the
    # number of batches.
    floor = importance[ranking[size - 1]] / n_batches**2
    near = [handle for handle in ranking if importance[handle] >= floor][: 50 * TOP]
    random = np.random.default_rng(0)
    weights = random.multinomial(n_batches, np.full(n_batches, 1 / n_batches), size=RESAMPLES).T
    worst = _worst(near, formats, weights.astype(np.float64))
    top = _top(worst, size)
    inside = np.array([(top == index).any(axis=0) for index in range(len(near))])
    probability = inside.mean(axis=1)
    odd = np.arange(n_batches) % 2
    halves = _top(_worst(near, formats, np.array([1.0 - odd, odd]).T), size)
    samples = max(sum(entry.batches.samples) for entry in formats.values())
    return Stability(
        top=near[:size],
        probability=dict(zip(near, probability.tolist(), strict=True)),
        other_set=float(1 - inside[:size].all(axis=0).mean()),
        unsure=[near[index] for index in range(size) if probability[index] < SURE],
        halves=[near[index] for index in sorted(set(halves[:, 0]) ^ set(halves[:, 1]))],
        samples_needed=_samples_needed(worst, size, samples) if len(near) > size else None,
    )


def _worst(near: Sequence[str], formats: Mapping[str, FormatScores], weights: Floats) -> Floats:
    """Return each group's worst score, shape (groups, draws), with batches weighted by a draw."""
    scores = []
    for entry in formats.values():
        n_batches = len(entry.batches.tokens)
        rows = [
            entry.groups[handle].batch_scores if handle in entry.groups else [0.0] * n_batches
            for handle in near
        ]
        tokens = np.array(entry.batches.tokens) @ weights
        scores.append((np.array(rows, dtype=np.float64) @ weights) / np.maximum(1, tokens))
    worst: Floats = np.max(scores, axis=0)
    return worst


def _top(worst: Floats, size: int) -> npt.NDArray[np.int64]:
    return np.argsort(-worst, axis=0, kind="stable")[:size]


def _samples_needed(worst: Floats, size: int, samples: int) -> int | None:
    """Return how many samples tell the last of the set from the first outside of it."""
    difference = worst[size - 1] - worst[size]
    distance, spread = abs(float(difference.mean())), float(difference.std())
    if distance == 0:
        return None
    needed = ceil(samples * (1.96 * spread / distance) ** 2)
    return needed if needed <= MOST_SAMPLES else None
