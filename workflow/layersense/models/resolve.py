"""Make ``results/models/{model}/model.json``: fetch a checkpoint, or build the demo model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from layersense.config import DemoModel, Model, SampleDataset
from layersense.models.checkpoints import resolve, write_checkpoint

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
    demo = out.parent / "checkpoint"
    if isinstance(model, DemoModel):
        # Only the demo needs torch.
        from layersense.calibration.build import build_database
        from layersense.models.demo import build_demo

        database = out.parent / "sample.sqlite"
        build_database("sample", SAMPLE, database)
        build_demo(database, demo)
    write_checkpoint(out, resolve(name, model, demo))
