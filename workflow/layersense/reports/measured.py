"""What was measured of one scheme on held-out rows, as reports read a ``verification.parquet``."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from layersense.manifests.schema import Finding
from layersense.reports.result import read_table
from layersense.reports.text import number, percent, plain
from layersense.verification.analysis import Correlation, Duel, Summary, Verdict
from layersense.verification.plan import TUNED, UNNAMED
from layersense.verification.table import read_summary

Rows = list[dict[str, Any]]
Show = Callable[[float | None], str]


@dataclass(frozen=True)
class ShownMetric:
    """One of the task's own metrics, as columns of a report."""

    name: str
    unit: str
    higher_is_better: bool

    @property
    def heading(self) -> str:
        """Name, with a unit other than a share; the small letter stays in mAP."""
        is_name = self.name[1:2].isupper()
        heading = self.name if is_name else f"{self.name[0].upper()}{self.name[1:]}"
        return heading if self.unit in ("share", "") else f"{heading} ({self.unit})"

    @property
    def change(self) -> str:
        """Heading of the difference, in percentage points for a share."""
        return "Change, points" if self.unit == "share" else "Change"

    def value(self, row: dict[str, Any]) -> str:
        """Return a row's value with its interval, a share as percent; ``–`` where it has none."""
        one = self._of(row)
        show, ends = (percent, _percentage) if self.unit == "share" else (number, number)
        return _with_interval(one["value"], one["low"], one["high"], show, ends) if one else "–"

    def difference(self, row: dict[str, Any]) -> str:
        """Return a row's difference to the unquantized model's value, with its interval."""
        one = self._of(row)
        show = _points if self.unit == "share" else _signed
        ends = (one["difference"], one["difference_low"], one["difference_high"]) if one else None
        return _with_interval(*ends, show, show) if ends else "–"

    def _of(self, row: dict[str, Any]) -> dict[str, Any] | None:
        return next((one for one in row["metrics"] or () if one["name"] == self.name), None)


def _with_interval(
    value: float | None, low: float | None, high: float | None, show: Show, ends: Show
) -> str:
    """Return a value, and the ends of its interval where that has a width."""
    if low is None or high is None or value == low == high:
        return show(value)
    return f"{show(value)} ({ends(low)} to {ends(high)})"


def _percentage(value: float | None) -> str:
    """Return a share in percent, without the sign."""
    return "–" if value is None else f"{value * 100:.1f}"


def _points(value: float | None) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    return "–" if value is None else _sign(round(value, 3)) + f"{abs(value) * 100:.1f}"


def _signed(value: float | None) -> str:
    """Return a difference with its sign."""
    return "–" if value is None else _sign(value) + number(abs(value))


def _sign(value: float) -> str:
    return "+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else ""


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
    def metrics(self) -> list[ShownMetric]:
        """The task's own metrics, in its order; none where the task has none."""
        return [
            ShownMetric(one["name"], one["unit"], one["higher_is_better"])
            for one in self.before["metrics"] or ()
        ]

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

    @staticmethod
    def kl(value: float | None) -> str:
        """Return a measured KL in words."""
        return "not finite" if value is None else number(value)

    @staticmethod
    def risen(row: dict[str, Any]) -> str:
        """Return the loss difference of a row, with its interval."""
        value, low, high = (row[f"loss_difference{end}"] for end in ("", "_low", "_high"))
        return _with_interval(value, low, high, _signed, _signed)

    @staticmethod
    def agreement(row: dict[str, Any]) -> str:
        """Return in percent how often a row's first choice is the same, with its interval."""
        value, low, high = (row[f"top1_agreement{end}"] for end in ("", "_low", "_high"))
        return _with_interval(value, low, high, percent, _percentage)

    @property
    def cache_note(self) -> str | None:
        """Say what the key-value cache does; None where it stays as it is."""
        row = next((row for row in self.recipes if row["role"] == "cache"), None)
        if row is None:
            return None
        return (
            f"Every recipe here has the key-value cache quantized, too, which no score predicts: "
            f"alone it has a KL of {self.kl(row['kl'])}."
        )

    @property
    def tuned_note(self) -> str | None:
        """Say which recipes half of these rows chose; None if there are none."""
        own = self.chosen["recipe_digest"] if self.chosen else None
        names = [
            row["label"]
            for row in self.recipes
            if row["role"] in TUNED and row["recipe_digest"] != own
        ]
        if not names:
            return None
        judged = " The sentence above judges by the other half." if self.verdict.betterment else ""
        return (
            f"Half of these rows chose the recipe{'s' * (len(names) > 1)} {' and '.join(names)}, "
            f"so that {'their' if len(names) > 1 else 'its'} numbers here are too good.{judged}"
        )

    @property
    def metrics_note(self) -> str:
        """How to read the metrics and their intervals."""
        less = [metric.name for metric in self.metrics if not metric.higher_is_better]
        better = f"more is better, but of {' and '.join(less)} less" if less else "more is better"
        drawn = "samples" if self.summary.photographs is None else "photographs"
        return (
            f"On the same rows, with 95 % intervals by bootstrap over {drawn}; {better}. Change is "
            "against the unquantized model in the same resamples, which tells more than the two "
            "intervals of the values."
        )

    @property
    def verdict(self) -> Verdict:
        """What was found for this scheme."""
        return self.summary.verdict_of(self.scheme)

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
        """Of this recipe, and of the run without those about formats that it does not have."""
        return self.summary.findings_of(self.formats, self.scheme)

    @property
    def random(self) -> dict[str, Any] | None:
        """How many random recipes there are, with the best and the median KL."""
        own = self.chosen["recipe_digest"] if self.chosen else None
        found = [
            row["kl"]
            for row in self.all_recipes
            if row["role"] == "random" and row["kl"] is not None and row["recipe_digest"] != own
        ]
        if not found:
            return None
        return {"count": len(found), "median": median(found), "best": min(found)}

    @property
    def duels(self) -> list[Duel]:
        """The solver's choices against recipes within the same budget, but random ones."""
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
    rows = [_plain(row) for row in table.to_pylist()]
    return Measured(
        scheme=scheme,
        formats=list(formats),
        summary=summary,
        groups=[row for row in rows if row["kind"] == "group" and row["format"] in formats],
        all_recipes=[row for row in rows if row["kind"] == "recipe" and row["scheme"] == scheme],
        before=next(row for row in rows if row["kind"] == "before"),
    )


def _plain(value: Any) -> Any:
    """Return a value of the table with all its text on one line and printable."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return plain(value) if isinstance(value, str) else value
