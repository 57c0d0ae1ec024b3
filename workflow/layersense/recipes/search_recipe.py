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
_KNOWN = {
    "constraints", "candidate_formats", "module_search_spaces", "auto_quantize_method",
    "score_size", "disabled_layers", "cost_excluded_layers", "kv_cache",
}  # fmt: skip


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
    kind = (body.get("metadata") or {}).get("recipe_type")
    if kind != "auto_quantize" or not isinstance(body.get("auto_quantize"), dict):
        raise LayersenseError(
            f"{where}: is no search recipe (recipe_type {kind}); expected `auto_quantize`"
        )
    if body.get("quantize") is not None:
        raise LayersenseError(
            f"{where}: has a fixed baseline (`quantize`), which a scheme cannot say; give its "
            "layers an entry of module_search_spaces with one format and allow_no_quant: false"
        )
    search = body["auto_quantize"]
    if unknown := sorted(set(search) - _KNOWN):
        raise LayersenseError(f"{where}: auto_quantize has no key `{unknown[0]}`")
    constraints = search.get("constraints") or {}
    found: dict[str, Any] = {
        "quant_formats": [_format_name(one, where) for one in search.get("candidate_formats", [])],
        "effective_bits": float(constraints.get("effective_bits", 4.8)),
        "exclude": list(search.get("disabled_layers", [])),
        "cost_excluded": list(search.get("cost_excluded_layers", [])),
        "search_spaces": [
            {
                "layers": list(space["module_name_patterns"]),
                "quant_formats": [_format_name(one, where) for one in space["candidate_formats"]],
                "unquantized": bool(space.get("allow_no_quant", True)),
            }
            for space in search.get("module_search_spaces", [])
        ],
    }
    if constraints.get("cost_model", "weight") == "active_moe":
        ratio = (constraints.get("cost") or {}).get("active_moe_expert_ratio")
        if ratio is None:
            raise LayersenseError(
                f"{where}: cost_model active_moe needs cost.active_moe_expert_ratio here, the "
                "share of the routed experts that a token runs through"
            )
        found["active_expert_ratio"] = float(ratio)
    if search.get("kv_cache") is not None:
        found["kv_cache"] = _cache_name(search["kv_cache"], where)
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
    content = _resolve(documents, name, ())
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
    head = documents[0] if documents and isinstance(documents[0], dict) else {}
    imports = head.get("imports") or {}
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
    def imported(name: str) -> Any:
        if name not in known:
            raise LayersenseError(f"{where}: {_IMPORT} {name} is not among its imports")
        return known[name]

    if isinstance(value, dict):
        if _IMPORT not in value:
            return {key: _filled(item, known, where) for key, item in value.items()}
        merged: dict[Any, Any] = {}
        names = value[_IMPORT]
        for name in names if isinstance(names, list) else [names]:
            merged.update(imported(name))
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


def _format_name(quantize: Mapping[str, Any], where: str) -> str:
    """Return the format that a candidate is, whichever layers its patterns leave out."""
    weight, act = (_stages(quantize, side) for side in ("weight", "input"))
    algorithm = quantize.get("algorithm", "max")
    if isinstance(algorithm, str):
        algorithm = {"method": algorithm}
    wanted = {"weight": weight, "input": act, "algorithm": algorithm}
    for name, format in known_formats().items():
        if wanted.items() <= format_settings(format).items():
            billed = quantize.get("effective_bits")
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


def _stages(quantize: Mapping[str, Any], side: str) -> list[Attributes]:
    """Return what a config does to any linear layer: the last pattern that matches decides.

    `auto_quantize` applies a format to each module by itself, so that a pattern with a path in it
    matches nothing.
    """
    found: list[Attributes] = []
    for entry in quantize.get("quant_cfg", []):
        if entry.get("parent_class") or not fnmatchcase(
            f"{side}_quantizer", entry["quantizer_name"]
        ):
            continue
        cfg = entry.get("cfg")
        if entry.get("enable", True) is False:
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


def _cache_name(quantize: Mapping[str, Any], where: str) -> str:
    entries = [entry for entry in quantize.get("quant_cfg", []) if entry.get("cfg")]
    if len(entries) == 1 and fnmatchcase("k_bmm_quantizer", entries[0]["quantizer_name"]):
        attributes = _attributes(entries[0]["cfg"])
        for name, known in KV_CACHES.items():
            if known == attributes:
                return name
    raise LayersenseError(
        f"{where}: its kv_cache is none of {', '.join(KV_CACHES)}; take one of these"
    )
