"""What the tasks on photographs share: loading, names of classes, sizes, padding."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from layersense.calibration.images import open_image
from layersense.errors import LayersenseError
from layersense.models.checkpoints import Checkpoint, read_config
from layersense.models.loading import load_model
from layersense.models.tasks.batches import CACHE_BYTES, LazyBatches
from layersense.models.tasks.protocol import Batch

if TYPE_CHECKING:
    from PIL import Image

    from layersense.calibration.database import Row

_OTHER_NAMES = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "tvmonitor": "tv",
    "tv monitor": "tv",
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "ski": "skis",
}
"""Names of Pascal VOC and of DETR's relatives for classes of COCO."""


def load_image_model(
    auto_class: str, checkpoint: Checkpoint, *, dtype: str, device: torch.device | str
) -> tuple[nn.Module, tuple[str, ...], dict[str, Any] | None]:
    """Return a model in eval mode on ``device``, warnings about its weights, and its config.

    Args:
        auto_class: name of transformers' auto class of the task.
        checkpoint: what to load; nothing is downloaded.
        dtype: ``auto`` (the checkpoint's), ``bfloat16``, ``float16`` or ``float32``.
        device: where the weights go.

    Returns:
        As the config, None for a model of transformers, which holds its own.

    Raises:
        LayersenseError: its library cannot load it, weights are missing or not finite.
    """
    config = read_config(Path(checkpoint.path))
    library = config.get("library_name")
    if library == "torchvision":
        from layersense.models.torchvision_models import load_torchvision

        model, warnings = load_torchvision(checkpoint, config, dtype=dtype, device=device)
        return model, warnings, config
    if library == "ultralytics":
        from layersense.models.yolo import load_yolo

        model, warnings = load_yolo(checkpoint, config, dtype=dtype, device=device)
        return model, warnings, config
    import transformers

    model, warnings = load_model(
        getattr(transformers, auto_class), checkpoint, dtype=dtype, device=device
    )
    return model, warnings, None


def classes_by_name(names: Iterable[tuple[int, str]]) -> dict[str, int]:
    """Return name → number of a model's classes.

    Names are compared in lower case; one such as ``tench, Tinca tinca`` stands for each of its
    parts, and those of Pascal VOC for COCO's. Of two classes with one name the first counts.
    """
    found: dict[str, int] = {}
    for number, name in names:
        for part in (name, *name.split(",")):
            found.setdefault(_plain(part), number)
    return found


def find_class(classes: Mapping[str, int], name: str) -> int | None:
    """Return the number of the class called ``name``, or None if a model has none."""
    return classes.get(_plain(name))


def no_class(
    model: str, shown: Iterable[str], classes: Mapping[str, int], what: str
) -> LayersenseError:
    """Return the error of photographs that show nothing of which a model has a class.

    Args:
        model: the checkpoint's id.
        shown: what the photographs show.
        classes: the model's, see :func:`classes_by_name`.
        what: what shows it, ``boxes`` or ``masks``.
    """
    if all(re.fullmatch(r"(label )?\d+", name) for name in classes):
        # A fresh network, such as one from a description alone.
        advice = "its classes have no names: write the checkpoint with them"
    else:
        advice = f"take data with {what} of its classes"
    found = ", ".join(sorted(shown)[:4]) or f"no {what}"
    return LayersenseError(
        f"{model}: the photographs show {found}, none of the model's classes "
        f"({', '.join(list(classes)[:4])}, …); {advice}"
    )


def _plain(name: str) -> str:
    word = " ".join(name.replace("_", " ").lower().split())
    return _OTHER_NAMES.get(word, word)


def photograph(row: Row) -> Image.Image:
    """Return a row's photograph.

    Raises:
        LayersenseError: it has none, or the file is no image any more.
    """
    if row.image_path is None:
        raise LayersenseError(
            "the dataset of the run holds texts alone; name a dataset with images"
        )
    return open_image(row.image_path)


