"""A torch dataset over the calibration database; the only module here that imports torch."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from layersense.calibration.database import Row, open_database
from layersense.calibration.images import open_image
from layersense.calibration.sampling import Split, Unit


class Example(NamedTuple):
    """A row with its photograph."""

    image: Image.Image | None
    """RGB; None in a dataset of texts."""
    row: Row


class CalibrationDataset(Dataset[Example]):
    """The first rows of a unit and split, by position; photographs are opened when asked for.

    The rows (not the photographs) are read once, here: what workers of a ``DataLoader`` get,
    forked or spawned, is a plain list and no connection. Pass a ``collate_fn``: torch has none for
    images.

    Raises:
        LayersenseError: the database is unusable or holds fewer rows than ``limit``; later, an
            image has gone or changed into none.
    """

    def __init__(self, path: str | Path, unit: Unit, split: Split, limit: int | None = None):
        with open_database(path) as database:
            self._rows = database.rows(unit, split, limit)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> Example:
        row = self._rows[position]
        return Example(None if row.image_path is None else open_image(row.image_path), row)
