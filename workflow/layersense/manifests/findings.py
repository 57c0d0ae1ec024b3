"""Findings: the gotchas that a machine can see, so that no reader has to.

Each detector looks at one thing and returns what it saw; :data:`DETECTORS` lists them all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from layersense.manifests.codes import Code
from layersense.manifests.schema import (
    SUFFIX,
    Finding,
    LayerSensitivity,
    Manifest,
    gravest_first,
    plain_name,
)
from layersense.manifests.stability import Stability, ranking_stability
from layersense.quantization.extensions import RETRY
from layersense.quantization.formats import NONE, bits_of_shape
from layersense.scoring.scores import FormatScores, Scores

CLAMPED = 1e20
"""ModelOpt clamps g·ΔY to ±1e10 and squares it, so one clamped element alone makes this score."""
HIGH_PADDING = 0.5
"""Share of padding positions above which a batch is mostly padding."""
UNSTABLE = 0.5
"""Probability of another top set above which the ranking is called noisy."""
CUT = 1.05
"""Factor by which a layer's true bits exceed the billed before it is said."""
MAX_EXPERTS = 8
"""How many experts one sentence names."""
MAX_REASONS = 3
"""How many differing settings one sentence names."""


@dataclass(frozen=True)
class Evidence:
    """What detectors look at.

    Attributes:
        scores: the score file.
        manifest: the manifest without findings.
        expected: format → the settings that the config asks for today.
        patterns: key of the scheme → its patterns on module names.
    """

    scores: Scores
    manifest: Manifest
    expected: Mapping[str, Mapping[str, Any]]
    patterns: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def formats(self) -> dict[str, FormatScores]:
        """The scheme's formats as measured, smallest first."""
        return {name: self.scores.formats[name] for name in self.manifest.run}

    @cached_property
    def stability(self) -> Stability | None:
        """How sure the ranking is; resampled once for all detectors."""
        ranking = self.manifest.sensitivity_ranking
        return ranking_stability({entry.name: entry.importance for entry in ranking}, self.formats)


def find(evidence: Evidence) -> list[Finding]:
    """Return all findings, the most severe first, otherwise in the order of the detectors."""
    return gravest_first(finding for detect in DETECTORS for finding in detect(evidence))


def not_finite(evidence: Evidence) -> Iterator[Finding]:
    """A score is NaN or infinite."""
    handles = [
        handle
        for handle, group in evidence.manifest.layer_sensitivity.items()
        if any(score is None for score in group.scores)
    ]
    if handles:
        names = _formats_where(evidence, handles, lambda score: score is None)
        yield Finding(
            code=Code.SCORE_NOT_FINITE,
            severity="error",
            what=f"{_count(handles, 'group')} scored NaN or infinity under {_and(names)}, "
            "and left unquantized for that.",
            why="An overflow in the model's dtype, a broken weight, or a format whose scales "
            "overflow on these layers.",
            fix="Score in bfloat16 or float32 (dtype of the run), and check these layers' weights "
            "for NaN.",
            layers=_strip(handles),
            formats=names,
        )


def clamped(evidence: Evidence) -> Iterator[Finding]:
    """A score is so large that ModelOpt's clamp was at work."""
    handles = [
        handle
        for handle, group in evidence.manifest.layer_sensitivity.items()
        if any(
            value is not None and value >= CLAMPED for row in group.batch_scores for value in row
        )
    ]
    if handles:
        yield Finding(
            code=Code.SCORE_CLAMPED,
            severity="error",
            what=f"{_count(handles, 'group')} reached a score of 1e20 or more in one batch, where "
            "ModelOpt cuts off.",
            why="ModelOpt limits gradient × output error to ±1e10 for each element, so the true "
            "score is larger and the order among these layers means nothing.",
            fix="Leave these layers unquantized (exclude), and look for exploding gradients: wrong "
            "dtype, wrong labels, or a model that does not fit the data.",
            layers=_strip(handles),
        )


