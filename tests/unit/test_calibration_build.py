"""Every kind of source, every kind of bad input: one sentence, and nothing left behind."""

import errno
import json
import os
import random
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import TypeAdapter

from layersense.calibration.build import build_database, source_files
from layersense.calibration.database import Database, open_database
from layersense.config import Dataset
from layersense.errors import LayersenseError

COCO_IMAGES = 10


def build(path: Path, **settings: Any) -> Database:
    settings = {"calibration": 4, "heldout": 1, **settings}
    build_database("mine", TypeAdapter[Any](Dataset).validate_python(settings), path)
    return open_database(path)


def files(folder: Path, pattern: str = "*") -> list[str]:
    """Return what lies in a folder, but for the lock, which stays for the next job."""
    return sorted(file.name for file in folder.glob(pattern) if file.suffix != ".lock")


def refused(path: Path, **settings: Any) -> str:
    """Build, expect a refusal, return the sentence; nothing may be left behind."""
    folder = path / "out"
    with pytest.raises(LayersenseError) as told:
        build(folder / "bad.sqlite", **settings)
    assert not folder.exists() or files(folder) == []
    sentence = str(told.value)
    assert "\n" not in sentence
    return sentence


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A folder in COCO's layout: ten images with two captions and one box each."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    images = []
    captions = []
    boxes = []
    for key in range(1, COCO_IMAGES + 1):
        Image.new("RGB", (20, 10), (key, 2 * key, 3 * key)).save(root / "train2017" / f"{key}.png")
        images.append({"id": key, "file_name": f"{key}.png", "width": 20, "height": 10})
        for word in ("one", "two"):
            captions.append(
                {"id": 100 + len(captions), "image_id": key, "caption": f"{word} of {key}"}
            )
        boxes.append(
            {
                "id": 500 + key,
                "image_id": key,
                "category_id": 1,
                "bbox": [1, 2, 3.5, 4],
                "area": 14.0,
                "iscrowd": 0,
                "segmentation": [[1, 2, 4.5, 2, 4.5, 6]],
            }
        )
    write(root, "captions", {"images": images, "annotations": captions, "info": {"year": 2017}})
    write(
        root,
        "instances",
        {
            "images": images,
            "annotations": boxes,
            "categories": [{"id": 1, "name": "thing", "supercategory": "things"}],
        },
    )
    return root


def file(root: Path, kind: str) -> Path:
    return root / "annotations" / f"{kind}_train2017.json"


def write(root: Path, kind: str, content: object) -> None:
    file(root, kind).write_text(json.dumps(content))


def edit(root: Path, kind: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file(root, kind).read_text())
    change(content)
    write(root, kind, content)


def dump(path: Path) -> list[str]:
    with sqlite3.connect(path) as connection:
        lines = list(connection.iterdump())
    connection.close()
    return lines


# --- what is built


