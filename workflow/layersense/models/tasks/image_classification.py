"""Classifiers: a photograph in, its classes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layersense.errors import LayersenseError
from layersense.models.checkpoints import Checkpoint
from layersense.models.loading import load_image_processor
from layersense.models.tasks.batches import CACHE_BYTES, LazyBatches
from layersense.models.tasks.images import (
    Resizer,
    classes_by_name,
    find_class,
    labels_of,
    load_image_model,
    photograph,
    yes_or_no,
)
from layersense.models.tasks.metrics import TopChoice
from layersense.models.tasks.protocol import (
    Batch,
    Loaded,
    Metric,
    Sampling,
    check_modality,
)

if TYPE_CHECKING:
    from layersense.calibration.database import Row
    from layersense.calibration.sampling import Unit
    from layersense.quantization.layers import LayerName


@dataclass(frozen=True)
class Classifier:
    """How photographs and the names of their classes come into a model."""

    classes: dict[str, int]
    """Name → number of its classes."""
    count: int
    """Outputs of the model."""
    several: bool
    """Whether the model was trained to give a photograph several classes."""
    processor: Any


@dataclass(frozen=True)
class Sample:
    """One photograph, as the model wants it."""

    image: Tensor
    """Shape (3, H, W)."""
    classes: tuple[int, ...]


class ImageClassification:
    """The photograph's classes: categories of its boxes, or the texts of the user's own table.

    Where boxes name the classes, or a photograph has several, each class is a yes or no of its own
    (binary cross entropy, summed over classes); else a photograph has one class (cross entropy).
    """

    name = "image-classification"
    modalities = frozenset({"image_labels"})

    def unit(self, modality: str) -> Unit:
        """Return the calibration database's unit: a photograph is a sample."""
        check_modality(self, modality)
        return "image"

    def load(self, checkpoint: Checkpoint, *, dtype: str, device: torch.device | str) -> Loaded:
        """Load model and processor; see :class:`~layersense.models.tasks.protocol.Task`."""
        model, warnings, config = load_image_model(
            "AutoModelForImageClassification", checkpoint, dtype=dtype, device=device
        )
        if config is not None:
            names = config["categories"]
            classes, several = classes_by_name(enumerate(names)), False
            classifier = Classifier(classes, len(names), several, Resizer.of(config, 224))
        else:
            own: Any = model.config
            several = own.problem_type == "multi_label_classification"
            processor = load_image_processor(checkpoint)
            classifier = Classifier(labels_of(own), own.num_labels, several, processor)
        return Loaded(model, classifier, checkpoint.id, warnings)

    def batches(
        self, loaded: Loaded, rows: Sequence[Row], sampling: Sampling, batch_size: int
    ) -> Sequence[Batch]:
        """Return the batches.

        Raises:
            LayersenseError: an image cannot be used, images come in several sizes, or a class is
                none of the model's.
        """
        check_modality(self, sampling.modality)
        classifier: Classifier = loaded.processor
        boxed = any(row.objects for row in rows)
        names = [
            tuple(dict.fromkeys(shown.category for shown in row.objects)) if boxed else row.texts
            for row in rows
        ]
        numbers = _numbers(loaded, names, boxed)
        several = boxed or classifier.several or any(len(classes) != 1 for classes in numbers)

        def prepare(index: int) -> Sample:
            image = photograph(rows[index])
            pixels = classifier.processor(images=image, return_tensors="pt")["pixel_values"][0]
            return Sample(pixels, numbers[index])

        def collate(samples: Sequence[Sample]) -> Batch:
            if len({sample.image.shape for sample in samples}) > 1:
                raise LayersenseError(
                    f"{loaded.name}: its processor gives images of several sizes, which cannot "
                    "share a batch; set `batch_size` and `calibration_batch_size` to 1"
                )
            return _batch(samples, classifier.count if several else None)

        return LazyBatches(
            len(rows),
            batch_size,
            prepare=prepare,
            size=lambda sample: sample.image.nbytes,
            collate=collate,
            cache_bytes=CACHE_BYTES,
        )

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on the batch; return its logits, shape (B, classes)."""
        return self.outputs_of(model, batch.inputs)["logits"]

    def outputs_of(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model without labels; return its ``logits``."""
        pixels = inputs["pixel_values"]
        logits = model(pixel_values=pixels).logits if hasattr(model, "config") else model(pixels)
        return {"logits": logits}

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the (binary) cross entropy of each photograph, summed, in nats."""
        logits = output.float()
        if batch.labels.is_floating_point():
            return functional.binary_cross_entropy_with_logits(
                logits, batch.labels, reduction="sum"
            )
        return functional.cross_entropy(logits, batch.labels, reduction="sum")

    def supervised_logits(self, output: Any, batch: Batch) -> Tensor:
        """Return the logits, shape (B, classes).

        Returns:
            Shape (B, classes, 2) where each class is a yes or no of its own.
        """
        logits: Tensor = output.float()
        return yes_or_no(logits) if batch.labels.is_floating_point() else logits

    def output_of(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of an exported file as ``forward`` does."""
        return outputs["logits"]

    def metrics(self, loaded: Loaded) -> Sequence[Metric]:
        """Return the share of photographs whose first choice is their class."""
        return [TopChoice("top-1 accuracy")]

    def describe(self, module_names: Sequence[str]) -> LayerName:
        """Return subsystem, block and kind of a layer group."""
        from layersense.quantization.layers import describe_image_layer

        return describe_image_layer(module_names)


def _numbers(
    loaded: Loaded, names: Sequence[tuple[str, ...]], boxed: bool
) -> list[tuple[int, ...]]:
    """Return the numbers of each photograph's classes."""
    classifier: Classifier = loaded.processor
    numbers = {name: find_class(classifier.classes, name) for row in names for name in row}
    unknown = sorted(name for name, number in numbers.items() if number is None)
    if unknown or not numbers:
        known = ", ".join(list(classifier.classes)[:4])
        raise LayersenseError(
            f"{loaded.name}: the photographs show "
            f"{', '.join(unknown[:4]) or 'nothing that is named'}, which the model has no class "
            f"for (its classes: {known}, …); "
            + (
                "take a checkpoint with the data's categories, or give photographs of your own "
                "(`source: images`) with the model's classes as texts"
                if boxed
                else "write the model's own classes into the column `text` of the table"
            )
        )
    return [tuple(number for name in row if (number := numbers[name]) is not None) for row in names]


def _batch(samples: Sequence[Sample], count: int | None) -> Batch:
    """Return a batch; with ``count`` classes each photograph may have any of them."""
    images = torch.stack([sample.image for sample in samples])
    if count is None:
        labels = torch.tensor([sample.classes[0] for sample in samples])
    else:
        labels = torch.zeros(len(samples), count)
        for row, sample in zip(labels, samples, strict=True):
            row[list(sample.classes)] = 1
    return Batch(
        inputs={"pixel_values": images},
        labels=labels,
        n_tokens=len(samples),
        n_samples=len(samples),
        n_padding=0,
        n_truncated=0,
        positions=images[:, 0].numel(),
    )
