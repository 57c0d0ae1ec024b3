"""The weight matrices of a layer, one by one, as the exporter writes them (torch)."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def matrix_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """Return the shape, (outputs, inputs), of each matrix of a layer before it is quantized.

    Returns:
        One shape for a layer with a weight, three for each expert of a mixture; nothing for a layer
        that the exporter does not know.
    """
    if is_mixture(module):
        return [tuple(weight.shape) for _, weight in _experts("", module, quantized=False)]
    weight = getattr(module, "weight", None)
    return [] if weight is None else [tuple(weight.shape)]


def matrices(name: str, module: nn.Module, *, quantized: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices of a layer that ModelOpt has prepared, each with the name it is given.

    Args:
        name: of the layer.
        module: the layer.
        quantized: whether to give the weights as the model computes with them.
    """
    if is_mixture(module):
        yield from _experts(name, module, quantized=quantized)
        return
    weight: Any = module.weight
    quantizer: Any = module.weight_quantizer if quantized else nn.Identity()
    yield name, quantizer(weight)


def is_mixture(module: nn.Module) -> bool:
    """Return whether a module holds gated experts in the two 3-D weights of transformers 5.

    Of shape (experts, 2 · width, inputs) and (experts, outputs, width), as ``F.linear`` takes them;
    ModelOpt's exporter splits no others (``_QuantFusedExperts``).
    """
    first, last = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if not (isinstance(first, Tensor) and isinstance(last, Tensor)):
        return False
    return (
        first.ndim == last.ndim == 3
        and len(first) == len(last)
        and first.shape[1] == 2 * last.shape[2]
        and first.shape[2] == last.shape[1]
        and not any("bias" in parameter for parameter, _ in module.named_parameters())
    )


def _experts(name: str, module: Any, *, quantized: bool) -> Iterator[tuple[str, Tensor]]:
    for number, (first, last) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
        if quantized:
            first = module.gate_up_proj_weight_quantizers[number](first)
            last = module.down_proj_weight_quantizers[number](last)
        gate, up = first.chunk(2)
        for projection, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", last)):
            yield f"{name}.{number}.{projection}", weight