def test_coco_holds_all_that_is_listed_and_what_was_drawn(coco: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    with build(path, source="coco", root=str(coco), calibration=12, heldout=4, seed=7) as database:
        meta = database.meta
        rows = database.rows("caption", "calibration")
        assert database.count("caption", "heldout") == 4
        assert database.count("image", "calibration") == 8
    assert (meta["source"], meta["split"], meta["seed"]) == ("coco", "train2017", "7")
    assert (meta["images"], meta["captions"], meta["boxes"]) == ("10", "20", "10")
    assert re.fullmatch("[0-9a-f]{64}", meta["digest"])
    for row in rows:
        assert row.image_path == coco / "train2017" / f"{row.image_id}.png"
        assert row.caption in {f"one of {row.image_id}", f"two of {row.image_id}"}
    with sqlite3.connect(path) as connection:
        ask = connection.execute
        assert ask("SELECT * FROM boxes WHERE box_id = 503").fetchall() == [
            (503, 3, 1, 1.0, 2.0, 3.5, 4.0, 14.0, 0)
        ]
        assert json.loads(ask("SELECT segmentation FROM segments").fetchone()[0]) == [
            [1, 2, 4.5, 2, 4.5, 6]
        ]
        assert ask("SELECT * FROM categories").fetchall() == [(1, "thing", "things")]
    connection.close()
    assert files(tmp_path, "*.sqlite*") == ["a.sqlite"]


def test_order_of_the_files_changes_nothing(coco: Path, tmp_path: Path) -> None:
    build(tmp_path / "a.sqlite", source="coco", root=str(coco)).close()
    dice = random.Random(5)
    for kind in ("captions", "instances"):
        edit(coco, kind, lambda c: [dice.shuffle(c[key]) for key in ("images", "annotations")])
    build(tmp_path / "b.sqlite", source="coco", root=str(coco)).close()
    assert dump(tmp_path / "a.sqlite") == dump(tmp_path / "b.sqlite")


def digest(path: Path, root: Path, **settings: Any) -> str:
    with build(path / "d.sqlite", source="coco", root=str(root), **settings) as database:
        return database.meta["digest"]


def test_digest_follows_rows_image_bytes_and_boxes(coco: Path, tmp_path: Path) -> None:
    whole = {"calibration": 16, "heldout": 4}
    before = digest(tmp_path, coco, **whole)
    moved = tmp_path / "moved"
    shutil.copytree(coco, moved)
    assert digest(tmp_path, moved, **whole) == before, "the folder must not enter"
    assert digest(tmp_path, coco, **{**whole, "seed": 1}) != before
    assert digest(tmp_path, coco, calibration=15, heldout=4) != before
    edit(moved, "captions", lambda c: c["annotations"][0].update(caption="another"))
    assert digest(tmp_path, moved, **whole) != before
    shutil.copy(file(coco, "captions"), file(moved, "captions"))
    edit(moved, "instances", lambda c: c["annotations"][0].update(bbox=[0, 0, 1, 1]))
    assert digest(tmp_path, moved, **whole) != before
    shutil.copy(file(coco, "instances"), file(moved, "instances"))
    assert digest(tmp_path, moved, **whole) == before
    Image.new("RGB", (20, 10)).save(moved / "train2017" / "4.png")
    assert digest(tmp_path, moved, **whole) != before


def test_coco_without_instances(coco: Path, tmp_path: Path) -> None:
    file(coco, "instances").unlink()
    with build(tmp_path / "a.sqlite", source="coco", root=str(coco)) as database:
        assert database.meta["boxes"] == "0"
        assert database.count("caption", "calibration") == 4


def test_coco_without_captions_counts_images(coco: Path, tmp_path: Path) -> None:
    file(coco, "captions").unlink()
    with build(tmp_path / "a.sqlite", source="coco", root=str(coco), calibration=8) as database:
        assert database.count("image", "calibration") == 8
        assert database.count("caption", "calibration") == 0


def test_run_lengths_are_kept(coco: Path, tmp_path: Path) -> None:
    mask = {"counts": [5, 195], "size": [10, 20]}
    edit(coco, "instances", lambda c: c["annotations"][0].update(segmentation=mask, iscrowd=1))
    build(tmp_path / "a.sqlite", source="coco", root=str(coco)).close()
    with sqlite3.connect(tmp_path / "a.sqlite") as connection:
        found = connection.execute(
            "SELECT segmentation, is_crowd FROM segments JOIN boxes USING (box_id) "
            "WHERE box_id = 501"
        ).fetchone()
    connection.close()
    assert (json.loads(found[0]), found[1]) == (mask, 1)


def test_only_sampled_images_are_opened(coco: Path, tmp_path: Path) -> None:
    sizes = {"calibration": 1, "heldout": 1}
    with build(tmp_path / "a.sqlite", source="coco", root=str(coco), **sizes) as database:
        kept = {
            row.image_id
            for unit in ("caption", "image", "pair")
            for split in ("calibration", "heldout")
            for row in database.rows(unit, split)  # type: ignore[arg-type]
        }
    assert 0 < len(kept) < COCO_IMAGES
    for key in range(1, COCO_IMAGES + 1):
        if key not in kept:
            (coco / "train2017" / f"{key}.png").unlink()
    build(tmp_path / "b.sqlite", source="coco", root=str(coco), **sizes).close()
    assert dump(tmp_path / "a.sqlite") == dump(tmp_path / "b.sqlite")


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_coco(shared_data: Path, tmp_path: Path, split: str) -> None:
    with build(
        tmp_path / "a.sqlite",
        source="coco",
        root=str(shared_data / "coco2017-tiny"),
        split=split,
        calibration=200,
        heldout=50,
    ) as database:
        assert (database.meta["images"], database.meta["captions"]) == ("50", "250")
        assert database.count("image", "calibration") == 40
        rows = database.rows("caption", "calibration") + database.rows("caption", "heldout")
    assert len({row.caption_id for row in rows}) == 250


def test_sample_is_27_photographs_with_135_captions(tmp_path: Path) -> None:
    with build(tmp_path / "a.sqlite", source="sample", calibration=110, heldout=25) as database:
        assert (database.meta["images"], database.meta["captions"]) == ("27", "135")
        rows = database.rows("caption", "calibration") + database.rows("caption", "heldout")
    assert {row.image_path.parent.name for row in rows if row.image_path} == {
        "train2017",
        "val2017",
    }
    assert len({row.caption_id for row in rows}) == 135


def test_sample_is_small_credited_and_free(repository: Path) -> None:
    folder = repository / "workflow" / "layersense" / "resources" / "coco-sample"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 1_000_000
    credits = (folder / "ATTRIBUTION.md").read_text()
    listed = set()
    for split in ("train2017", "val2017"):
        for kind in ("captions", "instances"):
            content = json.loads((folder / "annotations" / f"{kind}_{split}.json").read_text())
            for image in content["images"]:
                assert image["license"] in (4, 7)
                name = f"{split}/{image['file_name']}"
                assert f"`{name}` | {image['flickr_url']}" in credits
                listed.add(name)
                with Image.open(folder / name) as opened:
                    assert opened.size == (image["width"], image["height"])
            if kind == "instances":
                size = {
                    image["id"]: (image["width"], image["height"]) for image in content["images"]
                }
                for box in content["annotations"]:
                    inside_image(box, *size[box["image_id"]])
    assert listed == {str(p.relative_to(folder)) for p in files if p.suffix == ".jpg"}
    assert len(listed) == 27


def inside_image(box: dict[str, Any], width: int, height: int) -> None:
    x, y, w, h = box["bbox"]
    assert x + w <= width + 1
    assert y + h <= height + 1
    mask = box["segmentation"]
    if isinstance(mask, dict):
        assert mask["size"] == [height, width]
        assert sum(mask["counts"]) == width * height
        assert sum(mask["counts"][1::2]) == box["area"]
    else:
        xs = [v for polygon in mask for v in polygon[::2]]
        ys = [v for polygon in mask for v in polygon[1::2]]
        assert (min(xs), min(ys)) == pytest.approx((x, y), abs=1.5)
        assert (max(xs), max(ys)) == pytest.approx((x + w, y + h), abs=1.5)


# --- the user's own files


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b c.png", "sub/d.png", "é.png", "e.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def test_csv_and_jsonl_are_the_same_dataset(photos: Path, tmp_path: Path) -> None:
    rows = [
        ("a.png", "first, with a comma"),
        ("a.png", 'second "quoted"'),
        ("b c.png", "two\nlines"),
        ("./sub//d.png", "d"),
        ("é.png", "سلام 👩‍👩‍👧 \u200fעברית"),
        ("e.png", "e"),
    ]
    quoted = "".join(f'"{n}","{t.replace(chr(34), chr(34) * 2)}",9\n' for n, t in rows)
    (tmp_path / "t.csv").write_bytes(("image,text,extra\n" + quoted).encode("utf-8-sig"))
    lines = [json.dumps({"text": t, "image": n, "id": 5}) for n, t in reversed(rows)]
    (tmp_path / "t.jsonl").write_text("\n\n".join(lines))
    found = []
    for name in ("t.csv", "t.jsonl"):
        with build(
            tmp_path / f"{name}.sqlite",
            source="images",
            images=str(photos),
            table=str(tmp_path / name),
        ) as database:
            found.append((database.meta["digest"], database.rows("caption", "calibration")))
            assert (database.meta["images"], database.meta["captions"]) == ("5", "6")
    assert found[0] == found[1]
    with sqlite3.connect(tmp_path / "t.csv.sqlite") as connection:
        kept = connection.execute(
            "SELECT file_name, caption FROM captions JOIN images USING (image_id)"
        ).fetchall()
    connection.close()
    assert sorted(kept) == sorted((n.replace("./sub//", "sub/"), t) for n, t in rows)


def test_repeated_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ["a", "b", " a ", "c", "b", "d", "e"])
    )
    with build(tmp_path / "a.sqlite", source="text", file=str(tmp_path / "t.jsonl")) as database:
        assert database.meta["repeated_captions"] == "2"
        rows = database.rows("caption", "calibration") + database.rows("caption", "heldout")
    assert sorted(row.caption for row in rows if row.caption) == list("abcde")
    assert {row.image_path for row in rows} == {None}


