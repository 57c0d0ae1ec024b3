"""Scores of the batches that an unfinished measurement has completed (no torch).

``kl_div`` runs the model once for each layer group, format and batch, which takes hours on large
models. What is complete is written beside the score file now and then, and taken up by the next job
that measures the same.
"""

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from layersense.files import atomic_write

SAVE_SECONDS = 300.0
"""How old the file may become while batches complete."""


class Completed(msgspec.Struct, kw_only=True):
    """What the completed batches gave."""

    batch_scores: dict[str, dict[str, list[float]]]
    """Format → handle → summed score of each completed batch."""
    called: list[str]
    """Handles that a forward pass has called."""
    seen: list[dict[str, int]]
    """Statistics of each completed batch."""


class _File(msgspec.Struct, kw_only=True):
    key: str
    completed: Completed


class InProgress:
    """The file of one measurement.

    Args:
        path: where it lies.
        digest: what determines the measurement; a file of another one is ignored.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path, self.digest = path, digest
        self._saved = time.monotonic()

    def read(self, call: str) -> Completed | None:
        """Return what is complete of a call (its formats and batch size); None if nothing is."""
        try:
            found = msgspec.json.decode(self.path.read_bytes(), type=_File)
        except (OSError, msgspec.MsgspecError):
            return None
        return found.completed if found.key == self._key(call) else None

    def save(self, call: str, completed: Callable[[], Completed]) -> None:
        """Write what ``completed()`` returns, if the last writing is old enough."""
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            file = _File(key=self._key(call), completed=completed())
            atomic_write(self.path, msgspec.json.encode(file))
            self._saved = time.monotonic()

    def _key(self, call: str) -> str:
        return f"{self.digest} {call}"
