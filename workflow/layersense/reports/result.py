"""One result as reports read it: the groups of a ``layers.parquet`` and what its metadata says."""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from layersense.errors import LayersenseError
from layersense.files import BROKEN_JSON
from layersense.manifests.about import ABOUT_KEY, About
from layersense.manifests.tables import BYTES_PER_COST, LAYERS, readable
from layersense.quantization.formats import NONE
from layersense.reports.text import plain

State = Literal["score", "zero", "not reached", "not finite", "unknown"]
"""What a score is: a number, a true zero, or nothing that may be read as one."""
TOO_COSTLY = "quantizing them costs more than the budget asks for"
"""Why the solver leaves groups unquantized."""
Z95 = 1.96
"""Standard errors in half a 95 % interval of a normal variable."""
LABEL = 30
"""Longest label of a layer in a figure, in characters."""
MANY_FORMATS = 6
"""Formats up to which tables name every baseline of each; of more, the uniform one alone."""


def named_baselines(formats: Collection[str]) -> set[str]:
    """Return which kinds of a frontier's baselines tables name, for a scheme of these formats."""
    return {"uniform"} if len(formats) > MANY_FORMATS else {"uniform", "head_kept", "edges_kept"}


@dataclass(frozen=True)
class Score:
    """One group under one format."""

    format: str
    score: float | None
    """As measured; made monotone where the measured one is not known (foreign manifests)."""
    error: float | None
    """Standard error of ``score``."""
    damage: float | None
    """As the solver counts it: made monotone over the formats."""
    share: float | None
    """Of the total under this format, 0 to 1."""
    rank: int | None
    cost: float | None
    per_mb: float | None
    """Score for each 10^6 bytes saved."""
    state: State

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the score, not below zero."""
        if self.score is None or self.error is None:
            return None
        return max(0.0, self.score - Z95 * self.error), self.score + Z95 * self.error


@dataclass(frozen=True)
class Group:
    """One layer group; texts are on one line and without control characters."""

    index: int
    """Place in model order, from 0."""
    handle: str
    layer: str
    modules: list[str]
    subsystem: str
    block: int | None
    kind: str
    reached: str | None
    n_weights: int | None
    reason: str | None
    """Why it is not the solver's to decide."""
    selected: str | None
    cost_none: float | None
    scores: dict[str, Score]
    """By format, without ``NONE``."""

    @cached_property
    def worst(self) -> Score | None:
        """The format that hurts it most; None where one is not known or it was not reached."""
        scores = list(self.scores.values())
        known = [entry for entry in scores if entry.score is not None]
        if not known or len(known) < len(scores) or self.reached not in (None, "scored"):
            return None
        return max(known, key=lambda entry: entry.score or 0.0)

    @property
    def importance(self) -> float | None:
        """Its worst score, which it is ranked by."""
        return self.worst.score if self.worst else None

    @property
    def quantized(self) -> bool:
        """Whether the recipe quantizes it."""
        return self.selected not in (None, NONE)

    @property
    def chosen(self) -> Score | None:
        """Its score under the format that the recipe takes."""
        return self.scores.get(self.selected or NONE)

    @property
    def damage(self) -> float:
        """Predicted damage as chosen."""
        return (self.chosen.damage or 0.0) if self.chosen else 0.0

    @property
    def before(self) -> float:
        """Bytes of its weights at 16 bits."""
        return (self.cost_none or 0.0) * BYTES_PER_COST

    @property
    def after(self) -> float:
        """Bytes of its weights as chosen."""
        cost = self.chosen.cost if self.chosen else self.cost_none
        return (cost or 0.0) * BYTES_PER_COST


@dataclass(frozen=True)
class Part:
    """Groups that stand together: a subsystem, or those that take one format."""

    name: str
    groups: int
    quantized: int
    reached: int
    weights: int
    before: float
    after: float
    damage: float
    share: float
    """Of the importance of all groups, 0 to 1."""

    @property
    def saved_share(self) -> float:
        """Share of the bytes that the recipe saves."""
        return 1 - self.after / self.before if self.before else 0.0


