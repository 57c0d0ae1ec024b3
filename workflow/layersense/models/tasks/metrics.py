"""What tasks are judged by: shares of right choices, mean intersection over union."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layersense.errors import LayersenseError
from layersense.models.tasks.protocol import IGNORED, Batch, Loaded, Metric, Task

MEMBERS = ("name", "unit", "higher_is_better", "records", "value")
"""What a metric has; see :class:`layersense.models.tasks.protocol.Metric`."""


def metric_of(task: Task, loaded: Loaded) -> Metric | None:
    """Return the task's metric; None where it has none, as a task of the user's own may.

    Raises:
        LayersenseError: what the task calls its metric is none.
    """
    make = getattr(task, "metric", None)
    metric: Metric | None = None if make is None else make(loaded)
    lacking = [name for name in MEMBERS if not hasattr(metric, name)]
    if metric is not None and lacking:
        raise LayersenseError(
            f"task {task.name}: its metric lacks {', '.join(lacking)}; see `Metric` in "
            "layersense.models.tasks.protocol"
        )
    return metric


class TopChoice:
    """The share of supervised positions at which the largest logit is that of the label.

    The model is given the true tokens before each position (teacher forcing), where there are any.
    """

    unit = "share"
    higher_is_better = True

    def __init__(self, name: str) -> None:
        self.name = name

    def records(self, output: Any, logits: Tensor, batch: Batch) -> list[Any]:
        """Return the right and all positions of a batch; nothing where these have no labels."""
        labels = position_labels(batch, len(logits))
        if labels is None:
            return []
        return [[int((logits.argmax(dim=-1) == labels).sum()), len(labels)]]

    def value(self, records: Sequence[Any]) -> float:
        """Return right positions / all positions, 0 to 1; NaN where there are none."""
        total = sum(total for _, total in records)
        return sum(right for right, _ in records) / total if total else math.nan


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
        """Return the pixels of a batch by class: in both, labelled, chosen; shape (3, classes).

        Nothing where the pixels have no labels.
        """
        labels = position_labels(batch, len(logits))
        if labels is None:
            return []
        chosen, classes = logits.argmax(dim=-1), logits.shape[-1]
        parts = (labels[chosen == labels], labels, chosen)
        return [[torch.bincount(part, minlength=classes).tolist() for part in parts]]

    def value(self, records: Sequence[Any]) -> float:
        """Return the mean intersection over union, 0 to 1; NaN where there are no pixels."""
        if not records:
            return math.nan
        both, labelled, chosen = torch.tensor(records, dtype=torch.float64).sum(dim=0)
        union = labelled + chosen - both
        return float((both[union > 0] / union[union > 0]).mean())


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
