"""Budgets: bits per weight, size of the checkpoint, or a cost that the user gives."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import fsum
from pathlib import Path
from typing import Literal

from layersense import config
from layersense.errors import LayersenseError
from layersense.manifests.schema import SUFFIX, LayerSensitivity, plain_name
from layersense.manifests.tables import BYTES_PER_COST
from layersense.quantization.formats import NONE
from layersense.quantization.layers import describe_layer
from layersense.scoring.scores import NONE_BITS, Scores

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
COLUMNS = ("layer", "format", "cost")


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of a checkpoint's tensors.

    Attributes:
        fixed: bytes of what was never searched: embeddings, norms, biases.
        groups: handle → format → bytes of the group's weights, scales included. A weight that is
            tied to one that was never searched costs nothing until it is quantized.
    """

    fixed: float
    groups: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, scores: Scores, sensitivity: Mapping[str, LayerSensitivity]) -> "CheckpointSize":
        """Add up the parameters of a model, in the type it was scored in."""
        width = DTYPE_BYTES.get(scores.model.dtype, 2)
        partners: dict[str, int] = {}
        own = 0
        for layer in scores.layers.values():
            if layer.group is None and layer.tied_to is not None:
                partners[layer.tied_to] = layer.n_weights
            if layer.group is not None and layer.tied_to is None:
                own += layer.n_weights
        groups = {}
        for handle, group in sensitivity.items():
            layers = {name: scores.layers[name] for name in group.module_names}
            left = width * sum(
                layer.n_weights for layer in layers.values() if layer.tied_to is None
            )
            copies = width * sum(partners.get(name, 0) for name in layers)
            groups[handle] = {
                name: left if name == NONE else cost * BYTES_PER_COST + copies
                for name, cost in zip(map(plain_name, group.formats), group.costs, strict=True)
            }
        return cls(float(width * max(0, scores.model.n_parameters - own)), groups)

    def of_recipe(self, recipe: Mapping[str, str]) -> float:
        """Return the bytes of the whole checkpoint under a recipe."""
        return self.fixed + fsum(self.groups[handle][name] for handle, name in recipe.items())


@dataclass(frozen=True)
class Limit:
    """A scheme's budget, in its own unit and in the solver's.

    Attributes:
        kind: what it counts.
        key: where the scheme sets it.
        unit: of ``asked``.
        asked: as the scheme says it.
        fixed: what no choice changes, in ``unit``.
        per_cost: ``unit`` for each unit of the groups' budget costs.
        size: bytes of the checkpoint, whatever the budget is.
    """

    kind: Literal["bits", "size", "table"]
    key: str
    unit: str
    asked: float
    fixed: float
    per_cost: float
    size: CheckpointSize
    counted_weights: float | None = None
    """Weights that an average counts, where they are not all that was searched."""

    @property
    def room(self) -> float:
        """The budget as a sum of the groups' budget costs."""
        return (self.asked - self.fixed) / self.per_cost

    def used(self, cost: float) -> float:
        """Return a sum of the groups' budget costs in the budget's unit."""
        return self.fixed + self.per_cost * cost