@dataclass(frozen=True)
class Alternative:
    """A recipe to compare with: one format for every group that may be quantized."""

    name: str
    groups: int
    bits: float
    after: float
    damage: float
    complete: bool
    """False where a group that may be quantized has no finite score under it."""


@dataclass(frozen=True)
class Result:
    """One scheme of one run."""

    run: str
    scheme: str
    model: str | None
    dataset: str | None
    modality: str | None
    method: str | None
    formats: list[str]
    """Without ``NONE``, the smallest first; of equals, those of one weight type together, and the
    widest activations first."""
    bits: dict[str, float | None]
    """Format → its bits per weight."""
    groups: list[Group]
    """In model order."""
    about: About | None = field(repr=False)
    """None for a manifest that layersense did not write."""

    @cached_property
    def ranked(self) -> list[Group]:
        """All groups, the most sensitive first; those without a rank last, in model order."""
        return sorted(self.groups, key=lambda group: -_or(group.importance, -1.0))

    @cached_property
    def places(self) -> dict[str, int]:
        """Handle → place in the ranking, from 1; groups without a score have none."""
        ranked = [group for group in self.ranked if group.importance is not None]
        return {group.handle: place for place, group in enumerate(ranked, start=1)}

    @cached_property
    def importance(self) -> float:
        """Sum of the importance of all groups."""
        return sum(group.importance or 0.0 for group in self.groups)

    def share(self, group: Group) -> float | None:
        """Return a group's share in the importance of all, 0 to 1."""
        if group.importance is None or not self.importance:
            return None
        return group.importance / self.importance

    @cached_property
    def total(self) -> Part:
        """All groups together."""
        return self._part("all", self.groups)

    @cached_property
    def by_subsystem(self) -> list[Part]:
        """Subsystems, in the order in which the model has them."""
        return [
            self._part(name, members)
            for name, members in _grouped((group.subsystem, group) for group in self.groups).items()
        ]

    @cached_property
    def by_format(self) -> list[Part]:
        """Chosen formats, the smallest first, ``NONE`` last; formats that none takes have zeros."""
        chosen = _grouped((group.selected or NONE, group) for group in self.groups)
        return [self._part(name, chosen.get(name, [])) for name in (*self.formats, NONE)]

    @cached_property
    def left(self) -> list[tuple[str, list[Group]]]:
        """Why groups stay unquantized, and which, the most sensitive first."""
        unquantized = (group for group in self.ranked if not group.quantized)
        reasons = _grouped((group.reason or TOO_COSTLY, group) for group in unquantized)
        return list(reasons.items())

    @cached_property
    def alternatives(self) -> list[Alternative]:
        """Each format alone, for every group that may be quantized and has it."""
        return [self._alternative(name) for name in self.formats]

    @cached_property
    def labels(self) -> dict[str, str]:
        """Layer → a label for figures: its last parts, or the whole name where that is not one."""
        tails = {group.layer: tail(group.layer) for group in self.groups}
        counts: dict[str, int] = {}
        for label in tails.values():
            counts[label] = counts.get(label, 0) + 1
        return {layer: label if counts[label] == 1 else layer for layer, label in tails.items()}

    def most_damage_per_mb(self) -> list[tuple[Group, Score]]:
        """Return each ranked group with the format that hurts most for a saved MB, worst first."""
        found = []
        for group in self.groups:
            scores = [
                entry
                for entry in group.scores.values()
                if entry.per_mb is not None and entry.rank is not None
            ]
            if scores:
                found.append((group, max(scores, key=lambda entry: entry.per_mb or 0.0)))
        return sorted(found, key=lambda pair: -(pair[1].per_mb or 0.0))

    def _part(self, name: str, members: Sequence[Group]) -> Part:
        return Part(
            name=name,
            groups=len(members),
            quantized=sum(group.quantized for group in members),
            reached=sum(group.reached in (None, "scored") for group in members),
            weights=sum(group.n_weights or 0 for group in members),
            before=sum(group.before for group in members),
            after=sum(group.after for group in members),
            damage=sum(group.damage for group in members),
            share=sum(self.share(group) or 0.0 for group in members),
        )

    def _alternative(self, name: str) -> Alternative:
        cost = damage = 0.0
        count = 0
        complete = True
        for group in self.groups:
            entry = group.scores.get(name)
            if group.reason is None and entry is not None and entry.cost is not None:
                complete &= entry.damage is not None
                cost += entry.cost
                damage += entry.damage or 0.0
                count += 1
            else:
                cost += group.cost_none or 0.0
        before = self.total.before
        return Alternative(
            name=name,
            groups=count,
            bits=16 * cost * BYTES_PER_COST / before if before else 0.0,
            after=cost * BYTES_PER_COST,
            damage=damage,
            complete=complete,
        )


