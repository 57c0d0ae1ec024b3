"""``verification.json``: what was measured on the held-out rows (no torch)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from layersense.files import digest_json, read_record, write_record

VERIFICATION_VERSION = 1
"""Raised when what is measured changes, which measures everything again."""
PLAN_VERSION = 2
"""Raised when the plan or the search for better recipes changes: what is new in it is measured."""
METRICS_VERSION = 3
"""Raised when a task has another metric, which measures whole recipes again and no group alone."""
VERIFICATION_TABLE_VERSION = 9
"""Raised when the table or its summary changes for the same measurements."""


class TaskMetric(msgspec.Struct, kw_only=True):
    """What the task's own metric says of a model, over all held-out rows."""

    name: str
    unit: str
    """``share`` (0 to 1), or any other."""
    higher_is_better: bool
    value: float | None
    """None where not finite, as where no position has a label."""
    low: float | None = None
    high: float | None = None
    """95 % interval, by bootstrap over photographs (samples where there are none); None with fewer
    than two."""
    difference: float | None = None
    """Value minus that of the unquantized model on the same rows."""
    difference_low: float | None = None
    difference_high: float | None = None
    """Its 95 % interval: both models in each resample."""


class Damage(msgspec.Struct, kw_only=True):
    """What quantization did to the model's output.

    Units are samples, or batches where a task's outputs cannot be told apart by sample.
    """

    digest: str
    """SHA-256 over all that determines it."""
    kl: list[float | None]
    """KL(before ‖ after) in nats, summed over each unit; None where not finite."""
    agree: list[int]
    """Positions of each unit at which both models' first choice is the same."""
    correct: list[int] | None
    """Positions of each unit at which the first choice is the label; None without labels."""
    loss: list[float | None]
    """Loss of each batch, summed; None where not finite."""
    metrics: list[TaskMetric] = []
    """Of a whole recipe: all of the task's."""
    metrics_version: int = 0
    """:data:`METRICS_VERSION` when it was judged; 0 for single groups, which are not."""
    captions: bool = False
    """Whether what it writes was judged, as far as the task has a metric for it."""


class Single(msgspec.Struct, kw_only=True):
    """One layer group, quantized alone."""

    damage: Damage


class MeasuredRecipe(msgspec.Struct, kw_only=True):
    """A whole recipe."""

    recipe: dict[str, str]
    """Handle → format, of the groups that it quantizes."""
    damage: Damage
    kv_cache: str = "none"
    """Format of the key-value cache."""


class Before(msgspec.Struct, kw_only=True):
    """The unquantized model on the same rows."""

    digest: str
    positions: list[int]
    """Compared positions of each unit."""
    correct: list[int] | None
    loss: list[float]
    """Of each batch, summed."""
    tokens: list[int]
    """Supervised tokens of each batch (samples, where there are none)."""
    metrics: list[TaskMetric] = []
    """As for recipes."""
    photographs: list[int] | None = None
    """Number of each unit's photograph, where units are samples of photographs; several captions of
    one photograph are no independent rows."""


class Completed(msgspec.Struct, kw_only=True):
    """What the batches gave that an unfinished job has completed."""

    batches: int
    exact_reuse: bool
    before: Before
    singles: dict[str, dict[str, Damage]]
    """Format → handle → what it did alone."""
    recipes: dict[str, Damage]
    """By the recipe's digest."""
    records: dict[str, dict[str, list[Any]]]
    """Records of each metric by its name, by the recipe's digest; the unquantized model's under
    ``before``."""
    albums: int = 0
    """Batches of photographs for which captions are written."""


class Verification(msgspec.Struct, kw_only=True):
    """The whole file."""

    schema_version: int = VERIFICATION_VERSION
    run: str
    heldout_samples: int
    exact_reuse: bool
    """Whether singles shared the forward up to the changed layer, which gave equal outputs."""
    before: Before
    singles: dict[str, dict[str, Single]]
    """Format → handle → what it did alone."""
    recipes: dict[str, MeasuredRecipe]
    """By the recipe's digest."""
    seconds: dict[str, float]
    """Of the job that measured last, by phase."""
    peak_memory_bytes: int
    environment: dict[str, str]


def context_digest(settings: Mapping[str, Any], model: str, dataset: str) -> str:
    """Return the digest of all that every measurement of a run depends on.

    Args:
        settings: ``measured`` of :func:`layersense.settings.verify_settings`.
        model: digest of the checkpoint.
        dataset: digest of the calibration database.
    """
    return digest_json({"settings": settings, "checkpoint": model, "dataset": dataset})


def by_photograph(found: Verification) -> Verification:
    """Return what was found with all units of one photograph as one.

    Captions of one photograph are alike, so that intervals drawn from captions are too narrow.
    """
    numbers = found.before.photographs
    if numbers is None:
        return found
    unit_of = {number: unit for unit, number in enumerate(dict.fromkeys(numbers))}
    units = [unit_of[number] for number in numbers]

    def joined(values: Sequence[Any]) -> list[Any]:
        sums: list[Any] = [0] * len(unit_of)
        for unit, value in zip(units, values, strict=True):
            sums[unit] = None if value is None or sums[unit] is None else sums[unit] + value
        return sums

    def damage(of: Damage) -> Damage:
        correct = None if of.correct is None else joined(of.correct)
        return structs.replace(of, kl=joined(of.kl), agree=joined(of.agree), correct=correct)

    before = found.before
    return structs.replace(
        found,
        before=structs.replace(
            before,
            positions=joined(before.positions),
            correct=None if before.correct is None else joined(before.correct),
            photographs=list(unit_of),
        ),
        singles={
            format: {handle: Single(damage=damage(one.damage)) for handle, one in entries.items()}
            for format, entries in found.singles.items()
        },
        recipes={
            digest: structs.replace(recipe, damage=damage(recipe.damage))
            for digest, recipe in found.recipes.items()
        },
    )


def read_verification(path: str | Path) -> Verification:
    """Read a ``verification.json``.

    Raises:
        LayersenseError: it is missing, or none of this version.
    """
    return read_record(
        path,
        Verification,
        VERIFICATION_VERSION,
        "verification file",
        "verification_tables",
        "verify again",
    )


def write_verification(path: str | Path, content: Verification) -> None:
    """Write a ``verification.json`` atomically."""
    write_record(path, content)
