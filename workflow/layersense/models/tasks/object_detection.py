"""Detectors: a photograph in, the boxes of its objects out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layersense.errors import LayersenseError
from layersense.models.checkpoints import Checkpoint
from layersense.models.loading import (
    first_line,
    load_image_processor,
    load_model,
    start_gradients,
)
from layersense.models.tasks.images import (
    CACHE_BYTES,
    Canvas,
    classes_by_name,
    find_class,
    labels_of,
    photograph,
    stack_images,
    to_tensor,
)
from layersense.models.tasks.protocol import (
    Batch,
    Loaded,
    Sampling,
    check_modality,
    no_distribution,
)
from layersense.models.tasks.tokens import LazyBatches
from layersense.models.torchvision_models import load_torchvision, read_config

if TYPE_CHECKING:
    from layersense.calibration.database import Object, Row
    from layersense.calibration.sampling import Unit
    from layersense.quantization.layers import LayerName


@dataclass(frozen=True)
class Sample:
    """One photograph, as the model wants it."""

    image: Tensor
    """Shape (3, H, W)."""
    target: dict[str, Tensor]
    """Transformers: ``boxes`` as shares of the image, center, width and height, and
    ``class_labels``. torchvision: ``boxes`` in pixels by their corners, and ``labels``."""


@dataclass(frozen=True)
class Detector:
    """How photographs and boxes come into a model: a processor, or torchvision's own transform."""

    classes: dict[str, int]
    """Name → number of its classes."""
    processor: Any = None
    transform: Any = None


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
        config = read_config(checkpoint)
        if config is not None:
            model, warnings = load_torchvision(checkpoint, config, dtype=dtype, device=device)
            _dense(model)
            classes = classes_by_name(enumerate(config["categories"]))
            detector = Detector(classes, transform=model.transform)
            return Loaded(model, detector, checkpoint.id, warnings)
        from transformers import AutoModelForObjectDetection

        model, warnings = load_model(
            AutoModelForObjectDetection, checkpoint, dtype=dtype, device=device
        )
        own: Any = model
        own.loss_function = _Postponed(own.loss_function)
        start_gradients(model)
        detector = Detector(labels_of(own.config), processor=load_image_processor(checkpoint))
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
        if not any(_objects(row, detector.classes) for row in rows):
            shown = sorted({shown.category for row in rows for shown in row.objects})
            known = ", ".join(list(detector.classes)[:4])
            raise LayersenseError(
                f"{loaded.name}: the photographs show {', '.join(shown[:4]) or 'no boxes'}, none "
                f"of the model's classes ({known}, …); take data with boxes of its classes"
            )
        canvas = Canvas()

        def prepare(index: int) -> Sample:
            sample = _prepare(detector, rows[index])
            canvas.add(sample.image)
            return sample

        return LazyBatches(
            len(rows),
            batch_size,
            prepare=prepare,
            size=lambda sample: sample.image.nbytes,
            collate=lambda samples: _collate(detector, samples, canvas.size),
            cache_bytes=CACHE_BYTES,
        )

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on the batch; what its loss reads is kept in the result."""
        if dense := _KINDS.get(type(model).__name__):
            return dense.forward(model, batch)
        return model(**batch.inputs, labels=list(batch.targets)).loss

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the model's own loss of each photograph, summed, a float32 scalar."""
        losses = [output(index, target) for index, target in enumerate(batch.targets)]
        return torch.stack(losses).sum()

    def supervised_logits(self, output: Any, batch: Batch) -> Tensor:
        """Refuse: boxes and classes are no one distribution.

        Raises:
            LayersenseError: always.
        """
        raise no_distribution(self)

    def describe(self, module_names: Sequence[str]) -> LayerName:
        """Return subsystem, block and kind of a layer group."""
        from layersense.quantization.layers import describe_image_layer

        return describe_image_layer(module_names)


