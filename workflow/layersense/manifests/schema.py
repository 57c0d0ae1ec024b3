"""The manifest of one scheme: a superset of the how-to's JSON (no torch)."""

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from layersense.scoring.scores import Agreement, Batches, Dataset, Fit, Model, Reached

SCHEMA_VERSION = 1
SUFFIX = ".quant_recipe"
"""What ModelOpt appends to a module's name to make the handle of its layer group."""

VOLATILE = ("environment.*.host", "run.*.seconds", "run.*.peak_memory_bytes")
"""The keys that differ from run to run; all else is byte-identical for the same input."""


class Scheme(msgspec.Struct, kw_only=True):
    """The scheme as configured, with the how-to's elder keys."""

    name: str
    quant_formats: list[str]
    effective_bits: float | None
    """The budget in bits; None where it is in another unit: see ``autoquant_state.budget``."""
    auto_quantize_bits: float | None
    """The same number under the how-to's key."""
    auto_quantize_method: str
    coverage_mode: str
    coverage_fraction: float
    include: list[str]
    exclude: list[str]
    routers: bool
    unreached: str
    objective: str
    risk: float = 0.0
    """Standard errors of a score that count as damage."""
    target: str = "generic"
    """What the recipe is to run on."""
    kv_cache: str = "none"
    """Format of the key-value cache, the same for all layers."""
    recipe: str | None = None
    """ModelOpt's search recipe that it was made from."""
    cost_excluded: list[str] = []
    active_expert_ratio: float | None = None


class Layer(msgspec.Struct, kw_only=True):
    """One module with quantizable weights."""

    quantized: bool
    module_type: str
    n_weights: int
    format: str
    """Chosen format, ``NONE`` if it stays unquantized."""
    reason: str | None = None
    """Why it was not searched or not allowed; None if the solver decided."""
    tied_to: str | None = None
    """Module that shares this module's weight tensor, if any."""


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
    allowed: list[bool]
    """Whether the scheme lets the group take each format; ``NONE`` always."""
    budget_costs: list[float] | None = None
    """Cost of each format in the unit of the budget; None where that is ``costs`` (bits)."""
    flips_to: str | None = None
    """Format that the group could take within the noise of the scores instead of the chosen one."""
    top_probability: float | None = None
    """Probability, by resampling the batches, that the group belongs to the most sensitive ones (as
    many as findings speak of); None where it is not ranked or there are fewer than two batches."""


class Budget(msgspec.Struct, kw_only=True):
    """What the choice may cost."""

    kind: Literal["bits", "size", "table"]
    unit: str
    limit: float
    """As asked, in ``unit``."""
    used: float
    """By the choice, in ``unit``."""
    counted_weights: float | None = None
    """Weights that ``effective_bits`` averages over, where they are not all that was searched:
    those left out count 0, routed experts by the share that a token runs through."""
    fixed: float = 0.0
    """Share of ``used`` that no choice changes, such as the embeddings of a checkpoint."""
    per_cost: float = 1.0
    """``used`` is ``fixed`` + ``per_cost`` × the sum of the budget costs of the choice."""


class Deployment(msgspec.Struct, kw_only=True):
    """How the scheme's target restricts the choice, and what that costs."""

    target: str
    together: list[list[str]]
    """Sets of formats, one of which all formats of a recipe come from."""
    fused: list[list[str]]
    """Handles of the groups that the runtime loads as one, so that they take one format."""
    barred: int
    """Groups that may take fewer formats than they have."""
    score_without: float
    """``score`` of the choice within the same budget that no target restricts."""
    minimized_without: float
    """``minimized`` of the same choice; what the target costs is the difference."""
    effective_bits_without: float


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
    """No choice within the budget has a lower ``minimized`` than this."""
    gap: float
    """(minimized − lower_bound) / minimized, 0 if that is 0: how far from proven optimal."""
    is_satisfied: bool
    minimized: float
    """What the solver minimised: ``score``, with ``risk`` × its groups' standard errors."""
    score_se: float | None
    """Standard error of ``score`` from the batches; None with fewer than two."""
    score_low: float | None
    score_high: float | None
    """95 % interval of ``score`` by Student's t; None with fewer than two batches."""
    budget: Budget
    checkpoint_bytes: float
    """Predicted bytes of all tensors of the checkpoint, with what was never searched."""
    checkpoint_bytes_before: float
    """The same of the unquantized checkpoint."""
    deployment: Deployment | None = None
    """None where the target is ``generic``, which restricts nothing."""


class Ranked(msgspec.Struct, kw_only=True):
    """One entry of the ranking."""

    name: str
    importance: float


class Finding(msgspec.Struct, kw_only=True):
    """A machine-detected gotcha."""

    code: str
    """Stable identifier, one of :class:`layersense.manifests.codes.Code`."""
    severity: Literal["error", "warning", "info"]
    what: str
    why: str
    fix: str
    layers: list[str] = []
    """The module names it concerns, suffix stripped."""
    formats: list[str] = []
    """The formats it concerns; empty where it concerns none in particular."""


def gravest_first(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings, the most severe first, otherwise in their order."""
    order = {"error": 0, "warning": 1, "info": 2}
    return sorted(findings, key=lambda finding: order[finding.severity])


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
    fit: Fit
    agreement: Agreement | None
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

    @property
    def recipe(self) -> dict[str, str]:
        """What was chosen: the handle of every layer group → its format, in model order."""
        return {
            handle: plain_name(group.selected) for handle, group in self.layer_sensitivity.items()
        }


def label(format: str, bits: float) -> str:
    """Return a format's label as ModelOpt writes it: ``NONE(effective-bits: 16.0)``."""
    return f"{format}(effective-bits: {bits})"


def plain_name(label: str) -> str:
    """Return the format's name from its label; a name without bits is returned as it is."""
    return label.partition("(effective-bits:")[0]


def encode_manifest(manifest: Manifest) -> bytes:
    """Return a manifest as indented JSON; equal manifests, equal bytes."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
