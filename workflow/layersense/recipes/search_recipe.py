"""ModelOpt's own search recipes (``recipe_type: auto_quantize``) as schemes (no torch).

A recipe is expanded into the keys of a scheme while the config is read, so that everything after
that sees a scheme like any other. What it imports is looked for beside the working directory, then
among the files that come with ModelOpt, which ``recipe_library.json`` holds: checking a config
needs no ModelOpt. ``$import`` means what ModelOpt's `load_config` makes of it; a test compares.
"""

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import yaml

from layersense.errors import LayersenseError
from layersense.quantization.formats import (
    LIBRARY,
    Attributes,
    format_settings,
    known_formats,
)
from layersense.quantization.kv_cache import KV_CACHES

_IMPORT = "$import"


class _Entry(msgspec.Struct, kw_only=True):
    """An entry of a config's ``quant_cfg``."""

    quantizer_name: str
    parent_class: str | None = None
    cfg: dict[str, Any] | list[dict[str, Any]] | None = None
    enable: bool = True


class _Quantize(msgspec.Struct, kw_only=True):
    """A config of `mtq.quantize`."""

    quant_cfg: list[_Entry] = []
    algorithm: str | dict[str, Any] | None = "max"
    effective_bits: float | None = None


class _Space(msgspec.Struct, kw_only=True):
    module_name_patterns: list[str]
    candidate_formats: list[_Quantize]
    allow_no_quant: bool = True


class _Cost(msgspec.Struct, kw_only=True):
    active_moe_expert_ratio: float | None = None


class _Constraints(msgspec.Struct, kw_only=True):
    effective_bits: float = 4.8
    cost_model: str = "weight"
    cost: _Cost | None = None


class _Search(msgspec.Struct, kw_only=True):
    """The section ``auto_quantize`` of a recipe."""

    constraints: _Constraints | None = None
    candidate_formats: list[_Quantize] = []
    module_search_spaces: list[_Space] = []
    disabled_layers: list[str] = []
    cost_excluded_layers: list[str] = []
    kv_cache: _Quantize | None = None
    # The run's.
    auto_quantize_method: Any = None
    score_size: Any = None


def scheme_of(name: str) -> dict[str, Any]:
    """Return the keys of a scheme that a search recipe stands for.

    Method and number of samples are the run's, and are not taken over.

    Args:
        name: path in ModelOpt's library (``general/auto_quantize/…``) or of a file; the suffix may
            be left out.

    Raises:
        LayersenseError: it cannot be read, is no search recipe, or asks for what a scheme cannot
            say.
    """
    body = read_recipe(name)
    where = f"recipe {name}"
    metadata = body.get("metadata")
    kind = metadata.get("recipe_type") if isinstance(metadata, dict) else None
    if kind != "auto_quantize" or not isinstance(body.get("auto_quantize"), dict):
        raise LayersenseError(
            f"{where}: is no search recipe (recipe_type {kind}); expected `auto_quantize`"
        )
    if body.get("quantize") is not None:
        raise LayersenseError(
            f"{where}: has a fixed baseline (`quantize`), which a scheme cannot say; give its "
            "layers an entry of module_search_spaces with one format and allow_no_quant: false"
        )
    known = _Search.__struct_fields__
    if unknown := [key for key in body["auto_quantize"] if key not in known]:
        raise LayersenseError(f"{where}: auto_quantize has no key `{unknown[0]}`")
    try:
        search = msgspec.convert(body["auto_quantize"], _Search)
    except msgspec.ValidationError as error:
        raise LayersenseError(
            f"{where}: auto_quantize: {error}; compare it with one of ModelOpt's"
        ) from error
    constraints = search.constraints or _Constraints()
    found: dict[str, Any] = {
        "quant_formats": [_format_name(one, where) for one in search.candidate_formats],
        "effective_bits": constraints.effective_bits,
        "exclude": search.disabled_layers,
        "cost_excluded": search.cost_excluded_layers,
        "search_spaces": [
            {
                "layers": space.module_name_patterns,
                "quant_formats": [_format_name(one, where) for one in space.candidate_formats],
                "unquantized": space.allow_no_quant,
            }
            for space in search.module_search_spaces
        ],
    }
    if constraints.cost_model == "active_moe":
        ratio = constraints.cost.active_moe_expert_ratio if constraints.cost else None
        if ratio is None:
            raise LayersenseError(
                f"{where}: cost_model active_moe needs cost.active_moe_expert_ratio here, the "
                "share of the routed experts that a token runs through"
            )
        found["active_expert_ratio"] = ratio
    if search.kv_cache is not None:
        found["kv_cache"] = _cache_name(search.kv_cache, where)
    return found


def read_recipe(name: str) -> dict[str, Any]:
    """Return a recipe's content with everything that it imports.

    Raises:
        LayersenseError: it or what it imports cannot be found or read.
    """
    built_in = re.sub(r"\.ya?ml$", "", name)
    documents = library()[built_in] if built_in in library() else _read_file(name)
    if documents is None:
        raise LayersenseError(
            f"recipe {name}: is neither a file nor one of ModelOpt's "
            f"({', '.join(path for path in library() if path.startswith('general/'))})"
        )
    try:
        content = _resolve(documents, name, ())
    except RecursionError as error:  # YAML can refer to what it stands in
        raise LayersenseError(f"recipe {name}: is nested too deeply") from error
    if not isinstance(content, dict):
        raise LayersenseError(f"recipe {name}: expected a mapping")
    return content


