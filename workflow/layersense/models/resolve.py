"""Make ``results/models/{model}/model.json``: fetch a checkpoint, or build one of our own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from layersense.config import DemoModel, Model, SampleDataset
from layersense.models.checkpoints import as_pickle, resolve, write_checkpoint

SAMPLE = SampleDataset(source="sample", calibration=110, heldout=25)
"""All 135 captions of the embedded sample: the demo model learns both splits."""


def resolve_model(name: str, settings: Mapping[str, Any], out: Path) -> None:
    """Resolve a model and record what it is; the demo model is built beside the record.

    Args:
        name: the model's name in the config.
        settings: its entry in the config.
        out: the record, ``model.json``.

    Raises:
        LayersenseError: it cannot be found, fetched, built or used.
    """
    model: Model = TypeAdapter[Any](Model).validate_python(settings)
    built = None
    # Only what is built needs torch.
    if isinstance(model, DemoModel):
        from layersense.calibration.build import build_database
        from layersense.models.demo import build_demo

        built = out.parent / "checkpoint"
        database = out.parent / "sample.sqlite"
        build_database("sample", SAMPLE, database)
        build_demo(database, built)
    elif pickled := as_pickle(name, model):
        from layersense.models.yolo import convert

        built = convert(pickled, out.parent / "checkpoint")
    write_checkpoint(out, resolve(name, model, built))
