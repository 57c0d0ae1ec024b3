"""Tidy Parquet tables of manifests: one scheme, all schemes, all runs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from layersense.errors import LayersenseError
from layersense.files import atomic_path, canonical_json
from layersense.manifests.about import ABOUT_KEY, describe, versions
from layersense.manifests.read import NormalGroup, NormalManifest, read_manifest
from layersense.manifests.schema import Manifest
from layersense.manifests.stability import TOP
from layersense.quantization.formats import NONE

TABLE_VERSION = 6
ROW_GROUP = 1 << 16
"""Rows from which on a row group of ``sensitivity.parquet`` is written."""
BYTES_PER_COST = 2
"""ModelOpt's cost is elements × bits / 16, that is, units of two bytes."""

_NAME = pa.dictionary(pa.int32(), pa.string())

UNITS = {
    "block": "index of the block in its subsystem",
    "format_bits": "bits per weight, scales included",
    "n_weights": "elements",
    "score": "per supervised token (per sample where there are none), as measured",
    "score_se": "standard error of score, from the batches",
    "score_solver": "score, made monotone over the scheme's formats by compression",
    "score_share": "of the total in this run, scheme and format, 0 to 1",
    "rank": "1 = most sensitive in this run, scheme and format",
    "top_probability": f"probability, by resampling the batches, that the group is among the {TOP} "
    "most sensitive of its run and scheme (a quarter of the groups, if that is fewer)",
    "cost": "elements × bits / 16, that is, units of 2 bytes",
    "cost_none": "cost of the unquantized group",
    "score_per_mb_saved": "score for each 10^6 bytes saved against NONE",
    "imported": "generation of an imported manifest; null for what was measured here",
    "reason": "why the group stays unquantized whatever it costs; null where the solver decided",
}

LAYERS = pa.schema(
    [
        *((name, _NAME) for name in ("run", "model", "dataset", "modality", "method", "task")),
        *((name, _NAME) for name in ("scheme", "layer", "handle")),
        ("module_names", pa.list_(pa.string())),
        ("subsystem", _NAME),
        ("block", pa.int32()),
        *((name, _NAME) for name in ("kind", "reached", "format", "weight_format", "act_format")),
        ("format_bits", pa.float64()),
        ("n_weights", pa.int64()),
        *((name, pa.float64()) for name in ("score", "score_se", "score_solver", "score_share")),
        ("rank", pa.int32()),
        ("n_batches", pa.int32()),
        ("top_probability", pa.float64()),
        *((name, pa.float64()) for name in ("cost", "cost_none", "score_per_mb_saved")),
        ("selected", pa.bool_()),
        ("reason", _NAME),
        ("imported", _NAME),
    ],
    metadata={
        "layersense.table": "layers",
        "layersense.schema_version": str(TABLE_VERSION),
        "layersense.units": canonical_json(UNITS),
    },
)
"""One row for each run, scheme, layer group and format; ``NONE`` included."""

RUN_UNITS = {
    "effective_bits_asked": "average bits per searched weight",
    "effective_bits": "average bits per searched weight, of the choice",
    "bytes_before": "bytes of the searched weights, unquantized at 16 bits",
    "bytes_after": "bytes of the searched weights under the choice, scales included",
    "predicted_damage": "total score of the choice",
    "predicted_damage_se": "standard error of predicted_damage, from the batches",
    "gap": "share of predicted_damage by which the choice could be improved at most",
    "target": "what the recipe is to run on",
    "target_damage": "predicted damage that the target adds at the same budget; 0 without one",
    "searched_weights": "elements",
    "imported": "generation of an imported manifest; null for what was measured here",
    "coverage_mode": "how much may be quantized, in the manifest's own words",
    "top_share": "share of the most sensitive group in the importance of all, 0 to 1",
    "subsystem_shares": "share of each of `subsystems` in the importance of all, 0 to 1; "
    "null without a score",
}

RUNS = pa.schema(
    [
        *((name, _NAME) for name in ("run", "scheme", "model", "model_id", "dataset")),
        *((name, _NAME) for name in ("modality", "method", "engine", "task")),
        ("quant_formats", pa.list_(pa.string())),
        *((name, pa.float64()) for name in ("effective_bits_asked", "effective_bits")),
        *((name, pa.float64()) for name in ("bytes_before", "bytes_after")),
        *((name, pa.float64()) for name in ("predicted_damage", "predicted_damage_se", "gap")),
        *((name, pa.int64()) for name in ("groups", "groups_quantized", "groups_unreached")),
        *((name, pa.int64()) for name in ("searched_weights", "n_parameters", "score_samples")),
        *((name, pa.int32()) for name in ("errors", "warnings", "infos")),
        ("top_layer", _NAME),
        ("top_share", pa.float64()),
        ("subsystems", pa.list_(pa.string())),
        ("subsystem_shares", pa.list_(pa.float64())),
        ("versions", _NAME),
        ("imported", _NAME),
        ("coverage_mode", _NAME),
        ("target", _NAME),
        ("target_damage", pa.float64()),
    ],
    metadata={
        "layersense.table": "runs",
        "layersense.schema_version": str(TABLE_VERSION),
        "layersense.units": canonical_json(RUN_UNITS),
    },
)
"""One row for each run and scheme."""


