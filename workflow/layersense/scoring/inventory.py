"""What a model has: every module with quantizable weights, and the layer groups ModelOpt made."""

from collections.abc import Mapping
from dataclasses import dataclass

from modelopt.torch.quantization.algorithms import QuantRecipeHparam
from modelopt.torch.quantization.nn import QuantModule
from torch import nn

from layersense.models.experts import experts_per_token, unreached_experts
from layersense.models.tasks.protocol import Loaded, Task
from layersense.scoring.scores import Group, Layer


@dataclass(frozen=True)
class Inventory:
    """Layers and groups in model order."""

    layers: dict[str, Layer]
    groups: dict[str, Group]

    @property
    def idle_weights(self) -> int:
        """Weights of experts that, for any one token, do no work."""
        return sum(
            group.n_weights * (group.n_experts - group.experts_per_token) // group.n_experts
            for group in self.groups.values()
            if group.n_experts and group.experts_per_token
        )


def take_inventory(
    loaded: Loaded,
    hparams: Mapping[str, QuantRecipeHparam],
    original_types: Mapping[str, str],
    task: Task,
) -> Inventory:
    """List layers and groups of a model that ``auto_quantize`` has prepared.

    Args:
        loaded: the model after ``auto_quantize``.
        hparams: handle → ModelOpt's layer group.
        original_types: module name → class name before ``auto_quantize``.
        task: names the subsystems, if the model does not.
    """
    model, describe = loaded.model, loaded.describe or task.describe
    group_of = {
        name: handle for handle, hparam in hparams.items() for name in hparam.quant_module_names
    }
    owner: dict[int, str] = {}
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        if name not in original_types:  # a quantizer, which ModelOpt added
            continue
        # Vectors (biases, norms, scales) are no weights that any format quantizes.
        weights = {
            key: parameter
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.ndim >= 2
        }
        if not weights:
            continue
        first = next(iter(weights.values()))
        tied_to = owner.setdefault(id(first), name)
        layers[name] = Layer(
            module_type=original_types[name],
            n_weights=sum(weight.numel() for weight in weights.values()),
            shape=list(first.shape) if len(weights) == 1 else [],
            group=group_of.get(name),
            reason=None if name in group_of else _why_not_searched(module, original_types[name]),
            tied_to=None if tied_to == name else tied_to,
        )
    groups = {}
    for handle, hparam in hparams.items():
        names = list(hparam.quant_module_names)
        layer = describe(names)
        n_experts, unreached = unreached_experts(model, names) or (None, [])
        groups[handle] = Group(
            module_names=names,
            n_weights=sum(layers[name].n_weights for name in names),
            subsystem=layer.subsystem,
            block=layer.block,
            kind=layer.kind,
            n_experts=n_experts,
            experts_per_token=experts_per_token(model, names) if n_experts else None,
            unreached_experts=unreached,
        )
    return Inventory(layers=layers, groups=groups)


def _why_not_searched(module: nn.Module, module_type: str) -> str:
    if isinstance(module, QuantModule):
        return f"AutoQuantize searches linears, convolutions and fused experts, not {module_type}"
    return f"ModelOpt has no quantized form of {module_type}"
