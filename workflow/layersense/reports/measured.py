"""What was measured of one scheme on held-out rows, as reports read a ``verification.parquet``."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from layersense.manifests.schema import Finding
from layersense.reports.result import read_table
from layersense.reports.text import number, percent, plain
from layersense.verification.analysis import Correlation, Duel, Summary, Verdict
from layersense.verification.table import read_summary

Rows = list[dict[str, Any]]
UNNAMED = ("random", "rival")
"""Roles of recipes that are there to compare with, and not by themselves."""


@dataclass(frozen=True)
class Measured:
    """Measured damage of one scheme; rows have the columns of a ``verification.parquet``."""

    scheme: str
    formats: list[str]
    summary: Summary
    """Of the whole run."""
    groups: Rows
    """Groups quantized alone, under the scheme's formats."""
    all_recipes: Rows
    before: dict[str, Any]
    """The unquantized model."""

    @property
    def metric(self) -> str | None:
        """Name of the task's own metric, with a unit other than a share; None without one."""
        row = next((row for row in self.recipes if row["metric"] is not None), None)
        if row is None:
            return None
        unit = row["metric_unit"]
        return row["metric"] if unit in ("share", "") else f"{row['metric']} ({unit})"

    @property
    def metric_title(self) -> str | None:
        """The same as a heading; the small letter stays where a large one follows, as in mAP."""
        name = self.metric
        return name if name is None or name[1:2].isupper() else f"{name[0].upper()}{name[1:]}"

    @staticmethod
    def kl_note(task: str) -> str:
        """Say what the measured damage of a task's models is."""
        what = (
            "KL is the Kullback–Leibler divergence from the unquantized model's predictions, in "
            "nats per position"
        )
        if task != "object-detection":
            return what
        return (
            f"{what}: a query or an anchor, all its classes, and with them what its box moved, in "
            "the units of the loss"
        )

    @property
    def metric_note(self) -> str:
        """What the metric is without quantization, and in which direction it is better."""
        row = next(row for row in self.recipes if row["metric"] is not None)
        better = "more" if row["metric_higher_is_better"] else "less"
        return (
            f"The task's own metric, {row['metric']}, is {self.metric_text(self.before)} without "
            f"quantization on the same rows; {better} is better."
        )

    @staticmethod
    def metric_text(row: dict[str, Any]) -> str:
        """Return a row's metric, a share as percent; ``–`` where there is none."""
        return (percent if row["metric_unit"] == "share" else number)(row["metric_value"])

    @property
    def verdict(self) -> Verdict:
        """What was found for this scheme."""
        return next(entry for entry in self.summary.verdicts if entry.scheme == self.scheme)

    @property
    def correlations(self) -> list[Correlation]:
        """Of the scheme's formats."""
        return [entry for entry in self.summary.correlations if entry.format in self.formats]

    @cached_property
    def recipes(self) -> Rows:
        """Recipes with a name of their own, by bits."""
        named = (row for row in self.all_recipes if row["role"] not in UNNAMED)
        return sorted(named, key=lambda row: row["effective_bits"])

    @property
    def chosen(self) -> dict[str, Any] | None:
        """The scheme's own recipe; None where it is not measured."""
        return next((row for row in self.recipes if row["role"] == "scheme"), None)

    @property
    def findings(self) -> list[Finding]:
        """Of the run, without those about formats that the scheme does not have."""
        return self.summary.findings_of(self.formats)

    @property
    def random(self) -> dict[str, Any] | None:
        """How many random recipes there are, with the best and the median KL."""
        found = [row["kl"] for row in self.all_recipes if row["role"] == "random" and row["kl"]]
        if not found:
            return None
        return {"count": len(found), "median": median(found), "best": min(found)}

    @property
    def duels(self) -> list[Duel]:
        """The solver's choices against recipes of equal bits, but random ones."""
        random = {row["label"] for row in self.all_recipes if row["role"] == "random"}
        return [
            entry
            for entry in self.summary.duels
            if entry.scheme == self.scheme and entry.theirs not in random
        ]


def read_measured(path: Path, scheme: str, formats: Collection[str]) -> Measured:
    """Read what was measured of one scheme.

    Args:
        path: ``verification.parquet`` of its run.
        scheme: name of the scheme.
        formats: its formats.

    Raises:
        LayersenseError: the table cannot be read.
    """
    summary = read_summary(path)
    table = read_table(path)
    rows = [
        {name: plain(value) if isinstance(value, str) else value for name, value in row.items()}
        for row in table.to_pylist()
    ]
    return Measured(
        scheme=scheme,
        formats=list(formats),
        summary=summary,
        groups=[row for row in rows if row["kind"] == "group" and row["format"] in formats],
        all_recipes=[row for row in rows if row["kind"] == "recipe" and row["scheme"] == scheme],
        before=next(row for row in rows if row["kind"] == "before"),
    )
