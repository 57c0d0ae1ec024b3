"""``recipe.yaml``: the recipe for NVIDIA's own tools, ``hf_ptq.py --recipe`` (no torch).

It is a PTQ recipe of ModelOpt (``modelopt_recipes``, ``recipe_type: ptq``), read by ModelOpt's
`load_recipe`: one ``quant_cfg`` and one algorithm for all of it. Where a recipe needs several
algorithms the file cannot say so: it takes the one that is not `max`, its description names the
others, and ``quant_config.json`` is what replays it exactly.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from layersense.files import atomic_write
from layersense.manifests.read import read_own_manifest
from layersense.recipes.quant_config import Cache, Part, QuantConfig, quant_config


def ptq_recipe(config: QuantConfig) -> dict[str, Any]:
    """Return a recipe in the form of `ModelOptPTQRecipe`."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    algorithms: list[dict[str, Any]] = []
    replayed: list[Part | Cache] = [*config.parts]
    if config.kv_cache is not None:
        replayed.append(config.kv_cache)
    for part in replayed:
        entries += [_spelled(entry) for entry in part.config["quant_cfg"] if "cfg" in entry]
        algorithm = part.config["algorithm"]
        if algorithm is not None and algorithm not in algorithms:
            algorithms.append(algorithm)
    # Other algorithms calibrate ranges by `max` themselves before they go on.
    special = [algorithm for algorithm in algorithms if algorithm != {"method": "max"}]
    chosen = [*special, *algorithms, None][0]
    formats = ", ".join(f"{len(part.modules)} modules {part.format}" for part in config.parts)
    note = (
        f" ModelOpt calibrates all of a file by one algorithm, and this recipe has "
        f"{' and '.join(algorithm['method'] for algorithm in algorithms)}: quant_config.json "
        "beside it replays it exactly, by `layersense apply`."
        if len(algorithms) > 1
        else ""
    )
    return {
        "metadata": {
            "recipe_type": "ptq",
            "description": f"{config.model}, run {config.run}, scheme {config.scheme}: "
            f"{formats or 'nothing quantized'}, {config.effective_bits:.4g} bits per searched "
            f"weight. Names are those of the whole model.{note}",
        },
        "quantize": {"quant_cfg": entries, "algorithm": chosen},
    }


def write_recipe(manifest: str | Path, out: str | Path) -> None:
    """Write the recipe of a manifest for NVIDIA's tools.

    Raises:
        LayersenseError: the manifest cannot be read, or is none of layersense's own.
    """
    content = ptq_recipe(quant_config(read_own_manifest(manifest)))
    text = yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True)
    atomic_write(out, text)


def _spelled(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry with floating-point types as ModelOpt's recipes spell them: ``e4m3``."""
    cfg = entry["cfg"]
    stages = [_words(stage) for stage in (cfg if isinstance(cfg, list) else [cfg])]
    return {
        "quantizer_name": entry["quantizer_name"],
        "cfg": stages if isinstance(cfg, list) else stages[0],
    }


def _words(stage: Mapping[str, Any]) -> dict[str | int, Any]:
    found: dict[str | int, Any] = {}
    for key, value in stage.items():
        if key in ("num_bits", "scale_bits") and isinstance(value, list):
            value = f"e{value[0]}m{value[1]}"
        elif isinstance(value, Mapping):
            value = _words(value)
        found[int(key) if key.lstrip("-").isdigit() else key] = value
    # Nulls are left out of a format, but ModelOpt's configs spell a scale for the whole tensor.
    if "num_bits" in found and "block_sizes" not in found:
        found.setdefault("axis", None)
    return found
