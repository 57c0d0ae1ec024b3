"""``verification.parquet``: measured damage beside the predicted (no torch)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import structs

from layersense import config
from layersense.errors import LayersenseError
from layersense.files import atomic_path, canonical_json
from layersense.manifests.codes import Code
from layersense.manifests.read import read_own_manifest
from layersense.manifests.schema import (
    SUFFIX,
    Budget,
    Finding,
    LayerSensitivity,
    Manifest,
    plain_name,
)
from layersense.quantization.formats import NONE
from layersense.recipes.menu import Menu
from layersense.verification.analysis import (
    LEAST_CORRELATION,
    MAIN_DAMAGE,
    Betterment,
    Correlation,
    Duel,
    Parts,
    Summary,
    Verdict,
    correlate,
    difference_interval,
    mean_with_interval,
    ratio_interval,
)
from layersense.verification.plan import AT_ITS_BITS, CACHE, Planned, make_plan, plan_recipe
from layersense.verification.refine import Search, halves, mean_kl, search
from layersense.verification.store import (
    VERIFICATION_TABLE_VERSION,
    Damage,
    Verification,
    by_photograph,
    context_digest,
    read_verification,
)

SUMMARY_KEY = b"layersense.verification"
"""Key of the table's metadata that holds a :class:`Summary` as JSON."""

SOLVED, REFINED = "solved from measured damage", "refined by swaps"
"""Labels of the recipes that follow from what is measured."""
UNITS = {
    "effective_bits": "average bits per searched weight",
    "predicted": "score of the group, or predicted damage of the recipe",
    "predicted_low": "lower end of the 95 % interval of predicted",
    "predicted_high": "upper end of the 95 % interval of predicted",
    "kl": "KL(before ‖ after) in nats per compared position, on the held-out rows",
    "kl_low": "lower end of the 95 % bootstrap interval of kl over the units",
    "kl_high": "upper end of the 95 % bootstrap interval of kl over the units",
    "loss": "per supervised token (per sample where there are none)",
    "loss_difference": "loss minus that of the unquantized model",
    "loss_difference_low": "lower end of its 95 % interval, by bootstrap over the batches",
    "loss_difference_high": "upper end of its 95 % interval, by bootstrap over the batches",
    "perplexity": "exp(loss); null for tasks without tokens",
    "top1_agreement": "share of positions with the same first choice as before, 0 to 1",
    "top1_agreement_low": "lower end of its 95 % bootstrap interval over the units",
    "top1_agreement_high": "upper end of its 95 % bootstrap interval over the units",
    "top1_accuracy": "share of positions whose first choice is the label, 0 to 1",
    "metrics": "the task's own metrics over all held-out rows, null for single groups: name; "
    "value, in unit (share: 0 to 1); low and high, its 95 % interval by bootstrap over "
    "photographs; difference, value minus that of the unquantized model, with its own interval; "
    "whether higher_is_better",
    "sum_of_singles": "sum of the measured kl of the recipe's groups alone, and of its key-value "
    "cache; null if one is missing",
}

_NAME = pa.dictionary(pa.int32(), pa.string())
_METRIC = [
    ("name", pa.string()),
    ("unit", pa.string()),
    ("higher_is_better", pa.bool_()),
    *((name, pa.float64()) for name in ("value", "low", "high")),
    *((name, pa.float64()) for name in ("difference", "difference_low", "difference_high")),
]
VERIFICATION = pa.schema(
    [
        ("run", _NAME),
        ("kind", _NAME),
        ("scheme", _NAME),
        ("role", _NAME),
        ("label", pa.string()),
        ("layer", _NAME),
        ("handle", _NAME),
        ("subsystem", _NAME),
        ("layer_kind", _NAME),
        ("format", _NAME),
        ("effective_bits", pa.float64()),
        *((name, pa.float64()) for name in ("predicted", "predicted_low", "predicted_high")),
        *((name, pa.float64()) for name in ("kl", "kl_low", "kl_high")),
        *((name, pa.float64()) for name in ("loss", "loss_difference")),
        *((name, pa.float64()) for name in ("loss_difference_low", "loss_difference_high")),
        *((name, pa.float64()) for name in ("perplexity", "top1_agreement")),
        *((name, pa.float64()) for name in ("top1_agreement_low", "top1_agreement_high")),
        ("top1_accuracy", pa.float64()),
        ("metrics", pa.list_(pa.struct(_METRIC))),
        ("sum_of_singles", pa.float64()),
        ("rival_of", pa.string()),
        ("recipe_digest", pa.string()),
    ],
    metadata={
        "layersense.table": "verification",
        "layersense.schema_version": str(VERIFICATION_TABLE_VERSION),
        "layersense.units": canonical_json(UNITS),
    },
)
"""A row for each layer group quantized alone (``kind`` is ``group``; joins ``layers.parquet`` on
run, layer and format), and for each recipe in each of its roles (``kind`` is ``recipe``). The
first row, of kind ``before``, is the unquantized model."""


