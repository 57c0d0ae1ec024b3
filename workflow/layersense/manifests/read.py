"""Read manifests, ours and those of older generations, into one normal form; check them."""

import json
from collections import Counter
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec

from layersense.errors import LayersenseError, one_line
from layersense.manifests.modelopt_state import SUFFIXES, read_state
from layersense.manifests.schema import (
    SCHEMA_VERSION,
    SUFFIX,
    FormatRun,
    LayerSensitivity,
    Manifest,
    plain_name,
)
from layersense.quantization.formats import NONE
from layersense.quantization.layers import describe_layer
from layersense.scoring.scores import NONE_BITS

IMPORT_VERSION = 1
IMPORT_VERSION_KEY = "import_version"
"""Marks the normal form on disk."""

CUSTOM = "CUSTOM_"
"""What ModelOpt calls formats that it does not know by name, followed by their number."""


LISTS = ("formats", "scores", "costs")
"""What every generation says of a layer group."""


class NormalGroup(msgspec.Struct, kw_only=True):
    """One layer group; the lists run over ``formats``. None is what a manifest does not say."""

    handle: str
    layer: str
    """The handle without its suffix."""
    formats: list[str]
    """Plain names, without effective bits."""
    bits: list[float | None]
    scores: list[float | None]
    """As measured."""
    costs: list[float | None]
    scores_solver: list[float | None]
    scores_se: list[float | None]
    n_batches: list[int | None]
    module_names: list[str] | None
    n_weights: int | None
    reached: str | None
    subsystem: str
    block: int | None
    kind: str
    selected: str | None
    reason: str | None = None
    """Why it may not be quantized; None if the solver decided."""
    top_probability: float | None = None
    """Probability that it is among the most sensitive groups."""

    @property
    def importance(self) -> float | None:
        """Worst score over the formats; None where it was not reached or one is not known."""
        scores = [
            solver if measured is None else measured
            for name, measured, solver in zip(
                self.formats, self.scores, self.scores_solver, strict=True
            )
            if name != NONE
        ]
        known = [score for score in scores if score is not None]
        if not known or len(known) < len(scores) or self.reached not in (None, "scored"):
            return None
        return max(known)


class NormalManifest(msgspec.Struct, kw_only=True):
    """What every generation of manifests says, and None where it does not say it."""

    generation: str
    """``g0`` to ``g4`` for foreign manifests, ``autoquant`` for ModelOpt's own state,
    ``layersense`` for ours."""
    run: str
    scheme: str
    model: str | None
    dataset: str | None
    modality: str | None
    method: str | None
    task: str | None
    effective_bits_asked: float | None
    effective_bits: float | None
    score: float | None
    formats: dict[str, FormatRun]
    """How each format was measured; empty for foreign manifests."""
    groups: list[NormalGroup]
    own: Manifest | None
    """The manifest itself, where it is one of ours."""
    quant_formats: list[str] | None = None
    """The scheme's formats, as it names them."""
    coverage_mode: str | None = None
    """How much may be quantized, in the manifest's own words: ``full``, ``lm_only``…"""
    coverage_fraction: float | None = None
    imported: bool = False
    """Whether it was brought in from elsewhere, and not measured by this workflow."""


def read_manifest(path: str | Path) -> NormalManifest:
    """Read a manifest of any generation.

    Foreign manifests name no run; theirs is the part of the file name before the first dot that
    is followed by the scheme's name, or the whole stem.

    Raises:
        LayersenseError: it is missing or no manifest of any generation.
    """
    content = _load(path)
    if IMPORT_VERSION_KEY in content:
        return _imported(path, content)
    if "schema_version" in content:
        return _own(_checked(path, _decode(path, content)))
    if "candidate_stats" in content:
        content = _state_as_manifest(Path(path), content)
    problem = next(_foreign_problems(content), None)
    if problem:
        raise LayersenseError(f"{path}: {one_line(problem)}")
    return _foreign(Path(path), content)


