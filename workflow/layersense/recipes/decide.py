"""One scheme over the scores of a run: who may be quantized, what is chosen, why not the rest."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import ceil, floor, fsum, log10
from pathlib import Path
from typing import Any, NamedTuple

from layersense import config
from layersense.errors import LayersenseError
from layersense.files import atomic_write
from layersense.manifests.findings import Evidence, find
from layersense.manifests.schema import (
    AutoQuantizeState,
    Budget,
    Deployment,
    FormatRun,
    Layer,
    LayerSensitivity,
    Manifest,
    Ranked,
    Scheme,
    encode_manifest,
    label,
    plain_name,
)
from layersense.manifests.tables import BYTES_PER_COST
from layersense.quantization.extensions import RETRY
from layersense.quantization.formats import (
    NONE,
    Format,
    activation_bits,
    format_from_settings,
)
from layersense.quantization.layers import is_router
from layersense.recipes.budgets import Limit, budget_of
from layersense.recipes.menu import Menu
from layersense.recipes.solver import BUDGET_TOLERANCE
from layersense.recipes.targets import TARGETS, deployment
from layersense.scoring.scores import NONE_BITS, Reached, Scores, read_scores, score_per_token

NOT_REACHED: dict[Reached, str] = {
    "not_called": "the calibration data never ran it",
    "no_gradient": "no gradient of the loss reaches it",
}
BEYOND_COVERAGE = "beyond the scheme's coverage fraction"
EXCLUDED = "the scheme's include and exclude patterns leave it out"


@dataclass
class _Group:
    """A layer group under one scheme; the lists run over its formats, then ``NONE``."""

    formats: list[str]
    bits: list[float]
    scores: list[float | None]
    solver: list[float | None]
    costs: list[float]
    errors: list[float | None]
    batches: list[list[float | None]]
    reached: Reached
    kept: str | None = None
    """Why it may not be quantized; None if the solver decides."""
    withheld: set[str] = field(default_factory=set)
    """Formats that the scheme gives to other layers alone."""
    must: bool = False
    """Whether it may not stay unquantized."""

    @property
    def importance(self) -> float | None:
        """Worst score over the formats; None if one is not finite or there is none."""
        scores = [score for score in self.scores[:-1] if score is not None]
        return max(scores) if scores and len(scores) == len(self.formats) - 1 else None


def solve_scheme(
    run: str,
    scheme: str,
    settings: Mapping[str, Any],
    scores: Path,
    out: Path,
) -> None:
    """Decide one scheme and write its manifest.

    Args:
        run: name of the run.
        scheme: name of the scheme.
        settings: what :func:`layersense.settings.scheme_settings` returns.
        scores: score file of the run.
        out: manifest to write.

    Raises:
        LayersenseError: a format was not measured, or the budget cannot be met.
    """
    keys = {key: settings[key] for key in config.Scheme.model_fields if key in settings}
    expected = settings["expected"]
    manifest = build_manifest(
        read_scores(scores),
        run,
        scheme,
        config.Scheme.model_validate(keys),
        {
            name: {**expected["settings"], "format": format}
            for name, format in expected["formats"].items()
        },
    )
    atomic_write(out, encode_manifest(manifest))


def build_manifest(
    scores: Scores,
    run: str,
    scheme_name: str,
    scheme: config.Scheme,
    settings: Mapping[str, Mapping[str, Any]],
) -> Manifest:
    """Decide one scheme over the scores of a run.

    Args:
        scores: what was measured.
        run: name of the run.
        scheme_name: name of the scheme.
        scheme: the scheme; its formats go by the names in ``scores``.
        settings: format → the settings it would be measured under today; where those it was
            measured under differ (``frozen``), a finding says so. Formats left out are not
            compared.

    Raises:
        LayersenseError: a format was not measured, or the budget cannot be met.
    """
    where = f"run {run}, scheme {scheme_name}"
    left_out = {
        name: scores.left_out[name] for name in scheme.all_formats if name in scores.left_out
    }
    measured = [name for name in scheme.all_formats if name not in left_out]
    if not measured:
        name, reason = next(iter(left_out.items()))
        raise LayersenseError(
            f"{where}: none of its formats could be measured; {name}: {reason}; mend that and run "
            f"`{RETRY}`, or choose other formats"
        )
    for name in measured:
        if name not in scores.formats:
            raise LayersenseError(
                f"{where}: format {name} has not been measured; run "
                "`snakemake scores` (without frozen=true), or take it out of the scheme's "
                "quant_formats"
            )
    if not scores.groups:
        raise LayersenseError(
            f"{where}: the score file has no layer group; score the run again, or choose a model "
            "with linear layers or convolutions"
        )
    # ModelOpt's order: by compression; of equal bits by name, to have one order.
    formats = sorted(
        dict.fromkeys(measured),
        key=lambda name: (scores.formats[name].effective_bits, name),
    )
    used = {
        name: format_from_settings(name, scores.formats[name].settings["format"])
        for name in formats
    }
    precisions = {name: Precision.of(format) for name, format in used.items()}
    groups = {handle: _group(scores, handle, precisions) for handle in scores.groups}
    _keep(scores, groups, scheme)
    _limit_formats(scores, groups, scheme, where)
    sensitivity = {handle: _sensitivity(scores, handle, group) for handle, group in groups.items()}
    limit = budget_of(scheme, scores, sensitivity, where)
    tokens = {name: scores.formats[name].batches.tokens for name in formats}
    menu = Menu.of(sensitivity, tokens, objective=scheme.objective, risk=scheme.risk)
    if scheme.target == "generic":
        state = _choose(scores, groups, sensitivity, menu, scheme, limit, where)
    else:
        free = menu
        found = deployment(
            scheme.target,
            used,
            {handle: group.module_names for handle, group in sensitivity.items()},
            {name: layer.module_type for name, layer in scores.layers.items()},
        )
        _bar(groups, sensitivity, found.barred)
        menu = Menu.of(
            sensitivity,
            tokens,
            objective=scheme.objective,
            risk=scheme.risk,
            together=found.together,
            fused=found.fused,
        )
        state = _choose(scores, groups, sensitivity, menu, scheme, limit, where)
        state.deployment = _price(
            scheme.target,
            menu,
            free,
            {handle: plain_name(group.selected) for handle, group in sensitivity.items()},
            state,
            limit.room,
        )
    manifest = Manifest(
        scheme=Scheme(
            name=scheme_name,
            quant_formats=scheme.all_formats,
            effective_bits=scheme.effective_bits,
            auto_quantize_bits=scheme.effective_bits,
            auto_quantize_method=scores.method,
            coverage_mode=scheme.coverage_mode,
            coverage_fraction=scheme.coverage_fraction,
            include=list(scheme.include),
            exclude=list(scheme.exclude),
            routers=scheme.routers,
            unreached=scheme.unreached,
            objective=scheme.objective,
            risk=scheme.risk,
            target=scheme.target,
            kv_cache=scheme.kv_cache,
            recipe=scheme.recipe,
            cost_excluded=list(scheme.cost_excluded),
            active_expert_ratio=scheme.active_expert_ratio,
        ),
        run_name=run,
        model=scores.model,
        dataset=scores.dataset,
        num_quantized_layers=0,
        layers=_layers(scores, groups, sensitivity),
        autoquant_state=state,
        layer_sensitivity=sensitivity,
        sensitivity_ranking=_ranking(groups),
        findings=[],
        environment={name: scores.formats[name].environment for name in formats},
        run={
            name: FormatRun(
                digest=entry.digest,
                engine=scores.engine,
                method=scores.method,
                effective_bits=entry.effective_bits,
                weight_format=entry.weight_format,
                act_format=entry.act_format,
                kernel=entry.kernel,
                batches=entry.batches,
                seconds=entry.seconds,
                peak_memory_bytes=entry.peak_memory_bytes,
                fit=entry.fit,
                agreement=entry.agreement,
                back_offs=entry.back_offs,
                settings=entry.settings,
            )
            for name, entry in ((name, scores.formats[name]) for name in formats)
        },
    )
    manifest.num_quantized_layers = sum(layer.quantized for layer in manifest.layers.values())
    evidence = Evidence(scores, manifest, settings, _own_patterns(scheme))
    if stability := evidence.stability:
        for ranked in manifest.sensitivity_ranking:
            # Of those that are not named, no resample could lift one into the set.
            probability = stability.probability.get(ranked.name, 0.0)
            manifest.layer_sensitivity[ranked.name].top_probability = probability
    manifest.findings = find(evidence)
    return manifest


def _own_patterns(scheme: config.Scheme) -> dict[str, list[str]]:
    """Return the patterns that a scheme's author wrote: a recipe's are for models of every kind."""
    if scheme.recipe is not None:
        return {}
    spaces = enumerate(scheme.search_spaces)
    return {
        "include": scheme.include,
        "exclude": scheme.exclude,
        "cost_excluded": scheme.cost_excluded,
        **{f"search_spaces[{number}].layers": space.layers for number, space in spaces},
    }


class Precision(NamedTuple):
    """How fine a format is."""

    weight_bits: float
    activation_bits: int
    activation: object
    """What is done to activations, in any form that compares."""

    @classmethod
    def of(cls, format: Format) -> "Precision":
        """Return the precision of a format."""
        return cls(format.effective_bits, activation_bits(format), format.input)

    def is_coarser_than(self, other: "Precision") -> bool:
        """Tell whether weights have fewer bits, and activations fewer or the very same."""
        return self.weight_bits < other.weight_bits and (
            self.activation_bits < other.activation_bits or self.activation == other.activation
        )


def monotone(scores: Sequence[float | None], precisions: Sequence[Precision]) -> list[float | None]:
    """Return scores as the solver sees them: none above that of a coarser format.

    ``initialize_candidate_stats`` of ModelOpt takes ``min(score, previous)`` from the most
    compressed format to ``NONE``: in its formats weights and activations narrow together. Of pairs
    that would take W4A16's score for W8A4's. What is not clamped costs more and scores more than
    what would have clamped it, so that the choice stays the same.

    Args:
        scores: of the formats; one that is not finite is None, and is passed over.
        precisions: of the same formats.
    """
    known = [
        (score, precision)
        for score, precision in zip(scores, precisions, strict=True)
        if score is not None
    ]
    return [
        None
        if score is None
        else min([score, *(other for other, coarse in known if coarse.is_coarser_than(own))])
        for score, own in zip(scores, precisions, strict=True)
    ]


def _group(scores: Scores, handle: str, precisions: Mapping[str, Precision]) -> _Group:
    measured = {
        name: scores.formats[name].groups[handle]
        for name in precisions
        if handle in scores.formats[name].groups
    }
    values, errors = [], []
    for name, entry in measured.items():
        value, error = score_per_token(entry.batch_scores, scores.formats[name].batches.tokens)
        values.append(value)
        errors.append(error)
    anywhere = [
        entry.groups[handle].reached
        for entry in ([scores.formats[name] for name in measured] or scores.formats.values())
        if handle in entry.groups
    ]
    reached: Reached = "scored" if "scored" in anywhere else (*anywhere, "not_called")[0]
    return _Group(
        formats=[*measured, NONE],
        bits=[*(scores.formats[name].effective_bits for name in measured), NONE_BITS],
        scores=[*values, 0.0],
        solver=monotone(
            [*values, 0.0],
            [*(precisions[name] for name in measured), Precision(NONE_BITS, 16, None)],
        ),
        costs=[
            *(entry.cost for entry in measured.values()),
            float(scores.groups[handle].n_weights),
        ],
        errors=[*errors, None if None in errors else 0.0],
        batches=[
            *(entry.batch_scores for entry in measured.values()),
            [0.0] * (len(next(iter(measured.values())).batch_scores) if measured else 0),
        ],
        reached=reached,
    )


def _keep(scores: Scores, groups: Mapping[str, _Group], scheme: config.Scheme) -> None:
    """Say of each group whether and why it stays unquantized before anything is solved."""
    for handle, group in groups.items():
        names = scores.groups[handle].module_names
        if len(group.formats) == 1:
            group.kept = "no format of the scheme applies to it"
        elif is_router(names) and not scheme.routers:
            group.kept = "it is a router, and the scheme leaves routers alone"
        elif not all(_matches(name, scheme.include) for name in names) or any(
            _matches(name, scheme.exclude) for name in names
        ):
            group.kept = EXCLUDED
        elif group.reached != "scored" and scheme.unreached == "keep":
            group.kept = NOT_REACHED[group.reached]
        elif group.importance is None:
            group.kept = "its score is not finite"
    if scheme.coverage_mode == "full":
        return
    # A group too large for what is left is passed over, so that it does not shut out smaller ones.
    room = scheme.coverage_fraction * sum(group.n_weights for group in scores.groups.values())
    room *= 1 + BUDGET_TOLERANCE
    free = [handle for handle, group in groups.items() if group.kept is None]
    for handle in sorted(free, key=lambda handle: groups[handle].importance or 0.0):
        if scores.groups[handle].n_weights <= room:
            room -= scores.groups[handle].n_weights
        else:
            groups[handle].kept = BEYOND_COVERAGE


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _limit_formats(
    scores: Scores, groups: Mapping[str, _Group], scheme: config.Scheme, where: str
) -> None:
    """Give each group the formats of its search space, or the scheme's.

    Raises:
        LayersenseError: an entry matches a part of a group, or several match one.
    """
    for handle, group in groups.items():
        names = scores.groups[handle].module_names
        matched = []
        for number, space in enumerate(scheme.search_spaces):
            hits = [_matches(name, space.layers) for name in names]
            if any(hits) and not all(hits):
                raise LayersenseError(
                    f"{where}: search_spaces[{number}] matches {names[hits.index(True)]} and not "
                    f"{names[hits.index(False)]}, which must share a format; match all or none"
                )
            if any(hits):
                matched.append(space)
        if len(matched) > 1:
            raise LayersenseError(
                f"{where}: {len(matched)} entries of search_spaces match {names[0]}; make their "
                "patterns disjoint"
            )
        own = matched[0].quant_formats if matched else scheme.quant_formats
        group.withheld = set(group.formats) - {NONE, *own}
        left = [name for name in group.formats if name != NONE and name not in group.withheld]
        group.must = bool(matched and not matched[0].unquantized and group.kept is None and left)
        if group.kept is None and not left:
            group.kept = "no format that the scheme gives it applies to it"


def _bar(
    groups: Mapping[str, _Group],
    sensitivity: Mapping[str, LayerSensitivity],
    barred: Mapping[str, Mapping[str, str]],
) -> None:
    """Take from the groups what a target does not let them have."""
    for handle, formats in barred.items():
        group, entry = groups[handle], sensitivity[handle]
        entry.allowed = [
            allowed and name not in formats
            for name, allowed in zip(group.formats, entry.allowed, strict=True)
        ]
        if not any(entry.allowed):
            raise LayersenseError(
                f"{entry.module_names[0]}: must be quantized (search_spaces, unquantized: false) "
                f"and {next(iter(formats.values()))}; allow it to stay, or give it other formats"
            )
        if group.kept is None and not any(entry.allowed[:-1]):
            group.kept = "; ".join(
                dict.fromkeys(formats[name] for name in group.formats if name in formats)
            )


def _price(
    target: config.Target,
    menu: Menu,
    free: Menu,
    chosen: Mapping[str, str],
    state: AutoQuantizeState,
    budget: float,
) -> Deployment:
    """Return what a target asks for and what the best choice without it would be."""
    solution = free.best(budget)
    choice = solution.choice
    if solution.score > state.minimized:  # what the target allows, no target allows too
        choice = free.choice(chosen)
    return Deployment(
        target=target,
        together=[list(formats) for formats in menu.together or ()],
        fused=[list(handles) for handles in menu.fused],
        barred=sum(
            len(own) < len(all_) for own, all_ in zip(menu.options, free.options, strict=True)
        ),
        score_without=free.damage(choice).score,
        minimized_without=min(solution.score, state.minimized),
        effective_bits_without=free.effective_bits(choice),
    )


def with_recipe(manifest: Manifest, recipe: Mapping[str, str]) -> Manifest:
    """Return a copy of a manifest that takes another recipe of its menu.

    ``checkpoint_bytes`` follows the searched weights; a tie that breaks or holds is not followed.

    Raises:
        LayersenseError: the recipe is over the budget.
    """
    result = copy.deepcopy(manifest)
    menu = Menu.of_manifest(result)
    choice = menu.choice(recipe)
    state = result.autoquant_state
    used = menu.budget_cost(choice)
    before = menu.choice(manifest.recipe)
    if used > menu.budget_cost(before) * (1 + BUDGET_TOLERANCE):
        raise LayersenseError(
            f"{manifest.run_name}, {manifest.scheme.name}: the recipe takes more than the "
            "scheme's own; verify again"
        )
    for handle, name in menu.recipe(choice).items():
        group = result.layer_sensitivity[handle]
        group.selected = next(text for text in group.formats if plain_name(text) == name)
        group.flips_to = None
        for module in group.module_names:
            layer = result.layers[module]
            layer.quantized, layer.format = name != NONE, name
    damage = menu.damage(choice)
    state.constraints = {"effective_bits": menu.effective_bits(choice)}
    state.score, state.score_se = damage.score, damage.error
    state.score_low, state.score_high = damage.low, damage.high
    state.checkpoint_bytes += BYTES_PER_COST * (menu.cost(choice) - state.cost)
    state.cost = menu.cost(choice)
    minimized = menu.problem.scores[menu.rows, choice]
    state.minimized = float(minimized.max() if menu.objective == "max" else fsum(minimized))
    bound = min(state.lower_bound, state.minimized)
    state.gap = (state.minimized - bound) / state.minimized if state.minimized else 0.0
    state.budget.used += state.budget.per_cost * (used - menu.budget_cost(before))
    result.num_quantized_layers = sum(layer.quantized for layer in result.layers.values())
    return result


def _choose(
    scores: Scores,
    groups: Mapping[str, _Group],
    sensitivity: Mapping[str, LayerSensitivity],
    menu: Menu,
    scheme: config.Scheme,
    limit: Limit,
    where: str,
) -> AutoQuantizeState:
    """Solve, write the choice into ``sensitivity`` and return the state."""
    lowest = menu.lowest
    if lowest > limit.room * (1 + BUDGET_TOLERANCE):
        raise LayersenseError(_unreachable(scores, groups, limit, lowest, where, scheme))
    solution = menu.best(limit.room)
    flips = menu.flips(solution.choice, limit.room)
    for handle, name in menu.recipe(solution.choice).items():
        group = sensitivity[handle]
        labels = {plain_name(text): text for text in group.formats}
        group.selected = labels[name]
        group.flips_to = flips.get(handle)
    damage = menu.damage(solution.choice)
    return AutoQuantizeState(
        keys=["candidate_stats", "best", "constraints"],
        constraints={"effective_bits": menu.effective_bits(solution.choice)},
        score=damage.score,
        score_se=damage.error,
        score_low=damage.low,
        score_high=damage.high,
        cost=menu.cost(solution.choice),
        minimized=solution.score,
        lower_bound=solution.lower_bound,
        gap=solution.gap,
        is_satisfied=True,
        budget=Budget(
            kind=limit.kind,
            unit=limit.unit,
            limit=limit.asked,
            used=limit.used(menu.budget_cost(solution.choice)),
            fixed=limit.fixed,
            per_cost=limit.per_cost,
            counted_weights=limit.counted_weights,
        ),
        checkpoint_bytes=limit.size.of_recipe(menu.recipe(solution.choice)),
        checkpoint_bytes_before=limit.size.of_recipe(dict.fromkeys(sensitivity, NONE)),
    )


def _unreachable(
    scores: Scores,
    groups: Mapping[str, _Group],
    limit: Limit,
    lowest: float,
    where: str,
    scheme: config.Scheme,
) -> str:
    total = fsum(group.n_weights for group in scores.groups.values())
    kept: dict[str, float] = {}
    for handle, group in groups.items():
        if group.kept:
            share = scores.groups[handle].n_weights / total
            kept[group.kept] = kept.get(group.kept, 0.0) + share
    limits = "; ".join(
        f"{share:.1%} of the searched weights stay unquantized because {why}"
        if why != BEYOND_COVERAGE
        else f"{share:.1%} of the searched weights are {why}"
        for why, share in sorted(kept.items(), key=lambda item: -item[1])
    )
    if left_out := [name for name in scheme.all_formats if name in scores.left_out]:
        limits += f"{'; ' if limits else ''}{' and '.join(left_out)} could not be measured"
    if limit.kind == "size":
        limits += (
            f"{'; ' if limits else ''}{ceil_digits(limit.fixed):g} GB of it are never searched, "
            "such as embeddings"
        )
    if scheme.target != "generic":
        title = TARGETS[scheme.target].title
        limits += f"{'; ' if limits else ''}with formats that {title} reads together"
    data = "give the run data that reaches them, " if set(kept) & set(NOT_REACHED.values()) else ""
    reachable = ceil_digits(limit.used(lowest))
    return (
        f"{where}: {limit.asked:g} {limit.unit} cannot be met, the lowest reachable "
        f"are {reachable:g} ({limits or 'the smallest format everywhere'}); {data}"
        f"raise {limit.key}, add a smaller format or loosen the scheme's constraints"
    )


def ceil_digits(value: float) -> float:
    """Return ``value`` rounded up to four decimals, or to the six digits that ``:g`` shows.

    So that the number which is named can be asked for.
    """
    factor = min(1e4, 10.0 ** (5 - floor(log10(max(value, 1.0)))))
    return ceil(value * factor) / factor


def _layers(
    scores: Scores,
    groups: Mapping[str, _Group],
    sensitivity: Mapping[str, LayerSensitivity],
) -> dict[str, Layer]:
    layers = {}
    for name, layer in scores.layers.items():
        group = groups[layer.group] if layer.group else None
        chosen = plain_name(sensitivity[layer.group].selected) if layer.group else NONE
        layers[name] = Layer(
            quantized=chosen != NONE,
            module_type=layer.module_type,
            n_weights=layer.n_weights,
            format=chosen,
            reason=group.kept if group else layer.reason,
            tied_to=layer.tied_to,
        )
    return layers


def _sensitivity(scores: Scores, handle: str, group: _Group) -> LayerSensitivity:
    """Return the entry of a group before anything is chosen."""
    labels = [label(name, bits) for name, bits in zip(group.formats, group.bits, strict=True)]
    entry = scores.groups[handle]
    return LayerSensitivity(
        formats=labels,
        scores=group.scores,
        costs=group.costs,
        scores_solver=group.solver,
        scores_se=group.errors,
        batch_scores=group.batches,
        module_names=entry.module_names,
        n_weights=entry.n_weights,
        reached=group.reached,
        subsystem=entry.subsystem,
        block=entry.block,
        kind=entry.kind,
        selected=labels[-1],
        allowed=[
            not group.must if name == NONE else group.kept is None and name not in group.withheld
            for name in group.formats
        ],
    )


def _ranking(groups: Mapping[str, _Group]) -> list[Ranked]:
    ranked = [
        Ranked(name=handle, importance=group.importance)
        for handle, group in groups.items()
        if group.reached == "scored" and group.importance is not None
    ]
    return sorted(ranked, key=lambda entry: entry.importance)