def other_settings(evidence: Evidence) -> Iterator[Finding]:
    """A format was measured under other settings than the config asks for now."""
    changes: list[tuple[str, str]] = []
    for name, entry in evidence.formats.items():
        if name not in evidence.expected:
            continue
        paths = [
            f"{path} (measured {_show(old)}, now {_show(new)})"
            for path, old, new in _differences(entry.settings, evidence.expected[name])
        ]
        if paths:
            more = f" and {len(paths) - MAX_REASONS} more" if len(paths) > MAX_REASONS else ""
            changes.append(("; ".join(paths[:MAX_REASONS]) + more, name))
    for change, names in _grouped(changes).items():
        yield Finding(
            code=Code.MEASURED_WITH_OTHER_SETTINGS,
            severity="warning",
            what=f"{_and(names)}: measured under other settings than the config asks for: "
            f"{change}.",
            why="The results are frozen (frozen: true), so nothing is measured again.",
            fix="Trust these scores only for the settings they were measured under, or run "
            "without frozen to measure again.",
            formats=list(names),
        )


def left_out(evidence: Evidence) -> Iterator[Finding]:
    """A format of the scheme could not be measured."""
    for reason, names in _grouped(
        (evidence.scores.left_out[name], name)
        for name in evidence.manifest.scheme.quant_formats
        if name in evidence.scores.left_out
    ).items():
        yield Finding(
            code=Code.FORMAT_LEFT_OUT,
            severity="warning",
            what=f"{_and(names)}: not measured, and no part of the recipe.",
            why=f"{reason}, and ModelOpt has no other code for this format on a GPU.",
            fix=f"Mend what the compiler says (envs/cuda has nvcc and ninja), then run `{RETRY}`.",
            formats=list(names),
        )


def subsystem_at_zero(evidence: Evidence) -> Iterator[Finding]:
    """No group of a subsystem has a score other than zero."""
    for subsystem, handles in _by_subsystem(evidence.manifest).items():
        groups = [evidence.manifest.layer_sensitivity[handle] for handle in handles]
        measured = [group for group in groups if len(group.formats) > 1]
        if not measured or any(score != 0.0 for group in measured for score in group.scores):
            continue
        why, fix = _why_zero(evidence, subsystem, measured)
        yield Finding(
            code=Code.SUBSYSTEM_AT_ZERO,
            severity="warning",
            what=f"All {len(groups)} groups of the {subsystem} subsystem have a score of zero: "
            "this is no sign that they can be quantized.",
            why=why,
            fix=fix,
            layers=_strip(handles),
        )


def unreached(evidence: Evidence) -> Iterator[Finding]:
    """Single groups that the loss did not reach, in a subsystem that it did."""
    for subsystem, handles in _by_subsystem(evidence.manifest).items():
        sensitivity = evidence.manifest.layer_sensitivity
        missed = [
            handle
            for handle in handles
            if sensitivity[handle].reached != "scored" and len(sensitivity[handle].formats) > 1
        ]
        if not missed or len(missed) == len(handles):
            continue
        for reached in ("not_called", "no_gradient"):
            concerned = [handle for handle in missed if sensitivity[handle].reached == reached]
            if concerned:
                why, fix = _why_missed(reached)
                yield Finding(
                    code=Code.UNREACHED_GROUPS,
                    severity="warning",
                    what=f"{_count(concerned, 'group')} of the {subsystem} subsystem: no score.",
                    why=why,
                    fix=fix,
                    layers=_strip(concerned),
                )


def unreached_experts(evidence: Evidence) -> Iterator[Finding]:
    """Some experts of a mixture saw no token, and share a score with those that did."""
    for handle, group in evidence.scores.groups.items():
        missed = group.unreached_experts
        if not missed or evidence.manifest.layer_sensitivity[handle].reached != "scored":
            continue
        named = ", ".join(map(str, missed[:MAX_EXPERTS]))
        more = f" and {len(missed) - MAX_EXPERTS} more" if len(missed) > MAX_EXPERTS else ""
        yield Finding(
            code=Code.UNREACHED_EXPERTS,
            severity="warning",
            what=f"{len(missed)} of {group.n_experts} experts of {handle.removesuffix(SUFFIX)} "
            f"saw no scored token: {named}{more}.",
            why="ModelOpt makes all experts of a layer one group, whose score is that of the "
            "experts the data reached; of the others nothing is known.",
            fix="Raise score_samples or max_length, or use more varied data, before the group is "
            "quantized by this score.",
            layers=_strip([handle]),
        )