def to_tensor(image: Image.Image) -> Tensor:
    """Return an image's channels as float32 in 0 to 1, shape (3, H, W)."""
    from torchvision.transforms.functional import pil_to_tensor

    channels: Tensor = pil_to_tensor(image)
    return channels.float() / 255


def stack_images(images: Sequence[Tensor], canvas: tuple[int, int], value: float = 0) -> Tensor:
    """Stack tensors of shape (…, H, W) after padding each to ``canvas`` at its right and bottom."""
    height, width = canvas
    return torch.stack(
        [
            functional.pad(
                image, (0, width - image.shape[-1], 0, height - image.shape[-2]), value=value
            )
            for image in images
        ]
    )


class Prepared(Protocol):
    """One photograph, as a model wants it."""

    @property
    def image(self) -> Tensor:
        """Shape (3, H, W)."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""


PreparedT = TypeVar("PreparedT", bound=Prepared)


def padded_batches(
    rows: Sequence[Row],
    batch_size: int,
    *,
    prepare: Callable[[Row], PreparedT],
    collate: Callable[[Sequence[PreparedT], tuple[int, int]], Batch],
    step: int = 1,
) -> Sequence[Batch]:
    """Return batches whose images are all padded to one canvas, the largest of all rows.

    A detector's features and anchors reach into the padding: with a canvas for each batch, scores
    would depend on the batch size.

    Args:
        rows: rows of the calibration database.
        batch_size: samples of a batch.
        prepare: makes a sample of a row.
        collate: makes a batch of samples and the canvas, (height, width).
        step: what height and width of the canvas are multiples of.
    """
    canvas = (0, 0)

    def see(index: int) -> PreparedT:
        nonlocal canvas
        sample = prepare(rows[index])
        height, width = (-(-edge // step) * step for edge in sample.image.shape[-2:])
        canvas = (max(canvas[0], height), max(canvas[1], width))
        return sample

    return LazyBatches(
        len(rows),
        batch_size,
        prepare=see,
        size=lambda sample: sample.nbytes,
        collate=lambda samples: collate(samples, canvas),
        cache_bytes=CACHE_BYTES,
    )


def yes_or_no(logits: Tensor) -> Tensor:
    """Return logits of "yes" as those of "yes" and "no": the sigmoid of one is the softmax of two.

    Args:
        logits: any shape.

    Returns:
        Shape (…, 2).
    """
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


def labels_of(config: Any) -> dict[str, int]:
    """Return name → number of the classes in a transformers config."""
    return classes_by_name(sorted((int(number), name) for number, name in config.id2label.items()))


class Resizer:
    """Prepares images and masks for a model of torchvision, as a processor of transformers does.

    Args:
        size: edge in pixels of the square that images are resized to.
        mean: what is subtracted from each channel in 0 to 1.
        std: what it is divided by.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.size = size
        self._mean, self._std = (torch.tensor(list(part)).view(3, 1, 1) for part in (mean, std))

    @classmethod
    def of(cls, config: Mapping[str, Any], size: int) -> Resizer:
        """Return that of a checkpoint's config; ``size`` where it names none."""
        image = config.get("image") or {}
        return cls(
            image.get("size") or size,
            image.get("mean") or (0.485, 0.456, 0.406),
            image.get("std") or (0.229, 0.224, 0.225),
        )

    def __call__(
        self, images: Image.Image, segmentation_maps: Any = None, **_: Any
    ) -> dict[str, Any]:
        """Return ``pixel_values``, shape (1, 3, size, size), and ``labels`` of a mask."""
        from torchvision.transforms.functional import resize

        edges = [self.size, self.size]
        pixels = (resize(to_tensor(images), edges, antialias=True) - self._mean) / self._std
        prepared: dict[str, Any] = {"pixel_values": pixels[None]}
        if segmentation_maps is not None:
            mask = torch.as_tensor(segmentation_maps)[None, None].float()
            prepared["labels"] = [functional.interpolate(mask, edges, mode="nearest")[0, 0].long()]
        return prepared