def write_verification_table(
    manifest_files: Sequence[Path], measured: Path, settings: Mapping[str, Any], out: Path
) -> None:
    """Write the table of a run.

    Args:
        manifest_files: manifests of the run's schemes.
        measured: its ``verification.json``.
        settings: what :func:`layersense.settings.verify_settings` returns.
        out: table to write.

    Raises:
        LayersenseError: an input cannot be read.
    """
    manifests = [read_own_manifest(path) for path in manifest_files]
    options = config.Verify.model_validate(settings["verify"])
    model, dataset = manifests[0].model.digest, manifests[0].dataset.digest
    context = context_digest(settings["measured"], model, dataset)
    table = verification_table(manifests, read_verification(measured), options, context)
    with atomic_path(out) as temporary:
        pq.write_table(table, temporary, compression="zstd", use_dictionary=True)


def read_summary(path: str | Path) -> Summary:
    """Read what a ``verification.parquet`` says beside its rows.

    Raises:
        LayersenseError: it cannot be read, or is no such table.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        return msgspec.json.decode(metadata[SUMMARY_KEY], type=Summary)
    except (OSError, ValueError, KeyError) as error:
        raise LayersenseError(
            f"{path}: cannot be read as a verification of layersense ({error}); delete it and run "
            "`snakemake` again"
        ) from error


class Pair(NamedTuple):
    """Score and measured damage of one group under one format."""

    subsystem: str
    score: float
    kl: float
    batch_scores: Sequence[float | None]
    """Summed, of each scoring batch."""
    units: Sequence[float | None]
    """Summed KL of each held-out unit."""


@dataclass(frozen=True)
class MeasuredRecipes:
    """What a ``verification.parquet`` says of whole recipes."""

    summary: Summary
    rows: list[dict[str, Any]]
    """Of kind ``recipe``."""

    def of(self, digest: str) -> dict[str, Any] | None:
        """Return a row of the recipe of this digest; None where it was not measured."""
        return next((row for row in self.rows if row["recipe_digest"] == digest), None)


def read_measured_recipes(path: Path) -> MeasuredRecipes:
    """Read the recipes of a ``verification.parquet``.

    Raises:
        LayersenseError: it cannot be read, or is no such table.
    """
    summary = read_summary(path)
    rows = pq.read_table(path).to_pylist()
    return MeasuredRecipes(summary, [row for row in rows if row["kind"] == "recipe"])


def verification_table(
    manifests: Sequence[Manifest],
    found: Verification,
    options: config.Verify,
    context: str | None = None,
) -> pa.Table:
    """Return the table of a run: columns :data:`VERIFICATION`.

    What is planned and not measured, as under ``frozen``, is left out, and a finding says so, as
    one does where it was measured under other settings.

    Args:
        manifests: of the run's schemes.
        found: what was measured.
        options: what was to be verified.
        context: digest of what it should depend on; None compares nothing.
    """
    plan = make_plan(manifests, options)
    found = by_photograph(found)
    run = found.run
    rows = [_row(found, None, run=run, kind="before", label="unquantized")]
    groups = _groups(manifests)
    missing: list[str] = []
    alone: dict[tuple[str, str], float] = {}
    pairs: dict[str, list[Pair]] = {}
    for format, handles in plan.singles.items():
        for handle in handles:
            single = found.singles.get(format, {}).get(handle)
            if single is None:
                missing.append(f"{handle.removesuffix(SUFFIX)} under {format}")
                continue
            group = groups[format][handle]
            score = group.scores[_index(group, format)]
            error = group.scores_se[_index(group, format)]
            row = _row(
                found,
                single.damage,
                run=run,
                kind="group",
                label=f"{handle.removesuffix(SUFFIX)} under {format}",
                layer=handle.removesuffix(SUFFIX),
                handle=handle,
                subsystem=group.subsystem,
                layer_kind=group.kind,
                format=format,
                predicted=score,
                predicted_low=None
                if score is None or error is None
                else max(0.0, score - 1.96 * error),
                predicted_high=None if score is None or error is None else score + 1.96 * error,
            )
            rows.append(row)
            if row["kl"] is not None and score is not None:
                alone[format, handle] = row["kl"]
                pairs.setdefault(format, []).append(
                    Pair(
                        subsystem=group.subsystem,
                        score=score,
                        kl=row["kl"],
                        batch_scores=group.batch_scores[_index(group, format)],
                        units=single.damage.kl,
                    )
                )
    searches = {
        manifest.scheme.name: search(manifest, found, plan.singles, options.refine)
        for manifest in manifests
    }
    for name, state in searches.items():
        if state.wanted:
            missing.append(f"a recipe in search of a better one for scheme {name}")
    measured: dict[tuple[str, str], tuple[Planned, Damage, float | None]] = {}
    for planned in [*plan.recipes, *_better(manifests, searches)]:
        entry = found.recipes.get(planned.digest)
        if entry is None:
            missing.append(f"{planned.label} of scheme {planned.scheme}")
            continue
        row = _row(
            found,
            entry.damage,
            run=run,
            kind="recipe",
            scheme=planned.scheme,
            role=planned.role,
            label=planned.label,
            effective_bits=planned.effective_bits,
            predicted=planned.predicted,
            predicted_low=planned.low,
            predicted_high=planned.high,
            sum_of_singles=_sum_of_singles(planned, alone),
            rival_of=planned.rival_of,
            recipe_digest=planned.digest,
        )
        rows.append(row)
        measured[planned.scheme, planned.label] = (planned, entry.damage, row["kl"])
        if planned.role == "cache" and row["kl"] is not None:
            alone[planned.kv_cache, CACHE] = row["kl"]
    tokens = {
        name: entry.batches.tokens for manifest in manifests for name, entry in manifest.run.items()
    }
    correlations = list(_correlations(pairs, tokens, found.before.positions))
    duels = [
        duel
        for manifest in manifests
        for duel in _duels(manifest.scheme.name, measured, found.before.positions)
    ]
    summary = Summary(
        correlations=correlations,
        duels=duels,
        verdicts=[
            structs.replace(
                _verdict(manifest, measured, duels, alone),
                betterment=_betterment(
                    found, measured, manifest.scheme.name, searches[manifest.scheme.name]
                ),
            )
            for manifest in manifests
        ],
        findings=[
            *_unmeasured(missing),
            *(_otherwise() if context not in (None, found.before.digest) else ()),
            *_broken(rows),
            *_findings(correlations),
        ],
        heldout_samples=found.heldout_samples,
        positions=sum(found.before.positions),
        exact_reuse=found.exact_reuse,
        photographs=None if found.before.photographs is None else len(found.before.photographs),
    )
    table = pa.Table.from_pylist(
        [{name: row.get(name) for name in VERIFICATION.names} for row in rows],
        schema=VERIFICATION,
    )
    return table.replace_schema_metadata(
        {**VERIFICATION.metadata, SUMMARY_KEY: msgspec.json.encode(summary)}
    )


def _better(manifests: Sequence[Manifest], searches: Mapping[str, Search]) -> Iterator[Planned]:
    """Yield the recipes that follow from what is measured, once all of that is."""
    for manifest in manifests:
        state = searches[manifest.scheme.name]
        if state.wanted:
            continue
        menu = Menu.of_manifest(manifest)
        if state.solved:
            yield plan_recipe(manifest, menu, "solved", SOLVED, state.solved)
        if state.refined:
            yield plan_recipe(manifest, menu, "refined", REFINED, state.refined)


def _betterment(
    found: Verification,
    measured: Mapping[tuple[str, str], tuple[Planned, Damage, float | None]],
    scheme: str,
    state: Search,
) -> Betterment | None:
    """Return what the better recipes do on the half of the rows that is there to judge."""
    if (scheme, scheme) not in measured or (scheme, SOLVED) not in measured:
        return None
    _, judging = halves(len(found.before.positions))

    def units(label: str) -> list[float | None]:
        return [measured[scheme, label][1].kl[unit] for unit in judging]

    def mean(label: str) -> float:
        return mean_kl(measured[scheme, label][1], found.before.positions, judging)

    own = ratio_interval(units(scheme), units(SOLVED))
    if own is None:
        return None
    result = Betterment(
        kl=mean(scheme),
        kl_solved=mean(SOLVED),
        own_ratio=own[0],
        own_ratio_low=own[1],
        own_ratio_high=own[2],
    )
    if (scheme, REFINED) in measured and (refined := ratio_interval(units(REFINED), units(SOLVED))):
        result.kl_refined, result.measured = mean(REFINED), state.measured
        result.refined_ratio, result.refined_ratio_low, result.refined_ratio_high = refined
    return result


def _row(found: Verification, damage: Damage | None, **more: Any) -> dict[str, Any]:
    before = found.before
    losses = before.loss if damage is None else damage.loss
    tokens, positions = sum(before.tokens), sum(before.positions)
    loss = None if None in losses else math.fsum(v for v in losses if v is not None) / tokens
    kl, low, high = (
        (0.0, 0.0, 0.0) if damage is None else mean_with_interval(damage.kl, before.positions)
    )
    risen, risen_low, risen_high = (
        (0.0, 0.0, 0.0)
        if damage is None
        else mean_with_interval(
            [
                None if loss is None else loss - other
                for loss, other in zip(damage.loss, before.loss, strict=True)
            ],
            before.tokens,
        )
    )
    agreed, agreed_low, agreed_high = (
        (1.0, 1.0, 1.0) if damage is None else mean_with_interval(damage.agree, before.positions)
    )
    correct = before.correct if damage is None else damage.correct
    # A loss per token has a perplexity; that of a sample has none.
    per_token = tokens > found.heldout_samples
    return {
        **more,
        "kl": kl,
        "kl_low": low,
        "kl_high": high,
        "loss": loss,
        "loss_difference": risen,
        "loss_difference_low": risen_low,
        "loss_difference_high": risen_high,
        "perplexity": math.exp(loss) if loss is not None and loss < 700 and per_token else None,
        "top1_agreement": agreed,
        "top1_agreement_low": agreed_low,
        "top1_agreement_high": agreed_high,
        "top1_accuracy": None if correct is None else sum(correct) / positions,
        "metrics": None
        if more["kind"] == "group"
        else msgspec.to_builtins((before if damage is None else damage).metrics),
    }


def _groups(manifests: Sequence[Manifest]) -> dict[str, dict[str, LayerSensitivity]]:
    """Return format → handle → group, of the first scheme that has the format."""
    groups: dict[str, dict[str, LayerSensitivity]] = {}
    for manifest in manifests:
        for name in manifest.run:
            groups.setdefault(name, manifest.layer_sensitivity)
    return groups


def _index(group: LayerSensitivity, format: str) -> int:
    return [plain_name(label) for label in group.formats].index(format)


def _sum_of_singles(planned: Planned, alone: Mapping[tuple[str, str], float]) -> float | None:
    """Return the sum of what a recipe's groups did alone; None if one was not measured."""
    parts = [(name, handle) for handle, name in planned.recipe.items() if name != NONE]
    if planned.kv_cache != "none":
        parts.append((planned.kv_cache, CACHE))
    if any(part not in alone for part in parts):
        return None
    return math.fsum(alone[part] for part in parts)


