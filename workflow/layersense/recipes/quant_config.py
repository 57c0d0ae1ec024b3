"""A recipe as ModelOpt configs: ``quant_config.json`` (no torch).

`mtq.quantize` calibrates everything that is on by one algorithm, and a recipe may need several (AWQ
for some layers, the largest value seen for others). A recipe is therefore a list of *parts*, one
for each format that it takes, each a whole config of `mtq.quantize`: everything off, then this
part's layers by their full names, so that no pattern catches a neighbour. Replayed in order, a part
switches the earlier ones off without losing what they calibrated; the entries of ``enable`` then
switch all of them on again.
"""

import glob
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from layersense.errors import LayersenseError
from layersense.files import read_record, write_record
from layersense.manifests.read import read_own_manifest
from layersense.manifests.schema import Manifest, plain_name
from layersense.quantization.formats import NONE, Attributes, Format, format_from_settings
from layersense.quantization.kv_cache import cache_config, cached_attention
from layersense.recipes.menu import Recipe, recipe_digest
from layersense.scoring.scores import NONE_BITS

QUANT_CONFIG_VERSION = 2
AWQ_SHARE = 0.25
"""Share of the calibration batches by which ModelOpt's search calibrates AWQ."""

Entry = dict[str, Any]
"""One entry of ModelOpt's ``quant_cfg``."""


class Part(msgspec.Struct, kw_only=True):
    """The layers of one format."""

    format: str
    modules: list[str]
    weight: list[Attributes]
    """Attributes of the quantizers that a weight passes."""
    input: list[Attributes]
    """The same of an activation; none if it stays as it is."""
    config: dict[str, Any]
    """A config of `mtq.quantize`: ``quant_cfg`` and ``algorithm``."""
    calibration_share: float
    """Share of the calibration batches that the search calibrated it on: the first of them."""


class Cache(msgspec.Struct, kw_only=True):
    """The key-value cache."""

    format: str
    """A name of :data:`layersense.quantization.kv_cache.KV_CACHES`."""
    modules: list[str]
    """The attention modules."""
    config: dict[str, Any]
    """A config of `mtq.quantize`, replayed like a part, after all of them."""


class QuantConfig(msgspec.Struct, kw_only=True):
    """The whole file."""

    schema_version: int = QUANT_CONFIG_VERSION
    run: str
    scheme: str
    model_name: str
    """Its name in the config."""
    model: str
    """Hub id or directory of the checkpoint."""
    model_digest: str
    dataset_name: str
    """Name of the dataset in the config, whose calibration split calibrates."""
    dataset_digest: str
    settings: dict[str, Any]
    """How the search read both: ``modality``, ``sampling``, ``dtype``, ``device``."""
    recipe_digest: str
    effective_bits: float
    parts: list[Part]
    enable: list[Entry]
    """What switches all parts and the cache on, once each is calibrated."""
    kv_cache: Cache | None = None
    """None: it stays as it is."""


def quant_config(manifest: Manifest, recipe: Recipe | None = None) -> QuantConfig:
    """Return the recipe of a manifest as ModelOpt configs.

    Args:
        manifest: what was measured and chosen.
        recipe: handle → format, of every group, if it is not what was chosen.
    """
    bits = manifest.autoquant_state.constraints["effective_bits"]
    if recipe is None:
        recipe = manifest.recipe
    else:
        bits = bits_of(manifest, recipe)
    formats = {
        name: format_from_settings(name, run.settings["format"])
        for name, run in manifest.run.items()
    }
    modules = {handle: group.module_names for handle, group in manifest.layer_sensitivity.items()}
    types = {name: layer.module_type for name, layer in manifest.layers.items()}
    parts = make_parts(recipe, formats, modules, types)
    cache = make_cache(manifest.scheme.kv_cache, manifest.layers)
    return QuantConfig(
        run=manifest.run_name,
        scheme=manifest.scheme.name,
        model_name=manifest.model.name,
        model=manifest.model.id,
        model_digest=manifest.model.digest,
        dataset_name=manifest.dataset.name,
        dataset_digest=manifest.dataset.digest,
        settings=read_settings(manifest),
        recipe_digest=recipe_digest(recipe),
        effective_bits=bits,
        parts=parts,
        enable=enable_entries([*parts, *([cache] if cache else [])]),
        kv_cache=cache,
    )


