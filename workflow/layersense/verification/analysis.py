"""What the held-out rows say of scores and recipes: means, intervals, correlations (no torch)."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from layersense.manifests.schema import Finding

Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
"""Bootstrap resamples, of units or of layer groups."""
LOW, HIGH = 2.5, 97.5
"""Percentiles of the 95 % intervals."""
LEAST_CORRELATION = 0.9
"""Spearman below which a score is told not to predict damage."""
LEAST_GROUPS = 5
"""Groups below which a correlation says nothing."""
MAIN_DAMAGE = 0.999
"""Share of the damage of all groups that the main ones do together."""
HALVINGS = 100
"""Random halvings of the rows by which a measurement is compared with itself."""
LEAST_PARTS = 4
"""Parts of the rows below which halves of them say nothing."""


class Correlation(msgspec.Struct, kw_only=True):
    """How well the order by score is the order by measured KL."""

    format: str
    subsystem: str | None
    """None: all of them."""
    groups: int
    spearman: float
    spearman_low: float
    spearman_high: float
    kendall: float
    kendall_low: float
    kendall_high: float
    main_groups: int
    """The fewest groups that together do :data:`MAIN_DAMAGE` of the measured KL of all."""
    spearman_main: float | None
    """Spearman over these; None with fewer than :data:`LEAST_GROUPS`."""
    score_repeats: float | None = None
    """Spearman that two measurements of the scores on as many rows are expected to have; None where
    their rows are too few to be halved."""
    damage_repeats: float | None = None
    """The same of the measured KL."""

    @property
    def ceiling(self) -> float | None:
        """Spearman that a perfect score is expected to show through the noise of the rows.

        √(score_repeats × damage_repeats): the correction for attenuation (Spearman, *The proof and
        measurement of association between two things*, 1904), solved for what is seen.
        """
        if self.score_repeats is None or self.damage_repeats is None:
            return None
        return float(np.sqrt(self.score_repeats * self.damage_repeats))


class Duel(msgspec.Struct, kw_only=True):
    """Two recipes within the same budget, measured on the same rows."""

    scheme: str
    ours: str
    """Label of the recipe that the solver chose."""
    theirs: str
    bits: float
    """Of the other recipe. Ours takes no more of what the scheme's budget counts."""
    kl_ours: float | None
    """None where not finite."""
    kl_theirs: float | None
    difference_low: float | None
    """95 % interval of theirs − ours, by bootstrap over the same units; None where there are fewer
    than two, or a KL is not finite."""
    difference_high: float | None

    @property
    def outcome(self) -> str:
        """``won``, ``lost``, or ``even`` where the interval of the difference holds zero.

        What is not finite is worse than all that is.
        """
        if self.kl_ours is None or self.kl_theirs is None:
            if self.kl_ours is self.kl_theirs:
                return "even"
            return "lost" if self.kl_ours is None else "won"
        if self.difference_low is None or self.difference_high is None:
            return "even"
        if self.difference_low > 0:
            return "won"
        return "lost" if self.difference_high < 0 else "even"


class Betterment(msgspec.Struct, kw_only=True):
    """What recipes from measured damage do at the bits of the scheme's own.

    All KL is of the half of the rows that the search did not go by.
    """

    kl: float
    """Of the scheme's own recipe."""
    kl_solved: float
    """Of the recipe that the damage of single groups gives."""
    own_ratio: float
    """``kl / kl_solved``: what is lost by solving from scores instead of measured damage."""
    own_ratio_low: float
    own_ratio_high: float
    """95 % interval, by bootstrap over the same units."""
    kl_refined: float | None = None
    """Of the recipe that was refined by swaps; None where none was asked for."""
    refined_ratio: float | None = None
    """``kl_refined / kl_solved``."""
    refined_ratio_low: float | None = None
    refined_ratio_high: float | None = None
    measured: int = 0
    """Whole recipes that the refinement has measured."""

    @property
    def sentence(self) -> str:
        """What it comes to, in words."""
        half = "the half of the rows that tuned neither"
        solved_is_own = self.own_ratio_low == self.own_ratio == self.own_ratio_high == 1
        if solved_is_own:
            parts = ["Measured damage of single groups gives the very same recipe"]
        else:
            parts = [
                f"On {half}, the recipe's KL is {self.own_ratio:.3g} times "
                f"({self.own_ratio_low:.3g} to {self.own_ratio_high:.3g}) that of the recipe which "
                "measured damage of single groups gives"
            ]
        refined = (self.refined_ratio, self.refined_ratio_low, self.refined_ratio_high)
        start = {
            (1, 1, 1): "that",
            (self.own_ratio, self.own_ratio_low, self.own_ratio_high): "the scheme's own",
        }
        if self.refined_ratio is None:
            pass
        elif refined in start:
            parts.append(
                f"none of {self.measured} measured recipes is better than {start[refined]} beyond "
                "the noise of the rows"
            )
        else:
            where = f" its KL on {half}" if solved_is_own else ""
            parts.append(
                f"{self.measured} measured recipes later, the refined one comes to "
                f"{self.refined_ratio:.3g} times ({self.refined_ratio_low:.3g} to "
                f"{self.refined_ratio_high:.3g}){where}"
            )
        return f"{'; '.join(parts)}."


