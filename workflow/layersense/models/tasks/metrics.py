"""What tasks are judged by: shares of right choices, mean intersection over union."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from layersense.errors import LayersenseError
from layersense.models.tasks.cider import cider_d
from layersense.models.tasks.protocol import IGNORED, Batch, Loaded, Metric, Task, WrittenMetric

Floats = npt.NDArray[np.float64]

MEMBERS = ("name", "unit", "higher_is_better", "records", "values")
"""What a metric has; one of what the model writes has ``write`` instead of ``records``. See
:class:`layersense.models.tasks.protocol.Metric`."""


def metrics_of(task: Task, loaded: Loaded) -> tuple[list[Metric], list[WrittenMetric]]:
    """Return the task's metrics, and those of what its model writes.

    None where it says nothing of them, as one's own may.

    Raises:
        LayersenseError: what the task calls a metric is none, or two have one name.
    """
    make = getattr(task, "metrics", None)
    metrics: list[Metric | WrittenMetric] = [] if make is None else list(make(loaded))
    for metric in metrics:
        writes = hasattr(metric, "write")
        lacking = [
            name
            for name in MEMBERS
            if not hasattr(metric, name) and not (writes and name == "records")
        ]
        if lacking:
            raise LayersenseError(
                f"task {task.name}: its metric {type(metric).__name__} lacks "
                f"{', '.join(lacking)}; see `Metric` in layersense.models.tasks.protocol"
            )
    names = [metric.name for metric in metrics]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise LayersenseError(
            f"task {task.name}: two of its metrics are called {twice[0]}; give each a name of its "
            "own"
        )
    written = [metric for metric in metrics if isinstance(metric, WrittenMetric)]
    return [metric for metric in metrics if not isinstance(metric, WrittenMetric)], written


def value_of(metric: Metric, records: Sequence[Any]) -> float | None:
    """Return a metric over all records, each once; None where it says nothing."""
    (value,) = metric.values(records, np.ones((1, len(records))))
    return float(value) if np.isfinite(value) else None


class TopChoice:
    """The share of supervised positions at which the largest logit is that of the label.

    The model is given the true tokens before each position (teacher forcing), where there are any.
    """

    unit = "share"
    higher_is_better = True

    def __init__(self, name: str) -> None:
        self.name = name

    def records(self, output: Any, logits: Tensor, batch: Batch) -> list[Any]:
        """Return right and all positions of each sample; nothing where these have no labels."""
        labels = position_labels(batch, len(logits))
        if labels is None:
            return []
        sizes = unit_sizes(batch, len(logits))
        right = per_unit(logits.argmax(dim=-1) == labels, sizes)
        return [[one, size] for one, size in zip(right, sizes, strict=True)]

    def values(self, records: Sequence[Any], counts: Floats) -> Floats:
        """Return right positions / all positions, 0 to 1; NaN where there are none."""
        right, total = (counts @ np.array(records, dtype=float).reshape(-1, 2)).T
        return ratio(right, total)


class CiderD:
    """CIDEr-D of the captions that a model writes, against all that people gave the photographs.

    The mean over photographs of :func:`layersense.models.tasks.cider.cider_d`, 0 to 10. The idf of
    its words comes from all references of all held-out photographs, in each resample too.

    Args:
        write: what the model writes for each sample of a batch.
        most_passes: how many passes of the model that takes at most.
    """

    name = "CIDEr-D"
    unit = "of 10"
    higher_is_better = True

    def __init__(self, write: Callable[[nn.Module, Batch], list[str]], most_passes: int) -> None:
        self._write, self.most_passes = write, most_passes

    def write(self, model: nn.Module, batch: Batch) -> list[str]:
        """Return the model's caption of each photograph."""
        return self._write(model, batch)

    def values(self, records: Sequence[Any], counts: Floats) -> Floats:
        """Return the mean of the photographs, 0 to 10; NaN where there are none."""
        scores = cider_d([text for text, _ in records], [texts for _, texts in records])
        return ratio(counts @ scores, counts.sum(axis=1))


class MeanIoU:
    """The mean over classes of intersection / union of the pixels chosen and those labelled.

    Pixels are counted over all photographs; a class that is neither labelled nor chosen anywhere
    is left out of the mean (M. Everingham et al., The Pascal Visual Object Classes Challenge, 2015,
    section 4.3).
    """

    name = "mean IoU"
    unit = "share"
    higher_is_better = True

    def records(self, output: Any, logits: Tensor, batch: Batch) -> list[Any]:
        """Return each photograph's pixels by class: in both, labelled, chosen; shape (3, classes).

        Nothing where the pixels have no labels.
        """
        labels = position_labels(batch, len(logits))
        if labels is None:
            return []
        classes, sizes = logits.shape[-1], unit_sizes(batch, len(logits))
        return [
            [
                torch.bincount(part, minlength=classes).tolist()
                for part in (ours[chosen == ours], ours, chosen)
            ]
            for ours, chosen in zip(
                torch.split(labels, sizes), torch.split(logits.argmax(dim=-1), sizes), strict=True
            )
        ]

    def values(self, records: Sequence[Any], counts: Floats) -> Floats:
        """Return the mean intersection over union, 0 to 1; NaN where there are no pixels."""
        if not records:
            return np.full(len(counts), np.nan)
        pixels = np.array(records, dtype=float)
        both, labelled, chosen = np.moveaxis(np.tensordot(counts, pixels, axes=1), 1, 0)
        union = labelled + chosen - both
        return ratio(ratio(both, union, 0.0).sum(axis=1), (union > 0).sum(axis=1))


def ratio(part: Floats, whole: npt.NDArray[Any], otherwise: float = np.nan) -> Floats:
    """Return ``part / whole``, and ``otherwise`` where the whole is zero."""
    found: Floats = np.divide(part, whole, out=np.full(part.shape, otherwise), where=whole > 0)
    return found


def position_labels(batch: Batch, positions: int) -> Tensor | None:
    """Return the label of each compared position, if the batch has one for each."""
    candidates = [batch.labels.flatten()]
    if batch.labels.ndim == 2:
        candidates.insert(0, batch.labels[:, 1:].flatten())
    for labels in candidates:
        found = labels[labels != IGNORED]
        if len(found) == positions:
            return found
    return None


def unit_sizes(batch: Batch, positions: int) -> list[int]:
    """Return how many of a batch's compared positions belong to each unit, in order.

    A unit is a sample, where the positions can be told apart by sample: one each, the supervised
    tokens of each, or equally many. Otherwise the batch is one unit.
    """
    if positions == batch.n_samples:
        return [1] * positions
    candidates = [batch.labels[:, 1:]] if batch.labels.ndim == 2 else []
    if batch.labels.ndim >= 2:
        for labels in (*candidates, batch.labels):
            counts: list[int] = (labels != IGNORED).flatten(1).sum(dim=1).tolist()
            if sum(counts) == positions:
                return counts
    if batch.n_samples and positions % batch.n_samples == 0 and batch.labels.ndim != 2:
        return [positions // batch.n_samples] * batch.n_samples
    return [positions]


def per_unit(values: Tensor, sizes: Sequence[int]) -> list[Any]:
    """Sum values, shape (positions,), over each unit."""
    kind = torch.float64 if values.is_floating_point() else torch.int64
    return [part.sum().item() for part in torch.split(values.to("cpu", kind), list(sizes))]
