"""Files that layersense wrote and something has damaged since: a sentence, or measured again."""

from collections.abc import Callable
from pathlib import Path

import pytest
from result_files import write_result

from layersense.errors import LayersenseError
from layersense.export.store import read_exported
from layersense.job_resources import model_size_mb
from layersense.manifests.tables import write_sensitivity
from layersense.models.checkpoints import read_checkpoint
from layersense.quantization.extensions import read_built
from layersense.recipes.quant_config import read_quant_config
from layersense.reports.overview import read_results
from layersense.reports.result import read_result
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


@pytest.mark.parametrize(
    "read",
    [
        read_result,
        lambda table: list(read_results(table)),
        lambda table: write_sensitivity([table], table.with_name("all.parquet")),
    ],
    ids=["report", "summary", "all tables"],
)
def test_a_damaged_table_is_named_in_one_line(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    whole = (write_result(tmp_path / "whole") / "layers.parquet").read_bytes()
    told = []
    for place in range(4, len(whole), 101):
        table = tmp_path / "table.parquet"
        table.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read(table)
        except LayersenseError as error:
            told.append(str(error))
    assert len(told) > 50
    for sentence in told:
        assert sentence.startswith(f"{tmp_path / 'table.parquet'}: ")
        assert "\n" not in sentence


def test_what_cannot_be_read_counts_as_not_there(damaged: Path) -> None:
    assert read_measured(damaged) == {}
    assert InProgress(damaged, "", Completed).read("call") is None
    assert model_size_mb(damaged) == 0
