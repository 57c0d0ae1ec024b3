"""The Parquet tables: columns, numbers by hand, readers, equal bytes."""

import datetime
import json

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import score_files as sf

from layersense import config
from layersense.errors import LayersenseError
from layersense.manifests.about import ABOUT_KEY, About
from layersense.manifests.read import read_manifest
from layersense.manifests.schema import encode_manifest
from layersense.manifests.tables import (
    LAYERS,
    layers_table,
    write_layers,
    write_runs,
    write_sensitivity,
)
from layersense.recipes.decide import build_manifest

FP8, INT8, INT4 = sf.FORMATS

COLUMNS = [
    "run",
    "model",
    "dataset",
    "modality",
    "method",
    "task",
    "scheme",
    "layer",
    "handle",
    "module_names",
    "subsystem",
    "block",
    "kind",
    "reached",
    "format",
    "weight_format",
    "act_format",
    "format_bits",
    "n_weights",
    "score",
    "score_se",
    "score_solver",
    "score_share",
    "rank",
    "n_batches",
    "top_probability",
    "cost",
    "cost_none",
    "score_per_mb_saved",
    "selected",
    "reason",
    "imported",
]


def write(folder, scores=None, run="demo", scheme="mix", **keys):
    keys = {"quant_formats": [FP8, INT4], "effective_bits": 6, **keys}
    manifest = build_manifest(scores or sf.make_scores(), run, scheme, config.Scheme(**keys), {})
    path = folder / run / scheme / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(encode_manifest(manifest))
    return path


@pytest.fixture
def table(tmp_path):
    write_layers(write(tmp_path), tmp_path / "layers.parquet")
    return tmp_path / "layers.parquet"


def test_columns_are_the_contracts(table):
    assert pq.read_schema(table).names == COLUMNS
    frame = pd.read_parquet(table)
    assert list(frame.columns) == COLUMNS
    assert len(frame) == len(sf.MODULES) * 3
    assert (frame.format == "NONE").sum() == len(sf.MODULES)
    assert frame.groupby("layer", observed=True).selected.sum().eq(1).all()


def test_numbers_by_hand(table):
    frame = pd.read_parquet(table)
    row = frame[(frame.layer == "lm_head") & (frame.format == FP8)].iloc[0]
    score = 2.0 * 1.005
    total = sum(sf.DAMAGE.values()) * 1.005
    assert row.score == pytest.approx(score)
    assert row.score_share == pytest.approx(score / total)
    assert (row["rank"], row.n_batches, row.n_weights) == (1, 4, 131072)
    assert row.top_probability == 1.0
    assert (row.cost, row.cost_none) == (65536, 131072)
    # 8 of 16 bits of 131,072 weights: one byte each.
    assert row.score_per_mb_saved == pytest.approx(score / 0.131072)
    assert (row.subsystem, row.weight_format, row.act_format) == ("head", "FP8", "FP8")
    assert row.handle == "lm_head.quant_recipe"
    none = frame[(frame.layer == "lm_head") & (frame.format == "NONE")].iloc[0]
    assert (none.score, none.format_bits) == (0, 16)
    assert none[["rank", "score_share", "score_per_mb_saved"]].isna().all()
    ranks = frame[frame.format == INT4].set_index("layer")["rank"].to_dict()
    order = sorted(sf.DAMAGE, key=lambda name: -sf.DAMAGE[name])
    assert ranks == {name: index for index, name in enumerate(order, start=1)}
    q_proj = frame[frame.layer.str.endswith("q_proj")].iloc[0]
    assert list(q_proj.module_names) == sf.MODULES[q_proj.layer][0]
    assert q_proj.block == 0