def bits_of(manifest: Manifest, recipe: Recipe) -> float:
    """Return the average bits per searched weight under a recipe."""
    cost, weights = 0.0, 0
    for handle, name in recipe.items():
        group = manifest.layer_sensitivity[handle]
        cost += group.costs[[plain_name(label) for label in group.formats].index(name)]
        weights += group.n_weights
    return NONE_BITS * cost / weights


def read_settings(manifest: Manifest) -> dict[str, Any]:
    """Return how the run read its model and data, whatever it measured."""
    measured = next(iter(manifest.run.values())).settings
    return {key: measured[key] for key in ("modality", "sampling", "dtype", "device")}


def make_parts(
    recipe: Recipe,
    formats: Mapping[str, Format],
    modules: Mapping[str, list[str]],
    types: Mapping[str, str],
) -> list[Part]:
    """Return one part for each format that a recipe takes, in the order of ``formats``.

    Args:
        recipe: handle → format.
        formats: the formats by name.
        modules: handle → names of the group's modules.
        types: module → class name in the original model.
    """
    parts = []
    for name, format in formats.items():
        members = [
            module
            for handle, chosen in recipe.items()
            if chosen == name
            for module in modules[handle]
        ]
        if not members or name == NONE:
            continue
        entries: list[Entry] = [{"quantizer_name": "*", "enable": False}]
        for module in members:
            entries += _entries(module, format, fused=holds_experts(types[module]))
        method = format.algorithm["method"] if format.algorithm else ""
        parts.append(
            Part(
                format=name,
                modules=members,
                weight=list(format.weight),
                input=list(format.input),
                config={"quant_cfg": entries, "algorithm": format.algorithm},
                calibration_share=AWQ_SHARE if "awq" in method else 1.0,
            )
        )
    return parts


def make_cache(name: str, layers: Iterable[str]) -> Cache | None:
    """Return how a model's key-value cache is quantized; None if it is not.

    Args:
        name: format of the cache, or ``none``.
        layers: names of all layers of the model.

    Raises:
        LayersenseError: the model has no attention that keeps keys and values.
    """
    if name == "none":
        return None
    modules = cached_attention(layers)
    if not modules:
        raise LayersenseError(
            f"`kv_cache: {name}` quantizes keys and values, and the model has no layers that make "
            "them in a language model or decoder; leave kv_cache of the scheme out"
        )
    return Cache(format=name, modules=modules, config=cache_config(name, modules))


def enable_entries(parts: Sequence[Part | Cache]) -> list[Entry]:
    """Return what switches the quantizers of all parts on, and nothing else."""
    return [
        {"quantizer_name": entry["quantizer_name"], "enable": True}
        for part in parts
        for entry in part.config["quant_cfg"]
        if "cfg" in entry
    ]


def write_quant_config(manifest: str | Path, out: str | Path) -> None:
    """Write the recipe of a manifest as ModelOpt configs.

    Raises:
        LayersenseError: the manifest cannot be read, or is none of layersense's own.
    """
    write_record(out, quant_config(read_own_manifest(manifest)))


def read_quant_config(path: str | Path) -> QuantConfig:
    """Read a ``quant_config.json``.

    Raises:
        LayersenseError: it is missing, or none of this version.
    """
    return read_record(
        path,
        QuantConfig,
        QUANT_CONFIG_VERSION,
        "quant_config.json",
        "recipes",
        "run `snakemake recipes`",
    )


def _entries(module: str, format: Format, *, fused: bool) -> list[Entry]:
    """Return the entries that set one module's quantizers; ModelOpt matches names by fnmatch."""
    name = glob.escape(module)
    entries: list[Entry] = []
    for kind, stages in (("weight", format.weight), ("input", format.input)):
        if not stages:
            continue
        cfg: Any = list(stages) if len(stages) > 1 else stages[0]
        # Fused experts have a list of quantizers for each projection.
        patterns = (
            [f"{name}.*_{kind}_quantizer", f"{name}.*_{kind}_quantizers.*"]
            if fused
            else [f"{name}.{kind}_quantizer"]
        )
        entries += [{"quantizer_name": pattern, "cfg": cfg} for pattern in patterns]
    return entries


def holds_experts(module_type: str) -> bool:
    """Return whether a module holds all experts of a layer in one tensor."""
    return "Experts" in module_type
