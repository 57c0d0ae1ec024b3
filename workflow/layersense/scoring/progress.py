"""Progress of a phase on a device, with the memory that it takes."""

import torch

from layersense import progress
from layersense.scoring.environment import peak_memory_bytes


class Progress(progress.Progress):
    """Count steps and tell how it goes; see :class:`layersense.progress.Progress`.

    Args:
        what: verb of the phase, such as ``score``.
        total: number of steps.
        unit: what one step is.
        device: whose peak memory is shown: the GPU's, or on a CPU the process's.
    """

    def __init__(self, what: str, total: int, unit: str, device: torch.device) -> None:
        super().__init__(what, total, unit)
        self.device = device

    def note(self) -> str:
        """Return the peak of the memory."""
        return f", {peak_memory_bytes(self.device) / 2**30:.1f} GiB"
