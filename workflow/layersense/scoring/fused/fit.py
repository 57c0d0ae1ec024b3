"""What to reduce when memory runs out, in which order, and what may not be reduced."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from modelopt.torch.quantization.algorithms import QuantRecipe
from torch import nn

from layersense.quantization.formats import Format
from layersense.scoring.scores import Fit

HELD_FACTOR = 2.2
"""Memory of a pass without checkpointing, as a multiple of all X and Y that taps hold: autograd
keeps about as much for the operations between them. Seen: Qwen2.5-VL, Llama."""
LOSS_COPIES = 3
"""Float32 tensors of the size of the supervised logits that a cross entropy and its gradient take.
Seen: 151,936 and 152,064 classes."""
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
        split = f"scoring batch of {fit.micro_batch} samples split into {size} at a time"
        apart = f"{len(bound)} format(s) with one activation range for a batch scored apart"
        if free:
            parts = [_part(what, free, split, micro_batch=size)]
            return parts + ([_part(what, bound, apart)] if bound else [])
    if checkpointable and not fit.checkpointing:
        note = "activations recomputed in the backward pass (gradient checkpointing)"
        return [_part(what, what.recipes, note, checkpointing=True)]
    if len(what.recipes) > 1:
        middle = -(-len(what.recipes) // 2)
        note = f"{len(what.recipes)} formats scored in two passes instead of one"
        halves = (what.recipes[:middle], what.recipes[middle:])
        return [_part(what, half, note) for half in halves]
    return []


def _part(what: Pass, recipes: tuple[QuantRecipe, ...], note: str, **changes: int | bool) -> Pass:
    """Return a pass of some formats of another, with what was changed and why."""
    fit = msgspec.structs.replace(what.fit, formats=len(recipes), **changes)
    return Pass(recipes, fit, (*what.back_offs, note))


def expected_bytes(weights: float, held: float, logits: int = 0) -> float:
    """Return the memory that a pass is expected to need where activations are kept.

    Args:
        weights: bytes of the weights, and of whatever else is there before a pass.
        held: bytes of all X and Y that taps hold.
        logits: how many logits are supervised.
    """
    return weights + HELD_FACTOR * held + LOSS_COPIES * 4 * logits


def expected_bytes_recomputed(
    weights: float, outside: float, blocks: Sequence[tuple[float, float]], logits: int = 0
) -> float:
    """Return the same where activations of checkpointed blocks are recomputed.

    One block's activations are there at a time, and every block's input.

    Args:
        weights: as above.
        outside: bytes of X and Y outside of the blocks, such as those of the head.
        blocks: bytes of each block's input, and of all X and Y within it.
        logits: as above.
    """
    inputs = sum(block[0] for block in blocks)
    largest = max((block[1] for block in blocks), default=0.0)
    return expected_bytes(weights, outside + largest, logits) + inputs


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
