"""The score of one tensor: Σ (g · ΔY)², as ModelOpt computes it, without intermediate tensors."""

import torch
from torch import Tensor

CLAMP = 1e10
"""ModelOpt cuts each element of g · ΔY off here (``_get_auto_quantize_score``)."""
BLOCK = 4096
"""Elements that one program of the CUDA kernel sums."""
CHUNK = 2**24
"""Elements that the CPU handles at a time."""


def scores(gradient: Tensor, perturbed: Tensor, output: Tensor) -> Tensor:
    """Return ``Σ clamp(g · (perturbed − output))²`` of each format, float32, shape (formats,).

    The difference is rounded to the output's dtype before it is multiplied in float32, as stock
    does, so that the numbers are stock's.

    Args:
        gradient: ∂L/∂Y, any shape.
        perturbed: the module's output under each format, shape (formats, elements), contiguous.
        output: the module's output, as many elements, same dtype.
    """
    gradient, output = gradient.reshape(-1), output.reshape(-1)
    if output.is_cuda:
        return _scores_cuda(gradient, perturbed, output)
    return torch.stack([_score_cpu(gradient, one, output) for one in perturbed])


def _score_cpu(gradient: Tensor, perturbed: Tensor, output: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float32)
    for start in range(0, len(output), CHUNK):
        part = slice(start, start + CHUNK)
        difference = perturbed[part] - output[part]
        x = gradient[part].float() * difference.float()
        total += x.clamp(-CLAMP, CLAMP).square().sum()
    return total


def _scores_cuda(gradient: Tensor, perturbed: Tensor, output: Tensor) -> Tensor:
    # Triton comes with torch's CUDA wheels only.
    from layersense.scoring.fused.triton_score import kernel

    formats, size = perturbed.shape
    programs = -(-size // BLOCK)
    partial = torch.empty(formats, programs, dtype=torch.float32, device=output.device)
    if programs:
        with torch.cuda.device(output.device):
            kernel[(programs,)](
                gradient, perturbed, output, partial, formats, size, programs, CLAMP, BLOCK
            )
    return partial.sum(dim=1)