@dataclass(frozen=True)
class Point:
    """One recipe of a ``frontier.parquet``."""

    kind: str
    label: str
    bits: float
    bytes: float
    used: float
    """What it takes of the scheme's budget, in its unit."""
    damage: float
    low: float
    high: float
    """Ends of the 95 % interval of ``damage``."""
    gap: float
    """How much less damage another choice could do at most, as a share of this one's."""
    knee: bool
    digest: str
    """What identifies the recipe, whatever it is called."""
    formats: list[str]
    """Of each group, in the order of the frontier's handles."""


@dataclass(frozen=True)
class Frontier:
    """The recipes of a scheme over all budgets, with baselines."""

    handles: list[str]
    points: list[Point]

    def recipe(self, point: Point) -> dict[str, str]:
        """Return the handle of each group → its format."""
        return dict(zip(self.handles, point.formats, strict=True))


def read_frontier(path: Path) -> Frontier:
    """Read a ``frontier.parquet``.

    Raises:
        LayersenseError: it is missing, or no such table.
    """
    table = read_table(path)
    try:
        handles = json.loads(table.schema.metadata[b"layersense.handles"])
        points = [
            Point(
                kind=row["kind"],
                label=plain(row["label"]),
                bits=row["effective_bits"],
                bytes=row["searched_bytes"],
                used=row["budget_used"],
                damage=row["predicted_damage"],
                low=row["damage_low"] if row["damage_low"] is not None else row["predicted_damage"],
                high=row["damage_high"]
                if row["damage_high"] is not None
                else row["predicted_damage"],
                gap=row["gap"],
                knee=row["knee"],
                digest=row["recipe_digest"],
                formats=row["recipe"],
            )
            for row in table.to_pylist()
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise LayersenseError(
            f"{path}: has other columns than this layersense writes; delete it and run "
            "`snakemake` again"
        ) from error
    return Frontier([plain(handle) for handle in handles], points)


def read_result(path: Path) -> Result:
    """Read a ``layers.parquet``.

    Raises:
        LayersenseError: it is missing, or no such table.
    """
    with readable(path):
        return make_result(read_table(path), path)


def make_result(table: pa.Table, path: Path) -> Result:
    """Return the result that a table of one run and scheme holds.

    Args:
        table: columns of :data:`layersense.manifests.tables.LAYERS`.
        path: where it is from, for errors.

    Raises:
        LayersenseError: the table is empty or its metadata is not of this version.
    """
    if table.schema.names != LAYERS.names:
        raise LayersenseError(
            f"{path}: has other columns than this layersense writes; delete it and run "
            "`snakemake` again"
        )
    if not table.num_rows:
        raise LayersenseError(
            f"{path}: holds no layer group; expected a row for each group and format"
        )
    metadata = table.schema.metadata or {}
    try:
        about = (
            msgspec.json.decode(metadata[ABOUT_KEY], type=About) if ABOUT_KEY in metadata else None
        )
    except BROKEN_JSON as error:
        raise LayersenseError(
            f"{path}: was written by another version of layersense ({error}); delete it and run "
            "`snakemake` again"
        ) from error
    columns = {name: values_of(table.column(name)) for name in table.schema.names}
    first = {name: columns[name][0] for name in ("run", "scheme", "model", "dataset")}
    groups, bits = _groups(columns)
    return Result(
        run=plain(first["run"]),
        scheme=plain(first["scheme"]),
        model=_plain(first["model"]),
        dataset=_plain(first["dataset"]),
        modality=columns["modality"][0],
        method=columns["method"][0],
        formats=_order(bits, columns),
        bits=bits,
        groups=groups,
        about=about,
    )


def read_table(path: Path, **options: Any) -> pa.Table:
    """Read a Parquet table of layersense.

    Raises:
        LayersenseError: it cannot be read.
    """
    with readable(path):
        return pq.read_table(path, **options)


def values_of(column: pa.ChunkedArray) -> list[Any]:
    """Return a column's values; those of a dictionary are made once, not for each row."""
    if not pa.types.is_dictionary(column.type):
        values: list[Any] = column.to_pylist()
        return values
    found: list[Any] = []
    for chunk in column.chunks:
        distinct = chunk.dictionary.to_pylist()
        found += [None if code is None else distinct[code] for code in chunk.indices.to_pylist()]
    return found


def tail(layer: str) -> str:
    """Return the last parts of a dotted name that fit into :data:`LABEL` characters."""
    if len(layer) <= LABEL:
        return layer
    parts = layer.split(".")
    label = parts.pop()
    while parts and len(parts[-1]) + 1 + len(label) < LABEL:
        label = f"{parts.pop()}.{label}"
    if 2 * len(label) < LABEL:  # `0` of a long name says too little: a piece of the next part, too
        label = layer
    return f"…{label[-LABEL + 1 :]}"


def _groups(columns: dict[str, list[Any]]) -> tuple[list[Group], dict[str, float | None]]:
    rows = range(len(columns["handle"]))
    selected = {
        columns["handle"][row]: plain(columns["format"][row])
        for row in rows
        if columns["selected"][row]
    }
    groups: dict[str, Group] = {}
    bits: dict[str, float | None] = {}
    for row in rows:
        handle, name = columns["handle"][row], plain(columns["format"][row])
        group = groups.get(handle)
        if group is None:
            group = groups[handle] = Group(
                index=len(groups),
                handle=plain(handle),
                layer=plain(columns["layer"][row]),
                modules=[plain(module) for module in columns["module_names"][row] or ()],
                subsystem=plain(columns["subsystem"][row]),
                block=columns["block"][row],
                kind=plain(columns["kind"][row]),
                reached=columns["reached"][row],
                n_weights=columns["n_weights"][row],
                reason=_plain(columns["reason"][row]),
                selected=selected.get(handle),
                cost_none=columns["cost_none"][row],
                scores={},
            )
        if name != NONE:
            bits.setdefault(name, columns["format_bits"][row])
            group.scores[name] = _score(columns, row, name)
    return list(groups.values()), bits


def _score(columns: dict[str, list[Any]], row: int, name: str) -> Score:
    measured, solver = columns["score"][row], columns["score_solver"][row]
    score = solver if measured is None else measured
    state: State
    if columns["reached"][row] not in (None, "scored"):
        state = "not reached"
    elif score is None:
        state = "not finite" if columns["reached"][row] else "unknown"
    else:
        state = "score" if score else "zero"
    return Score(
        format=name,
        score=score,
        error=columns["score_se"][row],
        damage=solver,
        share=columns["score_share"][row],
        rank=columns["rank"][row],
        cost=columns["cost"][row],
        per_mb=columns["score_per_mb_saved"][row],
        state=state,
    )


def _order(bits: dict[str, float | None], columns: dict[str, list[Any]]) -> list[str]:
    """Return formats by their bits, those of unknown bits last; see :attr:`Result.formats`."""
    types = {
        plain(name): (weight or "", act or "")
        for name, weight, act in zip(
            *(columns[key] for key in ("format", "weight_format", "act_format")), strict=True
        )
    }

    def key(name: str) -> tuple[float, str, float, str, str]:
        weight, act = types[name]
        digits = re.search(r"\d+$", act)
        width = 16 if act == NONE else int(digits[0]) if digits else 0
        return _or(bits[name], 99.0), weight, -width, act, name

    return sorted(bits, key=key)


def _grouped(pairs: Iterable[tuple[str, Group]]) -> dict[str, list[Group]]:
    grouped: dict[str, list[Group]] = {}
    for key, value in pairs:
        grouped.setdefault(key, []).append(value)
    return grouped


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _plain(value: str | None) -> str | None:
    return None if value is None else plain(value)