def test_unreached_and_unknown_scores_have_no_rank(tmp_path):
    scores = sf.make_scores()
    sf.set_reached(scores, "model.visual", "not_called")
    scores.formats[FP8].groups["lm_head.quant_recipe"].batch_scores[0] = None
    frame = layers_table(read_manifest(write(tmp_path, scores, effective_bits=12))).to_pandas()
    quantized = frame[frame.format == FP8].set_index("layer")
    vision = quantized.index.str.contains("visual")
    assert quantized[vision]["rank"].isna().all()
    assert (quantized[vision].score == 0).all()
    assert np.isnan(quantized.loc["lm_head", "score"])
    assert quantized["rank"].dropna().tolist() == [3, 2, 1]
    assert quantized.score_share.sum() == pytest.approx(1)


def test_metadata_compression_and_dictionaries(table):
    schema = pq.read_schema(table)
    assert schema.metadata[b"layersense.schema_version"] == b"6"
    assert set(json.loads(schema.metadata[b"layersense.units"])) <= set(COLUMNS)
    for field in schema:
        assert not pa.types.is_string(field.type), f"{field.name} is not dictionary-encoded"
    group = pq.ParquetFile(table).metadata.row_group(0)
    assert {group.column(index).compression for index in range(group.num_columns)} == {"ZSTD"}


def test_the_table_says_what_reports_need_beside_its_rows(tmp_path):
    scores = sf.make_scores()
    sf.set_reached(scores, "model.visual", "not_called")
    manifest = write(tmp_path, scores, quant_formats=[FP8], effective_bits=12)
    write_layers(manifest, tmp_path / "layers.parquet")
    schema = pq.read_schema(tmp_path / "layers.parquet")
    about = msgspec.json.decode(schema.metadata[ABOUT_KEY], type=About)
    assert [finding.code for finding in about.findings] == ["subsystem-at-zero"]
    assert about.measurements[FP8].tokens == sum(sf.TOKENS)
    assert "host" not in about.environment[FP8]
    frame = pd.read_parquet(tmp_path / "layers.parquet")
    reasons = frame[frame.reason.notna()].set_index("layer").reason
    assert set(reasons.index) == {name for name in sf.MODULES if "visual" in name}
    assert set(reasons) == {"the calibration data never ran it"}


def test_error_of_the_damage_is_that_of_the_sum_over_batches(tmp_path):
    """All groups swing alike between the batches, so their errors add up, not their squares."""
    manifest = write(tmp_path, quant_formats=[FP8], effective_bits=8)
    write_runs([manifest], tmp_path / "runs.parquet")
    (row,) = pq.read_table(tmp_path / "runs.parquet").to_pylist()
    total = sum(sf.DAMAGE.values())
    tokens, spread = np.array(sf.TOKENS), np.array(sf.SPREAD)
    ratio = (tokens * spread).sum() / tokens.sum()
    squares = ((tokens * (spread - ratio)) ** 2).sum()
    expected = total * np.sqrt(4 / 3 * squares) / tokens.sum()
    assert row["predicted_damage"] == pytest.approx(total * ratio)
    assert row["predicted_damage_se"] == pytest.approx(expected)
    frame = layers_table(read_manifest(manifest)).to_pandas()
    chosen = frame[frame.selected & (frame.format != "NONE")]
    assert row["predicted_damage_se"] == pytest.approx(chosen.score_se.sum())
    assert row["versions"].startswith("layersense 0.1.0, modelopt 0.47.0, torch 2.14.1")


def test_where_nothing_is_quantized_there_is_no_damage(tmp_path):
    manifest = write(tmp_path, quant_formats=[FP8], effective_bits=16, exclude=["*"])
    write_runs([manifest], tmp_path / "runs.parquet")
    (row,) = pq.read_table(tmp_path / "runs.parquet").to_pylist()
    assert (row["predicted_damage"], row["predicted_damage_se"]) == (0, 0)


def test_under_objective_max_the_error_is_that_of_the_worst_group(tmp_path):
    manifest = write(tmp_path, quant_formats=[FP8], effective_bits=8, objective="max")
    write_runs([manifest], tmp_path / "runs.parquet")
    (row,) = pq.read_table(tmp_path / "runs.parquet").to_pylist()
    frame = layers_table(read_manifest(manifest)).to_pandas()
    worst = frame[(frame.layer == "lm_head") & (frame.format == FP8)].iloc[0]
    assert row["predicted_damage_se"] == pytest.approx(worst.score_se)


