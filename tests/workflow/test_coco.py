"""Real COCO photographs by config alone."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from conftest import Project

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