def test_digest_of_texts_ignores_their_order(tmp_path: Path) -> None:
    digests = set()
    for texts in (list("abcdefgh"), list("hgfedcba")):
        (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
        with build(
            tmp_path / "a.sqlite", source="text", file=str(tmp_path / "t.jsonl")
        ) as database:
            digests.add(database.meta["digest"])
    assert len(digests) == 1


def test_strange_captions_are_cleaned_and_kept(coco: Path, tmp_path: Path) -> None:
    strange = {
        "x" * 10_000: "x" * 10_000,
        "  a man.\n": "a man.",
        "bell\x07 and\x00 escape\x1b[0m": "bell and escape[0m",
        "שלום \u200f(עברית)": "שלום \u200f(עברית)",
        "family 👨‍👩‍👧 \U0001f9d1🏽": "family 👨‍👩‍👧 \U0001f9d1🏽",
        "a\r\nb": "a\nb",
        "c1\x85control": "c1control",
    }

    def change(content: dict[str, Any]) -> None:
        for row, text in zip(content["annotations"], strange, strict=False):
            row["caption"] = text
        for row, text in zip(content["annotations"][-3:], ("", " \n ", "\x00"), strict=True):
            row["caption"] = text

    edit(coco, "captions", change)
    with build(tmp_path / "a.sqlite", source="coco", root=str(coco)) as database:
        assert database.meta["empty_captions"] == "3"
        assert database.meta["captions"] == "17"
    with sqlite3.connect(tmp_path / "a.sqlite") as connection:
        found = [t for (t,) in connection.execute("SELECT caption FROM captions ORDER BY 1")]
    connection.close()
    assert set(strange.values()) <= set(found)


# --- bad input


def set_file_name(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["images"][2].update(file_name=name)


@pytest.mark.parametrize(
    ("kind", "change", "why"),
    [
        (
            "captions",
            lambda c: c["annotations"][3].update(image_id=77),
            r"caption 103 belongs to image 77",
        ),
        ("captions", lambda c: c["images"].append(c["images"][4]), r"image id 5 occurs twice"),
        (
            "captions",
            lambda c: c["annotations"].append(c["annotations"][4]),
            r"caption id 104 occurs twice",
        ),
        (
            "captions",
            lambda c: c["images"][3].update(file_name="3.png"),
            r"images 3 and 4 have one file name",
        ),
        ("captions", set_file_name("/etc/passwd"), r"image 3: has the file name '/etc/passwd'"),
        ("captions", set_file_name("../3.png"), r"image 3: has the file name '\.\./3\.png'"),
        ("captions", set_file_name("a/../../3.png"), r"image 3: has the file name"),
        ("captions", set_file_name(""), r"image 3: has the file name ''"),
        ("captions", set_file_name("3.png\x00"), r"image 3: has the file name"),
        ("captions", lambda c: c.pop("images"), r"missing required field `images`"),
        (
            "captions",
            lambda c: c["annotations"][2].update(caption=5),
            r"Expected `str`, got `int` - at `\$\.annotations\[2\]\.caption`",
        ),
        ("captions", lambda c: c["images"][0].update(id=2**70), r"\$\.images\[0\]\.id"),
        (
            "instances",
            lambda c: c["annotations"][0].update(image_id=78),
            r"instance 501 belongs to image 78",
        ),
        (
            "instances",
            lambda c: c["annotations"][0].update(category_id=9),
            r"instance 501 has category 9",
        ),
        (
            "instances",
            lambda c: c["annotations"].append(c["annotations"][4]),
            r"instance id 505 occurs twice",
        ),
        (
            "instances",
            lambda c: c["categories"].append(c["categories"][0]),
            r"category id 1 occurs twice",
        ),
        (
            "instances",
            lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]),
            r"instance 501 has the box",
        ),
        (
            "instances",
            lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
            r"\$\.annotations\[0\]\.bbox",
        ),
        (
            "instances",
            lambda c: c["annotations"][0].update(segmentation="none"),
            r"instance 501 has a segmentation",
        ),
        (
            "instances",
            lambda c: c["annotations"][0].update(segmentation={"counts": [1]}),
            r"instance 501 has a segmentation",
        ),
        (
            "instances",
            lambda c: c["images"][2].update(file_name="other.png"),
            r"image 3 is 'other\.png', but the captions file calls it '3\.png'",
        ),
    ],
)
def test_wrong_record_is_named(
    coco: Path, tmp_path: Path, kind: str, change: Callable[[dict[str, Any]], object], why: str
) -> None:
    edit(coco, kind, change)
    sentence = refused(tmp_path, source="coco", root=str(coco))
    assert sentence.startswith(str(file(coco, kind)))
    assert re.search(why, sentence), sentence


