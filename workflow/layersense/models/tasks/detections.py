"""What detectors find, and what it is worth: COCO's average precision (torch)."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.ops import batched_nms, clip_boxes_to_image, generalized_box_iou_loss

from layersense.models.tasks.images import yes_or_no
from layersense.models.tasks.metrics import Floats, ratio

if TYPE_CHECKING:
    from layersense.models.tasks.protocol import Batch

THRESHOLDS = tuple((50 + 5 * step) / 100 for step in range(10))
"""Intersections over union from which on a box hits."""
RECALLS = np.linspace(0, 1, 101)
"""Levels of recall at which COCO reads the precision."""
MOST = 100
"""Detections of a photograph that count, as COCO has it."""
CROWD = "crowd_"
"""What the keys of a target begin with that are about crowds; no loss reads them."""
_TOPK = (torch.topk, Tensor.topk)


@dataclass(frozen=True)
class Detected:
    """A detector's output, before anything is sorted out."""

    loss: Callable[[int, dict[str, Tensor]], Tensor]
    """The loss of one photograph: its number in the batch, its target."""
    logits: Tensor
    """Of the classes at each query or anchor, shape (B, positions, classes)."""
    boxes: Callable[[], Tensor]
    """Gives the box of each position by its corners, in shares of the image, shape (B, positions,
    4)."""
    raw: Any
    """What the model's own way of sorting reads."""
    nothing: int | None = None
    """The class that stands for "nothing" where a position is of one class (softmax); None where
    each class is a yes or no of its own (sigmoid)."""


Find = Callable[[Detected, tuple[int, int]], "list[dict[str, Tensor]]"]
"""A model's own way from its output, and height and width of its images, to ``boxes`` by their
corners in pixels, ``scores`` and ``labels`` of each photograph."""


def distributions(output: Detected) -> Tensor:
    """Return what a detector says at each position, as logits in float32.

    Returns:
        Shape (positions, classes) where a position is of one class, and (positions, classes, 2)
        where each class is yes or no: independent of each other, so that divergences add up.
    """
    logits = output.logits.float().flatten(0, 1)
    return yes_or_no(logits) if output.nothing is None else logits


def box_damage(before: Detected, after: Detected) -> Tensor:
    """Return how far boxes moved, in the units of the loss, shape (positions,), float64.

    5 · L1 + 2 · (1 - GIoU) of the two boxes of a position, the box terms of DETR's loss with its
    weights (Carion et al., End-to-End Object Detection with Transformers, 2020, appendix A.2),
    times the probability that there is an object, by the unquantized model.
    """
    logits = before.logits.double()
    if before.nothing is not None:
        there = 1 - logits.softmax(dim=-1)[..., before.nothing]
    else:
        there = logits.sigmoid().amax(dim=-1)
    ours, theirs = (output.boxes().double().flatten(0, 1) for output in (before, after))
    moved = 5 * (ours - theirs).abs().sum(dim=-1)
    # A box without area has none in common with itself.
    apart = _apart(ours, theirs) - _apart(ours, ours)
    return there.flatten() * (moved + 2 * apart.clamp(min=0))


def _apart(ours: Tensor, theirs: Tensor) -> Tensor:
    found: Tensor = generalized_box_iou_loss(ours, theirs, reduction="none")
    return found


