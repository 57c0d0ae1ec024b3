"""Masks against shapes drawn by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("pycocotools")

from layersense.calibration.build import build_database
from layersense.calibration.database import Object, Row, open_database
from layersense.calibration.masks import decode_mask
from layersense.config import SampleDataset
from layersense.errors import LayersenseError


def square(left: int, top: int, edge: int) -> str:
    right, bottom = left + edge, top + edge
    return json.dumps([[left, top, right, top, right, bottom, left, bottom]])


def test_a_polygon_covers_its_pixels() -> None:
    mask = decode_mask(square(2, 3, 4), 10, 12, "here")
    expected = np.zeros((10, 12), dtype=bool)
    expected[3:7, 2:6] = True
    assert np.array_equal(mask, expected)


def test_several_polygons_are_one_object() -> None:
    both = json.dumps([*json.loads(square(0, 0, 2)), *json.loads(square(5, 5, 3))])
    assert decode_mask(both, 10, 12, "here").sum() == 4 + 9


def test_run_lengths_go_down_the_columns() -> None:
    runs = json.dumps({"size": [3, 4], "counts": [1, 4, 7]})
    mask = decode_mask(runs, 3, 4, "here")
    assert mask.T.flatten().tolist() == [False, *[True] * 4, *[False] * 7]


def test_compressed_run_lengths() -> None:
    from pycocotools import mask as coco

    drawn = np.zeros((5, 6), dtype=np.uint8, order="F")
    drawn[1:4, 2:5] = 1
    runs = coco.encode(drawn)
    text = json.dumps({"size": runs["size"], "counts": runs["counts"].decode()})
    assert np.array_equal(decode_mask(text, 5, 6, "here"), drawn.astype(bool))


@given(st.data())
def test_packed_run_lengths_are_those_of_pycocotools(data: st.DataObject) -> None:
    from pycocotools import mask as coco

    height, width = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    seed, share = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.floats(0, 1))
    drawn = np.random.default_rng(seed).random((height, width)) < share
    runs = coco.encode(np.asfortranarray(drawn, dtype=np.uint8))
    text = json.dumps({"size": runs["size"], "counts": runs["counts"].decode()})
    assert np.array_equal(decode_mask(text, height, width, "here"), drawn)


def test_nothing_and_lines_cover_nothing() -> None:
    assert not decode_mask("[]", 4, 4, "here").any()
    assert not decode_mask("[[0, 0, 3, 3]]", 4, 4, "here").any()


@pytest.mark.parametrize(
    "text",
    [
        '{"size": [4, 5], "counts": [1, 19]}',
        '{"counts": [1, 15]}',
        '{"size": [4, 4]}',
        "3",
        '[["a", 1, 2, 3, 4, 5]]',
        "[",
        # Fuzzing found that pycocotools crashes the process, or writes where it must not, on these.
        '{"size": [4, 4], "counts": [-5, 21]}',
        '{"size": [4, 4], "counts": [4294967295, 17]}',
        '{"size": [4, 4], "counts": [1, 2]}',
        '{"size": [4, 4], "counts": [0.5, 15.5]}',
        '{"size": [4, 4], "counts": [true, 15]}',
        '{"size": [4, 4], "counts": "zzzz"}',
        '{"size": [4, 4], "counts": "0\\u0000"}',
        '{"size": [4, 4], "counts": "00T"}',
        "[[1e30, 0, 3, 3, 0, 3]]",
        "[[1, 0, 3, 3, 0, NaN]]",
        "[[1, 0, 3, 3, 0, 2, 1]]",
        '[{"size": [4, 4], "counts": [16]}]',
        "[" * 100_000,
    ],
)
def test_a_broken_mask_names_the_image(text: str) -> None:
    with pytest.raises(LayersenseError, match=r"image 7: a mask cannot be read .*instances file"):
        decode_mask(text, 4, 4, "image 7")


def test_smaller_objects_lie_in_front_and_crowds_are_not_supervised() -> None:
    from layersense.models.tasks.semantic_segmentation import Segmenter, class_map

    image = Image.new("RGB", (10, 10))
    row = Row(
        None,
        None,
        objects=(
            Object("cat", (4, 4, 2, 2), False, square(4, 4, 2)),
            Object("sofa", (2, 2, 6, 6), False, square(2, 2, 6)),
            Object("person", (0, 0, 2, 2), True, square(0, 0, 2)),
            Object("dragon", (8, 0, 2, 2), False, square(8, 0, 2)),
        ),
    )
    found = class_map(Segmenter({"cat": 3, "couch": 5, "person": 1}, None), row, image)
    expected = np.full((10, 10), 255)
    expected[2:8, 2:8] = 5
    expected[4:6, 4:6] = 3
    assert np.array_equal(found, expected)
    with_background = Segmenter({"background": 0, "cat": 3, "person": 1}, None)
    found = class_map(with_background, row, image)
    assert found[9, 9] == 0
    assert (found[0:2, 0:2] == 255).all()
    assert (found == 3).sum() == 4


def test_rows_of_images_hold_what_their_source_says(tmp_path: Path) -> None:
    path = tmp_path / "sample.sqlite"
    build_database("sample", SampleDataset(source="sample", calibration=60, heldout=5), path)
    with open_database(path) as database:
        rows = database.rows("image", "calibration")
        captions = {row.image_id: row.objects for row in database.rows("caption", "calibration")}
    assert len(rows) == 22
    assert set(captions.values()) == {()}
    for row in rows:
        assert len(row.texts) == 5
        with Image.open(str(row.image_path)) as image:
            size = image.size
        for shown in row.objects:
            assert shown.segmentation is not None
            mask = decode_mask(shown.segmentation, size[1], size[0], "here")
            x, y, width, height = shown.bbox
            rows_, columns = np.nonzero(mask)
            if len(rows_):
                assert columns.min() >= x - 2
                assert columns.max() <= x + width + 2
                assert rows_.min() >= y - 2
                assert rows_.max() <= y + height + 2
    assert sum(len(row.objects) for row in rows) > 50
