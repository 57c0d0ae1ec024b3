"""What an unfinished measurement has completed (no torch).

``kl_div`` and verification run the model once for each layer group, format and batch, which takes
hours on large models. What is complete is written beside the output now and then, and taken up by
the next job that measures the same.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from layersense.files import BROKEN_JSON, atomic_write

Kind = TypeVar("Kind", bound=msgspec.Struct)

SAVE_SECONDS = 300.0
"""How old the file may become while batches complete."""


class Completed(msgspec.Struct, kw_only=True):
    """What the completed batches of scoring gave."""

    batch_scores: dict[str, dict[str, list[float]]]
    """Format → handle → summed score of each completed batch."""
    called: list[str]
    """Handles that a forward pass has called."""
    seen: list[dict[str, int]]
    """Statistics of each completed batch."""
    begun: dict[str, dict[str, float]] = {}
    """Format → handle → score, of what is complete of the batch after these."""


class _File(msgspec.Struct, kw_only=True):
    key: str
    completed: msgspec.Raw


class InProgress(Generic[Kind]):
    """The file of one measurement.

    Args:
        path: where it lies.
        digest: what determines the measurement; a file of another one is ignored.
        kind: what it holds.
    """

    def __init__(self, path: Path, digest: str, kind: type[Kind]) -> None:
        self.path, self.digest, self.kind = path, digest, kind
        self._saved = time.monotonic()

    def read(self, call: str) -> Kind | None:
        """Return what is complete of a call (its formats and batch size); None if nothing is."""
        try:
            found = msgspec.json.decode(self.path.read_bytes(), type=_File)
            if found.key != self._key(call):
                return None
            return msgspec.json.decode(found.completed, type=self.kind)
        except (OSError, *BROKEN_JSON):
            return None

    def save(self, call: str, completed: Callable[[], Kind]) -> None:
        """Write what ``completed()`` returns, if the last writing is old enough."""
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            content = msgspec.Raw(msgspec.json.encode(completed()))
            file = _File(key=self._key(call), completed=content)
            atomic_write(self.path, msgspec.json.encode(file))
            self._saved = time.monotonic()

    def _key(self, call: str) -> str:
        return f"{self.digest} {call}"
