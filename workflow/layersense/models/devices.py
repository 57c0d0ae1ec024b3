"""One model over several GPUs: which layers go where, and what moves between them.

accelerate plans by the sizes of modules, and transformers says which modules must stay in one
piece. accelerate's own hooks would replace the forward of every layer, which is what scoring does,
too; here tensors move in torch's hooks, at the modules of the plan alone, and the layers inside of
them stay what they are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from layersense.errors import LayersenseError

_GPUS: ContextVar[int] = ContextVar("gpus", default=1)


@contextmanager
def spread_over(gpus: int) -> Iterator[None]:
    """Let the models that are loaded in the block be spread over the first ``gpus`` GPUs."""
    token = _GPUS.set(gpus)
    try:
        yield
    finally:
        _GPUS.reset(token)


def wanted_gpus() -> int:
    """Return how many GPUs a model that is loaded now is spread over."""
    return _GPUS.get()


def free_memory(gpus: int) -> dict[int, int]:
    """Return the free bytes of the first ``gpus`` GPUs.

    Raises:
        LayersenseError: there are fewer.
    """
    there = torch.cuda.device_count()
    if there < gpus:
        raise LayersenseError(
            f"the run asks for {gpus} GPUs and {there} can be used here; lower `gpus` of the run"
        )
    return {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus)}


def plan_devices(
    skeleton: nn.Module, dtype: torch.dtype, memory: Mapping[int, int]
) -> dict[str, int]:
    """Return module → GPU, so that each GPU gets about the same share and no layer is cut.

    Args:
        skeleton: the model, whose weights may be on the meta device.
        dtype: type of its weights.
        memory: GPU → bytes that it may take.

    Raises:
        LayersenseError: the model does not say what must stay together, or does not fit.
    """
    from accelerate.utils import get_balanced_memory, infer_auto_device_map

    whole = sorted(getattr(skeleton, "_no_split_modules", None) or ())
    if not whole:
        raise LayersenseError(
            f"{type(skeleton).__name__}: transformers does not say which of its layers must stay "
            "on one GPU, so it cannot be spread; set `gpus: 1` in the run"
        )
    balanced = get_balanced_memory(
        skeleton, dict(memory), no_split_module_classes=whole, dtype=dtype
    )
    plan: dict[str, Any] = infer_auto_device_map(
        skeleton, balanced, no_split_module_classes=whole, dtype=dtype
    )
    if outside := sorted(name for name, place in plan.items() if place not in memory):
        size = sum(parameter.numel() for parameter in skeleton.parameters()) * dtype.itemsize
        raise LayersenseError(
            f"{type(skeleton).__name__}: its weights ({size / 2**30:.1f} GiB) do not fit onto "
            f"{len(memory)} GPU(s), {outside[0]} has no place; raise `gpus` of the run"
        )
    return plan


def connect(model: nn.Module, plan: Mapping[str, int]) -> None:
    """Let tensors follow a model that lies on several GPUs, and kernels the tensors.

    What enters a module of the plan is brought to its GPU, and what leaves the model to the first.
    ModelOpt's extensions run on the current GPU whatever their tensors', so that is set, too.
    """
    from accelerate.hooks import remove_hook_from_submodules
    from accelerate.utils import send_to_device

    remove_hook_from_submodules(model)
    first = min(plan.values())

    def enter(device: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            torch.cuda.set_device(device)
            return send_to_device(args, device), send_to_device(kwargs, device)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        torch.cuda.set_device(first)
        return send_to_device(output, first)

    for name, device in plan.items():
        part = model.get_submodule(name)
        # A vision-language model calls the embedding of its language model from outside.
        inside = [m for m in part.modules() if isinstance(m, nn.Embedding) and m is not part]
        for module in [part, *inside] if name else inside:
            module.register_forward_pre_hook(enter(device), with_kwargs=True)
    model.register_forward_hook(leave)
    _guard_quantizers()


def check_together(groups: Mapping[str, list[nn.Module]]) -> None:
    """Check that the modules of each layer group, which share a format, lie on one GPU.

    Raises:
        LayersenseError: a group is cut.
    """
    for handle, modules in groups.items():
        devices = {parameter.device for module in modules for parameter in module.parameters()}
        if len(devices) > 1:
            raise LayersenseError(
                f"{handle.removesuffix('.quant_recipe')}: its modules lie on several GPUs "
                f"({', '.join(sorted(map(str, devices)))}); set `gpus: 1` in the run"
            )


def _guard_quantizers() -> None:
    """Run each of ModelOpt's quantizers with its tensor's GPU as the current one."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    original = TensorQuantizer.forward
    if getattr(original, "guarded", False):
        return

    def forward(self: Any, inputs: torch.Tensor) -> Any:
        if not inputs.is_cuda:
            return original(self, inputs)
        with torch.cuda.device(inputs.device):
            return original(self, inputs)

    forward.guarded = True  # type: ignore[attr-defined]
    TensorQuantizer.forward = forward
