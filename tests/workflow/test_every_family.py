"""One config with a model of every family, from Snakemake to one summary, without a GPU."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from conftest import Project, make_project

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

FAMILIES = {
    "vlm": ("llava_onevision", "image-text-to-text", {"vision", "projector", "language", "head"}),
    "vlm-moe": ("qwen3_vl_moe", "image-text-to-text", {"vision", "projector", "language", "head"}),
    "llm": ("qwen3", "causal-lm", {"language", "head"}),
    "moe": ("qwen3_moe", "causal-lm", {"language", "head"}),
    "t5": ("t5", "seq2seq-lm", {"encoder", "decoder", "head"}),
    "detector": ("yolos", "object-detection", {"backbone", "head"}),
    "yolo": ("yolo_pickle", "object-detection", {"backbone", "neck", "head"}),
    "classifier": ("resnet", "image-classification", {"backbone", "head"}),
    "segmenter": ("segformer", "semantic-segmentation", {"backbone", "head"}),
}
"""Name → builder, task, subsystems."""
if find_spec("ultralytics") is None:
    del FAMILIES["yolo"]
TABLE = (0.27, 0.78, 0.54, 0.44)
"""About where the one dining table of the held-out photographs is: center, width and height in
shares of the photograph."""


def see_tables(folder: Path) -> None:
    """Let a YOLOS see a dining table about there, whatever it looks at."""
    import torch
    from transformers import YolosForObjectDetection

    model = YolosForObjectDetection.from_pretrained(folder)
    with torch.no_grad():
        classes, boxes = model.class_labels_classifier.layers[-1], model.bbox_predictor.layers[-1]
        classes.weight.mul_(-0.3)  # turned round, it is surest where there is one
        boxes.weight.mul_(0.1)
        classes.bias[model.config.label2id["dining table"]] += 6
        boxes.bias.copy_(torch.logit(torch.tensor(TABLE)))
    model.save_pretrained(folder)


def config() -> dict[str, Any]:
    run: dict[str, Any] = {
        "dataset": "sample",
        "schemes": ["fp8_int4"],
        "device": "cpu",
        "calibration_samples": 4,
        "score_samples": 4,
        "batch_size": 2,
        "max_length": 256,
    }
    models: dict[str, dict[str, Any]] = {
        name: {"checkpoint": f"./checkpoints/{name}", "task": task}
        for name, (_, task, _) in FAMILIES.items()
    }
    if "yolo" in models:
        models["yolo"] |= {"checkpoint": "./checkpoints/yolo/best.pt", "trust_remote_code": True}
    runs = {f"{name}.sample": {"model": name, **run} for name in FAMILIES}
    runs["detector.sample"]["verify"] = {"groups": 6, "points": 1, "random": 1}
    return {
        "datasets": {"sample": {"source": "sample", "calibration": 24, "heldout": 4}},
        "models": models,
        "schemes": {
            "fp8_int4": {
                "quant_formats": ["FP8_ALL_LAYERS_CFG", "W4A8_INT4_FP8"],
                "effective_bits": 7.0,
            }
        },
        "runs": runs,
    }


@pytest.fixture(scope="module")
def project(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    sys.path.insert(0, str(repository / "tests" / "unit"))
    import tiny_families

    project = make_project(tmp_path_factory.mktemp("families") / "project", repository)
    for name, (builder, _, _) in FAMILIES.items():
        folder = project.root / "checkpoints" / name
        tiny_families.seeded(getattr(tiny_families, builder), folder)
    see_tables(project.root / "checkpoints/detector")
    project.config_file.write_text(yaml.safe_dump(config()))
    project.run()
    return project


def test_yolo_is_among_them(project: Project) -> None:
    if "yolo" not in FAMILIES:
        pytest.skip("YOLO needs ultralytics: pip install --no-deps -r envs/yolo.lock")
    report = project.results / "yolo.sample/fp8_int4/layer-sensitivity-report.md"
    assert "ran Python code that came with the checkpoint" in report.read_text()


def test_every_subsystem_is_non_zero(project: Project) -> None:
    table = pq.read_table(project.results / "sensitivity.parquet").to_pandas()
    quantized = table[table["format"] != "NONE"]
    totals = quantized.groupby(["model", "format", "subsystem"], observed=True)["score"].sum()
    for name, (_, _, subsystems) in FAMILIES.items():
        for format in ("FP8_ALL_LAYERS_CFG", "W4A8_INT4_FP8"):
            found = totals[name, format]
            assert set(found.index) == subsystems, name
            assert (found > 0).all(), (name, format)
        assert (quantized[quantized["model"] == name]["reached"] == "scored").all()


def test_one_summary_holds_them_all(project: Project) -> None:
    summary = (project.results / "summary.md").read_text()
    for name in FAMILIES:
        assert f"## {name}" in summary.replace("\\", "")
    runs = pq.read_table(project.results / "runs.parquet").to_pandas().set_index("model")
    assert (runs["effective_bits"] <= 7.0 + 1e-6).all()
    assert (runs["errors"] == 0).all()
    assert runs["task"].to_dict() == {name: task for name, (_, task, _) in FAMILIES.items()}


def precision_of_tables(checkpoint: Path, database: Path) -> float:
    """Return the mean AP of a model that sees tables alone, by transformers and by arithmetic.

    Of one object the precision at any recall is 1 / the rank of the first box that hits it. The
    other classes that are shown have none.
    """
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    from layersense.calibration.database import open_database

    model = AutoModelForObjectDetection.from_pretrained(checkpoint).eval()
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    with open_database(database) as opened:
        rows = opened.rows("image", "heldout")
    shown = {one.category for row in rows for one in row.objects}
    found = []
    for row in rows:
        image = Image.open(row.image_path).convert("RGB")
        tables = [one.bbox for one in row.objects if one.category == "dining table"]
        with torch.no_grad():
            output = model(**processor(images=image, return_tensors="pt"))
        (boxes,) = processor.post_process_object_detection(
            output, threshold=0.0, target_sizes=[(image.height, image.width)]
        )
        assert {model.config.id2label[int(one)] for one in boxes["labels"]} == {"dining table"}
        for score, corners in zip(boxes["scores"], boxes["boxes"].tolist(), strict=True):
            found.append((float(score), max([overlap(corners, one) for one in tables] or [0.0])))
    found.sort(reverse=True)
    precisions = []
    for threshold in range(50, 100, 5):
        ranks = [rank for rank, (_, iou) in enumerate(found, start=1) if iou >= threshold / 100]
        precisions.append(1 / ranks[0] if ranks else 0.0)
    return sum(precisions) / len(precisions) / len(shown)


def overlap(corners: list[float], bbox: tuple[float, ...]) -> float:
    """Return intersection over union of a box by its corners and one of COCO."""
    left, top, right, bottom = corners
    x, y, width, height = bbox
    common = max(0, min(right, x + width) - max(left, x)) * max(
        0, min(bottom, y + height) - max(top, y)
    )
    return common / ((right - left) * (bottom - top) + width * height - common)


def test_a_detector_is_judged_by_its_average_precision(project: Project) -> None:
    rows = pq.read_table(project.results / "detector.sample/verification.parquet").to_pylist()
    (unquantized,) = (row for row in rows if row["kind"] == "before")
    expected = precision_of_tables(
        project.root / "checkpoints/detector", project.results / "calibration/sample.sqlite"
    )
    assert expected == pytest.approx(0.046, abs=0.01)
    assert unquantized["metrics"][0]["value"] == pytest.approx(expected, abs=1e-6)
    for row in rows:
        if row["kind"] == "recipe":
            assert [one["name"] for one in row["metrics"]] == ["mAP@[.5:.95]"]
    report = project.results / "detector.sample/fp8_int4/layer-sensitivity-report.md"
    assert f"| unquantized | – | {expected * 100:.1f} % (" in report.read_text()


def test_a_second_call_has_nothing_to_do(project: Project) -> None:
    assert project.run().jobs == set()
