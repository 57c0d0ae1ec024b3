"""Open a photograph as RGB, or refuse it in one sentence."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from layersense.calibration.archives import read_file
from layersense.errors import LayersenseError

Image.init()
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
"""What may be decoded; Pillow's other decoders are rare, and one (EPS) runs another program.
JPEG includes the multi-picture files of telephones."""
MAX_ASPECT = 200
"""Longest to shortest side; `qwen_vl_utils` refuses more."""
MIN_SIDE = 2
MAX_BYTES = 2**28
"""The most that an image in a zip may take unpacked, or one that is fetched."""


def open_image(path: str | Path) -> Image.Image:
    """Return the image at ``path`` as RGB, upright and wholly decoded.

    Grey, CMYK and palette images become RGB; transparent pixels are laid on white; 16-bit grey is
    scaled to 8 bits; EXIF orientation is applied; of an animation, the first frame is taken.

    Raises:
        LayersenseError: the file is missing, empty, no image of :data:`FORMATS`, damaged, larger
            than Pillow's limit against decompression bombs, one pixel high or wide, more than
            :data:`MAX_ASPECT` times as long as it is wide, or of a colour mode without a known
            range.
    """
    return decode_image(read_image(path), path)


def read_image(path: str | Path) -> bytes:
    """Return the bytes of an image file, or of one in a zip (``photos.zip/a.jpg``).

    Raises:
        LayersenseError: it is missing, not a plain file, empty or not readable.
    """
    file = Path(path)
    try:
        if file.exists() and not file.is_file():  # a pipe would block
            raise IsADirectoryError
        data = read_file(file, MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LayersenseError(
            f"{path}: there is no such image; restore it or drop its rows"
        ) from error
    except IsADirectoryError as error:
        raise LayersenseError(f"{path}: is not a file, but an image was expected there") from error
    except OSError as error:
        raise LayersenseError(
            f"{path}: the image cannot be read ({error.strerror or error}); check its permissions"
        ) from error
    if not data:
        raise LayersenseError(f"{path}: the image file is empty; restore it or drop its rows")
    return data


def decode_image(data: bytes, path: str | Path) -> Image.Image:
    """Return the image in ``data`` as RGB; see :func:`open_image`. ``path`` is for messages."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image, path)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), path)
    except LayersenseError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise LayersenseError(_too_large(path)) from error
    except Image.UnidentifiedImageError as error:
        raise LayersenseError(
            f"{path}: is not an image that can be read ({', '.join(FORMATS)}); "
            "convert it or drop its rows"
        ) from error
    except Exception as error:  # Pillow's decoders raise anything at all on damaged bytes
        raise LayersenseError(
            f"{path}: the image is damaged ({error}); restore it or drop its rows"
        ) from error


def _check_size(image: Image.Image, path: str | Path) -> None:
    width, height = image.size
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise LayersenseError(_too_large(path))
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise LayersenseError(
            f"{path}: the image is {width}×{height} pixels, but at least {MIN_SIDE} pixels a side "
            f"and at most {MAX_ASPECT} times as long as wide were expected; drop its rows"
        )


def _too_large(path: str | Path) -> str:
    limit = Image.MAX_IMAGE_PIXELS // 1_000_000
    return f"{path}: the image has more than {limit} million pixels; scale it down"


def _to_rgb(image: Any, path: str | Path) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise LayersenseError(
            f"{path}: the image has {'32-bit integer' if image.mode == 'I' else 'float'} pixels, "
            "whose range is unknown; convert it to 8 bits"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")
