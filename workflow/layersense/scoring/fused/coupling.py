"""What couples the samples of a batch, so that splitting it would change scores."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from layersense.errors import is_out_of_memory
from layersense.models.tasks.protocol import Batch, Task
from layersense.quantization.formats import Format
from layersense.scoring.fused.quantizers import has_static_blocks
from layersense.scoring.measurement import floating_dtype

logger = logging.getLogger(__name__)


class Coupling:
    """Whether a model's batches may be split: their loss is the sum of their samples' losses.

    A loss that couples samples (an auxiliary loss of a mixture of experts, a normalisation by the
    batch) differs, and an output without the samples in it (a table of position biases) has the
    same size for one sample as for two.

    Args:
        task: runs the model.
        model: the model.
        modules: those whose outputs are scored.
        batch: size and first sample → batch, on the model's device.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        modules: Sequence[nn.Module],
        batch: Callable[[int, int], Batch],
    ) -> None:
        self.task, self.model, self.modules, self.batch = task, model, modules, batch
        self._splittable: bool | None = None

    def is_splittable(self) -> bool:
        """Return whether a batch may be split, by two samples apart and together."""
        if self._splittable is None:
            reason = self._why_not()
            self._splittable = not reason
            if reason:
                logger.warning("the batch is not split, because %s", reason)
        return self._splittable

    def _why_not(self) -> str:
        try:
            one, other = self.sizes_and_loss(1, 0), self.sizes_and_loss(1, 1)
            both = self.sizes_and_loss(2, 0)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return "there is no memory to find out whether its loss is a sum over samples"
        if fixed := without_samples(one[0], other[0], both[0]):
            return f"the output of {fixed[0]} has no samples in it"
        slack = 1e-4 if floating_dtype(self.model) == torch.float32 else 2e-2
        if not abs(one[1] + other[1] - both[1]) <= slack * abs(both[1]):
            return "its loss is not the sum of its samples' losses"
        return ""

    def sizes_and_loss(self, size: int, start: int) -> tuple[dict[str, int], float]:
        """Return module → elements of its output, and the loss, of a batch."""
        batch = self.batch(size, start)
        sizes: dict[str, int] = {}
        names = {module: name for name, module in self.model.named_modules()}

        def hook(module: nn.Module, _: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            sizes[names[module]] = first.numel()

        handles = [module.register_forward_hook(hook) for module in self.modules]
        try:
            with torch.no_grad():
                loss = self.task.loss(self.task.forward(self.model, batch), batch)
        finally:
            for handle in handles:
                handle.remove()
        return sizes, float(loss)


def without_samples(
    one: Mapping[str, int], other: Mapping[str, int], both: Mapping[str, int]
) -> list[str]:
    """Return the modules whose output has no samples in it, such as a table of position biases.

    The output of two samples together is no larger than that of one of them.

    Args:
        one: module → elements of its output for a sample.
        other: the same for another sample, which may be longer or shorter.
        both: the same for both in one batch, padded to the longer one.
    """
    return [
        name for name, size in both.items() if size <= max(one.get(name, 0), other.get(name, 0))
    ]


def couples_samples(format: Format) -> bool:
    """Return whether a format's activation ranges belong to the whole batch.

    One range for it that is taken from it (dynamic, or never calibrated) depends on all of its
    samples, so a score depends on how the batch was split; ranges of blocks that were calibrated
    fit the calibrated shape alone.
    """

    def from_the_batch(stage: Mapping[str, Any]) -> bool:
        dynamic = stage.get("type") == "dynamic" or format.algorithm is None
        return dynamic and stage.get("axis") is None and not stage.get("block_sizes")

    return has_static_blocks(format) or any(from_the_batch(stage) for stage in format.input)
