"""Read manifests, ours and those of older generations, into one normal form; check them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from layersense.errors import LayersenseError
from layersense.manifests.schema import (
    SCHEMA_VERSION,
    SUFFIX,
    FormatRun,
    Manifest,
    plain_name,
)
from layersense.quantization.formats import NONE
from layersense.quantization.layers import describe_layer
from layersense.scoring.scores import NONE_BITS

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
    """``g0`` to ``g4`` for foreign manifests, ``layersense`` for ours."""
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


def read_manifest(path: str | Path) -> NormalManifest:
    """Read a manifest of any generation.

    Foreign manifests name no run; theirs is the part of the file name before the first dot that
    is followed by the scheme's name, or the whole stem.

    Raises:
        LayersenseError: it is missing or no manifest of any generation.
    """
    content = _load(path)
    if "schema_version" in content:
        return _own(_decode(path, content))
    problem = next(_foreign_problems(content), None)
    if problem:
        raise LayersenseError(f"{path}: {problem}")
    return _foreign(Path(path), content)


def read_own_manifest(path: str | Path) -> Manifest:
    """Read a manifest that layersense wrote.

    Raises:
        LayersenseError: it is missing, not JSON, or not of this schema.
    """
    return _decode(path, _load(path))


def validate_manifest(path: str | Path) -> list[str]:
    """Return what is wrong with a manifest, one sentence a problem; empty if it is sound."""
    try:
        content = _load(path)
        if "schema_version" not in content:
            return [f"{path}: {problem}" for problem in _foreign_problems(content)]
        manifest = _decode(path, content)
    except LayersenseError as error:
        return [str(error)]
    return [f"{path}: {problem}" for problem in _own_problems(manifest)]


def _load(path: str | Path) -> dict[str, Any]:
    try:
        content = msgspec.json.decode(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise LayersenseError(
            f"{path}: there is no such manifest; run `snakemake {path}` or check the path"
        ) from error
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise LayersenseError(
            f"{path}: cannot be read as JSON ({error}); write the manifest again"
        ) from error
    if not isinstance(content, dict):
        raise LayersenseError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def _decode(path: str | Path, content: dict[str, Any]) -> Manifest:
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise LayersenseError(
            f"{path}: schema_version is {version!r}, this layersense reads {SCHEMA_VERSION}; "
            "solve the scheme again"
        )
    try:
        return msgspec.convert(content, Manifest)
    except msgspec.ValidationError as error:
        raise LayersenseError(
            f"{path}: is not a manifest of layersense ({error}); solve the scheme again"
        ) from error


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
    known = [entry for entry in scheme.get("quant_formats") or [] if entry != NONE]
    groups = []
    for handle, entry in content["layer_sensitivity"].items():
        layer = handle.removesuffix(SUFFIX)
        place = describe_layer([layer])
        count = len(entry["formats"])
        scores = [None if score is None else float(score) for score in entry["scores"]]
        formats = [_resolve(label, known) for label in entry["formats"]]
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
                module_names=None,
                n_weights=None,
                reached=None,
                subsystem=place.subsystem,
                block=place.block,
                kind=place.kind,
                selected=None,
            )
        )
    model, dataset = content.get("model"), content.get("dataset")
    constraints = state.get("constraints") or {}
    return NormalManifest(
        generation=_generation(content),
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
    )


def _resolve(label: str, known: list[str]) -> str:
    """Return the format's name; ``CUSTOM_0`` by that of the scheme's only format."""
    name = plain_name(label)
    return known[0] if name == f"{CUSTOM}0" and len(known) == 1 else name


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
    return float(value) if isinstance(value, int | float) else None


def _foreign_problems(content: dict[str, Any]) -> Iterator[str]:
    for key in ("scheme", "layer_sensitivity"):
        if not isinstance(content.get(key), dict):
            yield f"key {key} is missing or no object, so this is no manifest of any generation"
            return
    if not isinstance(content["scheme"].get("name"), str):
        yield "scheme.name is missing; expected the scheme's name"
    if not isinstance(content.get("autoquant_state", {}), dict):
        yield "autoquant_state: expected an object"
    for handle, group in content["layer_sensitivity"].items():
        problem = _group_problem(group)
        if problem:
            yield f"layer_sensitivity[{handle}]: {problem}"


def _group_problem(group: Any) -> str | None:
    lists = [group.get(key) if isinstance(group, dict) else None for key in LISTS]
    if not all(isinstance(values, list) for values in lists):
        return "expected lists formats, scores and costs"
    formats, scores, costs = (values or [] for values in lists)
    if not len(formats) == len(scores) == len(costs):
        return "formats, scores and costs differ in length"
    if not all(isinstance(name, str) for name in formats):
        return "expected strings in formats"
    known = [*costs, *(score for score in scores if score is not None)]
    return (
        None
        if all(_number(value) is not None for value in known)
        else ("expected numbers in scores and costs")
    )


def _own_problems(manifest: Manifest) -> Iterator[str]:
    for handle, group in manifest.layer_sensitivity.items():
        where = f"layer_sensitivity[{handle}]"
        rows = (group.scores, group.costs, group.scores_solver, group.scores_se)
        if any(len(row) != len(group.formats) for row in (*rows, group.batch_scores)):
            yield f"{where}: its lists differ in length from formats"
        if group.selected not in group.formats:
            yield f"{where}.selected: {group.selected!r} is none of its formats"
        for name in group.module_names:
            if name not in manifest.layers:
                yield f"{where}.module_names: {name} is not in layers"
            elif manifest.layers[name].format != plain_name(group.selected):
                yield f"layers[{name}].format: differs from what {where} selected"
        for label in group.formats:
            if plain_name(label) != NONE and plain_name(label) not in manifest.run:
                yield f"{where}: format {plain_name(label)} is not in run"
    quantized = sum(layer.quantized for layer in manifest.layers.values())
    if quantized != manifest.num_quantized_layers:
        yield f"num_quantized_layers: is {manifest.num_quantized_layers}, layers count {quantized}"
    importance = [entry.importance for entry in manifest.sensitivity_ranking]
    if importance != sorted(importance):
        yield "sensitivity_ranking: is not ascending"
    for entry in manifest.sensitivity_ranking:
        if entry.name not in manifest.layer_sensitivity:
            yield f"sensitivity_ranking: {entry.name} is not in layer_sensitivity"
    cost = sum(
        group.costs[group.formats.index(group.selected)]
        for group in manifest.layer_sensitivity.values()
        if group.selected in group.formats
    )
    if abs(cost - manifest.autoquant_state.cost) > 1e-6 * max(1.0, cost):
        yield f"autoquant_state.cost: is {manifest.autoquant_state.cost}, the choice costs {cost}"
