"""Detectors: a photograph in, the boxes of its objects out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from layersense.errors import LayersenseError
from layersense.models import yolo
from layersense.models.checkpoints import Checkpoint
from layersense.models.loading import first_line, load_image_processor, start_gradients
from layersense.models.tasks.detections import (
    CROWD,
    AveragePrecision,
    Detected,
    Find,
    SameQueries,
    box_damage,
    distributions,
    from_middles,
    sort_out,
    to_middles,
)
from layersense.models.tasks.images import (
    classes_by_name,
    find_class,
    labels_of,
    load_image_model,
    no_class,
    padded_batches,
    photograph,
    stack_images,
    to_tensor,
)
from layersense.models.tasks.protocol import (
    Batch,
    Loaded,
    Metric,
    Sampling,
    check_modality,
)

if TYPE_CHECKING:
    from PIL import Image

    from layersense.calibration.database import Object, Row
    from layersense.calibration.sampling import Unit
    from layersense.quantization.layers import LayerName


@dataclass(frozen=True)
class Sample:
    """One photograph, as the model wants it."""

    image: Tensor
    """Shape (3, H, W)."""
    target: dict[str, Tensor]
    """``boxes`` and their classes. torchvision: in pixels by their corners, and ``labels``; others:
    as shares of the image, center, width and height, and ``class_labels``. The same with ``crowd_``
    before: crowds, if there are any."""

    @property
    def nbytes(self) -> int:
        """Bytes of its image; boxes are few."""
        return self.image.nbytes


Found = Sequence[tuple[int, "Object"]]
"""Numbers of their classes, and objects."""


@dataclass(frozen=True)
class Detector:
    """How photographs and boxes come into a model."""

    classes: dict[str, int]
    """Name → number of its classes."""
    prepare: Callable[[Image.Image, Found], Sample]
    """Resizes a photograph, and boxes with it.

    Raises:
        TypeError, ValueError: it cannot.
    """
    shares: bool = True
    """Whether boxes are shares of the image, so that they change where it is padded."""
    masked: bool = False
    """Whether the model is told what is padding."""
    step: int = 1
    """What height and width of its images are multiples of."""
    padding: float = 0.0
    """Value of the pixels that fill up an image."""
    find: Find | None = None
    """Sorts out what the model found; None if its checkpoint has no way to."""


class ObjectDetection:
    """COCO boxes, and the model's own detection loss, for each photograph alone.

    A detector normalises its loss over the boxes of a batch. Here it is computed for one photograph
    at a time and summed, so scores do not depend on the batch size. The model stays in eval mode:
    no running statistics move, and a model of the RT-DETR kind draws no denoising queries, which
    are noise by design.
    """

    name = "object-detection"
    modalities = frozenset({"image_boxes"})

    def unit(self, modality: str) -> Unit:
        """Return the calibration database's unit: a photograph is a sample."""
        check_modality(self, modality)
        return "image"

    def load(self, checkpoint: Checkpoint, *, dtype: str, device: torch.device | str) -> Loaded:
        """Load model and processor; see :class:`~layersense.models.tasks.protocol.Task`."""
        model, warnings, config = load_image_model(
            "AutoModelForObjectDetection", checkpoint, dtype=dtype, device=device
        )
        own: Any = model
        if config is None:
            own.loss_function = _Postponed(own.loss_function)
            start_gradients(model)
            processor = load_image_processor(checkpoint)
            masked = "pixel_mask" in processor.model_input_names
            prepare: Any = partial(_by_processor, processor)
            sorts = getattr(processor, "post_process_object_detection", None)
            find = None if sorts is None else partial(_found_by_processor, sorts)
            detector = Detector(labels_of(own.config), prepare, masked=masked, find=find)
            return Loaded(model, detector, checkpoint.id, warnings)
        classes = classes_by_name(enumerate(config["categories"]))
        if type(model).__name__ == "DetectionModel":
            prepare, step = partial(_by_size, config["image"]["size"]), int(max(own.stride))
            detector = Detector(classes, prepare, step=step, padding=yolo.GREY, find=yolo.found)
            describe = partial(yolo.describe, len(own.yaml["backbone"]), len(own.model) - 1)
            return Loaded(model, detector, checkpoint.id, warnings, describe)
        _dense(model)
        prepare = partial(_by_transform, own.transform)
        find = partial(_found_by_torchvision, own)
        detector = Detector(classes, prepare, shares=False, find=find)
        return Loaded(model, detector, checkpoint.id, warnings)

    def batches(
        self, loaded: Loaded, rows: Sequence[Row], sampling: Sampling, batch_size: int
    ) -> Sequence[Batch]:
        """Return the batches, every image padded to the largest of all rows.

        Raises:
            LayersenseError: an image cannot be used, or no photograph shows a class of the model.
        """
        check_modality(self, sampling.modality)
        detector: Detector = loaded.processor
        if not any(_objects(row, detector.classes, crowds=False) for row in rows):
            shown = {shown.category for row in rows for shown in row.objects}
            raise no_class(loaded.name, shown, detector.classes, "boxes")
        return padded_batches(
            rows,
            batch_size,
            prepare=partial(_prepare, detector),
            collate=partial(_collate, detector),
            step=detector.step,
        )

    def forward(self, model: nn.Module, batch: Batch) -> Detected:
        """Run the model on the batch; what its loss reads is kept in the result."""
        if kind := _KINDS.get(type(model).__name__):
            return kind(model, batch.inputs["pixel_values"])
        own: Any = model
        output = own(**batch.inputs, labels=list(batch.targets))
        return _detected(output.loss, output.logits, output.pred_boxes, own.config.num_labels)

    def loss(self, output: Detected, batch: Batch) -> Tensor:
        """Return the model's own loss of each photograph, summed, a float32 scalar."""
        losses = [output.loss(index, target) for index, target in enumerate(batch.targets)]
        return torch.stack(losses).sum()

    def supervised_logits(self, output: Detected, batch: Batch) -> Tensor:
        """Return the logits of the classes at each query or anchor.

        Returns:
            Shape (positions, classes), or (positions, classes, 2) where each is yes or no.
        """
        return distributions(output)

    def divergence(self, before: Detected, after: Detected) -> Tensor:
        """Return what differs beside the classes: boxes, in units of the loss."""
        return box_damage(before, after)

    def same_choices(self) -> SameQueries:
        """Return what lets a model choose the same queries again."""
        return SameQueries()

    def outputs_of(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model without labels; return ``logits`` and ``pred_boxes``.

        Raises:
            LayersenseError: it is a YOLO of two heads.
        """
        if type(model).__name__ == "DetectionModel":
            yolo.refuse_two_heads(model)
        if kind := _KINDS.get(type(model).__name__):
            output = kind(model, inputs["pixel_values"])
            return {"logits": output.logits, "pred_boxes": to_middles(output.boxes())}
        found = model(**inputs)
        return {"logits": found.logits, "pred_boxes": found.pred_boxes}

    def output_of(self, outputs: Mapping[str, Tensor]) -> Detected:
        """Return what an exported file of a detector finds, without a loss."""
        return _detected(None, outputs["logits"], outputs["pred_boxes"])

    def metrics(self, loaded: Loaded) -> Sequence[Metric]:
        """Return COCO's average precision, where the processor sorts out what it found."""
        detector: Detector = loaded.processor
        return [] if detector.find is None else [AveragePrecision(detector.find)]

    def describe(self, module_names: Sequence[str]) -> LayerName:
        """Return subsystem, block and kind of a layer group."""
        from layersense.quantization.layers import describe_image_layer

        return describe_image_layer(module_names)


def _objects(row: Row, classes: dict[str, int], *, crowds: bool) -> list[tuple[int, Object]]:
    """Return what the model can find, or crowds of it: no boxes without area, only its classes."""
    found = []
    for shown in row.objects:
        number = find_class(classes, shown.category)
        _, _, width, height = shown.bbox
        if number is not None and shown.is_crowd == crowds and width > 0 and height > 0:
            found.append((number, shown))
    return found


def _prepare(detector: Detector, row: Row) -> Sample:
    image = photograph(row)
    objects, crowds = (_objects(row, detector.classes, crowds=crowds) for crowds in (False, True))
    try:
        sample = detector.prepare(image, objects)
        if not crowds:
            return sample
        apart = detector.prepare(image, crowds).target
    except (TypeError, ValueError) as error:
        raise LayersenseError(
            f"image {row.image_path}: cannot be prepared with its boxes ({first_line(error)}); "
            "remove it from the data"
        ) from error
    return replace(
        sample, target={**sample.target, **{CROWD + key: value for key, value in apart.items()}}
    )


def _by_processor(processor: Any, image: Image.Image, objects: Found) -> Sample:
    """Prepare a photograph as a checkpoint of transformers says."""
    annotations = [
        {
            "bbox": list(shown.bbox),
            "category_id": number,
            "area": shown.bbox[2] * shown.bbox[3],
            "iscrowd": 0,
        }
        for number, shown in objects
    ]
    prepared = processor(
        images=image,
        annotations={"image_id": 0, "annotations": annotations},
        return_tensors="pt",
    )
    labels = prepared["labels"][0]
    return Sample(
        prepared["pixel_values"][0],
        {
            "class_labels": labels["class_labels"].to(torch.int64),
            "boxes": labels["boxes"].to(torch.float32),
        },
    )


def _by_transform(transform: Any, image: Image.Image, objects: Found) -> Sample:
    """Prepare a photograph by the transform that a model of torchvision begins with."""
    corners = [(x, y, x + w, y + h) for _, shown in objects for x, y, w, h in (shown.bbox,)]
    target = {
        "boxes": torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([number for number, _ in objects], dtype=torch.int64),
    }
    images, targets = transform([to_tensor(image)], [target])
    return Sample(images.tensors[0], {key: targets[0][key] for key in target})


def _by_size(size: int, image: Image.Image, objects: Found) -> Sample:
    """Prepare a photograph as YOLO's letterbox does: its longer edge becomes ``size`` pixels."""
    scale = size / max(image.size)
    edges = (round(image.width * scale), round(image.height * scale))
    middles = [
        ((x + w / 2) / image.width, (y + h / 2) / image.height, w / image.width, h / image.height)
        for _, shown in objects
        for x, y, w, h in (shown.bbox,)
    ]
    return Sample(
        to_tensor(image.resize(edges)),
        {
            "boxes": torch.tensor(middles, dtype=torch.float32).reshape(-1, 4),
            "class_labels": torch.tensor([number for number, _ in objects], dtype=torch.int64),
        },
    )


def _collate(detector: Detector, samples: Sequence[Sample], canvas: tuple[int, int]) -> Batch:
    images = stack_images([sample.image for sample in samples], canvas, detector.padding)
    pixels = sum(sample.image.shape[-2] * sample.image.shape[-1] for sample in samples)
    inputs = {"pixel_values": images}
    if detector.masked:
        inputs["pixel_mask"] = stack_images(
            [torch.ones(sample.image.shape[-2:], dtype=torch.int64) for sample in samples], canvas
        )
    targets = [_scaled(sample, canvas) if detector.shares else sample.target for sample in samples]
    positions = len(samples) * canvas[0] * canvas[1]
    return Batch(
        inputs=inputs,
        labels=torch.tensor([len(target["boxes"]) for target in targets]),
        targets=tuple(targets),
        n_tokens=len(samples),
        n_samples=len(samples),
        n_padding=positions - pixels,
        n_truncated=0,
        positions=positions,
    )


def _scaled(sample: Sample, canvas: tuple[int, int]) -> dict[str, Tensor]:
    """Return a target whose boxes are shares of the canvas instead of the image."""
    height, width = sample.image.shape[-2] / canvas[0], sample.image.shape[-1] / canvas[1]
    scale = torch.tensor([width, height] * 2)
    return {
        key: value * scale if key.endswith("boxes") else value
        for key, value in sample.target.items()
    }


# --- transformers --------------------------------------------------------------------------------


def _detected(loss: Any, logits: Tensor, boxes: Tensor, classes: int | None = None) -> Detected:
    """Return the output of a model of transformers; its classes may be unknown for its boxes."""
    # DETR's relatives have a class more, "nothing"; those with a focal loss have not.
    nothing = classes if classes is not None and logits.shape[-1] > classes else None
    return Detected(
        loss=loss,
        logits=logits,
        boxes=partial(from_middles, boxes),
        raw=SimpleNamespace(logits=logits, pred_boxes=boxes),
        nothing=nothing,
    )


def _found_by_processor(
    own: Any, output: Detected, size: tuple[int, int]
) -> list[dict[str, Tensor]]:
    """Sort out as a checkpoint's processor does, whatever the score."""
    found: list[dict[str, Tensor]] = own(
        output.raw, threshold=0.0, target_sizes=[size] * len(output.logits)
    )
    return found


class _Postponed:
    """Stands for a model's loss function and keeps what it is called with.

    The model puts what it returns into its output, as the loss. Called with one photograph's
    number and target, that computes the true loss of this photograph alone.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(
        self, logits: Tensor, labels: Any, device: Any, boxes: Tensor, config: Any, *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor], None]:  # fmt: skip
        def one(index: int, target: dict[str, Tensor]) -> Tensor:
            def cut(value: Any) -> Any:
                return _of_image(value, index, logits) if isinstance(value, Tensor) else value

            loss: Tensor = self.function(
                cut(logits),
                [target],
                device,
                cut(boxes),
                config,
                *(cut(value) for value in args),
                **{key: cut(value) for key, value in kwargs.items()},
            )[0]
            return loss.float()

        return one, {}, None


def _of_image(value: Tensor, index: int, logits: Tensor) -> Tensor:
    """Return one image's part of a tensor, in float32, with a batch of one.

    The batch is the first dimension, except in what DETR stacks for its auxiliary losses: there
    the decoder's layers come first, as the last of them, which is ``logits``, shows.
    """
    count = len(logits)
    stacked = value.ndim == logits.ndim + 1 and value.shape[1] == count
    if stacked and (len(value) != count or _last_is(value, logits)):
        return value[:, index : index + 1].float()
    if len(value) != count:
        raise LayersenseError(
            f"a loss over {count} images reads a tensor of shape {tuple(value.shape)}, so that the "
            "part of one image is unknown; score with `batch_size: 1`"
        )
    return value[index : index + 1].float()


def _last_is(value: Tensor, logits: Tensor) -> bool:
    last = value[-1]
    return last.shape == logits.shape and torch.equal(last, logits)


# --- torchvision ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Dense:
    """A kind of detector in torchvision whose heads see every position.

    Their losses need no train mode: they are functions of the heads' outputs and the anchors.
    """

    loss: Callable[[Any, dict[str, Tensor], dict[str, Tensor], list[Tensor], list[int]], Any]
    """Of the model, one target, one image's head outputs, its anchors, anchors of each level."""

    def __call__(self, model: Any, pixels: Tensor) -> Detected:
        """Run backbone and heads."""
        from torchvision.models.detection.image_list import ImageList

        features = model.backbone(pixels)
        levels = [features] if isinstance(features, Tensor) else list(features.values())
        heads = model.head(levels)
        sizes = [(pixels.shape[-2], pixels.shape[-1])] * len(pixels)
        anchors = model.anchor_generator(ImageList(pixels, sizes), levels)
        per_level = [level.shape[-2] * level.shape[-1] for level in levels]

        def one(index: int, target: dict[str, Tensor]) -> Tensor:
            outputs = {key: value[index : index + 1].float() for key, value in heads.items()}
            losses = self.loss(model, target, outputs, [anchors[index].float()], per_level)
            return torch.stack([loss.float() for loss in losses.values()]).sum()

        return Detected(
            loss=one,
            logits=_scored(heads),
            boxes=partial(_decoded, model, heads["bbox_regression"], anchors, sizes[0]),
            raw=(heads, anchors, per_level),
            nothing=0 if type(model).__name__ == "SSD" else None,
        )


def _scored(heads: Mapping[str, Tensor]) -> Tensor:
    """Return the logits by which a model ranks what it finds.

    FCOS ranks by the root of two probabilities, of the class and of being in its middle.
    """
    logits = heads["cls_logits"]
    if "bbox_ctrness" not in heads:
        return logits
    sure = (logsigmoid(logits.float()) + logsigmoid(heads["bbox_ctrness"].float())) / 2
    return sure - torch.log1p(-sure.exp().clamp(max=1 - 2**-24))


def _decoded(
    model: Any, regression: Tensor, anchors: Sequence[Tensor], size: tuple[int, int]
) -> Tensor:
    """Return what the heads say of each anchor as boxes, in shares of the image."""
    coder = model.box_coder
    # All images are of one size, and so are their anchors. The coder of FCOS goes by distances.
    decode = getattr(coder, "decode_single", coder.decode)
    there = anchors[0].expand(regression.shape[0], -1, -1)
    boxes: Tensor = decode(regression.float().flatten(0, 1), there.flatten(0, 1))
    scale = torch.tensor([size[1], size[0]] * 2, device=regression.device)
    return boxes.reshape(regression.shape) / scale


def _found_by_torchvision(
    model: Any, output: Detected, size: tuple[int, int]
) -> list[dict[str, Tensor]]:
    """Sort out as a model of torchvision does after its heads; what a file found, all at once."""
    if isinstance(output.raw, SimpleNamespace):
        nothing = 0 if type(model).__name__ == "SSD" else None
        return sort_out(output, size, model.score_thresh, model.nms_thresh, nothing)
    heads, anchors, per_level = output.raw
    if type(model).__name__ != "SSD":  # the others sort level by level
        each = heads["cls_logits"].shape[1] // sum(per_level)
        counts = [count * each for count in per_level]
        heads = {name: list(value.split(counts, dim=1)) for name, value in heads.items()}
        anchors = [list(boxes.split(counts)) for boxes in anchors]
    found: list[dict[str, Tensor]] = model.postprocess_detections(
        heads, anchors, [size] * len(output.logits)
    )
    return found


def _retinanet_loss(
    model: Any, target: Any, outputs: Any, anchors: list[Tensor], per_level: list[int]
) -> Any:
    return model.compute_loss([target], outputs, anchors)


def _fcos_loss(
    model: Any, target: Any, outputs: Any, anchors: list[Tensor], per_level: list[int]
) -> Any:
    each = model.anchor_generator.num_anchors_per_location()[0]
    return model.compute_loss([target], outputs, anchors, [count * each for count in per_level])


def _ssd_loss(
    model: Any, target: Any, outputs: Any, anchors: list[Tensor], per_level: list[int]
) -> Any:
    from torchvision.ops import box_iou

    if len(target["boxes"]):
        matched = model.proposal_matcher(box_iou(target["boxes"], anchors[0]))
    else:
        matched = torch.full((len(anchors[0]),), -1, device=anchors[0].device)
    return model.compute_loss([target], outputs, anchors, [matched])


_DENSE = {
    "RetinaNet": _Dense(_retinanet_loss),
    "FCOS": _Dense(_fcos_loss),
    "SSD": _Dense(_ssd_loss),
}
_KINDS: dict[str, Callable[[Any, Tensor], Detected]] = {**_DENSE, "DetectionModel": yolo.forward}
"""Class → what runs a model that is none of transformers."""


def _dense(model: nn.Module) -> None:
    """Refuse a detector of torchvision whose loss cannot be had in eval mode.

    Raises:
        LayersenseError: it is one.
    """
    if type(model).__name__ not in _DENSE:
        raise LayersenseError(
            f"{type(model).__name__} of torchvision samples its proposals at random and "
            f"normalises its loss over them; take one of {', '.join(_DENSE)}"
        )
