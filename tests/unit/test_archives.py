"""Images and annotations out of a zip: as if it were unpacked, and nothing is."""

import io
import json
import multiprocessing
import os
import random
import re
import sqlite3
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter

from layersense.calibration import archives
from layersense.calibration.archives import (
    find_in_zips,
    image_folder,
    is_file,
    is_folder,
    read_file,
)
from layersense.calibration.build import build_database
from layersense.calibration.coco import read_coco
from layersense.calibration.database import open_database
from layersense.calibration.images import open_image, read_image
from layersense.config import Dataset
from layersense.errors import LayersenseError
from layersense.validation import load_config


def photograph(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (seed, 2 * seed, 3 * seed)).save(buffer, "PNG")
    return buffer.getvalue()


def listing(kind: str) -> str:
    images = [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 10} for i in range(1, 11)]
    if kind == "captions":
        rows = [{"id": 100 + i, "image_id": i, "caption": f"photo {i}"} for i in range(1, 11)]
        return json.dumps({"images": images, "annotations": rows})
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 2, 3, 4]} for i in range(1, 11)]
    categories = [{"id": 1, "name": "thing"}]
    return json.dumps({"images": images, "annotations": boxes, "categories": categories})


def unpacked(root: Path) -> Path:
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    for kind in ("captions", "instances"):
        (root / f"annotations/{kind}_val2017.json").write_text(listing(kind))
    for key in range(1, 11):
        (root / f"val2017/{key}.png").write_bytes(photograph(key))
    return root


def zipped(root: Path, notes: str = "annotations/annotations_trainval2017.zip") -> Path:
    """The same as COCO's own files: both zips, with the folders that are in them."""
    (root / "annotations").mkdir(parents=True)
    with zipfile.ZipFile(root / notes, "w", zipfile.ZIP_DEFLATED) as archive:
        for kind in ("captions", "instances"):
            archive.writestr(f"annotations/{kind}_val2017.json", listing(kind))
    with zipfile.ZipFile(root / "val2017.zip", "w") as archive:
        archive.writestr("val2017/", "")
        for key in range(1, 11):
            archive.writestr(f"val2017/{key}.png", photograph(key))
    return root


def build(path: Path, **changes: Any) -> list[str]:
    entry = {"source": "coco", "split": "val2017", "calibration": 6, "heldout": 2, **changes}
    build_database("d", TypeAdapter[Any](Dataset).validate_python(entry), path)
    with sqlite3.connect(path) as connection:
        lines = list(connection.iterdump())
    connection.close()
    return [line for line in lines if not re.search("'(images_root|settings)'", line)]


@pytest.mark.parametrize("notes", ["annotations/annotations_trainval2017.zip", "notes.zip"])
def test_zips_give_what_folders_give(tmp_path: Path, notes: str) -> None:
    expected = build(tmp_path / "a.sqlite", root=str(unpacked(tmp_path / "folders")))
    root = zipped(tmp_path / "zips", notes)
    before = sorted(root.rglob("*"))
    assert build(tmp_path / "b.sqlite", root=str(root)) == expected
    assert any('INSERT INTO "boxes"' in line for line in expected)
    with open_database(tmp_path / "b.sqlite") as database:
        rows = database.rows("caption", "calibration")
    for row in rows:
        assert row.image_path == root / f"val2017.zip/val2017/{row.image_id}.png"
        assert open_image(row.image_path).getpixel((0, 0)) == (
            row.image_id, 2 * row.image_id, 3 * row.image_id
        )  # fmt: skip
    assert sorted(root.rglob("*")) == before, "nothing is unpacked"


def test_paths_into_zips_by_the_config(tmp_path: Path) -> None:
    root = zipped(tmp_path / "zips")
    entry = {
        "root": str(root),
        "captions": str(
            root / "annotations/annotations_trainval2017.zip/annotations/captions_val2017.json"
        ),
        "images": str(root / "val2017.zip/val2017"),
    }
    assert build(tmp_path / "a.sqlite", **entry) == build(tmp_path / "b.sqlite", root=str(root))
    config = {
        "datasets": {"d": {"source": "coco", "split": "val2017", **entry}},
        "models": {"m": {"source": "demo"}},
        "schemes": {"s": {"quant_formats": ["FP8_ALL_LAYERS_CFG"], "effective_bits": 11.0}},
        "runs": {"r": {"model": "m", "dataset": "d", "schemes": ["s"], "device": "cpu"}},
    }
    load_config(config, "config.yaml")
    config["datasets"]["d"]["captions"] += "x"
    with pytest.raises(LayersenseError, match=r"d\.captions: expected a file"):
        load_config(config, "config.yaml")