def test_a_mask_that_is_no_text_is_named(coco: Path, tmp_path: Path) -> None:
    edit(coco, "instances", lambda c: c["annotations"][0].update(segmentation={"counts": "?"}))
    instances = file(coco, "instances")
    instances.write_bytes(instances.read_bytes().replace(b'"?"', b'"\xff"'))
    sentence = refused(tmp_path, source="coco", root=str(coco))
    assert sentence.startswith(f"{instances}: instance 501 has a segmentation")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"images": [], "annotations": [{"id": 1, "ima', "truncated"),
        (b"", "truncated"),
        (b"[]", "Expected `object`, got `array`"),
        (b"<html>404</html>", "malformed"),
        (b'{"images": [{"id": 1, "file_name": "\xff"}], "annotations": []}', "utf-8|UTF-8"),
        (b"[" * 100_000, "Expected `object`|recursion"),
    ],
)
@pytest.mark.parametrize("kind", ["captions", "instances"])
def test_wrong_json_is_named(
    coco: Path, tmp_path: Path, kind: str, content: bytes, why: str
) -> None:
    file(coco, kind).write_bytes(content)
    sentence = refused(tmp_path, source="coco", root=str(coco))
    assert str(file(coco, kind)) in sentence
    assert re.search(why, sentence), sentence


