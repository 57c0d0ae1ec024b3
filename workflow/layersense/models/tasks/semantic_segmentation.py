"""Segmenters: a photograph in, a class for each of its pixels out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from layersense.calibration.masks import decode_mask
from layersense.errors import LayersenseError
from layersense.models.checkpoints import Checkpoint
from layersense.models.loading import first_line, load_image_processor
from layersense.models.tasks.images import (
    Resizer,
    classes_by_name,
    find_class,
    labels_of,
    load_image_model,
    no_class,
    padded_batches,
    photograph,
    stack_images,
)
from layersense.models.tasks.metrics import MeanIoU
from layersense.models.tasks.protocol import (
    IGNORED,
    Batch,
    Loaded,
    Metric,
    Sampling,
    check_modality,
)

if TYPE_CHECKING:
    from PIL import Image

    from layersense.calibration.database import Row
    from layersense.calibration.sampling import Unit
    from layersense.quantization.layers import LayerName

_NOTHING = 255
"""Stands for ``IGNORED`` while a mask is resized, as images of classes have no negative numbers."""
_BACKGROUND = ("background", "__background__")
AUXILIARY_WEIGHT = 0.5
"""Weight of the auxiliary head's loss in torchvision's reference training."""


@dataclass(frozen=True)
class Segmenter:
    """How photographs and masks come into a model."""

    classes: dict[str, int]
    """Name → number of its classes."""
    processor: Any

    @property
    def background(self) -> int | None:
        """Number of the class of all that is nothing else; None if the model has none."""
        return next((self.classes[name] for name in _BACKGROUND if name in self.classes), None)


@dataclass(frozen=True)
class Sample:
    """One photograph, as the model wants it."""

    image: Tensor
    """Shape (3, H, W)."""
    labels: Tensor
    """Class of each pixel, or ``IGNORED``, shape (H, W)."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.image.nbytes + self.labels.nbytes