class Verdict(msgspec.Struct, kw_only=True):
    """What was found for one scheme."""

    scheme: str
    sentence: str
    """Whether the chosen recipe beats its alternatives, in words."""
    additivity: float | None
    """Measured KL of the recipe / sum of the measured KL of its groups alone; None where not every
    group was measured alone."""
    equal: str = "at equal bits"
    """Within which budget recipes are compared, in words."""
    findings: list[Finding] = []
    """What speaks against this scheme's recipe."""
    betterment: Betterment | None = None
    """None where there are too few rows to halve, or something is not measured."""


class Summary(msgspec.Struct, kw_only=True):
    """Everything that is no row of the table."""

    correlations: list[Correlation]
    duels: list[Duel]
    verdicts: list[Verdict]
    findings: list[Finding]
    heldout_samples: int
    positions: int
    exact_reuse: bool
    photographs: int | None = None
    """How many photographs the held-out samples are of; None where they are of none."""

    def verdict_of(self, scheme: str) -> Verdict:
        """Return what was found for a scheme."""
        return next(verdict for verdict in self.verdicts if verdict.scheme == scheme)

    def findings_of(self, formats: Collection[str], scheme: str | None = None) -> list[Finding]:
        """Return the findings, without those that concern other formats than ``formats``.

        With a ``scheme``, what speaks against its own recipe comes first.
        """
        own = [] if scheme is None else self.verdict_of(scheme).findings
        return own + [
            finding
            for finding in self.findings
            if not finding.formats or set(finding.formats) & set(formats)
        ]


class Parts(NamedTuple):
    """A measurement of layer groups, part by part of its rows."""

    sums: Floats
    """Shape (groups, parts)."""
    weights: Floats
    """Tokens or positions of each part, shape (parts,)."""


def mean_with_interval(
    values: Sequence[float | None], weights: Sequence[int]
) -> tuple[float | None, float | None, float | None]:
    """Return Σ values / Σ weights with its 95 % bootstrap interval over the units.

    All are None where a value is not finite, and the interval is with fewer than two units.
    """
    if any(value is None for value in values) or not sum(weights):
        return None, None, None
    found = np.array(values, dtype=float)
    sizes = np.array(weights, dtype=float)
    mean = float(found.sum() / sizes.sum())
    if len(found) < 2:
        return mean, None, None
    ratios = _resampled(found, sizes)
    low, high = np.percentile(ratios, [LOW, HIGH])
    return mean, float(low), float(high)


def difference_interval(
    ours: Sequence[float | None], theirs: Sequence[float | None], weights: Sequence[int]
) -> tuple[float, float]:
    """Return the 95 % interval of (Σ theirs − Σ ours) / Σ weights over the same units.

    Infinitely wide where a value is not finite or there are fewer than two units.
    """
    if len(weights) < 2 or any(value is None for value in (*ours, *theirs)):
        return -np.inf, np.inf
    difference = np.array(theirs, dtype=float) - np.array(ours, dtype=float)
    low, high = np.percentile(_resampled(difference, np.array(weights, dtype=float)), [LOW, HIGH])
    return float(low), float(high)


def ratio_interval(
    ours: Sequence[float | None], theirs: Sequence[float | None]
) -> tuple[float, float, float] | None:
    """Return Σ ours / Σ theirs with its 95 % bootstrap interval over the same units.

    None with fewer than two units, or where a value is not finite or all of theirs are zero.
    """
    if len(ours) < 2 or any(value is None for value in (*ours, *theirs)):
        return None
    numerator, denominator = np.array(ours, dtype=float), np.array(theirs, dtype=float)
    if not denominator.sum() > 0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = _resampled(numerator, denominator)
    low, high = np.percentile(drawn[np.isfinite(drawn)], [LOW, HIGH])
    return float(numerator.sum() / denominator.sum()), float(low), float(high)


