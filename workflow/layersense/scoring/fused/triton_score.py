"""The CUDA kernel of :func:`layersense.scoring.fused.kernels.scores`, in Triton."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def kernel(
    gradient,
    perturbed,
    output,
    partial,
    formats,
    size,
    programs,
    clamp: tl.constexpr,
    block: tl.constexpr,
):
    """Write Σ clamp(g · (perturbed − output))² of each format and ``block`` elements."""
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * block + tl.arange(0, block)
    inside = offsets < size
    g = tl.load(gradient + offsets, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(output + offsets, mask=inside, other=0.0).to(tl.float32)
    source, target = perturbed + offsets, partial + program
    for _ in range(formats):
        q = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        difference = (q - y).to(output.dtype.element_ty).to(tl.float32)
        x = g * difference
        x = tl.minimum(x, clamp, propagate_nan=tl.PropagateNan.ALL)
        x = tl.maximum(x, -clamp, propagate_nan=tl.PropagateNan.ALL)
        tl.store(target, tl.sum(x * x))
        source += size
        target += programs
