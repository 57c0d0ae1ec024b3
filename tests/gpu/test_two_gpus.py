"""One model over two GPUs scores as on one."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.usefixtures("all_extensions")]

torch = pytest.importorskip("torch")
if torch.cuda.device_count() < 2:
    pytest.skip(
        f"needs 2 GPUs, {torch.cuda.device_count()} can be used here", allow_module_level=True
    )

from layersense.calibration.build import build_database  # noqa: E402
from layersense.calibration.database import open_database  # noqa: E402
from layersense.config import SampleDataset  # noqa: E402
from layersense.quantization.formats import resolve_format  # noqa: E402

FORMATS = (
    "FP8_ALL_LAYERS_CFG",
    "INT8_ALL_LAYERS_CFG",
    "INT4_AWQ_ALL_LAYERS_CFG",
    "NVFP4_ALL_LAYERS_CFG",
    "MXFP8_ALL_LAYERS_CFG",
)
"""Each kernel of ModelOpt once, and an algorithm that runs its own passes."""


def measurement(folder: Path, kind: str) -> Any:
    from tiny_models import resolve_folder, save_tiny_llama, save_tiny_qwen2_5_vl

    from layersense.models.tasks import get_task
    from layersense.models.tasks.protocol import Sampling
    from layersense.scoring.measurement import Measurement

    task, save = {
        "llm": ("causal-lm", save_tiny_llama),
        "vlm": ("image-text-to-text", save_tiny_qwen2_5_vl),
    }[kind]
    dataset = SampleDataset(source="sample", calibration=16, heldout=4)
    build_database("sample", dataset, folder / "sample.sqlite")
    with open_database(folder / "sample.sqlite") as database:
        rows = database.rows("caption", "calibration", limit=16)
    modality = "image_text" if kind == "vlm" else "text"
    return Measurement(
        checkpoint=resolve_folder(save(folder / "model"), task),
        task=get_task(task),
        sampling=Sampling(max_length=64, modality=modality),
        method="gradient",
        calibration_rows=rows,
        score_rows=rows,
        calibration_batch_size=4,
        score_batch_size=4,
        dtype="float32",
        device=torch.device("cuda"),
        seed=0,
    )


def scores(measure: Any, what: Any) -> dict[str, dict[str, float]]:
    found = {}
    for _, entries in measure(what, [resolve_format(name, {}) for name in FORMATS]):
        for name, entry in entries.items():
            found[name] = {handle: sum(g.batch_scores) for handle, g in entry.groups.items()}
    return found


@pytest.mark.parametrize("kind", ["llm", "vlm"])
@pytest.mark.parametrize("engine", ["fused", "modelopt"])
def test_scores_equal_those_on_one(tmp_path: Path, kind: str, engine: str) -> None:
    from layersense.scoring.engines import get_engine

    what = measurement(tmp_path, kind)
    one = scores(get_engine(engine), what)
    two = scores(get_engine(engine), replace(what, gpus=2))
    for name in FORMATS:
        differences = [abs(two[name][h] - s) / abs(s) for h, s in one[name].items() if s]
        print(f"{kind}, {engine}, {name}: largest {max(differences):.1e}")
        assert statistics.median(differences) <= 1e-4
        assert max(differences) <= 1e-2


@pytest.mark.parametrize("kind", ["llm", "vlm"])
def test_both_gpus_hold_layers(tmp_path: Path, kind: str) -> None:
    from layersense.scoring.measurement import load

    model = load(replace(measurement(tmp_path, kind), gpus=2)).model
    assert {parameter.device.index for parameter in model.parameters()} == {0, 1}
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())


def test_checkpointing_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layersense.scoring import fused
    from layersense.scoring.fused import fit

    what = replace(measurement(tmp_path, "llm"), gpus=2)
    plain = scores(fused.measure, what)
    monkeypatch.setattr(fit, "FULL", 0.0)  # nothing is expected to fit
    again = scores(fused.measure, what)
    for name in FORMATS:
        for handle, score in plain[name].items():
            assert again[name][handle] == pytest.approx(score, rel=1e-2, abs=1e-12)
