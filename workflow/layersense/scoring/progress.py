"""Progress of a long loop: a bar in a terminal, lines in a log file."""

import logging
import sys
import time

import torch
from tqdm import tqdm

from layersense.scoring.environment import peak_memory_bytes

logger = logging.getLogger(__name__)

LINE_SECONDS = 15.0


class Progress:
    """Count steps and tell how it goes.

    Args:
        what: verb of the phase, such as ``score``.
        total: number of steps.
        unit: what one step is.
        device: whose memory is shown.
    """

    def __init__(self, what: str, total: int, unit: str, device: torch.device) -> None:
        self.what, self.total, self.unit, self.device = what, total, unit, device
        self.done = 0
        self.started = self._last_line = time.monotonic()
        self._bar = tqdm(total=total, desc=what, unit=unit) if sys.stderr.isatty() else None

    def step(self) -> None:
        """Count one step; write a line when the last one is old, after the second and the last."""
        self.done += 1
        if self._bar is not None:
            self._bar.update()
            return
        now = time.monotonic()
        if self.done in (2, self.total) or now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            rate = (now - self.started) / self.done
            memory = (
                f", {peak_memory_bytes(self.device) / 2**30:.1f} GiB"
                if self.device.type == "cuda"
                else ""
            )
            logger.info(
                "%s: %d of %d, %.2f s/%s, %.0f s left%s",
                self.what,
                self.done,
                self.total,
                rate,
                self.unit,
                rate * (self.total - self.done),
                memory,
            )

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