def test_own_photographs_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for key in range(1, 11):
            archive.writestr(f"{key}.png", photograph(key))
    table = tmp_path / "table.csv"
    table.write_text("image,text\n" + "".join(f"{i}.png,photo {i}\n" for i in range(1, 11)))
    entry = {
        "source": "images",
        "images": str(tmp_path / "photos.zip"),
        "table": str(table),
        "calibration": 6,
        "heldout": 2,
    }
    build_database("d", TypeAdapter[Any](Dataset).validate_python(entry), tmp_path / "a.sqlite")
    with open_database(tmp_path / "a.sqlite") as database:
        for row in database.rows("caption", "calibration"):
            assert row.image_path is not None
            assert row.caption == f"photo {row.image_path.stem}"
            assert open_image(row.image_path).size == (20, 10)


def test_what_is_in_a_zip(tmp_path: Path) -> None:
    root = zipped(tmp_path / "zips")
    photos = root / "val2017.zip"
    assert image_folder(photos) == photos / "val2017"
    assert image_folder(root) == root
    assert is_folder(photos)
    assert is_folder(photos / "val2017")
    assert not is_folder(photos / "val")
    assert is_file(photos / "val2017/3.png")
    assert not is_file(photos / "val2017")
    assert not is_file(photos / "3.png")
    assert find_in_zips([root], "3.png") == photos / "val2017/3.png"
    assert find_in_zips([root], "none.png") is None
    for missing in (
        photos / "val2017",
        photos / "val2017/11.png",
        photos / "../../etc/passwd",
        root / "no.zip/a",
    ):
        with pytest.raises(LayersenseError, match="there is no such image"):
            read_image(missing)


def test_a_zip_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    for content in (b"old", b"newer"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", content)
        assert read_file(path / "a") == content


def test_many_threads_read_one_zip(tmp_path: Path) -> None:
    photos = zipped(tmp_path / "zips") / "val2017.zip" / "val2017"
    keys = [random.Random(0).randint(1, 10) for _ in range(300)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda key: read_image(photos / f"{key}.png"), keys))
    assert found == [photograph(key) for key in keys]


def test_a_forked_process_opens_its_own(tmp_path: Path) -> None:
    """A data loader's workers are forks; an open file's position would be one for all of them."""
    photos = zipped(tmp_path / "zips") / "val2017.zip" / "val2017"
    read_image(photos / "1.png")
    archives._open(photos.parent)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_read_all, args=(photos,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    _read_all(photos, leave=False)
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4


def _read_all(photos: Path, leave: bool = True) -> None:
    try:
        for _ in range(50):
            for key in range(1, 11):
                assert read_image(photos / f"{key}.png") == photograph(key)
    except BaseException:
        if leave:
            os._exit(1)
        raise
    if leave:
        os._exit(0)


# --- bad ones


def broken(kind: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1000) + photograph(1))
    data = bytearray(buffer.getvalue())
    central = data.index(b"PK\x01\x02")
    if kind == "cut short":
        return bytes(data[:-30])
    if kind == "no zip":
        return b"<html>"
    if kind == "bytes changed":
        data[45] ^= 0xFF
    elif kind == "encrypted":
        data[6] |= 1
        data[central + 8] |= 1
    elif kind == "unknown method":
        data[8] = data[central + 10] = 99
    elif kind == "lies about its size":
        data[central + 24 : central + 28] = (2**30).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("cut short", "is not a whole zip file"),
        ("no zip", "is not a whole zip file"),
        ("bytes changed", "its zip is damaged"),
        ("encrypted", "cannot be read from its zip"),
        ("unknown method", "cannot be read from its zip"),
        ("lies about its size", "takes 1024 MiB unpacked, at most 256 are read"),
    ],
)
def test_a_broken_zip_is_one_sentence(tmp_path: Path, kind: str, sentence: str) -> None:
    path = tmp_path / "photos.zip"
    path.write_bytes(broken(kind))
    with pytest.raises(LayersenseError) as told:
        read_image(path / "a.png")
    assert sentence in str(told.value)
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)


@settings(
    max_examples=int(os.environ.get("LAYERSENSE_FUZZ", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6), st.integers(0, 400)
)
def test_any_zip_is_read_or_refused_in_a_sentence(
    tmp_path: Path, changes: list[tuple[int, int]], end: int
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("d/captions.json", listing("captions"))
        archive.writestr("d/a.png", photograph(1))
    data = bytearray(buffer.getvalue())
    for at, value in changes:
        data[-1 - at % len(data)] = value  # the list of members is at the end
    path = tmp_path / "coco.zip"
    path.write_bytes(data[: len(data) - max(end - 350, 0)])
    for read in (
        partial(read_image, path / "d/a.png"),
        partial(image_folder, path),
        partial(is_folder, path / "d"),
        partial(find_in_zips, [tmp_path], "captions.json"),
        partial(read_coco, path / "d/captions.json", None, tmp_path),
    ):
        try:
            read()
        except LayersenseError as error:
            assert str(path) in str(error)  # noqa: PT017