def _correlations(
    pairs: Mapping[str, Sequence[Pair]],
    tokens: Mapping[str, Sequence[int]],
    positions: Sequence[int],
) -> Iterator[Correlation]:
    for format, entries in pairs.items():
        subsystems: list[str | None] = [None, *dict.fromkeys(entry.subsystem for entry in entries)]
        for subsystem in subsystems:
            chosen = [entry for entry in entries if subsystem in (None, entry.subsystem)]
            found = correlate(
                format,
                subsystem,
                [entry.score for entry in chosen],
                [entry.kl for entry in chosen],
                _parts([entry.batch_scores for entry in chosen], tokens[format]),
                _parts([entry.units for entry in chosen], positions),
            )
            if found is not None:
                yield found


def _parts(sums: Sequence[Sequence[float | None]], weights: Sequence[int]) -> Parts:
    return Parts(np.array(sums, dtype=float), np.array(weights, dtype=float))


def _duels(
    scheme: str,
    measured: Mapping[tuple[str, str], tuple[Planned, Damage, float | None]],
    positions: Sequence[int],
) -> Iterator[Duel]:
    """Yield the comparisons at equal bits: rivals against baselines, the choice against others."""
    own = measured.get((scheme, scheme))
    for (name, _), (planned, damage, kl) in measured.items():
        if name != scheme:
            continue
        if planned.role == "rival" and (scheme, planned.rival_of or "") in measured:
            ours, theirs = (planned, damage, kl), measured[scheme, planned.rival_of or ""]
        elif planned.role in AT_ITS_BITS and own is not None:
            ours, theirs = own, (planned, damage, kl)
        else:
            continue
        if ours[0].digest == theirs[0].digest:
            continue
        low, high = difference_interval(ours[1].kl, theirs[1].kl, positions)
        yield Duel(
            scheme=scheme,
            ours=ours[0].label,
            theirs=theirs[0].label,
            bits=theirs[0].effective_bits,
            kl_ours=ours[2],
            kl_theirs=theirs[2],
            difference_low=low if math.isfinite(low) else None,
            difference_high=high if math.isfinite(high) else None,
        )