def from_middles(boxes: Tensor) -> Tensor:
    """Return boxes by their corners for boxes by center, width and height."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([middle - half, middle + half], dim=-1)


def to_middles(boxes: Tensor) -> Tensor:
    """Return boxes by center, width and height for boxes by their corners."""
    first, last = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(first + last) / 2, last - first], dim=-1)


def sort_out(
    output: Detected,
    size: tuple[int, int],
    least: float,
    overlap: float,
    nothing: int | None = None,
) -> list[dict[str, Tensor]]:
    """Return what is found, from class logits and boxes alone.

    Args:
        output: what a model, or a file of it, says of each position.
        size: height and width of the images.
        least: score from which on a position counts.
        overlap: intersection over union above which the worse of two boxes of a class is dropped.
        nothing: the class that stands for "nothing"; None where classes are yes or no.
    """
    height, width = size
    logits = output.logits.float()
    scores = logits.sigmoid() if nothing is None else logits.softmax(dim=-1)
    if nothing is not None:
        scores[..., nothing] = 0
    found = []
    corners = output.boxes() * torch.tensor([width, height] * 2)
    for each, boxes in zip(scores, clip_boxes_to_image(corners, size), strict=True):
        positions, labels = torch.nonzero(each > least, as_tuple=True)
        there, sure = boxes[positions], each[positions, labels]
        kept = batched_nms(there, sure, labels, overlap)[:MOST]
        found.append({"boxes": there[kept], "scores": sure[kept], "labels": labels[kept]})
    return found


class AveragePrecision:
    """COCO's AP: the mean over classes and IoU thresholds 0.5, 0.55 … 0.95, by pycocotools.

    At most :data:`MOST` boxes of a photograph count. Boxes without area and classes that the model
    does not have are left out, as they are of its loss. What is found in a crowd is neither right
    nor wrong. Boxes are compared on the image as the model sees it: resizing changes no
    intersection over union.
    """

    name = "mAP@[.5:.95]"
    unit = "share"
    higher_is_better = True

    def __init__(self, find: Find) -> None:
        self._find = find

    def records(self, output: Any, logits: Tensor, batch: Batch) -> list[Any]:
        """Return two lists of each photograph: what is found, and what is there.

        Returns:
            Rows of ``[x, y, w, h, class, score]``, and of ``[x, y, w, h, class, is a crowd]``.
        """
        height, width = batch.inputs["pixel_values"].shape[-2:]
        records = []
        for found, target in zip(self._find(output, (height, width)), batch.targets, strict=True):
            best = found["scores"].float().sort(descending=True, stable=True).indices[:MOST]
            rows = torch.cat(
                [
                    _sides(found["boxes"][best].float()),
                    found["labels"][best].float()[:, None],
                    found["scores"][best].float()[:, None],
                ],
                dim=1,
            )
            records.append([rows.tolist(), _truth(target, height, width).tolist()])
        return records

    def values(self, records: Sequence[Any], counts: Floats) -> Floats:
        """Return the average precision, 0 to 1; NaN where no photograph has a box.

        pycocotools says which boxes hit, once. What follows is its ``accumulate`` with each
        photograph as often as it counts, for all rows of ``counts`` together: the precision at 101
        levels of recall is the best one at that recall or above.
        """
        objects = [[int(row[4]) for row in truth if not row[5]] for _, truth in records]
        true = sorted({number for numbers in objects for number in numbers})
        total, classes = np.zeros(len(counts)), np.zeros(len(counts))
        for number, matches in _matches(records, true).items():
            wanted = counts @ np.array([numbers.count(number) for numbers in objects], dtype=float)
            there = wanted > 0
            total[there] += _precision(counts[there], matches, wanted[there])
            classes[there] += 1
        return ratio(total, classes)


@dataclass(frozen=True)
class _Matches:
    """The boxes of a class that were found, from the most probable to the least."""

    images: npt.NDArray[np.int64]
    """Number of each box's photograph, shape (boxes,)."""
    right: npt.NDArray[np.bool_]
    """Whether it hits an object at each IoU threshold, shape (thresholds, boxes)."""
    counted: npt.NDArray[np.bool_]
    """Whether it is right or wrong there, and not in a crowd, of the same shape."""