def read_own_manifest(path: str | Path) -> Manifest:
    """Read a manifest that layersense wrote.

    Raises:
        LayersenseError: it is missing, not JSON, not of this schema, or its groups do not fit
            together.
    """
    return _checked(path, _decode(path, _load(path)))


def validate_manifest(path: str | Path) -> list[str]:
    """Return what is wrong with a manifest, one sentence a problem; empty if it is sound."""
    try:
        content = _load(path)
        if IMPORT_VERSION_KEY in content:
            _imported(path, content)
            return []
        if "candidate_stats" in content:
            content = _state_as_manifest(Path(path), content)
        if "schema_version" not in content:
            return [f"{path}: {one_line(problem)}" for problem in _foreign_problems(content)]
        manifest = _decode(path, content)
    except LayersenseError as error:
        return [str(error)]
    return [f"{path}: {one_line(problem)}" for problem in _own_problems(manifest)]


def encode_imported(manifest: NormalManifest) -> bytes:
    """Return the normal form as JSON, which :func:`read_manifest` reads back as it was."""
    body = {IMPORT_VERSION_KEY: IMPORT_VERSION, **msgspec.to_builtins(manifest)}
    return msgspec.json.format(msgspec.json.encode(body), indent=1) + b"\n"


def _imported(path: str | Path, content: dict[str, Any]) -> NormalManifest:
    version = content[IMPORT_VERSION_KEY]
    if version != IMPORT_VERSION:
        raise LayersenseError(
            f"{path}: {IMPORT_VERSION_KEY} is {version!r}, this layersense reads "
            f"{IMPORT_VERSION}; import the manifest again"
        )
    try:
        manifest = msgspec.convert(content, NormalManifest)
    except msgspec.ValidationError as error:
        raise LayersenseError(
            f"{path}: is not what layersense imports ({error}); import the manifest again"
        ) from error
    for group in manifest.groups:
        rows = (group.bits, group.scores, group.costs, group.scores_solver, group.scores_se)
        if any(len(row) != len(group.formats) for row in (*rows, group.n_batches)):
            raise LayersenseError(
                f"{path}: group {group.handle} has lists of several lengths; import it again"
            )
    return manifest