def _verdict(
    manifest: Manifest,
    measured: Mapping[tuple[str, str], tuple[Planned, Damage, float | None]],
    duels: Sequence[Duel],
    alone: Mapping[tuple[str, str], float],
) -> Verdict:
    scheme, budget = manifest.scheme.name, manifest.autoquant_state.budget
    equal, at_own, at_each = _within(budget)
    if (scheme, scheme) not in measured:
        return Verdict(
            scheme=scheme,
            sentence="The recipe is not measured yet.",
            additivity=None,
            equal=equal,
        )
    planned, _, kl = measured[scheme, scheme]
    total = _sum_of_singles(planned, alone)
    own = [duel for duel in duels if duel.scheme == scheme]
    random = [duel for duel in own if measured[scheme, duel.theirs][0].role == "random"]
    others = [duel for duel in own if duel not in random]
    parts = []
    if kl is None:
        parts.append(
            "with the recipe the model's outputs on these rows are not finite, so that it is of no "
            "use"
        )
    elif random:
        theirs = [math.inf if duel.kl_theirs is None else duel.kl_theirs for duel in random]
        median = float(np.median(theirs))
        if not math.isfinite(median):
            told = "not finite"
        else:
            told = f"{median / kl:.3g} times its own" if kl else f"{median:.3g}, and its own is 0"
        parts.append(
            f"at its own bits the recipe beats {sum(kl < other for other in theirs)} of "
            f"{len(random)} random recipes, whose median KL is {told}"
        )
    for outcome, words in (
        ("won", "does better than"),
        ("even", "cannot be told apart on these rows from"),
        ("lost", "does worse than"),
    ):
        # What is compared at the recipe's own bits, and at those of the other ones.
        for mine, where, who in (
            (True, at_own, "the recipe"),
            (False, at_each, "the solver's choice"),
        ):
            names = [
                duel.theirs
                for duel in others
                if duel.outcome == outcome and (duel.ours == scheme) == mine
            ]
            if names:
                parts.append(f"{where} {who} {words} {_and(names)}")
    sentence = "; ".join(parts) or "there is no other recipe to compare it with"
    return Verdict(
        scheme=scheme,
        sentence=f"{sentence[0].upper()}{sentence[1:]}.",
        additivity=kl / total if kl is not None and total else None,
        equal=equal,
        findings=[] if kl is not None else [_no_use(scheme)],
    )