def test_missing_inputs_are_named(coco: Path, tmp_path: Path) -> None:
    root = str(coco)
    none = str(tmp_path / "none")
    for settings in (
        {"source": "coco", "root": root, "captions": none},
        {"source": "coco", "root": root, "instances": none},
        {"source": "coco", "root": root, "images": none},
        {"source": "coco", "root": none},
        {"source": "images", "images": none, "table": str(file(coco, "captions"))},
        {"source": "images", "images": root, "table": none + ".csv"},
        {"source": "text", "file": none},
    ):
        assert none in refused(tmp_path, **settings)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "no such image"),
        (b"", "empty"),
        (b"<html>not found</html>", "not an image"),
        (b"\x89PNG\r\n\x1a\n broken", "not an image|damaged"),
    ],
)
def test_sampled_image_must_be_one(
    coco: Path, tmp_path: Path, content: bytes | None, why: str
) -> None:
    path = coco / "train2017" / "6.png"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    sentence = refused(tmp_path, source="coco", root=str(coco), calibration=16, heldout=4)
    assert re.search(rf"^{path}: .*({why}).*image 6 of .*captions_train2017\.json", sentence)


def test_missing_images_are_one_sentence(coco: Path, tmp_path: Path) -> None:
    """Ten images, all drawn: three are gone, then all, as when their folder was moved."""
    settings: dict[str, Any] = {"source": "coco", "root": str(coco), "calibration": 16}
    whole = settings | {"heldout": 4}
    for key in (2, 6, 9):
        (coco / "train2017" / f"{key}.png").unlink()
    sentence = refused(tmp_path, **whole)
    assert re.search(r"/(2|6|9)\.png: there is no such image, nor 2 more of the 10 ", sentence)
    (coco / "train2017").rename(coco / "photos 2024")
    (coco / "train2017").mkdir()
    sentence = refused(tmp_path, **whole)
    assert sentence.startswith(f"{coco / 'train2017'}: holds none of the 10 images")
    assert "set `images`" in sentence
    shutil.move(coco / "photos 2024", tmp_path / "elsewhere")
    assert "one of them" not in refused(tmp_path, **whole)


