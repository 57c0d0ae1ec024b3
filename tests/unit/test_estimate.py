"""`layersense estimate`: counts what is measured, guesses what is held, reads no weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow  # importing ModelOpt takes 15 s

torch = pytest.importorskip("torch")

import tiny_families  # noqa: E402
from studies import sample_database, study  # noqa: E402
from tiny_models import resolve_folder, save_tiny_llama, save_tiny_qwen2_5_vl  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from layersense.calibration.database import open_database  # noqa: E402
from layersense.cli import app  # noqa: E402
from layersense.models.tasks import get_task  # noqa: E402
from layersense.models.tasks.protocol import Batch, Sampling  # noqa: E402
from layersense.quantization.formats import resolve_format  # noqa: E402
from layersense.scoring.fused.fit import (  # noqa: E402
    HELD_FACTOR,
    LOSS_COPIES,
    WEIGHT_COPIES,
    expected_bytes,
    expected_bytes_recomputed,
)
from layersense.scoring.fused.held import (  # noqa: E402
    expected_peaks,
    held_by_running,
    held_by_shapes,
)
from layersense.scoring.fused.quantizers import Quantizers  # noqa: E402

FP8, INT8 = "FP8_ALL_LAYERS_CFG", "INT8_ALL_LAYERS_CFG"
KINDS: dict[str, tuple[str, Any]] = {
    "llm": ("causal-lm", save_tiny_llama),
    "vlm": ("image-text-to-text", save_tiny_qwen2_5_vl),
    "resnet": (
        "image-classification",
        lambda folder: tiny_families.seeded(tiny_families.resnet, folder),
    ),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, shared: Path) -> Any:
    """A real model with quantizers, its task and a batch of four rows."""
    name, save = KINDS[request.param]
    task = get_task(name)
    folder = shared / request.param
    folder.mkdir()
    model = task.load(resolve_folder(save(folder), name), dtype="auto", device="cpu")
    modality = {"llm": "text", "vlm": "image_text", "resnet": "image_labels"}[request.param]
    with open_database(sample_database(shared)) as database:
        rows = database.rows(task.unit(modality), "calibration", limit=12)
    (batch, *_) = task.batches(model, rows, Sampling(max_length=32, modality=modality), 4)
    quantizers = Quantizers(model.model, [resolve_format(FP8, {})])
    return request.param, task, model.model, quantizers.groups, batch


def test_shapes_tell_what_a_real_pass_holds(loaded: Any) -> None:
    kind, task, model, groups, batch = loaded
    real = held_by_running(groups, lambda: task.forward(model, batch))
    told = held_by_shapes(groups, task.describe, batch, model.config)
    if kind == "resnet":
        assert told is None  # where its convolutions work cannot be told without running it
        return
    assert told == real


def test_what_a_real_pass_holds_is_what_its_linear_layers_see(loaded: Any) -> None:
    _, task, model, groups, batch = loaded
    seen: dict[str, int] = {}

    def watch(name: str) -> Any:
        return lambda module, args, output: seen.__setitem__(name, output.numel() * 4)

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d)
    ]
    real = held_by_running(groups, lambda: task.forward(model, batch))
    for hook in hooks:
        hook.remove()
    assert sum(outputs for _, outputs in real.values()) == sum(seen.values())


def test_the_peak_by_hand() -> None:
    assert expected_bytes(100, 10, logits=5) == 100 + HELD_FACTOR * 10 + LOSS_COPIES * 4 * 5
    # A weight whose quantization takes more than the loss, which is gone by then.
    assert expected_bytes(100, 10, 5, largest=50) == 100 + HELD_FACTOR * 10 + WEIGHT_COPIES * 50
    # Three blocks: every input, the largest block, and what lies outside of them.
    assert expected_bytes_recomputed(100, 8, [(2, 20), (2, 30), (1, 5)]) == pytest.approx(
        100 + HELD_FACTOR * (8 + 30) + 5
    )


@pytest.mark.parametrize("loaded", ["llm"], indirect=True)
def test_recomputing_leaves_one_block_and_the_inputs_of_all(loaded: Any) -> None:
    _, task, model, groups, batch = loaded
    held = held_by_shapes(groups, task.describe, batch, model.config)
    assert held is not None
    kept, recomputed = expected_peaks(model, groups, held, batch.n_tokens)
    tokens, item = batch.labels.numel(), 4
    weights = sum(parameter.numel() for parameter in model.parameters()) * item
    # 64 wide, 128 between, 2 of 4 heads for keys and values: q, k, v; o; gate, up; down.
    block = (64 + 64 + 32 + 32) + (64 + 64) + (64 + 128 + 128) + (128 + 64)
    classes = model.config.vocab_size
    head = 64 + classes
    largest = WEIGHT_COPIES * 4 * 64 * max(classes, 128)  # of the head, or of an MLP
    loss = max(LOSS_COPIES * 4 * batch.n_tokens * classes, largest)
    assert kept == pytest.approx(weights + HELD_FACTOR * tokens * item * (2 * block + head) + loss)
    assert recomputed == pytest.approx(
        weights + HELD_FACTOR * tokens * item * (block + head) + 2 * 64 * tokens * item + loss
    )


@pytest.mark.parametrize(
    ("shape", "supervised", "kept", "recomputed"),
    [
        # Peaks in GiB on an H100: batches of 4 texts of 512 tokens, or of 4 images of 640×480.
        ("qwen2.5-0.5b", 2044, 7.9, 5.3),
        ("qwen2.5-vl-3b", 200, 34.6, 11.9),
        ("qwen2.5-vl-7b", 200, 46.7, 20.9),
    ],
)
def test_the_guess_is_near_what_was_measured(
    shape: str,
    supervised: int,
    kept: float,
    recomputed: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from random_models import SHAPES, make_model

    model, _ = make_model(shape, "meta")
    vision = SHAPES[shape].vision
    ids = torch.zeros(4, 496 if vision else 512, dtype=torch.int64)
    inputs = {"input_ids": ids}
    if vision:
        image = int(model.config.image_token_id)
        ids[:, :416] = image  # 1,663 patches an image, four to a token
        inputs["pixel_values"] = torch.empty(6652, 1176, device="meta")
    batch = Batch(
        inputs=inputs, labels=ids, n_tokens=supervised, n_samples=4, n_padding=0, n_truncated=0
    )
    task = get_task("image-text-to-text" if vision else "causal-lm")
    groups = Quantizers(model, [resolve_format(FP8, {})]).groups
    held = held_by_shapes(groups, task.describe, batch, model.config)
    assert held is not None
    guess = expected_peaks(model, groups, held, batch.n_tokens)
    for guessed, measured in zip(guess, (kept, recomputed), strict=True):
        assert guessed is not None
        assert 0.95 <= guessed / 2**30 / measured <= 1.15


# --- the command ---------------------------------------------------------------------------------


def write_config(place: Path, kind: str, **run: Any) -> Path:
    file = place / "config.yaml"
    config = {
        "datasets": {"sample": {"source": "sample", "calibration": 40, "heldout": 5}},
        "models": {"model": {"checkpoint": f"./{kind}", "task": KINDS[kind][0]}},
        "schemes": {"s": {"quant_formats": [FP8, INT8], "effective_bits": 11}},
        "runs": {
            "run": {"model": "model", "dataset": "sample", "schemes": ["s"], "device": "cpu", **run}
        },
    }
    file.write_text(yaml.safe_dump(config))
    return file


def estimated(file: Path, code: int = 0) -> list[str]:
    outcome = CliRunner().invoke(app, ["estimate", str(file)])
    assert outcome.exit_code == code, outcome.output
    return outcome.stdout.splitlines()


def line(lines: list[str], word: str) -> str:
    (found,) = (text for text in lines if text.startswith(f"  {word} "))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_a_config_is_needed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / kind).mkdir()
    KINDS[kind][1](tmp_path / kind)
    # The headers stay, and the weights are gone: reading one would fail the check of finite ones.
    (weights,) = (tmp_path / kind).glob("*.safetensors")
    content = weights.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    weights.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    lines = estimated(
        write_config(tmp_path, kind, calibration_samples=20, score_samples=10, max_length=32)
    )
    assert lines[0] == "run"
    assert "2 formats" in line(lines, "measure")
    assert "stands in for the dataset" in line(lines, "memory")
    assert "about" in line(lines, "memory")
    assert "not known: nothing of this run is measured" in line(lines, "time")
    expected = "not known before" if kind == "llm" else "5 calibration and 3 scoring"
    assert expected in line(lines, "batches")


def test_counts_are_those_of_the_measurement_and_time_is_what_was_measured(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_tiny_llama(tmp_path / "llm")
    run = {"calibration_samples": 6, "score_samples": 4, "batch_size": 2, "max_length": 16}
    done = study(shared, checkpoint, "causal-lm", formats=[FP8], **run)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results" / "run"
    folder.mkdir(parents=True)
    (tmp_path / "results" / "calibration").mkdir()
    database = sample_database(shared).read_bytes()
    (tmp_path / "results" / "calibration" / "sample.sqlite").write_bytes(database)
    file = write_config(tmp_path, "llm", **run)
    groups = len(done.scores.groups)
    assert f"{groups} layer groups of" in line(estimated(file), "measure")

    scores = json.loads((checkpoint / "study" / "scores.json").read_text())
    entry = scores["formats"][FP8]
    entry["settings"]["model"]["checkpoint"] = "./llm"
    entry["settings"]["dataset"] = {"source": "sample", "calibration": 40, "seed": 0}
    steps = len(entry["batches"]["tokens"])
    entry["seconds"] = {"load": 10.0, "calibrate": 20.0, "score": 3.0 * steps}
    (folder / "scores.json").write_text(json.dumps(scores))
    lines = estimated(file)
    assert "1 formats" in line(lines, "measure")
    assert INT8 in line(lines, "measure")
    assert line(lines, "there").split() == ["there", FP8]
    assert f"{steps} scoring" in line(lines, "batches")
    assert f"about {30 + 3 * steps} s" in line(lines, "time")


def test_a_model_that_is_not_here_is_said_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "llm")
    file = write_config(tmp_path, "llm", max_length=32)
    config = yaml.safe_load(file.read_text())
    config["models"]["hub"] = {"checkpoint": "owner/name", "task": "causal-lm"}
    config["runs"]["hub.run"] = {**config["runs"]["run"], "model": "hub"}
    file.write_text(yaml.safe_dump(config))
    lines = estimated(file, code=1)
    assert "run" in lines
    at = lines.index("hub.run")
    assert "not known: models.hub: is not on this machine yet" in lines[at + 1]
    assert "results/models/hub/model.json" in lines[at + 1]
