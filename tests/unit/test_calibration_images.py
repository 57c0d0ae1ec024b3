"""Photographs of every awkward kind: treated, or refused in one sentence."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from layersense.calibration.images import open_image
from layersense.errors import LayersenseError


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_grey_becomes_rgb(tmp_path: Path) -> None:
    image = open_image(save(tmp_path / "a.png", Image.new("L", (4, 3), 77)))
    assert (image.mode, image.size) == ("RGB", (4, 3))
    assert image.getpixel((0, 0)) == (77, 77, 77)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image = open_image(save(tmp_path / "a.jpg", red, quality=95))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - [255, 0, 0]).max() < 12


def test_palette_with_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([0, 0, 0, 200, 10, 20])
    image.putpixel((1, 1), 1)
    image = open_image(save(tmp_path / "a.png", image, transparency=0))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 1)) == (200, 10, 20)


def test_half_transparent_pixel_is_mixed_with_white(tmp_path: Path) -> None:
    image = open_image(save(tmp_path / "a.png", Image.new("RGBA", (2, 2), (0, 0, 0, 128))))
    assert image.getpixel((0, 0)) == (127, 127, 127)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    deep = Image.fromarray(np.array([[0, 0x8000], [0x40FF, 0xFFFF]], np.uint16))
    image = open_image(save(tmp_path / "a.png", deep))
    assert np.asarray(image)[:, :, 0].tolist() == [[0, 0x80], [0x40, 0xFF]]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90° clockwise to see it upright
    image = open_image(save(tmp_path / "a.png", image, exif=exif))
    assert image.size == (2, 4)
    assert image.getpixel((1, 0)) == (255, 0, 0)


def test_multi_picture_jpeg_of_a_telephone_is_read(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    path = save(tmp_path / "a.mpo", first, save_all=True, append_images=[second])
    assert open_image(path).getpixel((4, 4)) == pytest.approx((254, 0, 0), abs=2)


@pytest.mark.parametrize("size", [(300, 1), (1, 1), (1, 300), (804, 4)])
def test_thin_image_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    path = save(tmp_path / "thin.png", Image.new("RGB", size))
    with pytest.raises(LayersenseError, match=rf"thin\.png: .*{size[0]}×{size[1]} pixels"):
        open_image(path)


def test_aspect_of_200_is_kept(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.new("RGB", (800, 4)))
    assert open_image(path).size == (800, 4)


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pixels", [90, 30])
def test_decompression_bomb_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int
) -> None:
    path = save(tmp_path / "bomb.png", Image.new("RGB", (10, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)  # Pillow warns at once, raises at twice
    with pytest.raises(LayersenseError, match=r"bomb\.png: .*million pixels"):
        open_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_truncated_image_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = save(tmp_path / f"cut.{suffix}", Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(LayersenseError, match=rf"cut\.{suffix}: "):
        open_image(path)


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "depth.tiff", Image.new("F", (4, 4), 0.5))
    with pytest.raises(LayersenseError, match=r"depth\.tiff: .*float"):
        open_image(path)


def test_missing_empty_folder_and_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "text.jpg").write_text("not found")
    (tmp_path / "code.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name, why in (
        ("none.jpg", "no such image"),
        ("empty.jpg", "empty"),
        ("folder.jpg", "not a file"),
        ("text.jpg", "not an image"),
        ("code.jpg", "not an image"),
    ):
        with pytest.raises(LayersenseError, match=rf"{name}: .*{why}"):
            open_image(tmp_path / name)
