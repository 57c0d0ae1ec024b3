"""Which experts of a mixture the data reaches, while a model is scored."""

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

_SEEN = "_layersense_experts_seen"
_CHOSEN = "_layersense_experts_chosen"
_CHOSEN_KEYS = ("num_experts_per_tok", "num_selected_experts", "moe_topk", "top_k_experts", "moe_k")
"""How configs of transformers call the number of experts that work on a token."""
_ROUTING = "top_k_index"
"""The argument by which transformers tells fused experts who works on which token."""
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.")


def watch_experts(model: nn.Module) -> None:
    """Note, on every mixture of experts, the experts that scoring reaches.

    Experts come fused, as one module with 3-D weights that is told its tokens' experts, or as a
    linear layer each. Calibration is not counted: under ``gradient`` scoring is what runs with
    gradients, under ``kl_div`` what runs in inference mode.
    """
    for name, module in model.named_modules():
        if is_fused(module):
            module.register_forward_pre_hook(_on_fused, with_kwargs=True)
        elif _EXPERT.match(f"{name}.") and next(module.children(), None) is None:
            module.register_forward_pre_hook(_on_own)


def unreached_experts(
    model: nn.Module, module_names: Sequence[str]
) -> tuple[int, list[int]] | None:
    """Return how many experts a layer group has, and the numbers of those never reached.

    Returns:
        None for a group that is no mixture, or of a model that was not watched.
    """
    found: dict[int, bool] = {}
    for number, reached in _experts(model, module_names):
        found[number] = found.get(number, False) or reached
    if not found:
        return None
    return len(found), sorted(number for number, reached in found.items() if not reached)


def experts_per_token(model: nn.Module, module_names: Sequence[str]) -> int | None:
    """Return how many experts of a layer group work on each token, or None if that is unknown.

    Fused experts were told; of others the model's config may say it.
    """
    told = (getattr(model.get_submodule(name), _CHOSEN, None) for name in module_names)
    if (count := next((count for count in told if count), None)) is not None:
        return int(count)
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = (getattr(config, key, None) for key in _CHOSEN_KEYS)
    return next((count for count in found if isinstance(count, int)), None)


def _experts(model: nn.Module, module_names: Sequence[str]) -> Iterator[tuple[int, bool]]:
    for name in module_names:
        module = model.get_submodule(name)
        if is_fused(module):
            seen: Any = getattr(module, _SEEN, None)
            reached = [False] * _count(module) if seen is None else seen.tolist()
            yield from enumerate(reached)
        elif match := _EXPERT.match(f"{name}."):
            yield int(match[2]), hasattr(module, _SEEN)


def is_fused(module: nn.Module) -> bool:
    """Return whether a module holds all experts of a layer as 3-D weights."""
    if not isinstance(getattr(module, "num_experts", None), int):
        return False
    # The class's own forward: ModelOpt replaces that of the instance.
    forwards = [vars(base)["forward"] for base in type(module).__mro__ if "forward" in vars(base)]
    return any(_ROUTING in inspect.signature(forward).parameters for forward in forwards)


def _count(module: nn.Module) -> int:
    return int(module.num_experts)  # type: ignore[arg-type]


def _on_fused(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    chosen = kwargs.get(_ROUTING, args[1] if len(args) > 1 else None)
    if not _scoring() or not isinstance(chosen, torch.Tensor):
        return
    object.__setattr__(module, _CHOSEN, chosen.shape[-1])
    seen = getattr(module, _SEEN, None)
    if seen is None:
        # Stays on the device, so that no layer waits for a transfer.
        with torch.inference_mode(False):
            seen = torch.zeros(_count(module), dtype=torch.bool, device=chosen.device)
        object.__setattr__(module, _SEEN, seen)
    seen[chosen.detach().reshape(-1)] = True


def _on_own(module: nn.Module, args: tuple[Any, ...]) -> None:
    if _scoring() and args and args[0].numel():
        object.__setattr__(module, _SEEN, True)


def _scoring() -> bool:
    return torch.is_grad_enabled() or torch.is_inference_mode_enabled()
