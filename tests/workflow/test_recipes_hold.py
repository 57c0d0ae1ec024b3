"""Whether recipes hold on rows that nobody scored: a trained model, through the workflow."""

import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from conftest import make_project
from layersense.verification.table import read_summary

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

FORMATS = [
    "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG",
    "FP8_ALL_LAYERS_CFG",
    "INT8_ALL_LAYERS_CFG",
]
BITS = {"bits4_5": 4.5, "bits6": 6.0, "bits7": 7.0}
LEAST_CORRELATION, LEAST_OF_MAIN = 0.8, 0.88
"""Over all of the demo's groups it is 0.89 for INT4, 0.92 for FP8 and 0.96 for INT8; over those
that do 99.9 % of the damage 0.96, 0.97 and 0.93."""


def test_the_recipes_of_the_trained_demo_beat_the_alternatives(
    repository: Path, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "project", repository)

    def change(config: dict[str, Any]) -> None:
        run = {**config["runs"]["demo.image-text"], "schemes": list(BITS)}
        config["runs"] = {"demo": run}
        config["schemes"] = {
            name: {"quant_formats": FORMATS, "effective_bits": bits} for name, bits in BITS.items()
        }

    project.edit(change)
    project.run("verification_tables")
    check(project.results / "demo/verification.parquet")


def cider(row: dict[str, Any]) -> dict[str, Any]:
    (found,) = (metric for metric in row["metrics"] if metric["name"] == "CIDEr-D")
    return found


def check(file: Path) -> None:
    """Compare the measured recipes of each scheme."""
    before, *rest = pq.read_table(file).to_pylist()
    rows = [row for row in rest if row["kind"] == "recipe"]
    # The trained model writes captions that people's are like, and so do its recipes.
    assert cider(before)["value"] > 1
    assert all(
        cider(row)["value"] > 1 and cider(row)["low"] <= cider(row)["value"] <= cider(row)["high"]
        for row in rows
        if row["role"] in ("scheme", "solved")
    )
    assert len({row["scheme"] for row in rows}) == len(BITS)
    for scheme, bits in BITS.items():
        own = [row for row in rows if row["scheme"] == scheme]
        (chosen,) = (row for row in own if row["role"] == "scheme")
        random = [row["kl"] for row in own if row["role"] == "random"]
        uniform = [row for row in own if row["role"] == "uniform" and row["effective_bits"] <= bits]
        assert chosen["effective_bits"] <= bits
        assert len(random) == 20
        assert chosen["kl"] < statistics.median(random)
        assert uniform
        assert all(chosen["kl"] < row["kl"] for row in uniform)
        (outer,) = (row for row in own if row["role"] == "outer_first")
        assert outer["effective_bits"] <= chosen["effective_bits"] * (1 + 1e-9)
        assert chosen["kl"] < outer["kl"]
        # First and last block kept takes more bits than these, the head alone being a sixth of
        # the weights; within its bits, the solver's choice is better.
        rivals = {row["rival_of"]: row for row in own if row["role"] == "rival"}
        edges = [row for row in own if row["role"] == "edges_kept"]
        assert len(edges) == len(FORMATS)
        for row in edges:
            assert rivals[row["label"]]["effective_bits"] <= row["effective_bits"] * (1 + 1e-9)
            assert rivals[row["label"]]["kl"] < row["kl"]
        if bits >= 6:  # and so is the recipe itself, with a third of the bits less
            (edge,) = (row for row in edges if FORMATS[0] in row["label"])
            assert chosen["kl"] < edge["kl"]
    overall = [entry for entry in read_summary(file).correlations if entry.subsystem is None]
    assert {entry.format for entry in overall} == set(FORMATS)
    for entry in overall:
        assert entry.spearman >= LEAST_CORRELATION, entry
        assert entry.spearman_main is not None
        assert entry.spearman_main >= LEAST_OF_MAIN, entry
        assert entry.ceiling is not None
        assert entry.ceiling > 0.95, entry  # the rows are not what is missing
