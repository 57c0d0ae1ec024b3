"""Make the embedded sample from a part of COCO 2017: `python make_coco_sample.py COCO_ROOT`.

Ships the photographs under COCO licence 4 (Attribution) and 7 (no known restrictions) and no
others, scaled down, with their captions and with their instances scaled alike.
"""

import json
import shutil
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

LICENCES = (4, 7)
LONGEST_SIDE = 400
QUALITY = 80
SPLITS = ("train2017", "val2017")
TARGET = Path(__file__).parent / "coco-sample"


def main(root: Path) -> None:
    """Write ``coco-sample/`` beside this file, replacing what is there."""
    shutil.rmtree(TARGET, ignore_errors=True)
    (TARGET / "annotations").mkdir(parents=True)
    credits: list[str] = []
    for split in SPLITS:
        credits += _make_split(root, split)
    (TARGET / "ATTRIBUTION.md").write_text(_attribution(credits), encoding="utf-8")


def _make_split(root: Path, split: str) -> list[str]:
    captions = _read(root, f"captions_{split}")
    instances = _read(root, f"instances_{split}")
    kept = [image for image in captions["images"] if image["license"] in LICENCES]
    ids = {image["id"] for image in kept}
    (TARGET / split).mkdir()
    scales = {}
    for image in kept:
        old = (image["width"], image["height"])
        image["width"], image["height"] = _shrink(root, split, image["file_name"])
        scales[image["id"]] = (image["width"] / old[0], image["height"] / old[1])
    licenses = [licence for licence in captions["licenses"] if licence["id"] in LICENCES]
    common = {"info": captions["info"], "licenses": licenses, "images": kept}
    texts = [a for a in captions["annotations"] if a["image_id"] in ids]
    _write(f"captions_{split}", {**common, "annotations": texts})
    sizes = {image["id"]: (image["width"], image["height"]) for image in kept}
    boxes = [
        _scale(a, *scales[a["image_id"]], sizes[a["image_id"]])
        for a in instances["annotations"]
        if a["image_id"] in ids
    ]
    categories = {"categories": instances["categories"]}
    _write(f"instances_{split}", {**common, "annotations": boxes, **categories})
    names = {licence["id"]: licence for licence in licenses}
    return [_credit(split, image, names[image["license"]]) for image in kept]


def _shrink(root: Path, split: str, name: str) -> tuple[int, int]:
    with Image.open(root / split / name) as image:
        small = ImageOps.contain(
            image.convert("RGB"), (LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS
        )
    small.save(TARGET / split / name, quality=QUALITY, optimize=True)
    size: tuple[int, int] = small.size
    return size


def _scale(annotation: dict[str, Any], x: float, y: float, size: tuple[int, int]) -> dict[str, Any]:
    """Return an instance in the scaled image: box, area, and polygons or run lengths."""
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, dict):
        segmentation = _scale_runs(segmentation, size)
        area: float = sum(segmentation["counts"][1::2])
    else:
        segmentation = [_scale_points(polygon, x, y) for polygon in segmentation]
        area = round(annotation["area"] * x * y, 2)
    return {
        **annotation,
        "segmentation": segmentation,
        "area": area,
        "bbox": _scale_points(annotation["bbox"], x, y),
    }


def _scale_points(values: list[float], x: float, y: float) -> list[float]:
    return [round(v * (y if i % 2 else x), 1) for i, v in enumerate(values)]


def _scale_runs(mask: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Scale COCO's uncompressed run lengths: column by column, a run of zeros first."""
    height, width = mask["size"]
    values = np.arange(len(mask["counts"])) % 2
    pixels = np.repeat(values, mask["counts"]).reshape((height, width), order="F")
    image = Image.fromarray((pixels * 255).astype(np.uint8))
    scaled = np.asarray(image.resize(size, Image.Resampling.NEAREST)).ravel(order="F") > 0
    runs = [(bool(value), len(list(run))) for value, run in groupby(scaled)]
    counts = [length for _, length in runs]
    if runs[0][0]:
        counts.insert(0, 0)
    return {"counts": counts, "size": [size[1], size[0]]}


def _credit(split: str, image: dict[str, Any], licence: dict[str, Any]) -> str:
    url = licence["url"].replace("\\", "")
    return (
        f"| `{split}/{image['file_name']}` | {image['flickr_url']} | {image['coco_url']} "
        f"| [{licence['name']}]({url}) |"
    )


def _attribution(credits: list[str]) -> str:
    lines = [
        "# Attribution",
        "",
        f"These {len(credits)} photographs are from [COCO 2017](https://cocodataset.org): those",
        "that its annotations mark with licence 4 (Attribution License) or 7 (No known copyright",
        "restrictions). They belong to the Flickr users who took them, linked below. **Changed:**",
        f"scaled down to at most {LONGEST_SIDE} pixels a side and compressed again as JPEG.",
        "",
        "The captions and instances are by the COCO Consortium, under",
        "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). **Changed:** cut to these",
        "photographs; boxes and masks scaled with them, rounded to a tenth of a pixel.",
        "",
        "| photograph | source | in COCO | licence |",
        "| --- | --- | --- | --- |",
        *credits,
    ]
    return "\n".join(lines) + "\n"


def _read(root: Path, name: str) -> dict[str, Any]:
    path = root / "annotations" / f"{name}.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(name: str, content: dict[str, Any]) -> None:
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    (TARGET / "annotations" / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