def measured_zero(evidence: Evidence) -> Iterator[Finding]:
    """A group that the loss reached has a score of exactly zero under every format."""
    at_zero = {name for found in subsystem_at_zero(evidence) for name in found.layers}
    handles = [
        handle
        for handle, group in evidence.manifest.layer_sensitivity.items()
        if group.reached == "scored"
        and len(group.formats) > 1
        and all(score == 0.0 for score in group.scores)
        and handle.removesuffix(SUFFIX) not in at_zero
    ]
    if handles:
        yield Finding(
            code=Code.ZERO_SCORE,
            severity="warning",
            what=f"{_count(handles, 'group')} reached by the loss and still at exactly zero.",
            why="The layer's output does not change under quantization, or its gradient is zero: "
            "zero weights or inputs, or saturated activations.",
            fix="Check that these layers do anything on your data before you quantize them.",
            layers=_strip(handles),
        )


def idle_patterns(evidence: Evidence) -> Iterator[Finding]:
    """A pattern names no layer: a slip, or meant for another model that shares the scheme."""
    names = list(evidence.scores.layers)
    idle = [
        (key, pattern, _meant(pattern, names))
        for key, patterns in evidence.patterns.items()
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    for slip in (True, False):
        found = [entry for entry in idle if (entry[2] is not None) is slip]
        if not found:
            continue
        one = len(found) == 1
        yield Finding(
            code=Code.IDLE_PATTERN,
            severity="warning" if slip else "info",
            what=f"{_and([f'`{pattern}` of `{key}`' for key, pattern, _ in found])} "
            f"{'names' if one else 'name'} no layer of this model, and "
            f"{'does' if one else 'do'} nothing.",
            why="A pattern is compared with the whole name of a module, and letter case counts.",
            fix=f"Write {_and([f'`{meant}`' for *_, meant in found])} instead."
            if slip
            else "Nothing, if the scheme is shared with a model that has such layers.",
        )


def _meant(pattern: str, names: Sequence[str]) -> str | None:
    """Return the pattern that was probably meant: of a part of a name, or spelt a bit otherwise."""
    core = pattern.strip("*.")
    if not core:
        return None
    around = f"*{core}*"
    if any(fnmatchcase(name, around) for name in names):
        return around
    parts = {part.lower(): part for name in names for part in name.split(".")}
    near = [get_close_matches(part.lower(), parts, 1, 0.75) for part in core.split(".")]
    if not all(near):
        return None
    spelt = f"*{'.'.join(parts[part] for (part,) in near)}*"
    return spelt if any(fnmatchcase(name, spelt) for name in names) else None


def never_searched(evidence: Evidence) -> Iterator[Finding]:
    """Layers with weights that ModelOpt does not search."""
    by_reason: dict[str, list[str]] = {}
    for name, layer in evidence.scores.layers.items():
        if layer.group is None:
            by_reason.setdefault(layer.reason or "no reason was recorded", []).append(name)
    for reason, names in by_reason.items():
        share = sum(evidence.scores.layers[name].n_weights for name in names) / max(
            1, sum(layer.n_weights for layer in evidence.scores.layers.values())
        )
        yield Finding(
            code=Code.NEVER_SEARCHED,
            severity="info",
            what=f"{_count(names, 'layer')} with {share * 100:.1f} % of the weights: never "
            "searched.",
            why=f"{reason[:1].upper()}{reason[1:]}.",
            fix="Nothing, if they may stay unquantized; they are no part of the effective bits.",
            layers=names,
        )


def back_offs(evidence: Evidence) -> Iterator[Finding]:
    """Something was reduced to fit into memory."""
    for sentence, names in _grouped(
        (sentence, name) for name, entry in evidence.formats.items() for sentence in entry.back_offs
    ).items():
        yield Finding(
            code=Code.REDUCED_FOR_MEMORY,
            severity="warning",
            what=f"While {_and(names)} was measured: {sentence.rstrip('.')}.",
            why="The device ran out of memory at what the config asks for.",
            fix="Use a larger GPU, or set the smaller value in the run so that it is on purpose.",
        )


def simulated_kernels(evidence: Evidence) -> Iterator[Finding]:
    """A format ran without ModelOpt's compiled extension."""
    names = [name for name, entry in evidence.formats.items() if entry.kernel == "simulated"]
    if names:
        yield Finding(
            code=Code.SIMULATED_KERNEL,
            severity="warning",
            what=f"{_and(names)}: simulated with torch operations, not with ModelOpt's "
            "compiled CUDA extension.",
            why="The extension could not be built; it needs nvcc, a C++ compiler and ninja.",
            fix="The ranking is usually the same; for exact numbers install the cuda environment "
            f"(envs/) and run `{RETRY}`, which measures it again.",
            formats=names,
        )


def engine_warnings(evidence: Evidence) -> Iterator[Finding]:
    """ModelOpt or the engine warned of something."""
    for sentence, names in _grouped(
        (sentence, name) for name, entry in evidence.formats.items() for sentence in entry.warnings
    ).items():
        yield Finding(
            code=Code.ENGINE_WARNING,
            severity="info",
            what=f"While {_and(names)} was measured, a warning: {sentence.rstrip('.')}.",
            why="ModelOpt or the scoring engine said so; the scores were kept.",
            fix="Read the run's log under results/logs/ for what came before it.",
            formats=list(names),
        )


def tied_weights(evidence: Evidence) -> Iterator[Finding]:
    """Layers share one weight tensor."""
    layers = evidence.scores.layers
    for name, layer in layers.items():
        if layer.tied_to is None:
            continue
        partner = layers.get(layer.tied_to)
        if layer.group is None and (partner is None or partner.group is None):
            continue
        yield Finding(
            code=Code.TIED_WEIGHTS,
            severity="warning",
            what=f"{name} shares its weights with {layer.tied_to}.",
            why="The two are one tensor. A format for one of them breaks the tie, so the "
            "checkpoint keeps a second copy, and the predicted size misses it.",
            fix="Exclude the searched one if size counts, or count the embedding's copy on top.",
            layers=[name, layer.tied_to],
        )


def cut_blocks(evidence: Evidence) -> Iterator[Finding]:
    """Blocks are longer than the rows they lie in, so that scales take more than is billed."""
    found: dict[tuple[tuple[str, ...], float, float], list[str]] = {}
    for name, entry in evidence.formats.items():
        weight = entry.settings["format"]["weight"]
        true: dict[str, float] = {}
        for module, layer in evidence.scores.layers.items():
            if layer.group in entry.groups and layer.shape:
                bits = bits_of_shape(weight, layer.shape)
                if bits > entry.effective_bits * CUT:
                    true[module] = bits
        if true:
            key = (tuple(true), entry.effective_bits, max(true.values()))
            found.setdefault(key, []).append(name)
    for (modules, billed, bits), names in found.items():
        taken = [
            module
            for module in modules
            if plain_name(evidence.manifest.layers[module].format) in names
        ]
        yield Finding(
            code=Code.CUT_BLOCKS,
            severity="warning" if taken else "info",
            what=f"Under {_and(names)} a weight of {_count(modules, 'layer')} takes up to "
            f"{bits:.3g} bits with its scales, not the {billed:.4g} that are billed, because a row "
            f"is shorter than a block; the recipe quantizes {len(taken)} of {len(modules)} so.",
            why="ModelOpt lays blocks along a weight's last axis: inputs of a linear layer, but "
            "the width of the kernel of a convolution. More scales than are billed make the score "
            "small, and a runtime may not have them.",
            fix="Leave these layers out (`exclude`), give the scheme a `target`, or take a format "
            "with a scale for each channel or tensor.",
            layers=list(modules),
            formats=names,
        )


def high_padding(evidence: Evidence) -> Iterator[Finding]:
    """Most positions of the batches are padding."""
    shares = {name: entry.batches.padding_share for name, entry in evidence.formats.items()}
    if shares and max(shares.values()) > HIGH_PADDING:
        yield Finding(
            code=Code.HIGH_PADDING,
            severity="warning",
            what=f"{max(shares.values()) * 100:.0f} % of all positions in the scoring batches "
            "are padding.",
            why="Texts of very different length share a batch. Padding enters the calibrated "
            "ranges and wastes time; it is never supervised.",
            fix="Lower batch_size and calibration_batch_size, or use texts of similar length.",
        )


def truncated(evidence: Evidence) -> Iterator[Finding]:
    """Texts were cut to the longest length allowed."""
    cut, of = max(
        (
            (entry.batches.truncated, sum(entry.batches.samples))
            for entry in evidence.formats.values()
        ),
        default=(0, 0),
    )
    if cut:
        yield Finding(
            code=Code.TRUNCATED_TEXTS,
            severity="warning" if cut > 0.1 * of else "info",
            what=f"{cut} of {of} texts were cut.",
            why="They are longer than max_length of the run.",
            fix="Raise max_length if the ends of your texts matter.",
        )


def few_batches(evidence: Evidence) -> Iterator[Finding]:
    """Too few batches to estimate an error."""
    fewest = min((len(entry.batches.tokens) for entry in evidence.formats.values()), default=2)
    if fewest < 2:
        yield Finding(
            code=Code.TOO_FEW_BATCHES,
            severity="warning",
            what="The scores come from a single batch and have no standard error.",
            why="Doubt is estimated from how much batches differ.",
            fix="Raise score_samples or lower batch_size so that there are at least 8 batches.",
        )


def noisy_ranking(evidence: Evidence) -> Iterator[Finding]:
    """Other batches might well have put other groups at the top."""
    stability = evidence.stability
    if stability is not None and stability.other_set > UNSTABLE:
        yield Finding(
            code=Code.NOISY_RANKING,
            severity="warning",
            what=f"With other batches of the same data, the {len(stability.top)} most sensitive "
            f"groups would be others in {stability.other_set * 100:.0f} % of cases; "
            f"{len(stability.unsure)} of them stand or fall with the noise.",
            why="Their scores differ by less than the batches do.",
            fix=_samples_advice(stability),
            layers=_strip(stability.unsure),
        )


def disagreeing_halves(evidence: Evidence) -> Iterator[Finding]:
    """Two disjoint halves of the data put other groups at the top."""
    stability = evidence.stability
    if stability is not None and stability.halves:
        yield Finding(
            code=Code.HALVES_DISAGREE,
            severity="info",
            what=f"Every other batch, and those between them, name other groups among the "
            f"{len(stability.top)} most sensitive: {len(stability.halves)} are in one list alone.",
            why="Each half holds other rows, so what differs between them is not settled by the "
            "data.",
            fix=_samples_advice(stability),
            layers=_strip(stability.halves),
        )


def _samples_advice(stability: Stability) -> str:
    if stability.samples_needed is None:
        return (
            "Treat these groups alike: the last on the list and the first below it are too close "
            "for any number of samples."
        )
    return (
        f"Raise score_samples to about {stability.samples_needed:,}, which tells the last on the "
        "list from the first below it, or treat these groups alike."
    )


def trained_on_calibration(evidence: Evidence) -> Iterator[Finding]:
    """The model has seen the rows that it is scored on."""
    if evidence.scores.model.trained_on_calibration:
        yield Finding(
            code=Code.TRAINED_ON_CALIBRATION,
            severity="info",
            what="The model was trained on the rows that it is scored on.",
            why="It is the demo model, trained on both splits of the embedded sample so that its "
            "scores mean something.",
            fix="Nothing for the demo; never judge a real model on its training data.",
        )


def remote_code(evidence: Evidence) -> Iterator[Finding]:
    """The checkpoint ran code of its own."""
    model = evidence.scores.model
    if model.trust_remote_code:
        yield Finding(
            code=Code.REMOTE_CODE,
            severity="warning",
            what=f"{model.id} ran Python code that came with the checkpoint.",
            why="trust_remote_code is set for this model.",
            fix="Read that code at revision "
            f"{model.revision or 'of the directory'} before you trust model or scores.",
        )


def unfinished_budget(evidence: Evidence) -> Iterator[Finding]:
    """The solver could not prove that its choice is the best."""
    gap = evidence.manifest.autoquant_state.gap
    if gap > 1e-3:
        yield Finding(
            code=Code.UNPROVEN_CHOICE,
            severity="info",
            what="A better choice within the budget may exist, by at most "
            f"{gap * 100:.1f} % of the score.",
            why="The problem is too large to be solved exactly; the gap is a proven bound.",
            fix="Nothing: the doubt in the scores themselves is usually larger.",
        )


DETECTORS: tuple[Callable[[Evidence], Iterator[Finding]], ...] = (
    not_finite,
    clamped,
    other_settings,
    left_out,
    subsystem_at_zero,
    unreached,
    unreached_experts,
    measured_zero,
    few_batches,
    noisy_ranking,
    disagreeing_halves,
    back_offs,
    simulated_kernels,
    cut_blocks,
    high_padding,
    truncated,
    tied_weights,
    remote_code,
    unfinished_budget,
    idle_patterns,
    never_searched,
    trained_on_calibration,
    engine_warnings,
)
"""Every detector; findings of equal severity stand in this order."""


def _why_zero(
    evidence: Evidence, subsystem: str, groups: Sequence[LayerSensitivity]
) -> tuple[str, str]:
    missed = {group.reached for group in groups}
    if subsystem == "vision" and evidence.scores.dataset.modality == "text":
        return (
            "The calibration data is text alone, so the vision tower never ran.",
            "Measure with modality image_text on a dataset with images.",
        )
    if len(missed) == 1 and "scored" not in missed:
        return _why_missed(missed.pop())
    if "scored" in missed:
        return (
            "Gradients reach it and are zero, or quantization does not change its outputs.",
            "Check labels and loss: does the task's output depend on this subsystem at all?",
        )
    return (
        "Some of its layers were never run, and no gradient of the loss reaches the others.",
        "Use data and a task whose loss depends on this subsystem.",
    )


def _why_missed(reached: str) -> tuple[str, str]:
    if reached == "not_called":
        return (
            "No calibration sample ran these layers.",
            "Add data that exercises them (images for a vision tower, more text for rare "
            "experts), or keep them unquantized: what only training runs, such as a detector's "
            "auxiliary heads, need not be fast.",
        )
    return (
        "They ran, but no gradient of the loss reaches them.",
        "Use a loss that depends on their output, look for frozen or detached parts in the "
        "model's code, or measure with method kl_div.",
    )


def _by_subsystem(manifest: Manifest) -> dict[str, list[str]]:
    return _grouped(
        (group.subsystem, handle) for handle, group in manifest.layer_sensitivity.items()
    )


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    for key, value in pairs:
        result.setdefault(key, []).append(value)
    return result


def _formats_where(
    evidence: Evidence, handles: Iterable[str], wanted: Callable[[float | None], bool]
) -> list[str]:
    groups = [evidence.manifest.layer_sensitivity[handle] for handle in handles]
    return list(
        dict.fromkeys(
            plain_name(label)
            for group in groups
            for label, score in zip(group.formats, group.scores, strict=True)
            if wanted(score) and plain_name(label) != NONE
        )
    )


_ABSENT = object()


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield key path, old and new value of everything that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            below = f"{path}.{key}" if path else str(key)
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), below)
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        if list(old) != list(new):
            yield path, old, new
    elif old is _ABSENT or new is _ABSENT or old != new:
        yield path, old, new


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else str(value)


def _strip(handles: Iterable[str]) -> list[str]:
    return [handle.removesuffix(SUFFIX) for handle in handles]


def _count(items: Sequence[str], word: str) -> str:
    return f"{len(items)} {word}{'' if len(items) == 1 else 's'}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
