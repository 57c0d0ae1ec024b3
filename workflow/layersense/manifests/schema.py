"""The manifest of one scheme: a superset of the how-to's JSON (no torch)."""

from typing import Any, Literal

import msgspec

from layersense.scoring.scores import Batches, Dataset, Model, Reached

SCHEMA_VERSION = 1
SUFFIX = ".quant_recipe"
"""What ModelOpt appends to a module's name to make the handle of its layer group."""

VOLATILE = ("environment.*.host", "run.*.seconds", "run.*.peak_memory_bytes")
"""The keys that differ from run to run; all else is byte-identical for the same input."""


class Scheme(msgspec.Struct, kw_only=True):
    """The scheme as configured, with the how-to's elder keys."""

    name: str
    quant_formats: list[str]
    effective_bits: float
    auto_quantize_bits: float
    """The same number under the how-to's key."""
    auto_quantize_method: str
    coverage_mode: str
    coverage_fraction: float
    include: list[str]
    exclude: list[str]
    routers: bool
    unreached: str
    objective: str


class Layer(msgspec.Struct, kw_only=True):
    """One module with quantizable weights."""

    quantized: bool
    module_type: str
    n_weights: int
    format: str
    """Chosen format, ``NONE`` if it stays unquantized."""
    reason: str | None = None
    """Why it was not searched or not allowed; None if the solver decided."""


class LayerSensitivity(msgspec.Struct, kw_only=True):
    """One layer group; the lists run over ``formats``, ``NONE`` last."""

    formats: list[str]
    """Labels as ModelOpt writes them, ``FP8_ALL_LAYERS_CFG(effective-bits: 8.0)``."""
    scores: list[float | None]
    """As measured, divided by the number of supervised tokens; None where not finite."""
    costs: list[float]
    scores_solver: list[float | None]
    """Made monotone over the formats by compression, as ModelOpt's solver sees them."""
    scores_se: list[float | None]
    """Standard error of ``scores`` from the batches; None with fewer than two batches."""
    batch_scores: list[list[float | None]]
    """For each format, the summed score of each batch."""
    module_names: list[str]
    n_weights: int
    reached: Reached
    subsystem: str
    block: int | None
    kind: str
    selected: str
    """Label of the chosen format, one of ``formats``."""


class AutoQuantizeState(msgspec.Struct, kw_only=True):
    """The solver's answer."""

    keys: list[str]
    constraints: dict[str, float]
    """``effective_bits`` reached by the choice."""
    score: float
    """Total of ``scores_solver`` over the choice (their maximum under ``objective: max``)."""
    cost: float
    """Compressed weight size of the choice, elements × bits / 16."""
    lower_bound: float
    """No choice within the budget has a lower total than this."""
    gap: float
    """(score − lower_bound) / score, 0 if the score is 0: how far from proven optimal."""
    is_satisfied: bool


class Ranked(msgspec.Struct, kw_only=True):
    """One entry of the ranking."""

    name: str
    importance: float


class Finding(msgspec.Struct, kw_only=True):
    """A machine-detected gotcha."""

    code: str
    """Stable identifier, such as ``subsystem-at-zero``."""
    severity: Literal["error", "warning", "info"]
    what: str
    why: str
    fix: str
    layers: list[str] = []
    """The module names it concerns, suffix stripped."""


class FormatRun(msgspec.Struct, kw_only=True):
    """How one format was measured."""

    digest: str
    engine: str
    method: str
    effective_bits: float
    weight_format: str
    act_format: str
    kernel: str
    batches: Batches
    seconds: dict[str, float]
    peak_memory_bytes: int
    back_offs: list[str]
    settings: dict[str, Any]


class Manifest(msgspec.Struct, kw_only=True):
    """The whole file."""

    schema_version: int = SCHEMA_VERSION
    scheme: Scheme
    run_name: str
    model: Model
    dataset: Dataset
    num_quantized_layers: int
    layers: dict[str, Layer]
    autoquant_state: AutoQuantizeState
    layer_sensitivity: dict[str, LayerSensitivity]
    sensitivity_ranking: list[Ranked]
    """Ascending by the group's worst score over the scheme's formats; unreached ones left out."""
    findings: list[Finding]
    environment: dict[str, dict[str, str]]
    """Versions and hardware, by format."""
    run: dict[str, FormatRun]
    """How it was measured, by format."""


def label(format: str, bits: float) -> str:
    """Return a format's label as ModelOpt writes it: ``NONE(effective-bits: 16.0)``."""
    return f"{format}(effective-bits: {bits})"


def plain_name(label: str) -> str:
    """Return the format's name from its label; a name without bits is returned as it is."""
    return label.partition("(effective-bits:")[0]


def encode_manifest(manifest: Manifest) -> bytes:
    """Return a manifest as indented JSON; equal manifests, equal bytes."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
