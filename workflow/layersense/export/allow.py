"""What ModelOpt's Hugging Face exporter writes for which format and layer (no torch).

The exporter refuses nothing. It goes by the type of a weight and ignores what the activations do,
so a format that is not in :data:`WRITES` may become another one on the disk; a convolution is
written unquantized without being listed. What is in the table was read in ModelOpt 0.47's source
(``modelopt/torch/export/quant_utils.py``: ``get_quantization_format``, ``to_quantized_weight``,
``process_layer_quant_config``) and is checked, tensor by tensor, at every export.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import msgspec

from layersense.errors import LayersenseError
from layersense.manifests.schema import Manifest, plain_name
from layersense.quantization.formats import (
    NONE,
    Format,
    format_from_settings,
    format_settings,
    known_formats,
)
from layersense.recipes.menu import Recipe
from layersense.recipes.quant_config import bits_of, holds_experts

Layout = Literal["fp8", "int8", "int4", "nvfp4", "mxfp8"]

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1}
"""Bytes of an element, by safetensors' name of its type."""
TASKS = ("causal-lm", "image-text-to-text", "seq2seq-lm")
"""Tasks whose models are written in Hugging Face form."""
ONNX_TASKS = ("image-classification", "object-detection", "semantic-segmentation")
"""Tasks whose models are written as ONNX with Q/DQ nodes."""


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """What the exporter writes for a linear layer of one format."""

    algo: str
    """``quant_algo`` in ``hf_quant_config.json``."""
    layout: Layout
    """How the weight is packed."""
    block: int | None = None
    """Weights along the input that share a scale; None: a scale for a tensor or an output."""
    per_channel: bool = False
    """Whether, without blocks, each output has its own scale."""
    square: bool = False
    """Whether a block is as high as it is long."""
    second_scale: bool = False
    """Whether a ``weight_scale_2`` multiplies the scales of the blocks."""
    input_scale: bool = False
    """Whether activations have a fixed scale."""
    pre_quant_scale: bool = False
    """Whether inputs are scaled by channel first. It is not written where the norm before the layer
    could take it."""


WRITES: Mapping[str, Written] = {
    "FP8_ALL_LAYERS_CFG": Written(algo="FP8", layout="fp8", input_scale=True),
    "FP8_PER_CHANNEL_PER_TOKEN_ALL_LAYERS_CFG": Written(
        algo="FP8_PER_CHANNEL_PER_TOKEN", layout="fp8", per_channel=True
    ),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG": Written(
        algo="fp8_pb_wo", layout="fp8", block=128, square=True
    ),
    "INT8_ALL_LAYERS_CFG": Written(
        algo="W8A8_SQ_PER_CHANNEL", layout="int8", per_channel=True, input_scale=True
    ),
    "INT8_SMOOTHQUANT_ALL_LAYERS_CFG": Written(
        algo="W8A8_SQ_PER_CHANNEL",
        layout="int8",
        per_channel=True,
        input_scale=True,
        pre_quant_scale=True,
    ),
    "INT8_WEIGHT_ONLY_ALL_LAYERS_CFG": Written(algo="W8A16", layout="int8", per_channel=True),
    "INT4_AWQ_ALL_LAYERS_CFG": Written(
        algo="W4A16_AWQ", layout="int4", block=128, pre_quant_scale=True
    ),
    "W4A8_AWQ_BETA_ALL_LAYERS_CFG": Written(
        algo="W4A8_AWQ",
        layout="int4",
        block=128,
        second_scale=True,
        input_scale=True,
        pre_quant_scale=True,
    ),
    "NVFP4_ALL_LAYERS_CFG": Written(
        algo="NVFP4", layout="nvfp4", block=16, second_scale=True, input_scale=True
    ),
    "W4A16_NVFP4_ALL_LAYERS_CFG": Written(
        algo="W4A16_NVFP4", layout="nvfp4", block=16, second_scale=True
    ),
    "NVFP4_AWQ_LITE_ALL_LAYERS_CFG": Written(
        algo="NVFP4_AWQ",
        layout="nvfp4",
        block=16,
        second_scale=True,
        input_scale=True,
        pre_quant_scale=True,
    ),
    "MXFP8_ALL_LAYERS_CFG": Written(algo="MXFP8", layout="mxfp8", block=32),
}
"""Format → what is written of it.

Not here, although the exporter takes them: integers of 4 bits calibrated by `max`, which become AWQ
without its scales; pairs of types whose activations it does not look at; MXFP4 and its like, under
names that no runtime reads; what nobody has run.
"""

