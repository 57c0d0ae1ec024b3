"""Masks of objects: COCO's polygons and run lengths, as pixels."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from layersense.errors import LayersenseError

MAX_BEYOND = 16
"""How many times the image's longer side a polygon may reach; an annotator's slip is far less."""


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
    try:
        content: Any = json.loads(segmentation)
        if isinstance(content, list):
            return _fill_polygons(content, height, width)
        if list(content["size"]) != [height, width]:
            raise ValueError(f"it is for {content['size'][1]}×{content['size'][0]} pixels")
        counts = content["counts"]
        runs = counts if isinstance(counts, list) else _unpack(counts)
        return _fill_runs(runs, height, width)
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise LayersenseError(
            f"{where}: a mask cannot be read ({error}); repair the instances file"
        ) from error


def _fill_polygons(polygons: list[Any], height: int, width: int) -> npt.NDArray[np.bool_]:
    from pycocotools import mask as coco

    if not all(isinstance(polygon, list) for polygon in polygons):
        raise ValueError("it is a list of something else than polygons")
    whole = [[float(x) for x in polygon] for polygon in polygons if len(polygon) >= 6]
    for polygon in whole:
        # It is drawn by C code, which trusts its input: it walks along every edge.
        if len(polygon) % 2 or not np.isfinite(polygon).all():
            raise ValueError("a polygon is not pairs of numbers")
        if np.abs(polygon).max() > MAX_BEYOND * max(height, width):
            raise ValueError("a polygon leaves the image by far")
    if not whole:
        return np.zeros((height, width), dtype=bool)
    runs = coco.merge(coco.frPyObjects(whole, height, width))
    return np.asarray(coco.decode(runs), dtype=bool)


def _fill_runs(runs: list[Any], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Return the mask of alternating runs of nothing and something, down the columns.

    pycocotools writes past its memory where runs are negative or do not fit.
    """
    if not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(f"its runs are not counts that make {width}×{height} pixels")
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def _unpack(text: str) -> list[int]:
    """Return the runs that COCO packed into a string.

    Each character holds five bits, lowest first, and a sixth that says whether more follow; the
    last one's highest bit is the sign. From the fourth on, a run is stored as the difference to
    the one before the last (``rleToString`` of COCO's API).
    """
    runs: list[int] = []
    value = bits = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise ValueError(f"its packed runs hold {character!r}")
        value |= (code & 0x1F) << bits
        bits += 5
        if code & 0x20:
            continue
        if code & 0x10:
            value -= 1 << bits
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = bits = 0
    if bits:
        raise ValueError("its packed runs are cut short")
    return runs
