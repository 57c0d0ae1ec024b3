"""Masks of objects: COCO's polygons and run lengths, as pixels."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from layersense.errors import LayersenseError


def decode_mask(segmentation: str, height: int, width: int, where: str) -> npt.NDArray[np.bool_]:
    """Return the pixels that an object covers, shape (height, width).

    Args:
        segmentation: JSON, as COCO has it: a list of polygons ``[x, y, x, y, …]`` in pixels, or
            run lengths ``{size: [height, width], counts: …}`` along the columns, plain or
            compressed.
        height: of the image, in pixels.
        width: of the image, in pixels.
        where: the image, for messages.

    Raises:
        LayersenseError: it is neither, or of another size.
    """
    from pycocotools import mask as coco

    try:
        content: Any = json.loads(segmentation)
        if isinstance(content, list):
            polygons = [polygon for polygon in content if len(polygon) >= 6]
            if not polygons:
                return np.zeros((height, width), dtype=bool)
            runs = coco.merge(coco.frPyObjects(polygons, height, width))
        else:
            if list(content["size"]) != [height, width]:
                raise ValueError(f"it is for {content['size'][1]}×{content['size'][0]} pixels")
            plain = isinstance(content["counts"], list)
            runs = coco.frPyObjects(content, height, width) if plain else content
        decoded = coco.decode(runs)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise LayersenseError(
            f"{where}: a mask cannot be read ({error}); repair the instances file"
        ) from error
    return np.asarray(decoded, dtype=bool)
