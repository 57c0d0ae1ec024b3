"""What the taps of a pass will hold, told from the shapes of weights and of one batch.

No model runs: transformers' own code looks into its inputs, which a model without weights cannot.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from modelopt.torch.quantization.algorithms import QuantRecipeHparam
from torch import Tensor, nn

from layersense.models.tasks.protocol import Batch
from layersense.quantization.layers import LayerName
from layersense.scoring.fused.fit import expected_bytes, expected_bytes_recomputed

Held = dict[str, tuple[int, int]]
"""Layer group → bytes of its input, and of the outputs of its modules."""


def held_by_shapes(
    groups: Mapping[str, QuantRecipeHparam],
    describe: Callable[[Sequence[str]], LayerName],
    batch: Batch,
    config: Any,
) -> Held | None:
    """Return what each group's modules take in and put out, for one batch.

    Args:
        groups: handle → ModelOpt's layer group.
        describe: the task's description of a layer.
        batch: a scoring batch.
        config: the model's config in transformers' form.

    Returns:
        None where the positions that some layer works on cannot be told, as in a convolutional
        network.
    """
    positions = _positions(batch, config)
    found: Held = {}
    for handle, hparam in groups.items():
        subsystem = describe(list(hparam.quant_module_names)).subsystem
        count = positions.get(subsystem, positions.get("language"))
        sizes = [_features(module) for module in hparam.quant_modules]
        if count is None or None in sizes:
            return None
        known = [size for size in sizes if size is not None]
        item = next(hparam.quant_modules[0].parameters()).dtype.itemsize
        found[handle] = (
            max(inputs for inputs, _ in known) * count * item,
            sum(outputs for _, outputs in known) * count * item,
        )
    return found


def held_by_running(groups: Mapping[str, QuantRecipeHparam], run: Callable[[], Any]) -> Held:
    """Return the same from a forward pass, such as that of a network without weights."""
    found: Held = {}
    hooks = []

    def watch(handle: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            inputs = sum(tensor.nbytes for tensor in args if isinstance(tensor, Tensor))
            first = output[0] if isinstance(output, tuple) else output
            before = found.get(handle, (0, 0))
            # The modules of a group see the same input.
            found[handle] = (max(before[0], inputs), before[1] + first.nbytes)

        return hook

    for handle, hparam in groups.items():
        hooks += [module.register_forward_hook(watch(handle)) for module in hparam.score_modules]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in hooks:
            handle.remove()
    return found


def expected_peaks(
    model: nn.Module, groups: Mapping[str, QuantRecipeHparam], held: Held, n_tokens: int
) -> tuple[float, float | None]:
    """Return the expected peak in bytes, with activations kept and with them recomputed.

    The second is None where the model cannot recompute activations.

    Args:
        model: the model; its weights may be on the meta device.
        groups: handle → ModelOpt's layer group.
        held: what they take in and put out.
        n_tokens: supervised tokens of the batch.
    """
    weights = float(sum(parameter.nbytes for parameter in model.parameters()))
    total = float(sum(sum(sizes) for sizes in held.values()))
    heads = [module for name, module in model.named_modules() if name.endswith("lm_head")]
    logits = n_tokens * max((getattr(head, "out_features", 0) for head in heads), default=0)
    largest = max(
        (
            float(parameter.nbytes)
            for hparam in groups.values()
            for module in hparam.quant_modules
            for parameter in module.parameters()
        ),
        default=0.0,
    )
    kept = expected_bytes(weights, total, logits, largest)
    blocks = _blocks(model)
    if not blocks:
        return kept, None
    within: dict[str, float] = dict.fromkeys(blocks, 0.0)
    entry: dict[str, float] = dict.fromkeys(blocks, 0.0)
    outside = 0.0
    for handle, (inputs, outputs) in held.items():
        name = groups[handle].quant_module_names[0]
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if block is None:
            outside += inputs + outputs
        else:
            within[block] += inputs + outputs
            # The first layer of a block sees what the block sees.
            entry[block] = entry[block] or inputs
    return kept, expected_bytes_recomputed(
        weights, outside, [(entry[block], within[block]) for block in blocks], logits, largest
    )


def _blocks(model: nn.Module) -> list[str]:
    """Return the names of the modules whose activations transformers can recompute."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not getattr(model, "supports_gradient_checkpointing", False):
        return []
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
    ]


def _positions(batch: Batch, config: Any) -> dict[str, int]:
    """Return subsystem → number of positions that its layers work on."""
    found: dict[str, int] = {}
    ids = batch.inputs.get("input_ids")
    if ids is not None:
        found |= dict.fromkeys(("language", "head", "encoder", "decoder", "other"), ids.numel())
        if "decoder_input_ids" in batch.inputs or (
            getattr(config, "is_encoder_decoder", False) and batch.labels.ndim == 2
        ):
            found |= dict.fromkeys(("decoder", "head"), batch.labels.numel())
    pixels = batch.inputs.get("pixel_values")
    if pixels is None:
        return found
    vision = getattr(config, "vision_config", config)
    patch = getattr(vision, "patch_size", None)
    if pixels.ndim == 2:  # patches in a row, as Qwen-VL's
        found["vision"] = len(pixels)
    elif isinstance(patch, int) and pixels.ndim >= 4:
        height, width = pixels.shape[-2:]
        images = pixels[..., 0, 0, 0].numel()
        found["vision"] = images * (height // patch) * (width // patch)
        if ids is None:
            found["language"] = found["head"] = found["vision"]
    token = getattr(config, "image_token_id", None)
    if ids is not None and token is not None:
        found["projector"] = int((ids == token).sum())
    return found


def _features(module: nn.Module) -> tuple[int, int] | None:
    """Return how many numbers a module takes in and puts out at one position."""
    weights = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
    if not weights:
        return None
    weight = weights[0]
    if isinstance(module, nn.modules.conv._ConvNd):
        # One that cuts an image into patches sees each number once.
        whole = tuple(module.kernel_size) == tuple(module.stride)
        return (weight[0].numel(), module.out_channels) if whole else None
    if weight.ndim == 3:  # fused experts are scored at what they return: the hidden size
        hidden = int(getattr(module, "hidden_dim", min(weight.shape[1:])))
        return hidden, hidden
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return int(weight.shape[0]), int(weight.shape[1])
