"""What a task's own metric says of a model, with its interval (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layersense.verification.analysis import HIGH, LOW, Floats, resamples
from layersense.verification.store import TaskMetric

if TYPE_CHECKING:
    from layersense.models.tasks.protocol import Metric, WrittenMetric


class Judge:
    """Judges models by one metric, against the unquantized one.

    Args:
        metric: what judges.
        before: records of the unquantized model, over all batches.
        photographs: number of each row's photograph. All records of one are drawn together, where
            there is a record for each row; else each record is drawn by itself.
    """

    def __init__(
        self,
        metric: Metric | WrittenMetric,
        before: Sequence[Any],
        photographs: Sequence[int] | None = None,
    ) -> None:
        if photographs is None or len(photographs) != len(before):
            photographs = range(len(before))
        self._metric, self._counts = metric, selections(photographs)
        self._before = metric.values(before, self._counts)

    def of(self, records: Sequence[Any]) -> TaskMetric:
        """Return what the metric says of a model's records, with intervals."""
        found = self._metric.values(records, self._counts)
        value, low, high = _told(found)
        difference, difference_low, difference_high = _told(found - self._before)
        return TaskMetric(
            name=self._metric.name,
            unit=self._metric.unit,
            higher_is_better=self._metric.higher_is_better,
            value=value,
            low=low,
            high=high,
            difference=difference,
            difference_low=difference_low,
            difference_high=difference_high,
        )


def selections(photographs: Sequence[int]) -> Floats:
    """Return how often each record counts, shape (1 + resamples, records).

    In the first row once each; then as often as its photograph is drawn. With fewer than two
    photographs there is the first row alone.
    """
    order = {number: unit for unit, number in enumerate(dict.fromkeys(photographs))}
    all_once = np.ones((1, len(photographs)))
    if len(order) < 2:
        return all_once
    units = [order[number] for number in photographs]
    drawn = np.array([np.bincount(row, minlength=len(order)) for row in resamples(len(order))])
    return np.concatenate([all_once, drawn[:, units]])


def _told(values: Floats) -> tuple[float | None, float | None, float | None]:
    """Return the first value, and the 95 % interval of the others; None where not finite.

    A resample that holds nothing to judge, such as photographs without a box, is left out.
    """
    drawn = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(drawn, [LOW, HIGH]) if len(drawn) else (np.nan, np.nan)
    value, low, high = (float(one) if np.isfinite(one) else None for one in (values[0], low, high))
    return value, low, high
