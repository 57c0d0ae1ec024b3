"""What vLLM reads of a checkpoint that ModelOpt exported, as rules (no torch).

Read in vLLM's ``vllm/model_executor/layers/quantization/modelopt.py`` at commit
00155cdecca722d98e34234c3d172725b7720b7d of https://github.com/vllm-project/vllm; each rule names
the class or function that it was read in. The real vLLM, where it is installed, has the last word:
``layersense check … --vllm``.
"""

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

from layersense.recipes.targets import TARGETS, TOWERS

ALGORITHMS = frozenset(
    {
        "FP8",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "FP8_PB_WO",
        "NVFP4",
        "W4A16_NVFP4",
        "MXFP8",
        "MIXED_PRECISION",
    }
)
"""``QUANT_ALGOS``: `from_config` refuses any other, after making it upper case."""
MIXED = frozenset({"FP8", "NVFP4", "W4A16_NVFP4"})
"""Algorithms of single layers that ``ModelOptMixedPrecisionConfig.get_quant_method`` knows; a layer
of any other is taken for unquantized, and its packed weight is refused or misread."""
EXPERTS = frozenset({"FP8", "NVFP4", "W4A16_NVFP4", "MXFP8"})
"""Algorithms of experts: ``ModelOptFp8Config`` has one method for them, with one scale a weight."""
FUSED = tuple(entry.layers for entry in TARGETS["vllm"].fused)
"""Layers that vLLM loads as one; ``_resolve_quant_algo`` raises where their algorithms differ."""


def excluded(name: str, patterns: Iterable[str]) -> bool:
    """Return whether vLLM takes a module for unquantized (``is_layer_excluded``).

    A pattern matches as a shell pattern, and also wherever it stands as a part of the name.
    """
    return any(pattern in name or fnmatch(name, pattern) for pattern in patterns)


def problems(
    config: Mapping[str, Any],
    separate: Mapping[str, Any],
    quantized: Mapping[str, str],
    mixtures: Collection[str] = (),
    others: Collection[str] = (),
) -> list[str]:
    """Return why vLLM would not read a checkpoint as it is meant; empty if it would.

    Args:
        config: ``config.json``.
        separate: ``hf_quant_config.json``, which holds the same in its own words.
        quantized: module → its algorithm, as it should be.
        mixtures: those of the modules that hold experts.
        others: modules of the model that the checkpoint holds unquantized.
    """
    found = []
    section = config.get("quantization_config")
    if not isinstance(section, dict):
        return ["config.json holds no quantization_config, so that everything is read unquantized"]
    # `_extract_modelopt_quant_algo`
    if not str(section.get("quant_method", "")).lower().startswith("modelopt"):
        found.append("quantization_config.quant_method does not start with `modelopt`")
    other = separate.get("quantization", {})
    algorithm = str(section.get("quant_algo", "")).upper()
    if str(other.get("quant_algo", "")).upper() != algorithm:
        found.append("config.json and hf_quant_config.json name different algorithms")
    if algorithm not in ALGORITHMS:
        found.append(f"quant_algo {algorithm or 'is missing'} is none that vLLM reads")
    # `from_config` reads config.json where it can, and knows one form of it there.
    if other.get("kv_cache_quant_algo") and not isinstance(section.get("kv_cache_scheme"), dict):
        found.append(
            f"its key-value cache in {other['kv_cache_quant_algo']} is read as unquantized"
        )
    ignored = section.get("ignore", [])
    if sorted(ignored) != sorted(other.get("exclude_modules", [])):
        found.append("config.json and hf_quant_config.json leave out different modules")
    if wrong := [name for name in quantized if excluded(name, ignored)]:
        found.append(f"`ignore` also matches {_some(wrong)}, which the checkpoint holds packed")
    if algorithm == "MIXED_PRECISION":
        layers = section.get("quantized_layers", {})
        listed = {name: str(layer.get("quant_algo", "")).upper() for name, layer in layers.items()}
        if listed != {name: algo.upper() for name, algo in quantized.items()}:
            found.append("quantized_layers are not the layers that the checkpoint holds packed")
        if unknown := sorted({algo for algo in listed.values() if algo not in MIXED}):
            found.append(f"{', '.join(unknown)} cannot stand in a mix")
    else:  # `ModelOptQuantConfigBase.get_quant_method`
        if tower := [name for name in quantized if any(word in name for word in TOWERS)]:
            found.append(
                f"{_some(tower)}: of one algorithm alone, vLLM reads a vision tower as unquantized"
            )
    if odd := [name for name in mixtures if quantized.get(name, "FP8").upper() not in EXPERTS]:
        found.append(f"{_some(odd)}: vLLM does not read experts of {quantized[odd[0]]}")
    for shards in FUSED:
        found += _unequal(quantized, frozenset(others), shards)
    return found


def _unequal(
    quantized: Mapping[str, str], others: Collection[str], shards: tuple[str, ...]
) -> list[str]:
    """Return a sentence for the first layer whose parts vLLM loads as one and that differ.

    A model need not have all of the parts: of an MLP without a gate, `up_proj` stands alone.
    """
    parents = {name.rpartition(".")[0] for name in quantized if name.rpartition(".")[2] in shards}
    for parent in sorted(parents):
        parts = [f"{parent}.{shard}" for shard in shards]
        there = [name for name in parts if name in quantized or name in others]
        if len({quantized.get(name) for name in there}) > 1:
            names = ", ".join(name.rpartition(".")[2] for name in there)
            return [f"{parent}: vLLM loads {names} as one, and their formats differ"]
    return []


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
