"""Build calibration databases at the scale of COCO train2017: seconds, memory, size.

`python benchmarks/coco_database.py` writes synthetic files in COCO's format (118,287 images,
591,753 captions, 860,001 instances in about 470 MB) into a temporary folder, builds in processes
of their own, and prints a table. The images are links to those of the embedded sample.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from layersense.calibration.build import check_images, read_records, write_database
from layersense.calibration.database import SAMPLE
from layersense.calibration.sampling import draw
from layersense.config import CocoDataset

IMAGES = 118_287
CAPTIONS = 591_753
INSTANCES = 860_001
CATEGORIES = 80
POINTS = 21
WORDS = "a man woman dog cat riding holding red small street kitchen table with on of two".split()  # noqa: SIM905


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="layersense-coco-") as folder:
        root = Path(folder)
        make_coco(root)
        notes = root / "annotations"
        sizes = {path.name: path.stat().st_size / 1e6 for path in notes.iterdir()}
        print(
            "| input | JSON to SQLite, s | … of CPU, s | sampled images, s "
            "| peak RSS, MB | database, MB |"
        )
        print("| --- | --- | --- | --- | --- | --- |")
        captions = f"captions ({sizes['captions_train2017.json']:.0f} MB)"
        print_row(root, captions, instances=False)
        print_row(
            root,
            f"{captions} + instances ({sizes['instances_train2017.json']:.0f} MB)",
            instances=True,
        )


def print_row(root: Path, label: str, *, instances: bool) -> None:
    file = root / "annotations" / "instances_train2017.json"
    hidden = file.with_suffix(".hidden")
    if not instances:
        file.rename(hidden)
    command = [sys.executable, __file__, str(root)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    if not instances:
        hidden.rename(file)
    seconds, cpu, hashing, peak, size, opened = json.loads(done.stdout)
    print(
        f"| {label} | {seconds:.1f} | {cpu:.1f} | {hashing:.1f} ({opened} images) "
        f"| {peak:.0f} | {size:.0f} |",
        flush=True,
    )


def build(root: Path) -> None:
    """Do what `build_database` does, step by step, and print what each cost as JSON."""
    dataset = CocoDataset(source="coco", root=str(root))
    target = root / "database.sqlite"
    start, cpu_start = time.perf_counter(), time.process_time()
    records = read_records(dataset)
    samples = draw(records, calibration=512, heldout=64, seed=0, name="benchmark")
    drawn, cpu_drawn = time.perf_counter(), time.process_time()
    images = check_images(records, samples)
    checked, cpu_checked = time.perf_counter(), time.process_time()
    write_database("benchmark", dataset, records, samples, images, target)
    end, cpu_end = time.perf_counter(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    seconds, cpu = end - checked + drawn - start, cpu_drawn - cpu_start + cpu_end - cpu_checked
    size = target.stat().st_size / 1e6
    print(json.dumps([seconds, cpu, checked - drawn, peak, size, len(images)]))


def make_coco(root: Path) -> None:
    """Write captions, instances and images; sizes and lengths are like COCO's."""
    dice = random.Random(0)
    notes, folder = root / "annotations", root / "train2017"
    notes.mkdir()
    folder.mkdir()
    photographs = sorted(SAMPLE.glob("*2017/*.jpg"))
    ids = dice.sample(range(1, 600_000), IMAGES)
    shown = json.loads((SAMPLE / "annotations" / "instances_val2017.json").read_text())
    size = {image["file_name"]: image for image in shown["images"]}
    photographs = [photograph for photograph in photographs if photograph.name in size]
    images = []
    for key in ids:
        photograph = photographs[key % len(photographs)]
        name = f"{key:012d}.jpg"
        (folder / name).symlink_to(photograph)
        images.append(
            {
                "license": 3,
                "file_name": name,
                "coco_url": f"http://images.cocodataset.org/train2017/{name}",
                "height": size[photograph.name]["height"],
                "width": size[photograph.name]["width"],
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": f"http://farm9.staticflickr.com/8186/{key}_4e622c8349_z.jpg",
                "id": key,
            }
        )
    captions = (
        {
            "image_id": ids[number % IMAGES],
            "id": number + 1,
            "caption": " ".join(dice.choices(WORDS, k=11)) + f" {number}.",
        }
        for number in range(CAPTIONS)
    )
    categories = [
        {"supercategory": "thing", "id": key, "name": f"thing {key}"}
        for key in range(1, CATEGORIES + 1)
    ]
    write_json(notes / "captions_train2017.json", images, captions, [])
    boxes = (instance(dice, number, ids) for number in range(INSTANCES))
    write_json(notes / "instances_train2017.json", images, boxes, categories)


def instance(dice: random.Random, number: int, ids: list[int]) -> dict[str, object]:
    points = [round(dice.random() * 400, 2) for _ in range(2 * dice.randint(5, 2 * POINTS))]
    crowd = number % 86 == 0
    runs = {"counts": [dice.randint(1, 99) for _ in range(200)], "size": [300, 400]}
    return {
        "segmentation": runs if crowd else [points],
        "area": round(dice.random() * 9000, 4),
        "iscrowd": int(crowd),
        "image_id": ids[dice.randrange(IMAGES)],
        "bbox": points[:4],
        "category_id": dice.randint(1, CATEGORIES),
        "id": number + 1,
    }


def write_json(
    path: Path, images: object, annotations: Iterable[object], categories: object
) -> None:
    with path.open("w") as file:
        file.write('{"info": {}, "licenses": [], "images": ' + json.dumps(images))
        file.write(', "annotations": [')
        for number, annotation in enumerate(annotations):
            file.write((", " if number else "") + json.dumps(annotation))
        file.write('], "categories": ' + json.dumps(categories) + "}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        build(Path(sys.argv[1]))
    else:
        main()