def layers_table(manifest: NormalManifest) -> pa.Table:
    """Return the tidy table of one manifest: columns :data:`LAYERS`, groups in model order.

    What the manifest says beside its groups stands in the table's metadata: see
    :mod:`layersense.manifests.about`.
    """
    shares, ranks = _shares_and_ranks(manifest)
    rows = []
    for group in manifest.groups:
        cost_none = _cost_none(group)
        for index, name in enumerate(group.formats):
            run = manifest.formats.get(name)
            score, cost = group.scores[index], group.costs[index]
            saved = (
                (cost_none - cost) * BYTES_PER_COST / 1e6
                if cost_none is not None and cost is not None
                else 0.0
            )
            rows.append(
                {
                    "run": manifest.run,
                    "model": manifest.model,
                    "dataset": manifest.dataset,
                    "modality": manifest.modality,
                    "method": manifest.method,
                    "task": manifest.task,
                    "scheme": manifest.scheme,
                    "layer": group.layer,
                    "handle": group.handle,
                    "module_names": group.module_names,
                    "subsystem": group.subsystem,
                    "block": group.block,
                    "kind": group.kind,
                    "reached": group.reached,
                    "format": name,
                    "weight_format": run.weight_format if run else NONE if name == NONE else None,
                    "act_format": run.act_format if run else NONE if name == NONE else None,
                    "format_bits": group.bits[index],
                    "n_weights": group.n_weights,
                    "score": score,
                    "score_se": group.scores_se[index],
                    "score_solver": group.scores_solver[index],
                    "score_share": shares.get((group.handle, name)),
                    "rank": ranks.get((group.handle, name)),
                    "n_batches": group.n_batches[index],
                    "top_probability": group.top_probability,
                    "cost": cost,
                    "cost_none": cost_none,
                    "score_per_mb_saved": score / saved
                    if score is not None and saved > 0
                    else None,
                    "selected": None if group.selected is None else group.selected == name,
                    "reason": group.reason,
                    "imported": manifest.generation if manifest.imported else None,
                }
            )
    table = _table(rows, LAYERS)
    if manifest.own is None:
        return table
    about = msgspec.json.encode(describe(manifest.own))
    return table.replace_schema_metadata({**table.schema.metadata, ABOUT_KEY: about})


def runs_table(manifests: Iterable[NormalManifest]) -> pa.Table:
    """Return the table with one row for each manifest: columns :data:`RUNS`, in that order."""
    return _table([_run_row(manifest) for manifest in manifests], RUNS)


def write_layers(manifest: str | Path, out: str | Path) -> None:
    """Write the table of one manifest.

    Raises:
        LayersenseError: the manifest cannot be read.
    """
    table = layers_table(read_manifest(manifest))
    with atomic_path(out) as temporary, _writer(temporary, table.schema) as writer:
        writer.write_table(table)


def table_beside(manifest: str | Path) -> Path:
    """Return the table of layers that lies beside a manifest, ours or an imported one."""
    path = Path(manifest)
    own = path.name == "manifest.json"
    return path.with_name("layers.parquet") if own else path.with_suffix(".parquet")


def write_sensitivity(tables: Sequence[str | Path], out: str | Path) -> None:
    """Concatenate ``layers.parquet`` files, never all in memory.

    Tables are gathered to row groups of :data:`ROW_GROUP` rows: one for each table would make the
    file's footer, which a writer holds in memory, grow with the number of tables.

    Raises:
        LayersenseError: a table cannot be read or has other columns.
    """
    held: list[pa.Table] = []
    with atomic_path(out) as temporary, _writer(temporary, LAYERS) as writer:
        for table in _layers_of(tables):
            held.append(table)
            if sum(map(len, held)) >= ROW_GROUP:
                _write_group(writer, held)
        _write_group(writer, held)


def _layers_of(tables: Sequence[str | Path]) -> Iterator[pa.Table]:
    for path in tables:
        with readable(path), pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(LAYERS):
                raise LayersenseError(
                    f"{path}: has other columns than this layersense writes; delete it and "
                    "run `snakemake` again"
                )
            for index in range(file.num_row_groups):
                yield file.read_row_group(index).cast(LAYERS)


def _write_group(writer: pq.ParquetWriter, held: list[pa.Table]) -> None:
    """Write tables as one row group, and forget them."""
    if held:
        table = pa.concat_tables(held).unify_dictionaries().combine_chunks()
        writer.write_table(table, row_group_size=max(1, len(table)))
    held.clear()