def _matches(records: Sequence[Any], classes: Sequence[int]) -> dict[int, _Matches]:
    """Return which boxes hit, by class."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = [
        {"image_id": image, "bbox": box, "category_id": int(number), "iscrowd": int(crowd),
         "area": box[2] * box[3], "id": index}
        for index, (image, (*box, number, crowd)) in enumerate(
            ((image, row) for image, (_, rows) in enumerate(records) for row in rows), start=1
        )
    ]  # fmt: skip
    # A class that no photograph shows has no precision.
    found = [
        {"image_id": image, "bbox": box, "category_id": int(number), "score": score}
        for image, (rows, _) in enumerate(records)
        for *box, number, score in rows
        if int(number) in classes and all(map(math.isfinite, (*box, score)))
    ]
    none = np.zeros((len(THRESHOLDS), 0), dtype=bool)
    nothing = _Matches(np.zeros(0, dtype=np.int64), none, none)
    if not found:
        return dict.fromkeys(classes, nothing)
    with redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(len(records))],
            "annotations": truth,
            "categories": [{"id": number} for number in classes],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.params.iouThrs = np.array(THRESHOLDS)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, math.inf]], ["all"]
        evaluation.params.maxDets = [MOST]
        evaluation.evaluate()
    result = {}
    for index, number in enumerate(classes):
        seen = [one for one in evaluation.evalImgs[index * len(records) :][: len(records)] if one]
        if not seen:
            result[number] = nothing
            continue
        scores = np.concatenate([one["dtScores"] for one in seen])
        order = np.argsort(-scores, kind="stable")
        images = np.concatenate([[one["image_id"]] * len(one["dtScores"]) for one in seen])
        hit = np.concatenate([one["dtMatches"] for one in seen], axis=1) > 0
        counted = ~np.concatenate([one["dtIgnore"] for one in seen], axis=1).astype(bool)
        result[number] = _Matches(
            images.astype(np.int64)[order], (hit & counted)[:, order], counted[:, order]
        )
    return result


def _precision(counts: Floats, matches: _Matches, wanted: Floats) -> Floats:
    """Return the mean precision over thresholds and levels of recall, shape (n,).

    Args:
        counts: how often each photograph counts, shape (n, photographs).
        matches: the boxes that were found.
        wanted: objects that are there, shape (n,).
    """
    total = np.zeros(len(counts))
    if not len(matches.images):
        return total
    weights = counts[:, matches.images]
    for one_right, one_counted in zip(matches.right, matches.counted, strict=True):
        right = (weights * one_right).cumsum(axis=1)
        found = (weights * one_counted).cumsum(axis=1)
        best = np.maximum.accumulate(ratio(right, found, 0.0)[:, ::-1], axis=1)[:, ::-1]
        # How many levels of recall each box is the first to reach.
        reached = np.searchsorted(RECALLS, right / wanted[:, None], side="right")
        total += (np.diff(reached, axis=1, prepend=0) * best).sum(axis=1)
    return total / (len(matches.right) * len(RECALLS))


def _sides(corners: Tensor) -> Tensor:
    """Return boxes by corner and size for boxes by two corners."""
    return torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)


def _truth(target: dict[str, Tensor], height: int, width: int) -> Tensor:
    """Return the objects of a target: [x, y, w, h] in pixels, class, 0; and its crowds, with 1."""
    crowds = {
        key.removeprefix(CROWD): value for key, value in target.items() if key.startswith(CROWD)
    }
    rows = []
    for crowd, objects in enumerate([target, crowds]):
        if objects:
            corners, classes = _corners(objects, height, width)
            kinds = torch.stack([classes.float(), torch.full_like(classes.float(), crowd)], dim=1)
            rows.append(torch.cat([_sides(corners), kinds], dim=1))
    return torch.cat(rows)


def _corners(target: dict[str, Tensor], height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the boxes of a target by their corners in pixels, and their classes."""
    boxes = target["boxes"].float()
    if "labels" in target:  # torchvision
        return boxes, target["labels"]
    scale = torch.tensor([width, height] * 2, device=boxes.device)
    return from_middles(boxes) * scale, target["class_labels"]


class SameQueries:
    """Lets a detector take the same queries again, so that its outputs can be compared one by one.

    Detectors of the RT-DETR kind take as queries the positions that score highest, in that order.
    Rounding changes the order, and quantization the choice. Within :meth:`noted` the choices are
    noted, and within :meth:`again` taken again, as tokens are by teacher forcing.
    """

    def __init__(self) -> None:
        self._chosen: list[Tensor] = []

    @property
    def any(self) -> bool:
        """Whether the model chose at all."""
        return bool(self._chosen)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what the model chooses."""
        self._chosen.clear()
        with _TopK(lambda values, found: self._chosen.append(found.indices)):
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """Give the model what it chose before."""
        noted = iter(self._chosen)

        def replace(values: Tensor, found: Any) -> Any:
            indices = next(noted)
            dim = _dimension(values, indices)
            return torch.return_types.topk((values.gather(dim, indices), indices))

        with _TopK(replace):
            yield


class _TopK(TorchFunctionMode):
    """Calls a function with input and result of every top-k; what it returns counts."""

    def __init__(self, seen: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in _TOPK:
            return found
        values = args[0] if args else kwargs["input"]
        return self._seen(values, found) or found


def _dimension(values: Tensor, indices: Tensor) -> int:
    """Return the dimension along which ``indices`` choose; the last one if none differs."""
    pairs = enumerate(zip(values.shape, indices.shape, strict=True))
    return next((dim for dim, (all_, some) in pairs if all_ != some), values.ndim - 1)
