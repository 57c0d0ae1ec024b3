"""Files that layersense wrote and something has damaged since: a sentence, or measured again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from layersense.errors import LayersenseError
from layersense.export.store import read_exported
from layersense.job_resources import model_size_mb
from layersense.models.checkpoints import read_checkpoint
from layersense.quantization.extensions import read_built
from layersense.recipes.quant_config import read_quant_config
from layersense.scoring.in_progress import Completed, InProgress
from layersense.scoring.scores import read_scores
from layersense.settings import read_measured
from layersense.verification.store import read_verification

DAMAGED = {
    "cut": b'{"run": "a',
    "no text": b"\xff\xfe\x00",
    "no UTF-8 in a text": b'{"run": "\xff", "digest": "\xff"}',
    "nested": b'{"formats":' * 100_000,
}


@pytest.fixture(params=DAMAGED.values(), ids=DAMAGED.keys())
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / "file.json"
    file.write_bytes(request.param)
    return file


@pytest.mark.parametrize(
    "read",
    [read_built, read_checkpoint, read_exported, read_quant_config, read_scores, read_verification],
)
def test_a_damaged_file_is_named(read: Callable[[Path], object], damaged: Path) -> None:
    with pytest.raises(LayersenseError, match=r"file\.json: "):
        read(damaged)


def test_what_cannot_be_read_counts_as_not_there(damaged: Path) -> None:
    assert read_measured(damaged) == {}
    assert InProgress(damaged, "", Completed).read("call") is None
    assert model_size_mb(damaged) == 0