def test_images_in_another_folder_are_seen(coco: Path, tmp_path: Path) -> None:
    """Names that begin with the folder that `images` ends in, as many tools write them."""
    edit(coco, "captions", lambda c: [i.update(file_name=f"train2017/{i['file_name']}")
                                      for i in c["images"]])  # fmt: skip
    file(coco, "instances").unlink()
    sentence = refused(tmp_path, source="coco", root=str(coco))
    assert re.search(rf"one of them is {coco}/train2017/\d+\.png$", sentence)
    build(tmp_path / "a.sqlite", source="coco", root=str(coco), images=str(coco))


def test_image_of_another_size_than_its_boxes_is_refused(coco: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 20)).save(coco / "train2017" / "6.png")
    settings = {"source": "coco", "root": str(coco), "calibration": 16, "heldout": 4}
    assert re.search(r"6\.png: is 40×20 pixels, but .* 20×10", refused(tmp_path, **settings))
    file(coco, "instances").unlink()
    build(tmp_path / "a.sqlite", **settings).close()


def test_an_image_changed_since_is_no_image_of_the_database(coco: Path, tmp_path: Path) -> None:
    database = build(tmp_path / "a.sqlite", source="coco", root=str(coco), calibration=16)
    rows = database.rows("image", "calibration")
    database.check_images(rows)
    (changed, other) = rows[3].image_path, rows[4].image_path
    assert changed is not None
    assert other is not None
    Image.new("RGB", (20, 10), (1, 1, 1)).save(changed)
    database.check_images(rows[:3])
    with pytest.raises(LayersenseError, match=re.escape(f"{changed}: is not the image that")):
        database.check_images(rows)
    other.unlink()
    with pytest.raises(LayersenseError, match="no such image"):
        database.check_images(rows[4:])


def test_the_files_whose_edit_makes_a_database_stale(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def listed(**settings: Any) -> list[str]:
        dataset = TypeAdapter[Any](Dataset).validate_python(settings)
        return [str(path) for path in source_files(dataset)]

    notes = "coco/annotations"
    both = [f"{notes}/captions_train2017.json", f"{notes}/instances_train2017.json"]
    # A study that is moved with its data is not stale: nothing absolute in its own folder.
    assert listed(source="coco", root="coco") == listed(source="coco", root=str(coco)) == both
    assert listed(source="coco", root="coco", fetch={}) == []
    assert listed(source="sample") == []
    assert listed(source="text", file="./a b.jsonl") == ["a b.jsonl"]
    monkeypatch.setenv("HOME", "/home/me")
    assert listed(source="text", file="~/a.jsonl") == ["/home/me/a.jsonl"]
    assert listed(source="images", images="coco", table="t.csv") == ["t.csv"]
    for kind in ("annotations", "train2017"):
        shutil.make_archive(str(coco / kind), "zip", coco, kind)
        shutil.rmtree(coco / kind)
    zips = ["coco/annotations.zip", "coco/train2017.zip"]
    assert listed(source="coco", root="coco") == zips
    inside = "coco/annotations.zip/annotations/captions_train2017.json"
    assert listed(source="coco", root="coco", captions=inside) == zips
    assert listed(source="images", images="coco/train2017.zip", table="t.csv") == [
        "t.csv",
        "coco/train2017.zip",
    ]


def test_more_samples_than_there_are(coco: Path, tmp_path: Path) -> None:
    sentence = refused(tmp_path, source="coco", root=str(coco), calibration=17)
    assert "asks for 17 calibration rows" in sentence
    assert "only 16" in sentence
    sentence = refused(tmp_path, source="coco", root=str(coco), heldout=5)
    assert "asks for 5 heldout rows" in sentence
    assert "only 4" in sentence


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("image,text\na.png,one\na.png, \n", "line 3: has an empty text"),
        ("image,text\na.png,one\n../a.png,two\n", r"line 3: has the file name '\.\./a\.png'"),
        ("image,text\na.png,one\na.png,two, three\n", "line 3 has more fields"),
        ("image,text\na.png,one\na.png\n", "line 3 has fewer fields"),
        ("image;text\na.png;one\n", r"line 1 has the columns \['image;text'\]"),
        ("image,text,text\na.png,one,two\n", "line 1 has the columns"),
        ('image,text\na.png,"one\n', "line 2 is not CSV"),
        ("", "line 1 has the columns"),
    ],
)
def test_wrong_line_of_a_csv_is_named(photos: Path, tmp_path: Path, content: str, why: str) -> None:
    table = tmp_path / "t.csv"
    table.write_text(content)
    sentence = refused(tmp_path, source="images", images=str(photos), table=str(table))
    assert re.search(rf"{table}: {why}", sentence), sentence