def _within(budget: Budget) -> tuple[str, str, str]:
    """Return within which budget recipes are compared.

    Returns:
        In general, at the scheme's own recipe, and at each of several others.
    """
    if budget.kind not in ("bits", "size"):
        return (f"within the same {budget.unit}",) * 3
    return (
        f"at equal {budget.kind}",
        f"at its own {budget.kind}",
        f"at the {budget.kind} of each of these",
    )


def _no_use(scheme: str) -> Finding:
    return Finding(
        code=Code.RECIPE_NOT_FINITE,
        severity="error",
        what=f"With the recipe of scheme {scheme} the model's outputs on held-out rows are "
        "infinite or no number.",
        why="A quantizer's range does not hold what the layer sees, or the model overflows in its "
        "own type.",
        fix="Do not ship it. Look which groups alone do this (verification.parquet), exclude them "
        "or the format, or run with a wider dtype.",
    )


def _broken(rows: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Tell which formats have groups whose measured damage has no number."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["kind"] == "group" and row["kl"] is None:
            found.setdefault(row["format"], []).append(row["layer"])
    for format, layers in found.items():
        yield Finding(
            code=Code.DAMAGE_NOT_FINITE,
            severity="warning",
            what=f"{len(layers)} of the groups that were quantized alone under {format} make the "
            "model's outputs on held-out rows infinite or no number.",
            why="A quantizer's range does not hold what the layer sees, or the model overflows in "
            "its own type. No correlation and no sum of single damages counts them.",
            fix="Leave these layers out of the format (exclude, search_spaces), or run with a "
            "wider dtype.",
            layers=layers,
            formats=[format],
        )


def _findings(correlations: Sequence[Correlation]) -> Iterator[Finding]:
    for entry in correlations:
        if entry.subsystem is None and entry.spearman < LEAST_CORRELATION:
            yield _predicts_badly(entry)


def _predicts_badly(entry: Correlation) -> Finding:
    """Say how badly a score orders its groups, and what is known of the cause."""
    main, ceiling = entry.spearman_main, entry.ceiling
    what = (
        f"Under {entry.format} the order by score is the order by measured KL only with "
        f"ρ = {entry.spearman:.2f} ({entry.spearman_low:.2f} to {entry.spearman_high:.2f}) over "
        f"{entry.groups} groups"
    )
    if main is not None and main >= LEAST_CORRELATION:
        return Finding(
            code=Code.SCORE_PREDICTS_BADLY,
            severity="info",
            what=f"{what}, and with ρ = {main:.2f} over the {entry.main_groups} of them that do "
            f"{MAIN_DAMAGE * 100:g} % of the damage.",
            why="The order is lost among groups that hardly matter: all the others together do "
            "less than a thousandth of the damage.",
            fix="Nothing for the recipe; read no order into the small scores.",
            formats=[entry.format],
        )
    why = (
        "Few or unlike rows, damage below the noise of the arithmetic, or a score that does not "
        "fit this model. On trained language models 0.96 to 0.99 are usual."
    )
    fix = (
        "Score more rows (score_samples) of the kind that is deployed, verify on more (heldout), "
        "and do not rely on this format's ranking until then."
    )
    if ceiling is not None:
        assert entry.score_repeats is not None
        assert entry.damage_repeats is not None
        noise = (
            f"On as many other rows the scores would repeat their order with ρ = "
            f"{entry.score_repeats:.2f} and the damages with {entry.damage_repeats:.2f}, so that a "
            f"perfect score would show {ceiling:.2f}"
        )
        if ceiling < LEAST_CORRELATION:
            more = (
                "Score more rows (score_samples)"
                if entry.score_repeats < entry.damage_repeats
                else "Verify on more rows (heldout of the dataset)"
            )
            why = f"{noise}: too few rows to tell."
            fix = f"{more}, and do not rely on this format's ranking until then."
        else:
            why = (
                f"{noise}: it is not for want of rows. The score does not fit this model, or was "
                "taken on rows of another kind."
            )
            fix = (
                "Do not rely on this format's ranking. Score rows of the kind that is deployed, "
                "and compare with method: kl_div where the task has it."
            )
    return Finding(
        code=Code.SCORE_PREDICTS_BADLY,
        severity="warning",
        what=f"{what}.",
        why=why,
        fix=fix,
        formats=[entry.format],
    )


def _unmeasured(missing: Sequence[str]) -> Iterator[Finding]:
    if missing:
        yield Finding(
            code=Code.NOT_VERIFIED,
            severity="warning",
            what=f"{len(missing)} of what the config asks to verify is not measured, such as "
            f"{missing[0]}.",
            why="The results are frozen (frozen: true), so nothing is measured.",
            fix="Run without frozen to measure it.",
        )


def _otherwise() -> Iterator[Finding]:
    yield Finding(
        code=Code.VERIFIED_WITH_OTHER_SETTINGS,
        severity="warning",
        what="The measured damage is that of another model, other rows or another sampling than "
        "the config asks for.",
        why="The results are frozen (frozen: true), so nothing is measured again.",
        fix="Run without frozen to measure it, or take the edit back.",
    )


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
