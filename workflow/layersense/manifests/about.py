"""What a manifest says beside its layer groups, small enough to travel inside ``layers.parquet``.

Reports are rendered from tables alone. The findings, the scheme, the provenance and the solver's
answer are no columns, so :mod:`layersense.manifests.tables` puts them into the table's metadata.
What differs from run to run (seconds, peak memory, host) is left out: same measurement, same bytes.
"""

import msgspec

from layersense.manifests.schema import AutoQuantizeState, Finding, Manifest, Scheme
from layersense.scoring.scores import Dataset, Model

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
    flips: dict[str, str]
    """Handle → format that the group could take within the noise of the scores instead."""


def describe(manifest: Manifest) -> About:
    """Return what ``manifest`` says beside its groups."""
    return About(
        scheme=manifest.scheme,
        model=manifest.model,
        dataset=manifest.dataset,
        state=manifest.autoquant_state,
        damage_se=manifest.autoquant_state.score_se,
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
        flips={
            handle: group.flips_to
            for handle, group in manifest.layer_sensitivity.items()
            if group.flips_to is not None
        },
    )


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