def _objects(row: Row, classes: dict[str, int]) -> list[tuple[int, Object]]:
    """Return what the model can find: no crowds, no boxes without area, only its classes."""
    found = []
    for shown in row.objects:
        number = find_class(classes, shown.category)
        _, _, width, height = shown.bbox
        if number is not None and not shown.is_crowd and width > 0 and height > 0:
            found.append((number, shown))
    return found


def _prepare(detector: Detector, row: Row) -> Sample:
    image = photograph(row)
    objects = _objects(row, detector.classes)
    if detector.transform is not None:
        corners = [(x, y, x + w, y + h) for _, shown in objects for x, y, w, h in (shown.bbox,)]
        target = {
            "boxes": torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([number for number, _ in objects], dtype=torch.int64),
        }
        images, targets = detector.transform([to_tensor(image)], [target])
        return Sample(images.tensors[0], {key: targets[0][key] for key in target})
    annotations = [
        {
            "bbox": list(shown.bbox),
            "category_id": number,
            "area": shown.bbox[2] * shown.bbox[3],
            "iscrowd": 0,
        }
        for number, shown in objects
    ]
    try:
        prepared = detector.processor(
            images=image,
            annotations={"image_id": 0, "annotations": annotations},
            return_tensors="pt",
        )
    except (TypeError, ValueError) as error:
        raise LayersenseError(
            f"image {row.image_path}: {type(detector.processor).__name__} cannot prepare it "
            f"({first_line(error)}); remove it from the data"
        ) from error
    labels = prepared["labels"][0]
    return Sample(
        prepared["pixel_values"][0],
        {
            "class_labels": labels["class_labels"].to(torch.int64),
            "boxes": labels["boxes"].to(torch.float32),
        },
    )


def _collate(detector: Detector, samples: Sequence[Sample], canvas: tuple[int, int]) -> Batch:
    images = stack_images([sample.image for sample in samples], canvas)
    pixels = sum(sample.image.shape[-2] * sample.image.shape[-1] for sample in samples)
    inputs = {"pixel_values": images}
    targets = [sample.target for sample in samples]
    if detector.transform is None:
        targets = [_scaled(sample, canvas) for sample in samples]
        if "pixel_mask" in detector.processor.model_input_names:
            inputs["pixel_mask"] = stack_images(
                [torch.ones(sample.image.shape[-2:], dtype=torch.int64) for sample in samples],
                canvas,
            )
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
    return {**sample.target, "boxes": sample.target["boxes"] * torch.tensor([width, height] * 2)}


# --- transformers --------------------------------------------------------------------------------


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

    def forward(self, model: Any, batch: Batch) -> Any:
        """Run backbone and heads; return the loss of one photograph as a function."""
        from torchvision.models.detection.image_list import ImageList

        pixels = batch.inputs["pixel_values"]
        features = model.backbone(pixels)
        levels = [features] if isinstance(features, Tensor) else list(features.values())
        heads = model.head(levels)
        sizes = [tuple(pixels.shape[-2:])] * len(pixels)
        anchors = model.anchor_generator(ImageList(pixels, sizes), levels)
        per_level = [level.shape[-2] * level.shape[-1] for level in levels]

        def one(index: int, target: dict[str, Tensor]) -> Tensor:
            outputs = {key: value[index : index + 1].float() for key, value in heads.items()}
            losses = self.loss(model, target, outputs, [anchors[index].float()], per_level)
            return torch.stack([loss.float() for loss in losses.values()]).sum()

        return one


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


_KINDS = {
    "RetinaNet": _Dense(_retinanet_loss),
    "FCOS": _Dense(_fcos_loss),
    "SSD": _Dense(_ssd_loss),
}


def _dense(model: nn.Module) -> None:
    """Refuse a detector of torchvision whose loss cannot be had in eval mode.

    Raises:
        LayersenseError: it is one.
    """
    if type(model).__name__ not in _KINDS:
        raise LayersenseError(
            f"{type(model).__name__} of torchvision samples its proposals at random and "
            f"normalises its loss over them; take one of {', '.join(_KINDS)}"
        )