def test_csv_in_latin_1_is_named(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes("image,text\na.png,one\na.png,caf\xe9\n".encode("latin-1"))
    sentence = refused(tmp_path, source="images", images=str(photos), table=str(table))
    assert f"{table}: line 3 is not UTF-8" in sentence


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"text": "a"}\n{"text": ""}\n', "line 2: has an empty text"),
        ('{"text": "a"}\n\n{"text": 5}\n', "line 3: is not a row .*Expected `str`"),
        ('{"text": "a"}\n{"txt": "b"}\n', "line 2: .*missing required field `text`"),
        ('{"text": "a"}\n{"text": "b"', "line 2: .*truncated"),
    ],
)
def test_wrong_line_of_a_jsonl_is_named(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    sentence = refused(tmp_path, source="text", file=str(path))
    assert re.search(rf"{path}: {why}", sentence), sentence


def test_table_of_another_kind_is_refused(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.xlsx"
    table.write_bytes(b"PK")
    sentence = refused(tmp_path, source="images", images=str(photos), table=str(table))
    assert "t.xlsx: ends in '.xlsx', but .csv or .jsonl was expected" in sentence


# --- the disk

BUILD = """
import sys
from layersense.calibration.build import build_database
from layersense.config import SampleDataset
from layersense.errors import LayersenseError
try:
    build_database("s", SampleDataset(source="sample", calibration=9, heldout=1), sys.argv[1])
except LayersenseError as error:
    sys.exit(f"told: {error}")
"""


def test_file_size_limit_leaves_the_old_database(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    build(path, source="sample").close()
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        capture_output=True,
        text=True,
    )
    assert re.fullmatch(r"told: .*s\.sqlite: cannot be written \(.*\); free disk.*\n", done.stderr)
    assert files(tmp_path) == [path.name]
    assert path.read_bytes() == before


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(LayersenseError, match=r"s\.sqlite: cannot be written \(.*full"):
            build(disk / "s.sqlite", source="sample")
        assert files(disk) == []
        with pytest.raises(OSError, match="No space") as full:  # the disk was really too small
            (disk / "x").write_bytes(bytes(100_000))
        assert full.value.errno == errno.ENOSPC
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- several at once


@pytest.mark.slow
def test_jobs_that_start_together_build_once(coco: Path, tmp_path: Path) -> None:
    """An orphan of a killed workflow and its successor, on one machine or on several."""
    path = tmp_path / "out" / "a.sqlite"
    settings = {"source": "coco", "root": str(coco), "calibration": 4, "heldout": 1}
    command = [sys.executable, "-m", "layersense", "dataset", "d", "--out", str(path)]
    # Rows enough that the first is still at work when the last has started.
    edit(
        coco,
        "captions",
        lambda c: c["annotations"].extend(
            {"id": 1000 + i, "image_id": 1 + i % 10, "caption": f"text {i}"} for i in range(200_000)
        ),
    )
    processes = [
        subprocess.Popen(
            [*command, "--settings", json.dumps(settings)], stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, told
    waited = ["another job builds this dataset" in text for text in told]
    built = ["was built meanwhile" not in text for text in told]
    # A process that came after all others were done builds again, as it was asked to.
    assert sum(built) == waited.count(False) < 4
    assert any(waited)
    assert files(path.parent) == ["a.sqlite"]
    with open_database(path) as database:
        assert database.count("caption", "calibration") == 4


def test_a_job_that_waited_builds_what_is_of_other_settings(coco: Path, tmp_path: Path) -> None:
    """Only a database of the very same entry stands for one's own work."""
    from layersense.calibration.build import _is_of

    path = tmp_path / "a.sqlite"
    adapter = TypeAdapter[Any](Dataset)
    entry = {"source": "coco", "root": str(coco), "calibration": 4, "heldout": 1}
    assert not _is_of(path, adapter.validate_python(entry))
    build(path, source="coco", root=str(coco)).close()
    assert _is_of(path, adapter.validate_python({**entry, "fetch": {}}))
    assert not _is_of(path, adapter.validate_python({**entry, "seed": 1}))
