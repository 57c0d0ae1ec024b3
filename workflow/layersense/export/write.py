"""Put a recipe onto its model and write the checkpoint (torch)."""

import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.quant_aware_conversion import build_reverse_name_mapper
from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers
from safetensors import SafetensorError
from torch import Tensor, nn

from layersense.errors import LayersenseError
from layersense.export.allow import Plan
from layersense.export.check import tensor_names
from layersense.export.matrices import is_mixture, matrices, matrix_shapes
from layersense.export.store import Expected
from layersense.manifests.schema import Manifest
from layersense.models.checkpoints import Checkpoint
from layersense.quantization.formats import NONE
from layersense.recipes.quant_config import Cache, holds_experts

logger = logging.getLogger(__name__)

SHARD = "5GB"
"""Largest file of weights."""
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
"""Files that a checkpoint passes on as they are: processor, tokenizer, generation config; code only
where it may run."""
MADE = ("config.json", "hf_quant_config.json", "model.safetensors.index.json")
"""Those of them that the exporter makes anew."""
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_QUANTIZER = ("_quantizer", "_quantizers")


@dataclass(frozen=True)
class Fused:
    """A quantized model after the exporter's own fusions, before anything is packed.

    Attributes:
        expected: what the checkpoint should hold.
        tensors: name on the disk → tensor on the CPU: the weights as simulated, and what else the
            fusions changed.
    """

    expected: Expected
    tensors: dict[str, Tensor]


def fuse(
    model: nn.Module,
    plan: Plan,
    manifest: Manifest,
    formats: Mapping[str, Any],
    cache: Cache | None,
    original: str,
) -> Fused:
    """Let the exporter fuse what shares an input, and keep what the model then computes with.

    The exporter gives layers that share an input one input scale and, where a weight has a scale
    of its whole tensor, one of these too; AWQ and SmoothQuant layers get the mean of their scales,
    which the norm before them takes up. It does so again when it exports, which changes nothing.

    Raises:
        LayersenseError: layers that share an input have different formats.
    """
    before = _parameters(model)
    modules = {
        name: format
        for handle, format in plan.recipe.items()
        if format != NONE
        for name in manifest.layer_sensitivity[handle].module_names
    }
    try:
        with _quiet_exporter():
            requantize_resmooth_fused_llm_layers(model)
    except AssertionError as error:
        if "different quantization formats" not in str(error):
            raise
        raise LayersenseError(
            f"{manifest.run_name}, {manifest.scheme.name}: layers that read the same input have "
            "different formats, which ModelOpt's exporter cannot write; exclude one of them from "
            "the scheme"
        ) from error
    to_disk = _names_on_disk(model)
    after = _parameters(model)
    tensors: dict[str, Tensor] = {}
    shapes = {}
    quantized: dict[str, str] = {}
    with torch.no_grad():
        for name, format in modules.items():
            for part, weight in matrices(name, model.get_submodule(name), quantized=True):
                quantized[to_disk(part)] = format
                shapes[to_disk(part)] = list(weight.shape)
                tensors[f"{to_disk(part)}.weight"] = weight.cpu()
    changed = [
        name
        for name, parameter in after.items()
        if parameter is not before[name] and name.rpartition(".")[0] not in modules
    ]
    tensors |= {to_disk(name): after[name].detach().cpu() for name in changed}
    stored = [name for name in model.state_dict() if not _belongs_to_quantizer(name)]
    mixtures = {name: module for name, module in model.named_modules() if is_mixture(module)}
    stored = [name for name in stored if name.rpartition(".")[0] not in mixtures]
    known = tensor_names(Path(original))
    for name, module in mixtures.items():
        for part, weight in matrices(name, module, quantized=False):
            stored.append(f"{part}.weight")
            # Where the original has them as one tensor, no other copy is left to compare with.
            if name not in modules and to_disk(stored[-1]) not in known:
                changed.append(stored[-1])
                tensors[to_disk(stored[-1])] = weight.detach().cpu()
    dtype = next(p.dtype for p in after.values() if p.is_floating_point())
    expected = Expected(
        original=original,
        quantized=quantized,
        shapes=shapes,
        formats={format: formats[format] for format in sorted(set(modules.values()))},
        unquantized=sorted(
            to_disk(name)
            for name, layer in manifest.layers.items()
            if name not in modules and _is_listed(model.get_submodule(name), layer.module_type)
        ),
        changed=sorted(map(to_disk, changed)),
        parameters=sorted(set(map(to_disk, stored))),
        mixtures=sorted(map(to_disk, mixtures)),
        dtype=DTYPES[dtype],
        kv_cache=cache.format.partition("_")[0].upper() if cache else None,
        cached=[
            to_disk(name)
            for name in (cache.modules if cache else ())
            if hasattr(model.get_submodule(name).k_bmm_quantizer, "_amax")
        ],
    )
    return Fused(expected, tensors)