class SemanticSegmentation:
    """Masks of COCO's polygons and run lengths, and cross entropy over the pixels.

    The loss of a photograph is the mean over its supervised pixels; a batch's loss is the sum of
    these. Crowds are not supervised; what belongs to no class of the model is background, and not
    supervised where the model has no such class.
    """

    name = "semantic-segmentation"
    modalities = frozenset({"image_masks"})

    def unit(self, modality: str) -> Unit:
        """Return the calibration database's unit: a photograph is a sample."""
        check_modality(self, modality)
        return "image"

    def load(self, checkpoint: Checkpoint, *, dtype: str, device: torch.device | str) -> Loaded:
        """Load model and processor; see :class:`~layersense.models.tasks.protocol.Task`."""
        model, warnings, config = load_image_model(
            "AutoModelForSemanticSegmentation", checkpoint, dtype=dtype, device=device
        )
        if config is not None:
            classes = classes_by_name(enumerate(config["categories"]))
            segmenter = Segmenter(classes, Resizer.of(config, 520))
        else:
            segmenter = Segmenter(labels_of(model.config), load_image_processor(checkpoint))
        if max(segmenter.classes.values()) >= _NOTHING:
            raise LayersenseError(
                f"{checkpoint.path}: has more than {_NOTHING} classes, which images of classes "
                "cannot hold; write a task of your own (docs/tasks.md)"
            )
        return Loaded(model, segmenter, checkpoint.id, warnings)

    def batches(
        self, loaded: Loaded, rows: Sequence[Row], sampling: Sampling, batch_size: int
    ) -> Sequence[Batch]:
        """Return the batches, every image padded to the largest of all rows.

        Raises:
            LayersenseError: an image or a mask cannot be used, or no photograph shows a class of
                the model.
        """
        check_modality(self, sampling.modality)
        segmenter: Segmenter = loaded.processor
        shown = {shown.category for row in rows for shown in row.objects if shown.segmentation}
        if not any(find_class(segmenter.classes, name) is not None for name in shown):
            raise no_class(loaded.name, shown, segmenter.classes, "masks")
        return padded_batches(
            rows, batch_size, prepare=partial(_prepare, segmenter), collate=_collate
        )

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model; return main and, if there are, auxiliary logits, shape (B, C, h, w)."""
        pixels = batch.inputs["pixel_values"]
        if hasattr(model, "config"):
            output = model(pixel_values=pixels)
            auxiliary = getattr(output, "auxiliary_logits", None)
            return [output.logits] if auxiliary is None else [output.logits, auxiliary]
        output = model(pixels)
        return [output[key] for key in ("out", "aux") if key in output]

    def outputs_of(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model without labels; return its main ``logits``."""
        pixels = inputs["pixel_values"]
        if hasattr(model, "config"):
            return {"logits": model(pixel_values=pixels).logits}
        return {"logits": model(pixels)["out"]}

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return each photograph's mean cross entropy over its supervised pixels, summed."""
        total = batch.labels.new_zeros((), dtype=torch.float32)
        for weight, logits in zip((1.0, AUXILIARY_WEIGHT), output, strict=False):
            each = functional.cross_entropy(
                _resized(logits, batch), batch.labels, ignore_index=IGNORED, reduction="none"
            )
            pixels = (batch.labels != IGNORED).sum(dim=(1, 2)).clamp(min=1)
            total = total + weight * (each.sum(dim=(1, 2)) / pixels).sum()
        return total

    def supervised_logits(self, output: Any, batch: Batch) -> Tensor:
        """Return the main logits of supervised pixels, shape (pixels, classes)."""
        logits = _resized(output[0], batch).movedim(1, -1)
        return logits[batch.labels != IGNORED]

    def output_of(self, outputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the logits of an exported file as ``forward`` does."""
        return [outputs["logits"]]

    def metrics(self, loaded: Loaded) -> Sequence[Metric]:
        """Return the mean intersection over union of the classes."""
        return [MeanIoU()]

    def describe(self, module_names: Sequence[str]) -> LayerName:
        """Return subsystem, block and kind of a layer group."""
        from layersense.quantization.layers import describe_image_layer

        return describe_image_layer(module_names)


def class_map(segmenter: Segmenter, row: Row, image: Image.Image) -> np.ndarray[Any, Any]:
    """Return the class of each pixel, or 255 where nothing is supervised, shape (H, W).

    Where objects overlap, the smaller one lies in front.
    """
    background = segmenter.background
    nothing = _NOTHING if background is None else background
    found = np.full((image.height, image.width), nothing, dtype=np.uint8)
    masks = [
        (
            decode_mask(shown.segmentation, image.height, image.width, f"image {row.image_path}"),
            shown,
        )
        for shown in row.objects
        if shown.segmentation is not None
    ]
    for mask, shown in sorted(masks, key=lambda pair: -int(pair[0].sum())):
        number = find_class(segmenter.classes, shown.category)
        if shown.is_crowd:
            found[mask] = _NOTHING
        elif number is not None:
            found[mask] = number
    return found


def _prepare(segmenter: Segmenter, row: Row) -> Sample:
    image = photograph(row)
    # Checkpoints trained on ADE20K count background out of their classes; ours are numbered
    # as the model's outputs are.
    own = {} if isinstance(segmenter.processor, Resizer) else {"do_reduce_labels": False}
    try:
        prepared = segmenter.processor(
            images=image,
            segmentation_maps=class_map(segmenter, row, image),
            return_tensors="pt",
            **own,
        )
        labels = torch.as_tensor(prepared["labels"][0]).long()
    except (KeyError, TypeError, ValueError) as error:
        raise LayersenseError(
            f"image {row.image_path}: {type(segmenter.processor).__name__} cannot prepare it with "
            f"its mask ({first_line(error)}); remove it from the data"
        ) from error
    return Sample(
        torch.as_tensor(prepared["pixel_values"][0]),
        torch.where(labels == _NOTHING, IGNORED, labels),
    )


def _collate(samples: Sequence[Sample], canvas: tuple[int, int]) -> Batch:
    labels = stack_images([sample.labels for sample in samples], canvas, IGNORED)
    return Batch(
        inputs={"pixel_values": stack_images([sample.image for sample in samples], canvas)},
        labels=labels,
        n_tokens=len(samples),
        n_samples=len(samples),
        n_padding=labels.numel() - sum(sample.labels.numel() for sample in samples),
        n_truncated=0,
    )


def _resized(logits: Tensor, batch: Batch) -> Tensor:
    """Return logits at the labels' resolution, as the models' own losses do, in float32."""
    size = batch.labels.shape[-2:]
    return functional.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