ONNX_WRITES: Mapping[str, Written] = {
    "FP8_ALL_LAYERS_CFG": Written(algo="FP8", layout="fp8", input_scale=True),
    "INT8_ALL_LAYERS_CFG": Written(algo="INT8", layout="int8", per_channel=True, input_scale=True),
    "INT8_WEIGHT_ONLY_ALL_LAYERS_CFG": Written(algo="INT8", layout="int8", per_channel=True),
}
"""Format → its Q/DQ nodes, of those that the ONNX standard has and onnxruntime computes."""

_LINEAR = ("Linear",)
_ONNX_LAYERS = ("Linear", "Conv2d")
_TRANSPOSED = ("Conv1D",)
"""Linear layers of GPT-2 and its like, which hold their weights transposed. ModelOpt turns them,
and the exporter writes them so, quantized or not."""


@dataclass(frozen=True)
class Plan:
    """What is to be written of a recipe.

    Attributes:
        recipe: handle → format, of every group.
        kept: handle → why a group stays unquantized although the recipe quantizes it.
        written: format → what the exporter makes of it.
    """

    recipe: Recipe
    kept: dict[str, str]
    written: dict[str, Written]


def menu(task: str, *, mixture: bool = False) -> Mapping[str, Written]:
    """Return the formats that are written for a task's models; none for a task of one's own.

    Args:
        task: the task.
        mixture: whether the model holds all experts of a layer in one module. The exporter takes
            such a module for a list of layers as soon as it finds AWQ anywhere in the model.
    """
    found = WRITES if task in TASKS else ONNX_WRITES if task in ONNX_TASKS else {}
    return {name: entry for name, entry in found.items() if not (mixture and "AWQ" in entry.algo)}


def writes(format: Format, allowed: Mapping[str, Written] = WRITES) -> Written | None:
    """Return what is written of a format; None if it cannot be exported.

    A format counts by what it does: ``W8A8_FP8_FP8`` is ``FP8_ALL_LAYERS_CFG``.
    """
    settings, known = format_settings(format), known_formats()
    return next(
        (found for name, found in allowed.items() if format_settings(known[name]) == settings),
        None,
    )


def nearest_format(format: Format, allowed: Mapping[str, Written] = WRITES) -> str:
    """Return the format nearest to one that cannot be exported.

    It has the same type of weights if there is one, then activations of the same type, then nearly
    as many bits.
    """
    known = known_formats()
    return min(
        allowed,
        key=lambda name: (
            known[name].weight_format != format.weight_format,
            known[name].act_format != format.act_format,
            abs(known[name].effective_bits - format.effective_bits),
            known[name].algorithm != format.algorithm,
        ),
    )


def make_plan(
    manifest: Manifest, shapes: Mapping[str, Sequence[tuple[int, ...]]] | None = None
) -> Plan:
    """Return what is to be written of a manifest's recipe.

    Args:
        manifest: the recipe.
        shapes: module → shapes of the matrices that it is written as; None before the model is
            loaded, when only formats and types of layers are looked at.

    Raises:
        LayersenseError: the task has no checkpoint in Hugging Face form, or a format cannot be
            exported; the nearest recipe that can is named.
    """
    task = manifest.model.task
    where = f"{manifest.run_name}, {manifest.scheme.name}"
    mixture = any(holds_experts(layer.module_type) for layer in manifest.layers.values())
    allowed = menu(task, mixture=mixture)
    if not allowed:
        raise LayersenseError(
            f"{where}: a model of task {task} is not exported; those of "
            f"{', '.join((*TASKS, *ONNX_TASKS))} are"
        )
    for name, layer in manifest.layers.items():
        if layer.module_type in _TRANSPOSED:
            raise LayersenseError(
                f"{where}: {name} is a {layer.module_type}, whose weight ModelOpt's exporter "
                "writes transposed, so that no loader reads it; a model with such layers cannot be "
                "exported"
            )
    formats = {
        name: format_from_settings(name, run.settings["format"])
        for name, run in manifest.run.items()
    }
    recipe = manifest.recipe
    used = set(recipe.values()) - {NONE}
    written = {name: writes(formats[name], allowed) for name in formats if name in used}
    if bad := [name for name, found in written.items() if found is None]:
        raise LayersenseError(_refusal(manifest, formats, recipe, bad, allowed))
    known = {name: found for name, found in written.items() if found is not None}
    kept: dict[str, str] = {}
    for handle, name in recipe.items():
        if name == NONE:
            continue
        for module in manifest.layer_sensitivity[handle].module_names:
            module_type = manifest.layers[module].module_type
            if task in ONNX_TASKS:
                reason = None if module_type in _ONNX_LAYERS else _NO_NODES.format(module_type)
            else:
                there = None if shapes is None else shapes[module]
                reason = _why_not(module_type, known[name], there)
            if reason:
                kept[handle] = f"{module}: {reason}"
                break
    left = {handle: NONE if handle in kept else name for handle, name in recipe.items()}
    used = set(left.values())
    return Plan(left, kept, {name: found for name, found in known.items() if name in used})


