"""What the tasks on photographs share: names of classes, sizes, padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from layersense.calibration.images import open_image
from layersense.errors import LayersenseError

if TYPE_CHECKING:
    from PIL import Image

    from layersense.calibration.database import Row

CACHE_BYTES = 2**31
"""How much of the prepared samples stays in memory between passes over the data."""

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


class Canvas:
    """The smallest height and width that hold every image seen.

    All batches of a run are padded to one canvas, because a detector's features and anchors reach
    into the padding: with a canvas for each batch, scores would depend on the batch size.
    """

    def __init__(self) -> None:
        self.size = (0, 0)

    def add(self, image: Tensor) -> None:
        """See an image of shape (…, H, W)."""
        self.size = (max(self.size[0], image.shape[-2]), max(self.size[1], image.shape[-1]))


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
