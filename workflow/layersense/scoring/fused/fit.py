"""What to reduce when memory runs out, and in which order."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from modelopt.torch.quantization.algorithms import QuantRecipe
from torch import nn

from layersense.scoring.scores import Fit

HELD_FACTOR = 1.75
"""Memory of a pass without checkpointing, as a multiple of all X and Y that taps hold: autograd
keeps nearly as much for the operations between them. Seen: Qwen2.5 of 0.5 B, 3 B and 7 B."""
LOSS_COPIES = 3
"""Float32 tensors of the size of the supervised logits at the peak of a cross entropy: the log
probabilities that it keeps, and the gradients at both ends of its softmax."""
WEIGHT_COPIES = 4
"""The largest weight, quantized, and what its quantizer and the formats' outputs take beside it."""
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
        apart = f"{len(bound)} format(s) with activation ranges of a whole batch scored apart"
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


def expected_bytes(weights: float, held: float, logits: int = 0, largest: float = 0) -> float:
    """Return the memory that a pass is expected to need where activations are kept.

    The loss is gone by the time the first layer is scored.

    Args:
        weights: bytes of the weights, and of whatever else is there before a pass.
        held: bytes of all X and Y that taps hold.
        logits: how many logits are supervised.
        largest: bytes of the largest weight that is quantized.
    """
    return weights + HELD_FACTOR * held + max(LOSS_COPIES * 4 * logits, WEIGHT_COPIES * largest)


def expected_bytes_recomputed(
    weights: float,
    outside: float,
    blocks: Sequence[tuple[float, float]],
    logits: int = 0,
    largest: float = 0,
) -> float:
    """Return the same where activations of checkpointed blocks are recomputed.

    One block's activations are there at a time, and every block's input.

    Args:
        weights: as above.
        outside: bytes of X and Y outside of the blocks, such as those of the head.
        blocks: bytes of each block's input, and of all X and Y within it.
        logits: as above.
        largest: as above.
    """
    inputs = sum(block[0] for block in blocks)
    within = max((block[1] for block in blocks), default=0.0)
    return expected_bytes(weights, outside + within, logits, largest) + inputs


def first_fit(
    wanted: Fit,
    *,
    weights: float,
    kept: float,
    recomputed: float | None,
    usable: float,
    splittable: Callable[[], bool],
) -> Fit:
    """Return how a pass is tried first, so that it is expected to fit.

    Activations are recomputed where they do not fit otherwise, then the batch is halved.

    Args:
        wanted: how a pass goes where memory is no matter.
        weights: bytes that are there before a pass.
        kept: expected peak in bytes with all activations kept.
        recomputed: the same with activations recomputed; None where the model cannot do so.
        usable: bytes in all that a pass may use, the weights among them.
        splittable: whether the batch may be split; asked only if it has to be.
    """
    limit = FULL * usable
    fit, need = wanted, kept
    if need > limit and recomputed is not None:
        fit, need = msgspec.structs.replace(fit, checkpointing=True), recomputed
    size = fit.micro_batch
    while size > 1 and weights + (need - weights) * size / wanted.micro_batch > limit:
        if size == wanted.micro_batch and not splittable():
            break
        size = _half(size)
    return msgspec.structs.replace(fit, micro_batch=size)


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