def write_runs(manifests: Sequence[str | Path], out: str | Path) -> None:
    """Write the table with one row for each manifest.

    Raises:
        LayersenseError: a manifest cannot be read.
    """
    table = runs_table(read_manifest(path) for path in manifests)
    with atomic_path(out) as temporary, _writer(temporary, RUNS) as writer:
        writer.write_table(table)


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Say in one sentence what a damaged table raises while it is read.

    Raises:
        LayersenseError: it cannot be read.
    """
    try:
        yield
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise LayersenseError(
            f"{path}: cannot be read as a table of layersense ({' '.join(str(error).split())}); "
            "delete it and run `snakemake` again if the workflow wrote it, else name the right file"
        ) from error


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema)


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=True)


def _target_damage(manifest: Manifest) -> float:
    """Return the predicted damage that a scheme's target adds."""
    state = manifest.autoquant_state
    return state.minimized - state.deployment.minimized_without if state.deployment else 0.0


def _cost_none(group: NormalGroup) -> float | None:
    return group.costs[group.formats.index(NONE)] if NONE in group.formats else None


def _shares_and_ranks(
    manifest: NormalManifest,
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], int]]:
    by_format: dict[str, list[tuple[str, float]]] = {}
    for group in manifest.groups:
        if group.reached not in (None, "scored"):
            continue
        for name, score in zip(group.formats, group.scores, strict=True):
            if name != NONE and score is not None:
                by_format.setdefault(name, []).append((group.handle, score))
    shares: dict[tuple[str, str], float] = {}
    ranks: dict[tuple[str, str], int] = {}
    for name, entries in by_format.items():
        total = sum(score for _, score in entries)
        ordered = sorted(entries, key=lambda entry: -entry[1])  # equal ones stay in model order
        for rank, (handle, score) in enumerate(ordered, start=1):
            ranks[handle, name] = rank
            if total > 0:
                shares[handle, name] = score / total
    return shares, ranks


def _run_row(manifest: NormalManifest) -> dict[str, Any]:
    own = manifest.own
    importance = {
        group.handle: value for group in manifest.groups if (value := group.importance) is not None
    }
    total = sum(importance.values())
    top = max(manifest.groups, key=lambda group: importance.get(group.handle, -1.0), default=None)
    subsystems: dict[str, float | None] = dict.fromkeys(g.subsystem for g in manifest.groups)
    for group in manifest.groups:
        if group.handle in importance:
            so_far = subsystems[group.subsystem] or 0.0
            subsystems[group.subsystem] = so_far + importance[group.handle]
    before = [_cost_none(group) for group in manifest.groups]
    known = [cost for cost in before if cost is not None]
    bytes_before = BYTES_PER_COST * sum(known) if len(known) == len(before) else None
    selected = [group.selected for group in manifest.groups]
    severities = [finding.severity for finding in own.findings] if own else None
    return {
        "run": manifest.run,
        "scheme": manifest.scheme,
        "model": manifest.model,
        "model_id": own.model.id if own else None,
        "dataset": manifest.dataset,
        "modality": manifest.modality,
        "method": manifest.method,
        "engine": next((run.engine for run in manifest.formats.values()), None),
        "task": manifest.task,
        "quant_formats": manifest.quant_formats,
        "effective_bits_asked": manifest.effective_bits_asked,
        "effective_bits": manifest.effective_bits,
        "bytes_before": bytes_before,
        "bytes_after": BYTES_PER_COST * own.autoquant_state.cost if own else None,
        "predicted_damage": manifest.score,
        "predicted_damage_se": own.autoquant_state.score_se if own else None,
        "gap": own.autoquant_state.gap if own else None,
        "groups": len(manifest.groups),
        "groups_quantized": sum(name != NONE for name in selected) if own else None,
        "groups_unreached": (
            sum(group.reached != "scored" for group in manifest.groups) if own else None
        ),
        "searched_weights": sum(group.n_weights or 0 for group in manifest.groups) if own else None,
        "n_parameters": own.model.n_parameters if own else None,
        "score_samples": own.dataset.score_samples if own else None,
        "errors": severities.count("error") if severities is not None else None,
        "warnings": severities.count("warning") if severities is not None else None,
        "infos": severities.count("info") if severities is not None else None,
        "top_layer": top.layer if top and top.handle in importance else None,
        "top_share": importance[top.handle] / total if top and total > 0 else None,
        "subsystems": list(subsystems),
        "subsystem_shares": [
            value / total if value is not None and total > 0 else None
            for value in subsystems.values()
        ],
        "versions": versions(own) if own else None,
        "imported": manifest.generation if manifest.imported else None,
        "coverage_mode": manifest.coverage_mode,
        "target": own.scheme.target if own else None,
        "target_damage": _target_damage(own) if own else None,
    }