@cache
def library() -> Mapping[str, list[Any]]:
    """Return the files that come with ModelOpt: path without suffix → its YAML documents."""
    content: dict[str, list[Any]] = json.loads(LIBRARY.read_bytes())
    return content


def _read_file(name: str) -> list[Any] | None:
    for path in (Path(name), Path(f"{name}.yml"), Path(f"{name}.yaml")):
        path = path.expanduser()
        if path.is_file():
            try:
                return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise LayersenseError(f"{path}: cannot be read as YAML ({error})") from error
    return None


def _resolve(documents: Sequence[Any], where: str, loading: tuple[str, ...]) -> Any:
    """Return the body of a file; its imports stand beside it, or in a document before it."""
    if where in loading:
        raise LayersenseError(f"{where}: imports itself, through {' → '.join(loading)}")
    if not documents:
        raise LayersenseError(f"{where}: is empty")
    head = documents[0] if isinstance(documents[0], dict) else {}
    imports = head.get("imports") or {}
    if not (
        isinstance(imports, dict)
        and all(isinstance(word, str) for pair in imports.items() for word in pair)
    ):
        raise LayersenseError(f"{where}: imports: expected names and paths")
    body = documents[-1]
    if isinstance(body, dict):
        body = {key: value for key, value in body.items() if key != "imports"}
    known: dict[str, Any] = {}
    for name, path in imports.items():
        # Files of the working directory come first, as with ModelOpt.
        found = _read_file(path) or library().get(re.sub(r"\.ya?ml$", "", path))
        if found is None:
            raise LayersenseError(f"{where}: imports {path}, which cannot be found")
        known[name] = _resolve(found, path, (*loading, where))
    return _filled(body, known, where)


def _filled(value: Any, known: Mapping[str, Any], where: str) -> Any:
    def imported(name: Any) -> Any:
        if not isinstance(name, str) or name not in known:
            raise LayersenseError(f"{where}: {_IMPORT} {name} is not among its imports")
        return known[name]

    if isinstance(value, dict):
        if _IMPORT not in value:
            return {key: _filled(item, known, where) for key, item in value.items()}
        merged: dict[Any, Any] = {}
        names = value[_IMPORT]
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(found := imported(name), dict):
                raise LayersenseError(f"{where}: {_IMPORT} {name} is no mapping and stands in one")
            merged.update(found)
        own = {key: item for key, item in value.items() if key != _IMPORT}
        return _filled({**merged, **own}, known, where)
    if isinstance(value, list):
        items: list[Any] = []
        for item in value:
            if isinstance(item, dict) and set(item) == {_IMPORT}:
                found = imported(item[_IMPORT])
                items += found if isinstance(found, list) else [found]  # a list is spliced
            else:
                items.append(_filled(item, known, where))
        return items
    return value


def _format_name(quantize: _Quantize, where: str) -> str:
    """Return the format that a candidate is, whichever layers its patterns leave out."""
    weight, act = (_stages(quantize, side) for side in ("weight", "input"))
    algorithm = quantize.algorithm
    if isinstance(algorithm, str):
        algorithm = {"method": algorithm}
    wanted = {"weight": weight, "input": act, "algorithm": algorithm}
    for name, format in known_formats().items():
        if wanted.items() <= format_settings(format).items():
            billed = quantize.effective_bits
            if billed is not None and billed != format.effective_bits:
                raise LayersenseError(
                    f"{where}: bills {name} at {billed:g} bits (effective_bits of a candidate), "
                    f"which takes {format.effective_bits:g}; leave that out, or write the scheme's "
                    "keys with a budget that fits"
                )
            return name
    raise LayersenseError(
        f"{where}: a candidate is none of the known formats (weight {weight}, input {act}, "
        f"algorithm {algorithm}); write the scheme's keys instead, with an entry of `formats`"
    )


def _stages(quantize: _Quantize, side: str) -> list[Attributes]:
    """Return what a config does to any linear layer: the last pattern that matches decides.

    `auto_quantize` applies a format to each module by itself, so that a pattern with a path in it
    matches nothing.
    """
    found: list[Attributes] = []
    for entry in quantize.quant_cfg:
        if entry.parent_class or not fnmatchcase(f"{side}_quantizer", entry.quantizer_name):
            continue
        cfg = entry.cfg
        if not entry.enable:
            found = []
        elif cfg is not None:
            found = [_attributes(one) for one in (cfg if isinstance(cfg, list) else [cfg])]
    return found


def _attributes(cfg: Mapping[str, Any]) -> Attributes:
    """Return attributes as formats have them: pairs as lists, axes as text, no nulls."""
    found: Attributes = {}
    for key, value in cfg.items():
        if value is None or key in ("effective_bits", "enable"):
            continue
        if isinstance(value, str) and (match := re.fullmatch(r"[eE](\d)[mM](\d)", value)):
            value = [int(match[1]), int(match[2])]
        elif isinstance(value, Mapping):
            value = _attributes({str(name): item for name, item in value.items()})
        found[str(key)] = value
    return found


def _cache_name(quantize: _Quantize, where: str) -> str:
    entries = [entry for entry in quantize.quant_cfg if entry.cfg]
    if len(entries) == 1 and fnmatchcase("k_bmm_quantizer", entries[0].quantizer_name):
        cfg = entries[0].cfg
        attributes = _attributes(cfg) if isinstance(cfg, dict) else None
        for name, known in KV_CACHES.items():
            if known == attributes:
                return name
    raise LayersenseError(
        f"{where}: its kv_cache is none of {', '.join(KV_CACHES)}; take one of these"
    )
