"""Read COCO's own JSON: captions, and instances where there are any."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from layersense.calibration.records import (
    Box,
    Caption,
    Category,
    Image,
    Records,
    check_file_name,
    clean_text,
    decode,
    read_bytes,
)
from layersense.errors import LayersenseError
from layersense.files import BROKEN_JSON

Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""An id that SQLite can hold."""


class _Image(msgspec.Struct, gc=False):
    id: Id
    file_name: str
    width: int | None = None
    height: int | None = None
    coco_url: str | None = None


class _Caption(msgspec.Struct, gc=False):
    id: Id
    image_id: Id
    caption: str


class _Captions(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Caption]


class _Instance(msgspec.Struct, gc=False):
    id: Id
    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int = 0
    segmentation: msgspec.Raw = msgspec.Raw()


class _Instances(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Instance]
    categories: list[Category]


class _RunLengths(msgspec.Struct):
    size: tuple[int, int]
    counts: list[int] | str


_POLYGONS = msgspec.json.Decoder(list[list[float]])
_RUN_LENGTHS = msgspec.json.Decoder(_RunLengths)


def read_coco(
    captions: Path | None, instances: Path | None, images_root: Path, prefix: str = ""
) -> Records:
    """Read one split of COCO.

    The images are those that either file lists. Captions with no text are left out and counted,
    as are captions that repeat another of the same image: COCO has a few of both.

    Args:
        captions: COCO captions JSON, if any.
        instances: COCO instances JSON, if any; at least one of the two.
        images_root: folder of the images.
        prefix: put before every file name, such as ``train2017/``.

    Raises:
        LayersenseError: a file is missing or of another shape, an id occurs twice, an annotation
            refers to an image or category that is not listed, a file name leaves the folder.
    """
    listing = captions or instances
    assert listing is not None
    records = Records(listing=listing, images_root=images_root)
    images: dict[int, Image] = {}
    if captions is not None:
        found = decode(
            read_bytes(captions, "captions file"), _Captions, str(captions), "a COCO captions file"
        )
        _add_images(images, found.images, captions, prefix)
        _add_captions(records, found.annotations, images, captions)
    if instances is not None:
        boxes = decode(
            read_bytes(instances, "instances file"),
            _Instances,
            str(instances),
            "a COCO instances file",
        )
        _add_images(images, boxes.images, instances, prefix)
        _check_unique([c.id for c in boxes.categories], "category", instances)
        _add_boxes(records, boxes, images, instances)
    records.images = [images[key] for key in sorted(images)]
    return records


def merge(parts: Iterable[Records], listing: Path, images_root: Path) -> Records:
    """Return several splits as one; their ids must not collide.

    Raises:
        LayersenseError: two splits use one id for different things.
    """
    whole = Records(listing=listing, images_root=images_root)
    categories: dict[int, Category] = {}
    for part in parts:
        whole.images += part.images
        whole.captions += part.captions
        whole.boxes += part.boxes
        categories |= {category.id: category for category in part.categories}
        whole.empty_captions += part.empty_captions
        whole.repeated_captions += part.repeated_captions
    whole.categories = list(categories.values())
    for what, rows in (
        ("image", whole.images),
        ("caption", whole.captions),
        ("box", whole.boxes),
    ):
        rows.sort(key=lambda row: row.id)
        _check_unique([row.id for row in rows], what, listing)
    return whole


def _add_images(images: dict[int, Image], found: list[_Image], file: Path, prefix: str) -> None:
    _check_unique([image.id for image in found], "image", file)
    for image in found:
        name = prefix + check_file_name(image.file_name, f"{file}: image {image.id}")
        known = images.get(image.id)
        if known is None:
            images[image.id] = Image(
                image.id, image.id, name, image.width, image.height, image.coco_url
            )
        elif known.file_name != name:
            raise LayersenseError(
                f"{file}: image {image.id} is {name!r}, but the captions file calls it "
                f"{known.file_name!r}; use captions and instances of the same split"
            )
    _check_names(images, file)


def _add_captions(
    records: Records, found: list[_Caption], images: dict[int, Image], file: Path
) -> None:
    found.sort(key=lambda caption: (caption.image_id, caption.id))
    _check_unique([caption.id for caption in found], "caption", file)
    texts: set[str] = set()
    image_id: int | None = None
    for row in found:
        if row.image_id != image_id:
            image_id, texts = row.image_id, set()
            if image_id not in images:
                raise LayersenseError(
                    f"{file}: caption {row.id} belongs to image {image_id}, which `images` does "
                    "not list; add the image or remove the caption"
                )
        text = clean_text(row.caption)
        if not text:
            records.empty_captions += 1
        elif text in texts:
            records.repeated_captions += 1
        else:
            texts.add(text)
            records.captions.append(Caption(row.id, row.id, image_id, text))
    records.captions.sort(key=lambda caption: caption.id)


def _add_boxes(records: Records, found: _Instances, images: dict[int, Image], file: Path) -> None:
    found.annotations.sort(key=lambda instance: instance.id)
    _check_unique([instance.id for instance in found.annotations], "instance", file)
    categories = {category.id for category in found.categories}
    for row in found.annotations:
        where = f"{file}: instance {row.id}"
        if row.image_id not in images:
            raise LayersenseError(
                f"{where} belongs to image {row.image_id}, which `images` does not list; add the "
                "image or remove the instance"
            )
        if row.category_id not in categories:
            raise LayersenseError(
                f"{where} has category {row.category_id}, which `categories` does not list; add "
                "the category or remove the instance"
            )
        if row.bbox[2] < 0 or row.bbox[3] < 0:
            raise LayersenseError(
                f"{where} has the box {list(row.bbox)}, but [x, y, width, height] with no negative "
                "width or height was expected"
            )
        mask = _check_mask(row.segmentation, where)
        records.boxes.append(
            Box(
                row.id,
                row.image_id,
                row.category_id,
                row.bbox,
                row.area,
                int(bool(row.iscrowd)),
                mask,
            )
        )
    records.categories = sorted(found.categories, key=lambda category: category.id)


def _check_mask(mask: msgspec.Raw, where: str) -> msgspec.Raw | None:
    """Return the mask, None if there is none."""
    start = bytes(memoryview(mask)[:1])
    if start in (b"", b"n"):
        return None
    decoder: msgspec.json.Decoder[Any] = _RUN_LENGTHS if start == b"{" else _POLYGONS
    try:
        decoded = decoder.decode(mask)
    except BROKEN_JSON as error:
        raise LayersenseError(
            f"{where} has a segmentation that is neither polygons nor run lengths ({error})"
        ) from error
    return mask if decoded else None


def _check_unique(ids: list[int], what: str, file: Path) -> None:
    if len(set(ids)) == len(ids):
        return
    seen: set[int] = set()
    for key in ids:
        if key in seen:
            raise LayersenseError(
                f"{file}: {what} id {key} occurs twice; give each {what} an id of its own"
            )
        seen.add(key)


def _check_names(images: dict[int, Image], file: Path) -> None:
    """Refuse a photograph listed under two ids: it could stand in both splits."""
    names: dict[str, int] = {}
    for key in sorted(images):
        name = images[key].file_name
        other = names.setdefault(name, key)
        if other != key:
            raise LayersenseError(
                f"{file}: images {other} and {key} have one file name, {name!r}; list each image "
                "once"
            )