def budget_of(
    scheme: config.Scheme,
    scores: Scores,
    sensitivity: Mapping[str, LayerSensitivity],
    where: str,
) -> Limit:
    """Return the budget of a scheme; sets ``budget_costs`` of the groups where it is not in bits.

    Args:
        scheme: the scheme.
        scores: what was measured.
        sensitivity: every layer group by handle.
        where: run and scheme, for messages.

    Raises:
        LayersenseError: the table cannot be read, or lacks a layer's cost under a format.
    """
    size = CheckpointSize.of(scores, sensitivity)
    if scheme.cost_table is not None:
        table = read_cost_table(Path(scheme.cost_table.file).expanduser())
        for handle, group in sensitivity.items():
            group.budget_costs = [
                _table_cost(table, handle, group, plain_name(text), scheme.cost_table.file)
                for text in group.formats
            ]
        asked, unit = scheme.cost_table.at_most, scheme.cost_table.unit
        return Limit("table", "cost_table.at_most", unit, asked, 0.0, 1.0, size)
    if scheme.size_gb is not None:
        for handle, group in sensitivity.items():
            group.budget_costs = [size.groups[handle][plain_name(text)] for text in group.formats]
        return Limit("size", "size_gb", "GB", scheme.size_gb, size.fixed / 1e9, 1e-9, size)
    if scheme.effective_bits is None:
        raise LayersenseError(
            f"{where}: has no budget; set effective_bits, size_gb or cost_table of the scheme"
        )
    bits = scheme.effective_bits
    total = fsum(group.n_weights for group in scores.groups.values())
    if not scheme.cost_excluded and scheme.active_expert_ratio is None:
        return Limit("bits", "effective_bits", "effective bits", bits, 0.0, NONE_BITS / total, size)
    counted = 0.0
    for group in sensitivity.values():
        weight = cost_weight(group.module_names, scheme)
        counted += weight * group.n_weights
        group.budget_costs = [weight * cost for cost in group.costs]
    if not counted:
        raise LayersenseError(
            f"{where}: cost_excluded leaves out every layer, so that there is nothing to average "
            "bits over; leave some in"
        )
    per_cost = NONE_BITS / counted
    return Limit("bits", "effective_bits", "effective bits", bits, 0.0, per_cost, size, counted)


def cost_weight(names: Sequence[str], scheme: config.Scheme) -> float:
    """Return by how much a group's weights count in ``effective_bits``.

    As ``AutoQuantizeCostModel`` and ``ActiveMoECostModel`` of ModelOpt: nothing where all of its
    modules are left out, the share of active experts where one is a routed expert.
    """
    if scheme.cost_excluded and all(
        any(fnmatchcase(name, pattern) for pattern in scheme.cost_excluded) for name in names
    ):
        return 0.0
    routed = any(
        describe_layer([name]).kind == "experts" and "shared_expert" not in name for name in names
    )
    return scheme.active_expert_ratio if routed and scheme.active_expert_ratio else 1.0


def read_cost_table(path: Path) -> dict[tuple[str, str], float]:
    """Read a CSV table of costs: (layer, format) → cost.

    Raises:
        LayersenseError: it cannot be read, lacks a column, or a row is not valid or comes twice.
    """
    table: dict[tuple[str, str], float] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise LayersenseError(
                    f"{path}: has no column {' or '.join(missing)}; its first line should name "
                    f"the columns {', '.join(COLUMNS)}"
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                key = (row["layer"] or "", row["format"] or "")
                try:
                    cost = float(row["cost"] or "")
                except ValueError:
                    cost = math.nan
                if not cost >= 0 or math.isinf(cost):
                    raise LayersenseError(
                        f"{where}: the cost is {row['cost']!r}; expected a number of 0 or more"
                    )
                if key in table:
                    raise LayersenseError(
                        f"{where}: layer {key[0]} under {key[1]} stands in the file twice; "
                        "remove one of the rows"
                    )
                table[key] = cost
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LayersenseError(
            f"{path}: cannot be read as a CSV table ({error}); check the scheme's cost_table.file"
        ) from error
    return table


def _table_cost(
    table: Mapping[tuple[str, str], float],
    handle: str,
    group: LayerSensitivity,
    format: str,
    file: str,
) -> float:
    """Return a group's cost: of the row that names the group, or of those that name its modules.

    A group goes by the name of one of its modules: a row of that name is the group's where no other
    module has one, and else that module's.
    """
    name = handle.removesuffix(SUFFIX)
    if (handle, format) in table:
        return table[handle, format]
    there = {module for module in group.module_names if (module, format) in table}
    if (name, format) in table and there <= {name}:
        return table[name, format]
    missing = [module for module in group.module_names if module not in there]
    if missing:
        beside = f", which shares a format with {min(there)}" if there else ""
        raise LayersenseError(
            f"{file}: has no cost of layer {missing[0]} under {format}{beside}; give a row for "
            "every searched layer under every format of the scheme and under NONE"
        )
    return fsum(table[module, format] for module in group.module_names)
