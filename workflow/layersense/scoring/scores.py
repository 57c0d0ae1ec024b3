"""The score file of a run: what a GPU job measured, one entry a format (no torch)."""

from collections.abc import Sequence
from math import fsum, sqrt
from pathlib import Path
from typing import Any, Literal

import msgspec

from layersense.files import read_record, write_record

SCHEMA_VERSION = 2
NONE_BITS = 16.0
"""Bits per weight of an unquantized layer, by ModelOpt's definition of cost."""

Reached = Literal["scored", "not_called", "no_gradient"]


class Layer(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One module that holds weights which a format could quantize."""

    module_type: str
    """Class name in the original model, such as ``Linear``."""
    n_weights: int
    """Elements of the weight tensor."""
    shape: list[int] = []
    """Shape of the weight tensor; none for modules of several, such as fused experts."""
    group: str | None = None
    """Handle of its layer group; None if ModelOpt does not search it."""
    reason: str | None = None
    """Why it is not searched, as a sentence fragment; None if it is."""
    tied_to: str | None = None
    """Module that shares this module's weight tensor, if any."""


class Group(msgspec.Struct, kw_only=True):
    """Modules that must share a format: ModelOpt's ``quant_recipe`` handle."""

    module_names: list[str]
    n_weights: int
    subsystem: str
    block: int | None
    kind: str
    n_experts: int | None = None
    """How many experts it holds; None if it is no mixture of experts."""
    experts_per_token: int | None = None
    """How many of them work on each token; None if that is unknown."""
    unreached_experts: list[int] = []
    """Numbers of the experts that no scored token was sent to."""


class GroupScore(msgspec.Struct, kw_only=True):
    """What one format does to one layer group."""

    reached: Reached
    batch_scores: list[float | None]
    """Summed score of each scoring batch, not divided by tokens; None where it was not finite."""
    cost: float
    """ModelOpt's compressed weight size: elements × effective bits / 16."""


class Model(msgspec.Struct, kw_only=True):
    """The checkpoint that was measured."""

    name: str
    """Its name in the config."""
    id: str
    """Hub id or directory, as the config says it."""
    revision: str | None
    """Commit on the hub; None for a directory."""
    digest: str
    """SHA-256 that identifies the checkpoint's files."""
    task: str
    architecture: str
    n_parameters: int
    n_active_parameters: int | None = None
    """Those that work on a token; None if it is no mixture of experts, or one that does not say how
    many experts a token has."""
    dtype: str
    trust_remote_code: bool
    trained_on_calibration: bool = False
    """True for the demo model, which has seen the very rows it is scored on."""


class Dataset(msgspec.Struct, kw_only=True):
    """The data it was measured on."""

    name: str
    """Its name in the config."""
    source: str
    digest: str
    """SHA-256 over the sampled rows and image bytes, from the database's ``meta``."""
    modality: str
    unit: str
    calibration_samples: int
    score_samples: int


class Batches(msgspec.Struct, kw_only=True):
    """What the scoring batches held."""

    tokens: list[int]
    """Supervised tokens of each batch (samples, where there are no tokens)."""
    samples: list[int]
    padding_share: float
    """Padding positions as a share of all positions, 0 to 1."""
    truncated: int = 0
    """Samples that were cut to ``max_length``."""


class Fit(msgspec.Struct, kw_only=True, frozen=True):
    """How the scoring fitted into memory; no score depends on it."""

    micro_batch: int
    """Samples in one forward and backward pass, at most."""
    checkpointing: bool
    """Whether activations were computed again in the backward pass instead of kept."""
    formats: int
    """Formats scored in one pass."""


class Agreement(msgspec.Struct, kw_only=True, frozen=True):
    """The fused engine's check of itself on the first step."""

    groups: list[str]
    """Handles of the groups that were also scored as stock scores them."""
    largest_difference: float
    """Largest relative difference between the two scores."""


class FormatScores(msgspec.Struct, kw_only=True):
    """One format's measurement and all that determined it."""

    digest: str
    """SHA-256 over ``settings``, the checkpoint's digest and the dataset's digest."""
    settings: dict[str, Any]
    """The config's part of what determined it: see :mod:`layersense.settings`."""
    effective_bits: float
    weight_format: str
    act_format: str
    kernel: Literal["compiled", "simulated", "native"]
    """``compiled``: ModelOpt's CUDA extension. ``simulated``: it could not be built and torch
    operations stand in. ``native``: this format needs no extension on this device."""
    batches: Batches
    groups: dict[str, GroupScore]
    environment: dict[str, str]
    """Versions and hardware: ``layersense``, ``torch``, ``modelopt``, ``transformers``,
    ``python``, ``host``, ``device`` and, of a GPU, ``compute_capability`` and ``cuda``."""
    seconds: dict[str, float]
    """Wall seconds by phase: ``load``, ``calibrate``, ``score`` and what else the engine tells."""
    peak_memory_bytes: int
    fit: Fit
    agreement: Agreement | None = None
    """None where stock itself has scored."""
    back_offs: list[str]
    """What was reduced to fit into memory, one sentence each."""
    warnings: list[str]
    """What ModelOpt or the engine warned of."""


class Scores(msgspec.Struct, kw_only=True):
    """The whole file."""

    schema_version: int = SCHEMA_VERSION
    run: str
    method: str
    engine: str
    model: Model
    dataset: Dataset
    layers: dict[str, Layer]
    """Every module with quantizable weights, in model order."""
    groups: dict[str, Group]
    """Every layer group, by handle (with ``.quant_recipe``), in model order."""
    formats: dict[str, FormatScores]
    left_out: dict[str, str] = {}
    """Formats that were asked for and could not be measured here → why, without a full stop."""


def read_scores(path: str | Path) -> Scores:
    """Read a score file.

    Raises:
        LayersenseError: it is missing, not JSON, or not of this schema.
    """
    return read_record(path, Scores, SCHEMA_VERSION, "score file", "scores", "score again")


def write_scores(path: str | Path, scores: Scores) -> None:
    """Write a score file atomically."""
    write_record(path, scores)


def score_per_token(
    batch_scores: Sequence[float | None], tokens: Sequence[int]
) -> tuple[float | None, float | None]:
    """Return a score and its standard error from the batches.

    The score is the ratio ``R = Σ s / Σ t`` of summed scores to supervised tokens. Its standard
    error is that of a ratio estimator over batches, ``√(n/(n−1) · Σ (s − R·t)²) / Σ t`` (Cochran,
    *Sampling Techniques*, 3rd ed., eq. 6.13, without the finite population correction).

    Args:
        batch_scores: summed score of each batch; None where it was not finite.
        tokens: supervised tokens of each batch.

    Returns:
        The score (None if a batch was not finite) and its standard error (None if that is so, or
        with fewer than two batches).
    """
    values = [value for value in batch_scores if value is not None]
    total = sum(tokens)
    if len(values) < len(batch_scores) or not total:
        return None, None
    score = fsum(values) / total
    count = len(values)
    if count < 2:
        return score, None
    squares = fsum((s - score * t) ** 2 for s, t in zip(values, tokens, strict=True))
    return score, sqrt(count / (count - 1) * squares) / total