def test_equal_manifests_give_equal_bytes(tmp_path):
    path = write(tmp_path)
    for name in ("one", "two"):
        write_layers(path, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_other_readers_take_the_table_as_it_is(table):
    polars = pytest.importorskip("polars", reason="polars is no dependency")
    assert polars.read_parquet(table).columns == COLUMNS
    duckdb = pytest.importorskip("duckdb", reason="duckdb is no dependency")
    count = duckdb.sql(f"select count(*) from '{table}' where format = 'NONE'").fetchall()
    assert count == [(len(sf.MODULES),)]


def test_sensitivity_is_the_concatenation(tmp_path, shared_data):
    manifests = [
        write(tmp_path, scheme="a"),
        write(tmp_path, scheme="b", quant_formats=[FP8], effective_bits=9),
        *sorted((shared_data / "manifests").glob("*.json")),
    ]
    tables = []
    for index, manifest in enumerate(manifests):
        tables.append(tmp_path / f"{index}.parquet")
        write_layers(manifest, tables[-1])
    write_sensitivity(tables, tmp_path / "sensitivity.parquet")
    whole = pq.read_table(tmp_path / "sensitivity.parquet")
    assert whole.schema.equals(LAYERS, check_metadata=False)
    # Gathered, so that the footer does not grow with the number of tables.
    assert pq.ParquetFile(tmp_path / "sensitivity.parquet").num_row_groups == 1
    parts = [row for path in tables for row in pq.read_table(path).to_pylist()]
    assert whole.to_pylist() == parts
    assert len(parts) == 21 + 14 + 550 + (2 * 145 + 105)


def test_sensitivity_of_nothing_is_an_empty_table(tmp_path):
    write_sensitivity([], tmp_path / "none.parquet")
    assert pq.read_table(tmp_path / "none.parquet").schema.names == COLUMNS


def test_a_table_of_another_kind_is_named(tmp_path, table):
    other = tmp_path / "other.parquet"
    pd.DataFrame({"a": [datetime.date(2026, 1, 1)]}).to_parquet(other)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1")
    for path in (other, broken, tmp_path / "missing.parquet"):
        with pytest.raises(LayersenseError, match=str(path)):
            write_sensitivity([table, path], tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_runs_by_hand(tmp_path, shared_data):
    scores = sf.make_scores()
    sf.set_reached(scores, "model.visual", "no_gradient")
    scores.model.trained_on_calibration = True
    manifests = [
        write(tmp_path, scores, quant_formats=[FP8], effective_bits=12),
        shared_data / "manifests" / "qwen3_vl_4b.wfp8_aint8_autoquant_lm.json",
    ]
    write_runs(manifests, tmp_path / "runs.parquet")
    ours, theirs = pq.read_table(tmp_path / "runs.parquet").to_pylist()
    total = sum(weights for _, weights in sf.MODULES.values())
    quantized = ours["bytes_before"] - ours["bytes_after"]
    assert ours["bytes_before"] == 2 * total
    assert ours["effective_bits"] == pytest.approx(16 - 8 * quantized / total)
    assert (ours["groups"], ours["groups_unreached"]) == (7, 3)
    assert (ours["errors"], ours["warnings"], ours["infos"]) == (0, 1, 1)
    assert ours["top_layer"] == "lm_head"
    assert ours["top_share"] == pytest.approx(2 / 3.3)
    assert ours["subsystems"] == ["vision", "language", "head"]
    assert ours["subsystem_shares"] == [None, pytest.approx(1.3 / 3.3), pytest.approx(2 / 3.3)]
    assert (theirs["run"], theirs["groups"], theirs["gap"]) == ("qwen3_vl_4b", 250, None)
    assert theirs["predicted_damage"] == pytest.approx(420.57508313265396)
    assert (theirs["bytes_after"], theirs["warnings"]) == (None, None)
