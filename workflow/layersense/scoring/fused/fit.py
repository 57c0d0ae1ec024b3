"""What to reduce when memory runs out, in which order, and what may not be reduced."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modelopt.torch.quantization.algorithms import QuantRecipe
from torch import nn

from layersense.quantization.formats import Format
from layersense.scoring.scores import Fit

HELD_FACTOR = 2.2
"""Memory of a pass without checkpointing, as a multiple of all X and Y that taps hold: autograd
keeps about as much for the operations between them. Seen: Qwen2.5-VL, Llama."""
FULL = 0.92
"""Share of the free memory above which a pass is expected not to fit."""


@dataclass(frozen=True)
class Pass:
    """Formats that are scored together, and how a batch goes through the model for them."""

    recipes: tuple[QuantRecipe, ...]
    fit: Fit
    back_offs: tuple[str, ...] = ()


def smaller(
    what: Pass, *, coupled: Sequence[QuantRecipe], splittable: bool, checkpointable: bool
) -> list[Pass]:
    """Return what to do instead of a pass that ran out of memory; nothing if all is exhausted.

    First the batch is halved, then activations are recomputed, then fewer formats are scored at a
    time. Formats that couple the samples of a batch are never split.

    Args:
        what: what ran out of memory.
        coupled: formats whose activations have one range for the whole batch.
        splittable: whether the loss and every layer's output are sums over samples.
        checkpointable: whether the model can recompute activations.
    """
    fit = what.fit
    if splittable and fit.micro_batch > 1:
        free = tuple(recipe for recipe in what.recipes if recipe not in coupled)
        bound = tuple(recipe for recipe in what.recipes if recipe in coupled)
        size = _half(fit.micro_batch)
        parts = []
        if free:
            note = f"scoring batch of {fit.micro_batch} samples split into {size} at a time"
            parts.append(
                Pass(
                    free,
                    replace_fit(fit, micro_batch=size, formats=len(free)),
                    (*what.back_offs, note),
                )
            )
        if bound and free:
            note = f"{len(bound)} format(s) with one activation range for a batch scored apart"
            parts.append(Pass(bound, replace_fit(fit, formats=len(bound)), (*what.back_offs, note)))
        if free:
            return parts
    if checkpointable and not fit.checkpointing:
        note = "activations recomputed in the backward pass (gradient checkpointing)"
        changed = replace_fit(fit, checkpointing=True)
        return [replace(what, fit=changed, back_offs=(*what.back_offs, note))]
    if len(what.recipes) > 1:
        middle = -(-len(what.recipes) // 2)
        note = f"{len(what.recipes)} formats scored in two passes instead of one"
        return [
            Pass(part, replace_fit(fit, formats=len(part)), (*what.back_offs, note))
            for part in (what.recipes[:middle], what.recipes[middle:])
        ]
    return []


def replace_fit(fit: Fit, **changes: int | bool) -> Fit:
    """Return ``fit`` with changes."""
    values = {"micro_batch": fit.micro_batch, "checkpointing": fit.checkpointing}
    return Fit(**{**values, "formats": fit.formats, **changes})  # type: ignore[arg-type]


def couples_samples(format: Format) -> bool:
    """Return whether one activation range serves the whole batch and is taken from it.

    Such a range (dynamic, or never calibrated) depends on all samples of the batch, so a score
    under it depends on how the batch was split.
    """

    def from_the_batch(stage: Mapping[str, Any]) -> bool:
        dynamic = stage.get("type") == "dynamic" or format.algorithm is None
        return dynamic and stage.get("axis") is None and not stage.get("block_sizes")

    return any(from_the_batch(stage) for stage in format.input)


def can_checkpoint(model: nn.Module) -> bool:
    """Return whether the model can recompute activations in the backward pass."""
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def missing_memory(message: str) -> str:
    """Return what an out-of-memory error says of the amount, such as ``2.50 GiB more``."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+ [KMGT]iB)", message)
    return f"{found[1]} more" if found else "more memory"


def _half(size: int) -> int:
    """Return the largest divisor of ``size`` that is at most half of it, so that batches align."""
    return next(part for part in range(size // 2, 0, -1) if size % part == 0)
