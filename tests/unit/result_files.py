"""Results on disk from synthetic score files: manifest, tables, pages, without a model."""

from collections.abc import Sequence
from pathlib import Path

import score_files as sf

from layersense import config
from layersense.manifests.schema import encode_manifest
from layersense.manifests.tables import write_layers, write_runs, write_sensitivity
from layersense.recipes.decide import build_manifest
from layersense.recipes.frontier import write_frontier
from layersense.scoring.scores import Scores

FP8, INT8, INT4 = sf.FORMATS
HOSTILE = "x|y`z`<script>alert(1)</script>'\"&amp;</style>\n# h\x1b[31m\u202e[l](javascript:x)=1"
"""A name that every kind of output could trip over."""


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


def large_scores(groups: int, formats: int, blocks: int = 100) -> Scores:
    """Scores of a language model of ``groups`` layer groups under ``formats`` formats."""
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
    names = {f"FORMAT_{index:02d}_ALL_LAYERS_CFG": 4.0 + index / 2 for index in range(formats)}
    known, factors = dict(sf.FORMATS), dict(sf.FACTORS)
    sf.FORMATS.clear()
    sf.FACTORS.clear()
    try:
        sf.FORMATS.update({name: (bits, "W", "A") for name, bits in names.items()})
        sf.FACTORS.update({name: 2.0 ** (8 - bits) for name, bits in names.items()})
        return sf.make_scores(modules, damage, list(names))
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
