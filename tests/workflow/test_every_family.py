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


def config() -> dict[str, Any]:
    run = {
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
    return {
        "datasets": {"sample": {"source": "sample", "calibration": 24, "heldout": 4}},
        "models": models,
        "schemes": {
            "fp8_int4": {
                "quant_formats": ["FP8_ALL_LAYERS_CFG", "W4A8_INT4_FP8"],
                "effective_bits": 7.0,
            }
        },
        "runs": {f"{name}.sample": {"model": name, **run} for name in FAMILIES},
    }


@pytest.fixture(scope="module")
def project(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    sys.path.insert(0, str(repository / "tests" / "unit"))
    import tiny_families

    project = make_project(tmp_path_factory.mktemp("families") / "project", repository)
    for name, (builder, _, _) in FAMILIES.items():
        folder = project.root / "checkpoints" / name
        tiny_families.seeded(getattr(tiny_families, builder), folder)
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


def test_a_second_call_has_nothing_to_do(project: Project) -> None:
    assert project.run().jobs == set()
