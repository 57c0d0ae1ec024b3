"""Results on disk from synthetic score files: manifest, tables, pages, without a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import score_files as sf

from layersense import config
from layersense.manifests.read import read_own_manifest
from layersense.manifests.schema import encode_manifest
from layersense.manifests.tables import write_layers, write_runs, write_sensitivity
from layersense.recipes.decide import build_manifest
from layersense.recipes.frontier import write_frontier
from layersense.scoring.scores import Scores
from layersense.verification.plan import make_plan
from layersense.verification.store import (
    METRICS_VERSION,
    Before,
    Damage,
    MeasuredRecipe,
    Single,
    TaskMetric,
    Verification,
)
from layersense.verification.table import verification_table

FP8, INT8, INT4 = sf.FORMATS
HOSTILE = "x|y`z`<script>alert(1)</script>'\"&amp;</style>\n# h\x1b[31m\u202e[l](javascript:x)=1"
"""A name that every kind of output could trip over."""

VERIFY = config.Verify(points=3, random=4)
WEIGHTS = (1.1, 0.9, 1.0, 1.025)
"""How the damage of each of four held-out units differs from their mean."""


CACHE_DAMAGE = 0.5
"""KL that a quantized key-value cache adds."""


def token_accuracy(value, difference=0.0):
    return TaskMetric(
        name="token accuracy",
        unit="share",
        higher_is_better=True,
        value=value,
        low=value - 0.05,
        high=value + 0.04,
        difference=difference,
        difference_low=difference - 0.03,
        difference_high=difference + 0.02,
    )


def loss_in_words(value):
    """A metric of another kind: no share, less is better, no interval."""
    return TaskMetric(name="word errors", unit="words", higher_is_better=False, value=value)


def measured(manifests, options, scale=lambda handle, format: 1.0):
    """A verification in which every group does twice its score, and damages add up."""
    plan = make_plan(manifests, options)
    group = manifests[0].layer_sensitivity
    positions = [3, 5, 4, 8]

    def damage(per_position, **more):
        kl = [per_position * n * factor for n, factor in zip(positions, WEIGHTS, strict=True)]
        correct, loss = [1, 2, 2, 3], [12.0, 13.0]
        return Damage(digest="x", kl=kl, agree=positions, correct=correct, loss=loss, **more)

    def of(handle, format):
        if format == "NONE":
            return 0.0
        entry = group[handle]
        index = [label.split("(")[0] for label in entry.formats].index(format)
        return 2 * entry.scores[index] * scale(handle, format)

    return Verification(
        run=manifests[0].run_name,
        heldout_samples=4,
        exact_reuse=True,
        before=Before(
            digest="c",
            positions=positions,
            correct=[1, 2, 3, 4],
            loss=[10.0, 10.0],
            tokens=[8, 12],
            metrics=[token_accuracy(0.5), loss_in_words(12.5)],
        ),
        singles={
            format: {handle: Single(damage=damage(of(handle, format))) for handle in handles}
            for format, handles in plan.singles.items()
        },
        recipes={
            planned.digest: MeasuredRecipe(
                recipe=planned.recipe,
                damage=damage(
                    sum(of(h, name) for h, name in planned.recipe.items())
                    + (CACHE_DAMAGE if planned.kv_cache != "none" else 0.0),
                    metrics=[token_accuracy(0.4, -0.1), loss_in_words(14.25)],
                    metrics_version=METRICS_VERSION,
                ),
            )
            for planned in plan.recipes
        },
        seconds={},
        peak_memory_bytes=0,
        environment={},
    )


def write_verification(place: Path, options: config.Verify = VERIFY, **keys: Any) -> Path:
    """Write the ``verification.parquet`` of a run from the one result in ``place``."""
    manifest = read_own_manifest(place / "manifest.json")
    out = place.parent / "verification.parquet"
    table = verification_table([manifest], measured([manifest], options, **keys), options)
    pq.write_table(table, out)
    return out


def write_result(
    folder: Path,
    scores: Scores | None = None,
    run: str = "demo",
    scheme: str = "mix",
    **keys: object,
) -> Path:
    """Write manifest and tables of one scheme under ``folder``; return its folder."""
    keys = {"quant_formats": [FP8, INT4], "effective_bits": 6, **keys}
    manifest = build_manifest(
        scores or sf.make_scores(), run, scheme, config.Scheme.model_validate(keys), {}
    )
    place = folder / run / scheme
    place.mkdir(parents=True)
    (place / "manifest.json").write_bytes(encode_manifest(manifest))
    write_layers(place / "manifest.json", place / "layers.parquet")
    write_frontier(place / "manifest.json", place / "frontier.parquet")
    return place


def write_tables(folder: Path, places: Sequence[Path]) -> None:
    """Write the tables of all results into ``folder``."""
    write_sensitivity(
        [place / "layers.parquet" for place in places], folder / "sensitivity.parquet"
    )
    write_runs([place / "manifest.json" for place in places], folder / "runs.parquet")


def large_scores(
    groups: int, formats: int | dict[str, tuple[float, str, str]], blocks: int = 100
) -> Scores:
    """Scores of a language model of ``groups`` layer groups under ``formats`` formats.

    These are a number, or their names, each with its bits and its types as in ``sf.FORMATS``.
    """
    kinds = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    per_block = max(1, groups // blocks)
    modules, damage = {}, {}
    for index in range(groups):
        block, place = divmod(index, per_block)
        expert, kind = divmod(place, len(kinds))
        part = f"experts.{expert}." if expert else ""
        name = f"model.language_model.layers.{block}.{part}{kinds[kind]}"
        modules[name] = ([name], 4096 * (1 + kind))
        damage[name] = 10.0 ** (-6 + 4 * ((index * 7919) % 1000) / 1000) / (1 + block)
    if isinstance(formats, int):
        formats = {
            f"FORMAT_{index:02d}_ALL_LAYERS_CFG": (4.0 + index / 2, "W", "A")
            for index in range(formats)
        }
    known, factors = dict(sf.FORMATS), dict(sf.FACTORS)
    sf.FORMATS.clear()
    sf.FACTORS.clear()
    try:
        sf.FORMATS.update(formats)
        sf.FACTORS.update({name: 2.0 ** (8 - bits) for name, (bits, _, _) in formats.items()})
        return sf.make_scores(modules, damage, list(formats))
    finally:
        for kept, original in ((sf.FORMATS, known), (sf.FACTORS, factors)):
            kept.clear()
            kept.update(original)


def hostile_scores() -> Scores:
    """Scores with hostile names wherever a name can stand, and one of 300 characters."""
    name, long = f"model.layers.0.{HOSTILE}", "model.layers.1." + "x" * 285
    scores = sf.make_scores(
        {**sf.MODULES, name: ([name], 1024), long: ([long], 1024)},
        {**sf.DAMAGE, name: 9.0, long: 8.0},
        formats=(FP8, INT4),
    )
    for group in scores.groups.values():
        if group.module_names == [name]:
            group.subsystem = group.kind = HOSTILE
    scores.model.architecture = scores.dataset.source = scores.model.id = HOSTILE
    scores.model.name = HOSTILE
    for entry in scores.formats.values():
        entry.environment["gpu"] = HOSTILE
        entry.warnings.append(HOSTILE)
    return scores
