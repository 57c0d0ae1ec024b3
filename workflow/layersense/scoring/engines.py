"""Engines by name: what turns a measurement and formats into scores."""

from collections.abc import Callable, Iterator, Sequence

from layersense.quantization.formats import Format
from layersense.scoring import fused, modelopt_engine
from layersense.scoring.inventory import Inventory
from layersense.scoring.measurement import Measurement
from layersense.scoring.scores import FormatScores

Engine = Callable[
    [Measurement, Sequence[Format]], Iterator[tuple[Inventory, dict[str, FormatScores]]]
]
"""Yields an inventory and entries whenever some formats are complete."""

ENGINES: dict[str, Engine] = {
    "modelopt": modelopt_engine.measure,
    "fused": fused.measure,
}


def get_engine(name: str) -> Engine:
    """Return the engine called ``name``; the config has checked that there is one."""
    return ENGINES[name]