def _load(path: str | Path) -> dict[str, Any]:
    if Path(path).suffix in SUFFIXES:
        return read_state(path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")  # editors of Windows begin with a mark
        content = json.loads(text, object_pairs_hook=_each_key_once, parse_constant=_no_number)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except FileNotFoundError as error:
        raise LayersenseError(
            f"{path}: there is no such manifest; check the path, or run `snakemake {path}` if it "
            "is the workflow's own"
        ) from error
    except RecursionError as error:
        raise LayersenseError(
            f"{path}: is nested too deeply for a manifest; write the manifest again"
        ) from error
    except OSError as error:
        raise LayersenseError(
            f"{path}: cannot be read ({error.strerror}); expected a manifest, which is a JSON file"
        ) from error
    except ValueError as error:
        raise LayersenseError(
            f"{path}: cannot be read as JSON ({error}); delete it and run `snakemake` again if the "
            "workflow wrote it, or copy it again if it came from elsewhere"
        ) from error
    if not isinstance(content, dict):
        raise LayersenseError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; JSON's readers keep the last of two equal keys, silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number in JSON")


def _state_as_manifest(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Return ModelOpt's state with the keys of a manifest; its scheme is called like the file."""
    best = state["best"] if isinstance(state.get("best"), dict) else {}
    stats = state["candidate_stats"]
    chosen = best.get("recipe")
    return {
        "scheme": {"name": path.stem, "auto_quantize_method": state.get("method")},
        "autoquant_state": {
            "constraints": best.get("constraints") or {},
            "score": best.get("score"),
        },
        "layer_sensitivity": stats,
        "selected": chosen if isinstance(chosen, dict) else {},
        "state": True,
    }


def _decode(path: str | Path, content: dict[str, Any]) -> Manifest:
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise LayersenseError(
            f"{path}: schema_version is {version!r}, this layersense reads {SCHEMA_VERSION}; "
            "solve the scheme again, or read it by the layersense that wrote it"
        )
    try:
        return msgspec.convert(content, Manifest)
    except msgspec.ValidationError as error:
        raise LayersenseError(
            f"{path}: is not a manifest of layersense ({error}); solve the scheme again"
        ) from error


def _checked(path: str | Path, manifest: Manifest) -> Manifest:
    """Refuse a manifest with a group that nothing could be made of."""
    for handle, group in manifest.layer_sensitivity.items():
        if problem := next(_own_group_problems(manifest, handle, group), None):
            raise LayersenseError(f"{path}: {one_line(problem)}; solve the scheme again")
    return manifest


def _own(manifest: Manifest) -> NormalManifest:
    return NormalManifest(
        generation="layersense",
        run=manifest.run_name,
        scheme=manifest.scheme.name,
        model=manifest.model.name,
        dataset=manifest.dataset.name,
        modality=manifest.dataset.modality,
        method=manifest.scheme.auto_quantize_method,
        task=manifest.model.task,
        effective_bits_asked=manifest.scheme.effective_bits,
        effective_bits=manifest.autoquant_state.constraints.get("effective_bits"),
        score=manifest.autoquant_state.score,
        formats=manifest.run,
        quant_formats=list(manifest.scheme.quant_formats),
        coverage_mode=manifest.scheme.coverage_mode,
        coverage_fraction=manifest.scheme.coverage_fraction,
        groups=[
            NormalGroup(
                handle=handle,
                layer=handle.removesuffix(SUFFIX),
                formats=[plain_name(label) for label in group.formats],
                bits=[_bits(label) for label in group.formats],
                scores=group.scores,
                costs=list(group.costs),
                scores_solver=group.scores_solver,
                scores_se=group.scores_se,
                n_batches=[len(batches) for batches in group.batch_scores],
                module_names=group.module_names,
                n_weights=group.n_weights,
                reached=group.reached,
                subsystem=group.subsystem,
                block=group.block,
                kind=group.kind,
                selected=plain_name(group.selected),
                reason=manifest.layers[group.module_names[0]].reason,
                top_probability=group.top_probability,
            )
            for handle, group in manifest.layer_sensitivity.items()
        ],
        own=manifest,
    )


def _foreign(path: Path, content: dict[str, Any]) -> NormalManifest:
    scheme = content["scheme"]
    state = content.get("autoquant_state") or {}
    name = scheme["name"]
    stem = path.stem
    custom = _custom(content)
    selected = content.get("selected") or {}
    groups = []
    for handle, entry in content["layer_sensitivity"].items():
        layer = handle.removesuffix(SUFFIX)
        module_names = entry.get("module_names")
        place = describe_layer(module_names or [layer])
        count = len(entry["formats"])
        scores = [_number(score) for score in entry["scores"]]
        formats = [_resolve(label, custom) for label in entry["formats"]]
        chosen = selected.get(handle)
        groups.append(
            NormalGroup(
                handle=handle,
                layer=layer,
                formats=formats,
                bits=[_bits(label) for label in entry["formats"]],
                # ModelOpt keeps scores made monotone. Only the first is surely as measured, and
                # that of NONE, which is zero by definition.
                scores=[
                    score if index == 0 or formats[index] == NONE else None
                    for index, score in enumerate(scores)
                ],
                costs=[float(cost) for cost in entry["costs"]],
                scores_solver=scores,
                scores_se=[None] * count,
                n_batches=[None] * count,
                module_names=module_names,
                n_weights=None,
                reached=None,
                subsystem=place.subsystem,
                block=place.block,
                kind=place.kind,
                selected=_resolve(chosen, custom) if isinstance(chosen, str) else None,
            )
        )
    model, dataset = content.get("model"), content.get("dataset")
    constraints = state.get("constraints") or {}
    return NormalManifest(
        generation="autoquant" if content.get("state") is True else _generation(content),
        run=stem.removesuffix(f".{name}") or stem,
        scheme=name,
        model=_text(model.get("id") if isinstance(model, dict) else model),
        dataset=_text(dataset.get("name") if isinstance(dataset, dict) else dataset),
        modality=None,
        method=_text(scheme.get("auto_quantize_method")),
        task=None,
        effective_bits_asked=_number(scheme.get("auto_quantize_bits")),
        effective_bits=_number(constraints.get("effective_bits")),
        score=_number(state.get("score")),
        formats={},
        groups=groups,
        own=None,
        quant_formats=scheme.get("quant_formats"),
        coverage_mode=_text(scheme.get("coverage_mode")),
        coverage_fraction=_number(scheme.get("coverage_fraction")),
    )


def _custom(content: dict[str, Any]) -> str | None:
    """Return what ``CUSTOM_0`` means, where that is certain.

    ModelOpt numbers the formats that it does not know. Where the scheme has one format and no
    other number occurs, it is that one.
    """
    known = [entry for entry in content["scheme"].get("quant_formats") or [] if entry != NONE]
    numbered = {
        name
        for group in content["layer_sensitivity"].values()
        for name in map(plain_name, group["formats"])
        if name.startswith(CUSTOM)
    }
    return known[0] if len(known) == 1 and numbered == {f"{CUSTOM}0"} else None


def _resolve(label: str, custom: str | None) -> str:
    """Return a format's name; ``CUSTOM_0`` as ``custom``, where that is known."""
    name = plain_name(label)
    return custom if custom is not None and name == f"{CUSTOM}0" else name


def _bits(label: str) -> float | None:
    _, found, rest = label.partition("(effective-bits:")
    try:
        return float(rest.rstrip(") ")) if found else (NONE_BITS if label == NONE else None)
    except ValueError:
        return None


def _generation(content: dict[str, Any]) -> str:
    """Return the generation by the newest top-level key that is there."""
    marks = {
        "run_config": "g4",
        "quantization": "g4",
        "dataset": "g3",
        "model": "g2",
        "sensitivity_ranking": "g1",
    }
    return next((generation for key, generation in marks.items() if key in content), "g0")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _foreign_problems(content: dict[str, Any]) -> Iterator[str]:
    for key in ("scheme", "layer_sensitivity"):
        if not isinstance(content.get(key), dict):
            yield f"key {key} is missing or no object, so this is no manifest of any generation"
            return
    scheme_problems = list(_scheme_problems(content["scheme"]))
    yield from scheme_problems
    state = content.get("autoquant_state")
    if state is not None and not isinstance(state, dict):
        yield "autoquant_state: expected an object"
    elif state is not None and not isinstance(state.get("constraints") or {}, dict):
        yield "autoquant_state.constraints: expected an object"
    for key, inner in (("model", "id"), ("dataset", "name")):
        value = content.get(key)
        value = value.get(inner) if isinstance(value, dict) else value
        if value is not None and not isinstance(value, str):
            yield f"{key}: expected text, or an object with the text `{inner}`"
    if not content["layer_sensitivity"]:
        yield "layer_sensitivity holds no layer group; expected one at least"
    handles: dict[str, str] = {}
    sound = not scheme_problems
    for handle, group in content["layer_sensitivity"].items():
        problem = _group_problem(group)
        sound = sound and not problem
        layer = handle.removesuffix(SUFFIX)
        if problem:
            yield f"layer_sensitivity[{handle}]: {problem}"
        elif not layer:
            yield f"layer_sensitivity: a group is called {handle!r}; expected a module's name"
        elif layer in handles:
            yield f"layer_sensitivity: {handles[layer]} and {handle} are one group; keep one"
        handles.setdefault(layer, handle)
    if sound:
        custom = _custom(content)
        for handle, group in content["layer_sensitivity"].items():
            names = [_resolve(label, custom) for label in group["formats"]]
            if len(set(names)) < len(names):
                yield f"layer_sensitivity[{handle}]: two of its formats have one name"


def _scheme_problems(scheme: dict[str, Any]) -> Iterator[str]:
    name = scheme.get("name")
    if not isinstance(name, str) or not name:
        yield "scheme.name is missing; expected the scheme's name"
    formats = scheme.get("quant_formats")
    if formats is not None and not (
        isinstance(formats, list) and all(isinstance(entry, str) for entry in formats)
    ):
        yield "scheme.quant_formats: expected a list of names"
    for key in ("auto_quantize_bits", "coverage_fraction"):
        if scheme.get(key) is not None and not _is_number(scheme[key]):
            yield f"scheme.{key}: expected a number"
    for key in ("auto_quantize_method", "coverage_mode"):
        if scheme.get(key) is not None and not isinstance(scheme[key], str):
            yield f"scheme.{key}: expected text"


def _group_problem(group: Any) -> str | None:
    lists = [group.get(key) if isinstance(group, dict) else None for key in LISTS]
    if not all(isinstance(values, list) for values in lists):
        return "expected lists formats, scores and costs"
    formats, scores, costs = (values or [] for values in lists)
    if not len(formats) == len(scores) == len(costs):
        return "formats, scores and costs differ in length"
    if not formats:
        return "formats is empty; expected NONE at least"
    if not all(isinstance(name, str) and name for name in formats):
        return "expected strings in formats"
    if len(set(formats)) < len(formats):
        return "a format stands twice in formats"
    if not all(map(_is_number, [*costs, *(score for score in scores if score is not None)])):
        return "expected numbers in scores and costs"
    if any(cost < 0 for cost in costs):
        return "a cost is below zero"
    names = group.get("module_names")
    if names is not None and not (
        isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    ):
        return "expected names in module_names"
    return None


def _own_group_problems(manifest: Manifest, handle: str, group: LayerSensitivity) -> Iterator[str]:
    """Yield where a group refers to what is not there."""
    where = f"layer_sensitivity[{handle}]"
    rows = (group.scores, group.costs, group.scores_solver, group.scores_se, group.allowed)
    more = (group.batch_scores, group.budget_costs or group.costs)
    if any(len(row) != len(group.formats) for row in (*rows, *more)):
        yield f"{where}: its lists differ in length from formats"
    if group.selected not in group.formats:
        yield f"{where}.selected: {group.selected!r} is none of its formats"
    if not group.module_names:
        yield f"{where}.module_names: names no module"
    for name in group.module_names:
        if name not in manifest.layers:
            yield f"{where}.module_names: {name} is not in layers"
    for label in group.formats:
        if plain_name(label) != NONE and plain_name(label) not in manifest.run:
            yield f"{where}: format {plain_name(label)} is not in run"


def _own_problems(manifest: Manifest) -> Iterator[str]:
    cost = 0.0
    for handle, group in manifest.layer_sensitivity.items():
        yield from _own_group_problems(manifest, handle, group)
        where = f"layer_sensitivity[{handle}]"
        for name in group.module_names:
            layer = manifest.layers.get(name)
            if layer is not None and layer.format != plain_name(group.selected):
                yield f"layers[{name}].format: differs from what {where} selected"
        cost += dict(zip(group.formats, group.costs, strict=False)).get(group.selected, 0.0)
    quantized = sum(layer.quantized for layer in manifest.layers.values())
    if quantized != manifest.num_quantized_layers:
        yield f"num_quantized_layers: is {manifest.num_quantized_layers}, layers count {quantized}"
    importance = [entry.importance for entry in manifest.sensitivity_ranking]
    if importance != sorted(importance):
        yield "sensitivity_ranking: is not ascending"
    for entry in manifest.sensitivity_ranking:
        if entry.name not in manifest.layer_sensitivity:
            yield f"sensitivity_ranking: {entry.name} is not in layer_sensitivity"
    if abs(cost - manifest.autoquant_state.cost) > 1e-6 * max(1.0, cost):
        yield f"autoquant_state.cost: is {manifest.autoquant_state.cost}, the choice costs {cost}"
