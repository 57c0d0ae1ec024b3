"""The dry pass: what it sees is what scoring then finds, and it leaves no trace."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow  # importing ModelOpt takes 15 s

torch = pytest.importorskip("torch")

import tiny_families as families  # noqa: E402
from studies import _config, sample_database, study  # noqa: E402
from tiny_models import resolve_folder  # noqa: E402

from layersense import settings  # noqa: E402
from layersense.cli import app  # noqa: E402
from layersense.errors import LayersenseError  # noqa: E402
from layersense.models.checkpoints import write_checkpoint  # noqa: E402
from layersense.scoring import reach  # noqa: E402
from layersense.scoring.job import prepare_measurement  # noqa: E402
from layersense.scoring.measurement import load  # noqa: E402
from layersense.validation import load_config  # noqa: E402


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return families.builder(tmp_path_factory)


def prepared(shared: Path, folder: Path, task: str, **run: Any) -> Any:
    config = load_config(yaml.safe_load(yaml.safe_dump(_config(str(folder), task, run))), "test")
    return prepare_measurement(
        settings.score_settings(config, "run"),
        resolve_folder(folder, task),
        sample_database(shared),
    )[0]


@pytest.mark.parametrize(
    ("name", "task", "run"),
    [
        ("t5", "seq2seq-lm", {}),
        ("rt_detr", "object-detection", {}),
        ("qwen3_vl_moe", "image-text-to-text", {}),
        ("gpt2", "causal-lm", {}),
        ("llava_onevision", "image-text-to-text", {"modality": "text"}),
        ("bart", "outside_tasks:FrozenEncoder", {"modality": "text_pair"}),
        ("t5", "outside_tasks:EncoderOnly", {"modality": "text_pair"}),
        ("yolos", "outside_tasks:ClassesOnly", {"modality": "image_boxes"}),
        ("llava_onevision", "image-text-to-text", {"method": "kl_div", "modality": "text"}),
    ],
)
def test_the_dry_pass_sees_what_scoring_finds(
    shared: Path, checkpoint: Any, caplog: Any, name: str, task: str, run: dict[str, Any]
) -> None:
    with caplog.at_level(logging.INFO, "layersense"):
        result = study(shared, checkpoint(name), task, **run)
    measurement = prepared(shared, checkpoint(name), task, **run)
    found, _ = reach.dry_pass(measurement, load(measurement))
    groups = result.manifest.layer_sensitivity
    expected: dict[str, set[tuple[str, str]]] = {}
    for group in groups.values():
        expected.setdefault(group.subsystem, set()).update(
            (module, group.reached) for module in group.module_names if group.reached != "scored"
        )
    assert {part.subsystem: set(part.missed.items()) for part in found} == expected
    assert sum(part.layers for part in found) == sum(
        len(group.module_names) for group in groups.values()
    )
    messages = [record.getMessage() for record in caplog.records]
    warned = [record.levelname for record in caplog.records if "subsystem" in record.getMessage()]
    zero = {part for part, missed in expected.items()
            if missed and all(g.reached != "scored" for g in groups.values()
                              if g.subsystem == part)}  # fmt: skip
    assert warned == ["WARNING"] * len(zero)
    assert {
        part for part in expected if any(f"the {part} subsystem" in m for m in messages)
    } == zero
    # Before anything is calibrated, and once.
    at = [i for i, message in enumerate(messages) if message.startswith("dry pass of")]
    assert len(at) == 1
    assert at[0] < next(i for i, message in enumerate(messages) if "scoring batches" in message)


def test_it_leaves_no_trace(shared: Path, checkpoint: Any) -> None:
    measurement = prepared(shared, checkpoint("rt_detr"), "object-detection")
    loaded = load(measurement)
    model = loaded.model

    def state() -> Any:
        return (
            [p.requires_grad for p in model.parameters()],
            [len(m._forward_hooks) for m in model.modules()],
            torch.random.get_rng_state().tolist(),
        )

    before, weights = state(), {k: v.clone() for k, v in model.state_dict().items()}
    reach.dry_pass(measurement, loaded)
    assert state() == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_it_goes_on_until_everything_is_reached(shared: Path, checkpoint: Any) -> None:
    measurement = prepared(shared, checkpoint("gpt2"), "causal-lm")
    _, samples = reach.dry_pass(measurement, load(measurement))
    assert samples == 1
    measurement = prepared(
        shared, checkpoint("yolos"), "outside_tasks:ClassesOnly", modality="image_boxes"
    )
    _, samples = reach.dry_pass(measurement, load(measurement))
    assert samples == reach.SAMPLES


def test_no_memory_for_it_stops_no_scoring(
    shared: Path, checkpoint: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(reach, "dry_pass", fail)
    with caplog.at_level(logging.INFO, "layersense"):
        result = study(shared, checkpoint("gpt2"), "causal-lm", seed=3)
    assert all(score > 0 for score in result.subsystems.values())
    assert "the dry pass was left out (CUDA out of memory.)" in caplog.messages


def test_the_command_names_what_is_missed(
    shared: Path, checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    data = _config(str(checkpoint("llava_onevision")), "image-text-to-text", {})
    data["runs"]["texts"] = {**data["runs"]["run"], "modality": "text"}
    Path("config.yaml").write_text(yaml.safe_dump(data))

    def call(*words: str) -> Any:
        return CliRunner().invoke(app, ["reach", "config.yaml", *words])

    missing = call().exception
    assert isinstance(missing, LayersenseError)
    assert "snakemake results/models/model/model.json results/calibration/sample.sqlite" in str(
        missing
    )
    config = load_config(data, "test")
    model = Path("results/models/model/model.json")
    model.parent.mkdir(parents=True)
    write_checkpoint(model, resolve_folder(checkpoint("llava_onevision"), "image-text-to-text"))
    assert config.models["model"].task == "image-text-to-text"
    Path("results/calibration").mkdir()
    Path("results/calibration/sample.sqlite").symlink_to(sample_database(shared))
    good = call("--run", "run")
    assert good.exit_code == 0, good.output
    assert "run: dry pass of 1 sample: the loss reaches vision" in good.output
    bad = call("--device", "cpu")
    assert bad.exit_code == 1
    assert "texts: dry pass: the vision subsystem never ran in 4 samples" in bad.output
    assert "has no run nothing" in str(call("--run", "nothing").exception)