def write_checkpoint_folder(
    model: nn.Module, folder: Path, checkpoint: Checkpoint, expected: Expected
) -> None:
    """Export a quantized model into a folder, with what belongs to it.

    Raises:
        LayersenseError: the disk is full.
    """
    try:
        with _quiet_exporter():
            export_hf_checkpoint(model, export_dir=folder, max_shard_size=SHARD)
        copy_others(Path(checkpoint.path), folder, MADE, code=checkpoint.trust_remote_code)
        untie(folder / "config.json", expected)
    except (OSError, SafetensorError) as error:
        raise no_space(folder, error) from error


def no_space(folder: Path, error: Exception) -> LayersenseError:
    """Return the error of a checkpoint that could not be written."""
    reason = getattr(error, "strerror", None) or str(error)
    return LayersenseError(
        f"{folder.parent}: the checkpoint cannot be written ({reason}); free disk space, or link "
        "results/ to a folder that has it; an earlier checkpoint stays as it was"
    )


def untie(config_file: Path, expected: Expected) -> None:
    """Say that the head is no longer the embedding, where it was and is now packed.

    The exporter writes both and leaves `tie_word_embeddings` as it was, so that every loader would
    take the embedding for the head.
    """
    heads = [name for name in expected.quantized if name.rpartition(".")[2] == "lm_head"]
    if not heads:
        return
    config = json.loads(config_file.read_bytes())
    for section in (config, config.get("text_config") or {}):
        if section.get("tie_word_embeddings"):
            section["tie_word_embeddings"] = False
    # Where the key is absent, the default of the class stands, which may be true.
    config["tie_word_embeddings"] = False
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def copy_others(source: Path, folder: Path, made: Sequence[str], *, code: bool) -> None:
    """Copy what a checkpoint holds beside its weights, but for the files that were made anew."""
    for pattern in COPIED if code else COPIED[:-1]:
        for file in sorted(source.glob(pattern)):
            if file.name not in made and not file.name.endswith(".safetensors.index.json"):
                shutil.copyfile(file, folder / file.name)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters by all their names: a tied one has several."""
    return dict(model.named_parameters(remove_duplicate=False))


def _names_on_disk(model: nn.Module) -> Any:
    """Return what turns a module's name into the one that the exporter gives it."""
    try:
        mapper = build_reverse_name_mapper(model)
    except Exception as error:  # the exporter itself then keeps the names as they are
        logger.warning("names in the checkpoint are those of the loaded model (%s)", error)
        mapper = None
    return mapper or (lambda name: name)


def _is_listed(module: nn.Module, module_type: str) -> bool:
    """Return whether a runtime reads a module as quantized unless it is told otherwise.

    Embeddings it does not: ModelOpt lists some of them and some not, by their class.
    """
    return (
        isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        or module_type.endswith("Router")
        or holds_experts(module_type)
    )


def _belongs_to_quantizer(name: str) -> bool:
    return any(part.endswith(_QUANTIZER) for part in name.split("."))


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep what the exporter prints for the log, and its warnings off the terminal."""
    printed = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(printed):
        warnings.simplefilter("ignore")
        yield
    for line in printed.getvalue().splitlines():
        logger.debug("%s", line)


def weight_shapes(model: nn.Module, manifest: Manifest) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes of the weight matrices of each searched module."""
    modules = [name for group in manifest.layer_sensitivity.values() for name in group.module_names]
    return {name: matrix_shapes(model.get_submodule(name)) for name in modules}


def quant_algo(folder: Path) -> str:
    """Return the algorithm that a written checkpoint names."""
    content = json.loads((folder / "hf_quant_config.json").read_bytes())
    return str(content["quantization"]["quant_algo"])
