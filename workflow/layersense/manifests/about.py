"""What a manifest says beside its layer groups, small enough to travel inside ``layers.parquet``.

Reports are rendered from tables alone. The findings, the scheme, the provenance and the solver's
answer are no columns, so :mod:`layersense.manifests.tables` puts them into the table's metadata.
What differs from run to run (seconds, peak memory, host) is left out: same measurement, same bytes.
"""

from math import sqrt

import msgspec

from layersense.manifests.schema import (
    AutoQuantizeState,
    Finding,
    Manifest,
    Scheme,
    plain_name,
)
from layersense.scoring.scores import Dataset, Model, score_per_token

ABOUT_KEY = b"layersense.about"
"""Key of the table's metadata."""
VERSIONS = ("layersense", "modelopt", "torch", "transformers")
"""The packages whose versions tell two results apart."""


class Measurement(msgspec.Struct, kw_only=True):
    """How one format was measured."""

    engine: str
    kernel: str
    effective_bits: float
    weight_format: str
    act_format: str
    batches: int
    tokens: int
    """Supervised tokens (samples, where there are none) over all scoring batches."""
    padding_share: float
    """Padding positions as a share of all positions, 0 to 1."""
    truncated: int
    back_offs: list[str]
    seed: int | None
    """Seed of torch; None if the settings name none."""


class About(msgspec.Struct, kw_only=True):
    """A manifest without its groups."""

    scheme: Scheme
    model: Model
    dataset: Dataset
    state: AutoQuantizeState
    damage_se: float | None
    """Standard error of ``state.score``, in its unit; None with fewer than two batches."""
    findings: list[Finding]
    environment: dict[str, dict[str, str]]
    """Versions and hardware, by format."""
    measurements: dict[str, Measurement]
    """By format."""


def describe(manifest: Manifest) -> About:
    """Return what ``manifest`` says beside its groups."""
    return About(
        scheme=manifest.scheme,
        model=manifest.model,
        dataset=manifest.dataset,
        state=manifest.autoquant_state,
        damage_se=damage_error(manifest),
        findings=manifest.findings,
        environment={
            name: {key: value for key, value in entry.items() if key != "host"}
            for name, entry in manifest.environment.items()
        },
        measurements={
            name: Measurement(
                engine=run.engine,
                kernel=run.kernel,
                effective_bits=run.effective_bits,
                weight_format=run.weight_format,
                act_format=run.act_format,
                batches=len(run.batches.tokens),
                tokens=sum(run.batches.tokens),
                padding_share=run.batches.padding_share,
                truncated=run.batches.truncated,
                back_offs=run.back_offs,
                seed=_seed(run.settings.get("sampling")),
            )
            for name, run in manifest.run.items()
        },
    )


def damage_error(manifest: Manifest) -> float | None:
    """Return the standard error of the predicted damage.

    Groups are scored on the same batches, so their errors are not independent: the damage of each
    batch is summed over the choice first, and the error is that of
    :func:`layersense.scoring.scores.score_per_token` over these sums. Under ``objective: max`` the
    damage is one group's score, and the error is that group's.

    Returns:
        The error in the unit of a score; None with fewer than two batches. Where formats were
        scored on different batches, that of independent scores.
    """
    chosen = []
    tokens = set()
    for group in manifest.layer_sensitivity.values():
        selected = group.formats.index(group.selected)
        solver = group.scores_solver[selected]
        if not solver:
            continue
        # Made monotone, a score may be that of a smaller format: take its batches.
        source = group.scores.index(solver) if solver in group.scores else selected
        name = plain_name(group.formats[source])
        chosen.append((solver, group.batch_scores[source], group.scores_se[source]))
        tokens.add(tuple(manifest.run[name].batches.tokens))
    if not chosen:
        return 0.0
    if manifest.scheme.objective == "max":
        return max(chosen, key=lambda entry: entry[0])[2]
    if len(tokens) != 1:
        errors = [error for _, _, error in chosen]
        known = [error for error in errors if error is not None]
        return sqrt(sum(error**2 for error in known)) if len(known) == len(errors) else None
    totals: list[float | None] = []
    for column in zip(*(batches for _, batches, _ in chosen), strict=True):
        known = [value for value in column if value is not None]
        totals.append(sum(known) if len(known) == len(column) else None)
    return score_per_token(totals, next(iter(tokens)))[1]


def versions(manifest: Manifest) -> str:
    """Return the versions that measured it: ``layersense 0.1.0, modelopt 0.47.0, …``."""
    found = []
    for package in VERSIONS:
        known = dict.fromkeys(
            entry[package] for entry in manifest.environment.values() if package in entry
        )
        if known:
            found.append(f"{package} {' and '.join(known)}")
    return ", ".join(found)


def _seed(sampling: object) -> int | None:
    seed = sampling.get("seed") if isinstance(sampling, dict) else None
    return seed if isinstance(seed, int) else None