def tensors(
    written: Written, shape: Sequence[int], dtype: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return what stands in the checkpoint for one weight: suffix → type and shape.

    Args:
        written: what the exporter does.
        shape: (outputs, inputs) of the weight.
        dtype: safetensors' name of the model's type, that of ``pre_quant_scale``.
    """
    outputs, inputs = shape
    weight: dict[Layout, tuple[str, tuple[int, ...]]] = {
        "fp8": ("F8_E4M3", (outputs, inputs)),
        "mxfp8": ("F8_E4M3", (outputs, inputs)),
        "int8": ("I8", (outputs, inputs)),
        "int4": ("U8", (outputs // 2, inputs)),
        "nvfp4": ("U8", (outputs, inputs // 2)),
    }
    found = {"weight": weight[written.layout]}
    scale_type = {"nvfp4": "F8_E4M3", "mxfp8": "U8"}.get(written.layout, "F32")
    if written.square and written.block:
        scale: tuple[int, ...] = (outputs // written.block, 1, inputs // written.block, 1)
    elif written.block:
        scale = (outputs, inputs // written.block)
    else:
        scale = (outputs,) if written.per_channel else ()
    found["weight_scale"] = (scale_type, scale)
    if written.second_scale:
        found["weight_scale_2"] = ("F32", ())
    if written.input_scale:
        found["input_scale"] = ("F32", ())
    if written.pre_quant_scale:
        found["pre_quant_scale"] = (dtype, (inputs,))
    return found


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor, by safetensors' name of its type."""
    return BYTES[dtype] * prod(shape)


_NO_NODES = "Q/DQ nodes are written for linear layers and 2-D convolutions, and this is {}"


def _why_not(
    module_type: str, written: Written, shapes: Sequence[tuple[int, ...]] | None
) -> str | None:
    is_mixture = holds_experts(module_type)
    if module_type not in _LINEAR and not is_mixture:
        return f"the exporter packs linear layers, and this is {module_type}"
    if is_mixture and written.pre_quant_scale:  # SmoothQuant
        return f"{written.algo} scales the inputs of layers, and of experts the exporter does not"
    if is_mixture and shapes is not None and not shapes:
        return (
            f"the exporter splits experts with the weights `gate_up_proj` and `down_proj`, and "
            f"{module_type} has others"
        )
    return next(filter(None, (_misfit(written, *shape) for shape in shapes or ())), None)


def _misfit(written: Written, outputs: int, inputs: int) -> str | None:
    if written.layout == "int4" and outputs % 2:
        return f"packing 4-bit integers takes an even number of outputs, and these are {outputs}"
    if written.block and inputs % written.block:
        return (
            f"{inputs} inputs are no multiple of {written.block}, the block of {written.algo}, and "
            "the exporter packs whole blocks"
        )
    if written.block and written.square and outputs % written.block:
        return f"{outputs} outputs are no multiple of {written.block}, the block of {written.algo}"
    return None


def _refusal(
    manifest: Manifest,
    formats: Mapping[str, Format],
    recipe: Recipe,
    bad: Sequence[str],
    allowed: Mapping[str, Written],
) -> str:
    """Return a sentence that names the nearest recipe that can be exported."""
    here = {name: found for name, found in formats.items() if writes(found, allowed)}
    changes: dict[tuple[str, str], int] = {}
    nearest = dict(recipe)
    for handle, name in recipe.items():
        group = manifest.layer_sensitivity[handle]
        if name in bad:
            # Formats of this very group, of nearly as many bits; unquantized if there is none.
            taken = min(
                (other for other in map(plain_name, group.formats) if other in here),
                key=lambda other: abs(here[other].effective_bits - formats[name].effective_bits),
                default=NONE,
            )
            changes[name, taken] = changes.get((name, taken), 0) + 1
            nearest[handle] = taken
    told = ", ".join(
        f"{count} group{'s' * (count > 1)} {new} instead of {old}"
        for (old, new), count in changes.items()
    )
    # AWQ among experts is the one such case.
    mixture = ", beside fused experts" if any(writes(formats[name]) for name in bad) else ""
    advice = ", ".join(dict.fromkeys(nearest_format(formats[name], allowed) for name in bad))
    return (
        f"{manifest.run_name}, {manifest.scheme.name}: ModelOpt's exporter cannot write "
        f"{', '.join(bad)} as it was measured{mixture}; the nearest recipe that can be exported "
        f"gives {told} ({bits_of(manifest, nearest):.3g} bits instead of "
        f"{manifest.autoquant_state.constraints['effective_bits']:.3g}); replace the format in "
        f"`quant_formats` of the scheme, for instance by {advice}"
    )
