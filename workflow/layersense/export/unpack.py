"""Unpack what the exporter packed, by the layouts' definitions and no code of the exporter."""

from collections.abc import Mapping

import torch
from torch import Tensor

from layersense.export.allow import Written

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a 4-bit float by its lower three bits (OCP MX specification 1.0, table 6)."""
_E2M1_STEP = (0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0)
"""Distance of each to the next one above, below the largest."""


def unpack(written: Written, found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a weight as it was before it was packed, and the step of the format at each element.

    Args:
        written: how it was packed.
        found: ``weight``, ``weight_scale`` and, where there is one, ``weight_scale_2``.

    Returns:
        Values and steps in float32, shape (outputs, inputs). The step is the distance between
        neighbouring values that the format can hold there.
    """
    packed, scale = found["weight"], found["weight_scale"]
    if written.layout == "fp8":
        codes = packed.float()
        steps = _float_steps(codes)
    elif written.layout == "mxfp8":
        codes = packed.float()
        steps = _float_steps(codes)
        scale = torch.exp2(scale.float() - 127)  # E8M0: an exponent alone
    elif written.layout == "int8":
        codes = packed.float()
        steps = torch.ones_like(codes)
    elif written.layout == "int4":
        # Two outputs in one byte, the even one below; two's complement of 4 bits.
        low, high = packed & 0xF, packed >> 4
        halves = torch.stack([low, high], dim=1).flatten(0, 1).to(torch.int16)
        codes = torch.where(halves > 7, halves - 16, halves).float()
        steps = torch.ones_like(codes)
    else:
        # Two inputs in one byte, the even one below; the highest bit is the sign.
        nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2).long()
        magnitude = torch.tensor(E2M1)[nibbles & 7]
        codes = torch.where(nibbles > 7, -magnitude, magnitude)
        steps = torch.tensor(_E2M1_STEP)[nibbles & 7]
    spread = _spread(written, scale.float(), codes.shape[0], codes.shape[1])
    if "weight_scale_2" in found and written.layout == "nvfp4":
        spread = spread * found["weight_scale_2"].float()
    return codes * spread, steps * spread


def _spread(written: Written, scale: Tensor, outputs: int, inputs: int) -> Tensor:
    """Return the scale of each element."""
    if written.block is None:
        return scale.reshape(-1, 1).expand(outputs, inputs)
    if written.square:
        blocks = scale.reshape(outputs // written.block, inputs // written.block)
        scale = blocks.repeat_interleave(written.block, dim=0)
    return scale.reshape(outputs, inputs // written.block).repeat_interleave(written.block, dim=1)


def _float_steps(codes: Tensor) -> Tensor:
    """Return the distance between neighbours in E4M3: 1/8 of the power of two below, ≥ 2⁻⁹."""
    exponent = torch.floor(torch.log2(codes.abs().clamp(min=2.0**-6)))
    return torch.exp2(exponent - 3)
