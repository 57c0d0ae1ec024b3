"""Real COCO photographs by config alone; COCO fetched."""

import io
import json
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image

from conftest import Project
from file_server import serve

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


def test_both_splits_of_real_coco_end_in_reports(
    new_study: Project, shared_data: Path, tmp_path: Path
) -> None:
    study = new_study.copy(tmp_path / "study")
    splits = ("train2017", "val2017")
    run = {
        "model": "vlm",
        "schemes": ["fp8"],
        "calibration_samples": 8,
        "score_samples": 4,
        "max_length": 512,
        "max_pixels": 50176,
        "device": "cpu",
    }
    config = {
        "datasets": {
            split: {
                "source": "coco",
                "root": str(shared_data / "coco2017-tiny"),
                "split": split,
                "calibration": 128,
                "heldout": 32,
            }
            for split in splits
        },
        "models": {"vlm": {"checkpoint": "./checkpoints/vlm", "task": "image-text-to-text"}},
        "schemes": {
            "fp8": {"quant_formats": ["FP8_ALL_LAYERS_CFG"], "effective_bits": 11.0},
        },
        "runs": {f"vlm.{split}": {**run, "dataset": split} for split in splits},
    }
    study.config_file.write_text(yaml.safe_dump(config))
    study.run()
    table = pd.read_parquet(study.results / "sensitivity.parquet")
    table = table[table["format"] != "NONE"]
    for split in splits:
        assert (study.results / f"vlm.{split}/fp8/layer-sensitivity-report.md").exists()
        scores = table[table["run"] == f"vlm.{split}"].groupby("subsystem", observed=True)["score"]
        assert (scores.max()[["vision", "language"]] > 0).all()


def test_a_dataset_fetches_what_it_draws(new_study: Project, tmp_path: Path) -> None:
    """Twice nothing, more rows their images alone, and how fast is no reason."""
    study = new_study.copy(tmp_path / "study")
    target = "results/calibration/photos.sqlite"
    with serve() as server:
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30)).save(buffer, "JPEG")
        images = [
            {"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30,
             "coco_url": f"{server.address}/{i}.jpg"}
            for i in range(1, 61)
        ]  # fmt: skip
        captions = [{"id": i, "image_id": i, "caption": f"photo {i}"} for i in range(1, 61)]
        server.files = {f"/{i}.jpg": buffer.getvalue() for i in range(1, 61)}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            content = json.dumps({"images": images, "annotations": captions})
            archive.writestr("annotations/captions_train2017.json", content)
        server.files["/notes.zip"] = buffer.getvalue()
        coco = {
            "source": "coco",
            "root": "data of mine/$(touch pwned) `touch pwned` {wildcards} {run}\n; touch pwned",
            "calibration": 8,
            "heldout": 2,
            "fetch": {"annotations": f"{server.address}/notes.zip"},
        }
        study.edit(lambda config: config["datasets"].update(photos=coco))
        assert study.run(target).jobs == {"fetch/photos", "dataset/photos"}
        sampled = study.json("calibration/photos.fetched.json")["sampled"]
        assert len(server.asked) == 1 + sampled
        study.edit(lambda config: config["datasets"]["photos"]["fetch"].update(connections=2))
        assert study.run(target).jobs == set()
        study.edit(lambda config: config["datasets"]["photos"].update(calibration=16))
        assert study.run(target).jobs == {"fetch/photos", "dataset/photos"}
        more = study.json("calibration/photos.fetched.json")
        assert more["fetched"] == more["sampled"] - sampled > 0
        assert len(server.asked) == 1 + more["sampled"]
    assert not list(study.root.rglob("pwned"))
