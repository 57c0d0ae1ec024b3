"""Write ``registry.json`` from the installed ModelOpt.

``python -m layersense.quantization.generate_registry``; a test fails when the file has drifted.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.quantization.config as mtq_config
import yaml
from modelopt.torch.opt.config_loader import BUILTIN_CONFIG_ROOT
from modelopt.torch.quantization.model_quant import _AUTO_QUANTIZE_SUPPORTED_ALGORITHMS
from modelopt.torch.quantization.nn import QuantLinearConvBase, QuantModuleRegistry
from torch import nn

from layersense.files import write_json
from layersense.quantization.formats import LIBRARY, REGISTRY, all_layers_name
from layersense.quantization.modelopt_formats import algorithm_configs

LIBRARY_FOLDERS = (
    "general/auto_quantize", "configs/auto_quantize", "configs/numerics", "configs/ptq",
)  # fmt: skip
# Configs that quantize only the layers they name: copies of others once that is dropped.
_LIMITED = ("_MLP_", "_OMLP_", "_EXPERTS_ONLY_", "MAMBA_")


def generate() -> dict[str, Any]:
    """Return the registry as JSON: see :class:`layersense.quantization.formats.Registry`."""
    formats: dict[str, Any] = {}
    refused: dict[str, str] = {}
    names = [name for name in dir(mtq_config) if name.endswith("_CFG")]
    # Limited ones last, so that a copy meets the format it is an alias of.
    for base in sorted(names, key=lambda name: (_is_limited(name), name)):
        config = getattr(mtq_config, base)
        parts = _parts(config)
        if not parts["weight"]:
            refused[base] = "it quantizes the key-value cache and no weight"
        elif _method(parts["algorithm"]) not in _AUTO_QUANTIZE_SUPPORTED_ALGORITHMS:
            refused[base] = (
                f"ModelOpt's search does not accept its algorithm `{_method(parts['algorithm'])}`"
            )
        else:
            twin = next(
                (known for known in formats.values() if parts.items() <= known.items()), None
            )
            if twin:
                twin["aliases"].append(base)
            elif _is_limited(base):
                refused[base] = (
                    "it quantizes only the layers that it names, in a way that no other config "
                    "does; make a format of your own that does the same to all layers"
                )
            else:
                formats[all_layers_name(base)] = {"base": base, "aliases": [], **parts}
    return {
        "modelopt": version("nvidia-modelopt"),
        "attributes": [
            field
            for field in mtq_config.QuantizerAttributeConfig.model_fields
            if field != "effective_bits"
        ],
        "algorithms": _algorithms(),
        "excluded_classes": _excluded_classes(),
        "formats": dict(sorted(formats.items())),
        "refused": refused,
    }


def generate_library() -> dict[str, list[Any]]:
    """Return the search recipes that come with ModelOpt and what they can import, as documents."""
    found = {}
    for place in LIBRARY_FOLDERS:
        folder = BUILTIN_CONFIG_ROOT.joinpath(place)
        for file in sorted(Path(str(folder)).rglob("*.yaml")):
            path = file.relative_to(Path(str(BUILTIN_CONFIG_ROOT))).with_suffix("").as_posix()
            documents = list(yaml.safe_load_all(file.read_text(encoding="utf-8")))
            found[path] = json.loads(json.dumps(documents))
    return found


def _is_limited(base: str) -> bool:
    return any(mark in base for mark in _LIMITED)


def _parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return weight and input attributes and algorithm of a config, whichever layers it names."""
    found: dict[str, list[dict[str, Any]]] = {"weight": [], "input": []}
    for entry in config["quant_cfg"]:
        cfg = entry.get("cfg")
        if cfg is None or entry.get("enable") is False:
            continue
        for side, stages in found.items():
            if entry["quantizer_name"].endswith(f"{side}_quantizer"):
                new = [_attributes(stage) for stage in (cfg if isinstance(cfg, list) else [cfg])]
                if stages and stages != new:
                    raise ValueError(f"{config}: two layers of it differ in their {side} format")
                stages[:] = new
    algorithm = config.get("algorithm")
    if isinstance(algorithm, str):
        algorithm = {"method": algorithm}
    return {**found, "algorithm": algorithm}


def _attributes(cfg: Mapping[str, Any]) -> dict[str, Any]:
    # Bits are computed by ours alone, for a changed base keeps ModelOpt's number otherwise.
    kept = {k: v for k, v in cfg.items() if v is not None and k != "effective_bits"}
    attributes: dict[str, Any] = json.loads(json.dumps(kept))
    return attributes


def _method(algorithm: Mapping[str, Any] | None) -> str | None:
    return algorithm["method"] if algorithm else None


def _algorithms() -> dict[str, list[str]]:
    return {
        method: [field for field in config.model_fields if field != "method"]
        for method, config in sorted(algorithm_configs().items())
        if method in _AUTO_QUANTIZE_SUPPORTED_ALGORITHMS
    }


def _excluded_classes() -> list[str]:
    return sorted(
        key
        for original, key in QuantModuleRegistry._key_registry.items()
        if not issubclass(QuantModuleRegistry[original], QuantLinearConvBase)
        and not issubclass(original, nn.Linear)
    )


if __name__ == "__main__":
    write_json(REGISTRY, generate())
    write_json(LIBRARY, generate_library())
