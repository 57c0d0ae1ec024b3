"""The torch dataset, in the process and in workers."""

from pathlib import Path

import pytest

from layersense.calibration.build import build_database
from layersense.calibration.database import open_database
from layersense.config import SampleDataset

torch_data = pytest.importorskip("torch.utils.data")


def first(examples: list[object]) -> object:
    return examples[0]


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_workers_read_rows_in_position_order(tmp_path: Path, context: str | None) -> None:
    from layersense.calibration.torch_dataset import CalibrationDataset

    path = tmp_path / "s.sqlite"
    build_database("s", SampleDataset(source="sample", calibration=6, heldout=4), path)
    dataset = CalibrationDataset(path, "caption", "calibration", limit=5)
    assert len(dataset) == 5
    loader = torch_data.DataLoader(
        dataset,
        batch_size=1,
        num_workers=2 if context else 0,
        multiprocessing_context=context,
        collate_fn=first,
    )
    examples = list(loader)
    with open_database(path) as database:
        assert [example.row for example in examples] == database.rows("caption", "calibration", 5)
    assert {example.image.mode for example in examples} == {"RGB"}
