"""Progress of a long loop: a bar in a terminal, lines in a log file."""

import logging
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_SECONDS = 15.0
_BAR = "{desc}: {n_fmt}/{total_fmt} |{bar}| {rate_inv_fmt}, {remaining} left{postfix}"


class Progress:
    """Count steps and tell how it goes.

    Args:
        what: verb of the phase, such as ``score``.
        total: number of steps.
        unit: what one step is.
    """

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self.started = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=what, unit=unit, bar_format=_BAR)

    def note(self) -> str:
        """Return what a line says beside the pace, such as the memory in use."""
        return ""

    def step(self, steps: int = 1) -> None:
        """Count steps; write a line when the last one is old, after the second and the last."""
        self.done += steps
        if self._bar is not None:
            self._bar.set_postfix_str(self.note().removeprefix(", "), refresh=False)
            self._bar.update(steps)
            return
        now = time.monotonic()
        if self.done in (2, self.total) or now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            rate = (now - self.started) / max(self.done, 1)
            logger.info(
                "%s: %d of %d, %.2f s/%s, %s left%s",
                self.what,
                self.done,
                self.total,
                rate,
                self.unit,
                duration(rate * (self.total - self.done)),
                self.note(),
            )

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Return a time in the units that a person thinks in, such as ``2 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