def resamples(units: int) -> npt.NDArray[np.int64]:
    """Return which units each bootstrap resample draws, shape (resamples, units)."""
    return np.random.default_rng(0).integers(0, units, size=(RESAMPLES, units))


def _resampled(values: Floats, weights: Floats) -> Floats:
    """Return the ratio of sums in each bootstrap resample of the units."""
    drawn = resamples(len(values))
    ratios: Floats = values[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    return ratios


def correlate(
    format: str,
    subsystem: str | None,
    scores: Sequence[float],
    damages: Sequence[float],
    score_parts: Parts | None = None,
    damage_parts: Parts | None = None,
) -> Correlation | None:
    """Return the rank correlations with bootstrap intervals over the groups.

    Args:
        format: the format.
        subsystem: whose groups they are; None for all.
        scores: of each group.
        damages: measured KL of each group.
        score_parts: what the scores are made of, for their noise.
        damage_parts: what the damages are made of.

    Returns:
        None with fewer than :data:`LEAST_GROUPS` groups, or where all values of one side are equal.
    """
    from scipy import stats  # here, because pages read results of it and import takes a second

    x, y = np.array(scores), np.array(damages)
    if len(x) < LEAST_GROUPS or len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return None
    main = _main(y)
    generator = np.random.default_rng(0)
    spearman, kendall = [], []
    for _ in range(RESAMPLES // 2):
        drawn = generator.integers(0, len(x), size=len(x))
        if len(np.unique(x[drawn])) > 1 and len(np.unique(y[drawn])) > 1:
            spearman.append(_spearman(x[drawn], y[drawn]))
            kendall.append(float(stats.kendalltau(x[drawn], y[drawn]).statistic))
    spearman_low, spearman_high = np.percentile(spearman, [LOW, HIGH])
    kendall_low, kendall_high = np.percentile(kendall, [LOW, HIGH])
    return Correlation(
        format=format,
        subsystem=subsystem,
        groups=len(x),
        spearman=_spearman(x, y),
        spearman_low=float(spearman_low),
        spearman_high=float(spearman_high),
        kendall=float(stats.kendalltau(x, y).statistic),
        kendall_low=float(kendall_low),
        kendall_high=float(kendall_high),
        main_groups=len(main),
        spearman_main=_spearman(x[main], y[main]) if len(main) >= LEAST_GROUPS else None,
        score_repeats=score_parts and repeatability(score_parts),
        damage_repeats=damage_parts and repeatability(damage_parts),
    )


def repeatability(parts: Parts) -> float | None:
    """Return the Spearman that two measurements on as many rows are expected to have, 0 to 1.

    The mean r over random halvings of the parts, stretched from half the rows to all of them:
    2r / (1 + r) (Spearman–Brown). None with fewer than :data:`LEAST_PARTS` parts or
    :data:`LEAST_GROUPS` groups, or where the values of a half are all equal.
    """
    groups, count = parts.sums.shape
    if count < LEAST_PARTS or groups < LEAST_GROUPS or not np.isfinite(parts.sums).all():
        return None
    generator = np.random.default_rng(0)
    found = []
    for _ in range(HALVINGS):
        order = generator.permutation(count)
        one, other = (
            parts.sums[:, half].sum(axis=1) / parts.weights[half].sum()
            for half in (order[: count // 2], order[count // 2 :])
        )
        if len(np.unique(one)) < 2 or len(np.unique(other)) < 2:
            return None
        found.append(_spearman(one, other))
    r = max(0.0, float(np.mean(found)))
    return 2 * r / (1 + r)


def _main(damages: Floats) -> npt.NDArray[np.int64]:
    """Return the fewest indices whose damages are :data:`MAIN_DAMAGE` of all."""
    order = np.argsort(-damages, kind="stable")
    reached = np.cumsum(damages[order]) >= MAIN_DAMAGE * damages.sum()
    return order[: int(reached.argmax()) + 1]


def _spearman(x: Floats, y: Floats) -> float:
    """Return Pearson's correlation of the ranks, those of ties averaged."""
    from scipy import stats

    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])
