"""What every source of calibration data is read into, and the hygiene of its texts and names."""

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

import msgspec

from layersense.calibration.archives import read_file
from layersense.errors import LayersenseError
from layersense.files import BROKEN_JSON

T = TypeVar("T")

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class Image(msgspec.Struct, gc=False):
    """A listed image."""

    id: int
    key: int | str
    """What identifies it whatever the order of the source: COCO's id, or its file name."""
    file_name: str
    width: int | None
    height: int | None
    url: str | None = None
    """Where it can be fetched, as COCO says it; only fetching reads it."""


class Caption(msgspec.Struct, gc=False):
    """A text, and the image it describes if there is one."""

    id: int
    key: int | str
    image_id: int | None
    text: str


class Box(msgspec.Struct, gc=False):
    """An object in an image; pixels, from the top left corner."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None
    iscrowd: int
    segmentation: msgspec.Raw | None
    """JSON text: a list of polygons, or COCO's run lengths."""


class Category(msgspec.Struct):
    """A class of objects."""

    id: int
    name: str
    supercategory: str = ""


@dataclass
class Records:
    """All that a source lists, whatever is sampled later."""

    listing: Path
    """The file that lists the images or texts, for messages."""
    images_root: Path | None
    """Folder that every ``file_name`` is relative to; None where there are no images."""
    images: list[Image] = field(default_factory=list)
    captions: list[Caption] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    categories: list[Category] = field(default_factory=list)
    empty_captions: int = 0
    """Captions that were left out because nothing but white space is in them."""
    repeated_captions: int = 0
    """Captions that were left out because the same image (or no image) has the same text."""


def clean_text(text: str) -> str:
    r"""Return ``text`` stripped and without control characters; ``\n`` and ``\t`` stay.

    Direction marks, joiners and emoji stay: only the C0 and C1 control characters go.
    """
    if not text.isprintable():
        text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text.strip()


def check_file_name(name: str, where: str) -> str:
    """Return an image's ``name``, relative to its folder, in its shortest form.

    Args:
        name: a relative path with ``/``.
        where: file and record, for the message.

    Raises:
        LayersenseError: it is empty, absolute or climbs out of the folder.
    """
    if _PLAIN_NAME.fullmatch(name):
        return name
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\x00" in name:
        raise LayersenseError(
            f"{where}: has the file name {name!r}, but a path inside the image folder was expected"
        )
    return str(path)


def read_bytes(path: Path, what: str) -> bytes:
    """Return the bytes of an input file, or of one in a zip (``annotations.zip/captions.json``).

    Raises:
        LayersenseError: it is missing or cannot be read.
    """
    try:
        return read_file(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LayersenseError(f"{path}: there is no such {what}; correct its path") from error
    except OSError as error:
        raise LayersenseError(
            f"{path}: the {what} cannot be read ({error.strerror or error}); check its permissions"
        ) from error


def decode(data: bytes, kind: type[T], where: str, what: str) -> T:
    """Return JSON as a typed value.

    Raises:
        LayersenseError: it is no JSON, cut short, or of another shape; the message names the key.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except BROKEN_JSON as error:
        raise LayersenseError(
            f"{where}: is not {what} ({error}); repair it or download it again"
        ) from error
