"""The demo model is built whole or not at all, and tells photographs apart."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import CAPTIONS, resolve_folder, save_images

from layersense.calibration.database import Row
from layersense.errors import LayersenseError
from layersense.models import demo
from layersense.models.checkpoints import read_checkpoint
from layersense.models.resolve import resolve_model
from layersense.models.tasks import get_task
from layersense.models.tasks.protocol import Sampling


class Database:
    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def rows(self, unit: str, split: str) -> list[Row]:
        assert unit == "caption"
        return {"calibration": self._rows[:-1], "heldout": self._rows[-1:]}[split]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Five captioned images of noise, which ``open_database`` returns."""
    folder = tmp_path / "images"
    folder.mkdir()
    images = save_images(folder, ((120, 90), (90, 120), (112, 112), (64, 64), (200, 100)))
    rows = [Row(path, caption) for path, caption in zip(images, CAPTIONS, strict=True)]
    monkeypatch.setattr(demo, "BATCH_SIZE", 4)
    monkeypatch.setattr(demo, "open_database", lambda path: nullcontext(Database(rows)))
    return rows


def test_a_model_that_learned_nothing_is_refused_and_not_saved(
    tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "STEPS", 2)
    out = tmp_path / "out" / "checkpoint"
    out.mkdir(parents=True)
    (out / "earlier").touch()
    with pytest.raises(LayersenseError, match=r"with the right image and .* with a wrong one"):
        demo.build_demo(tmp_path / "x.sqlite", out)
    assert [path.name for path in out.parent.rglob("*")] == ["checkpoint", "earlier"]


def test_one_image_is_too_few(tmp_path: Path, rows: list[Row]) -> None:
    rows[:] = [replace(row, image_path=rows[0].image_path) for row in rows]
    with pytest.raises(LayersenseError, match="fewer than two images"):
        demo.build_demo(tmp_path / "x.sqlite", tmp_path / "out")


@pytest.mark.slow
def test_a_trained_model_replaces_an_earlier_one_and_is_the_same_again(
    tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "STEPS", 3)
    monkeypatch.setattr(demo, "HIGHEST_LOSS", 100.0)
    monkeypatch.setattr(demo, "LOWEST_GAP", -100.0)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    out = tmp_path / "checkpoint"
    digests = []
    for seed in (0, 0, 1):
        demo.build_demo(tmp_path / "x.sqlite", out, seed)
        (out / "earlier.json").touch()
        checkpoint = resolve_folder(out, "image-text-to-text")
        (out / "earlier.json").unlink()
        digests.append(checkpoint.digest)
    assert digests[0] == digests[1] != digests[2]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "images"]


@pytest.mark.slow
def test_the_demo_tells_the_right_photograph_from_a_wrong_one(tmp_path: Path) -> None:
    from layersense.calibration.database import open_database

    record = tmp_path / "models" / "demo" / "model.json"
    resolve_model("demo", {"source": "demo"}, record)
    checkpoint = read_checkpoint(record)
    assert checkpoint.trained_on_calibration
    assert checkpoint.dtype == "float32"
    assert 1.2e6 < checkpoint.n_parameters < 2e6
    with open_database(record.with_name("sample.sqlite")) as database:
        rows = [r for split in ("calibration", "heldout") for r in database.rows("caption", split)]
    assert len(rows) == 135
    assert len({row.image_path for row in rows}) == 27

    task = get_task(checkpoint.task)
    loaded = task.load(checkpoint, dtype="auto", device="cpu")

    def mean_loss(rows: list[Row]) -> float:
        batches = task.batches(loaded, rows, Sampling(512, "image_text"), 8)
        with torch.no_grad():
            losses = [task.loss(task.forward(loaded.model, batch), batch) for batch in batches]
        return float(sum(losses)) / sum(batch.n_tokens for batch in batches)

    # Five captions an image: five rows on is the next photograph.
    captions = sorted(rows, key=lambda row: str(row.image_path))
    shifted = captions[5:] + captions[:5]
    wrong = [
        Row(other.image_path, row.caption) for row, other in zip(captions, shifted, strict=True)
    ]
    right = mean_loss(list(rows))
    assert right < 0.5
    assert mean_loss(wrong) > right + 1.0
