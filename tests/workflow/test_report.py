"""The page that `snakemake --report` makes."""

import getpass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from conftest import Project

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


def test_the_report_is_complete(study: Project) -> None:
    study.run("--report", "study.html")
    page = (study.root / "study.html").read_text(encoding="utf-8")
    pages = ("interactive report", "Markdown report", "sensitivity along depth", "heat map")
    for text in (*pages, "frontier", "all runs, compared", "summary, Markdown"):
        assert text in page, text
    for table in ("layer groups", "recipes", "all layer groups", "all runs"):
        assert f"table of {table}, Parquet" in page, table
    for name in ("vlm.photos", "llm.words", "mixed", "fp8", "MY_INT8"):
        assert name in page, name
    # Captions, the config, and the graph of the rules.
    for text in ("with its 95 % interval", "The whole configuration", "calibration_samples"):
        assert text in page, text
    for rule in ("solve", "frontier", "page", "index"):
        assert f'"{rule}"' in page, rule


def test_no_result_says_where_it_was_made_or_by_whom(done_study: Project) -> None:
    """Paths stand as the config has them, here relative ones; logs and records of this machine
    (what was fetched, where a checkpoint lies) are not for others."""
    local = {"logs", "benchmarks", "models", "calibration"}
    words = {str(done_study.root), str(Path.home()) + "/", f"/{getpass.getuser()}/", "pytest-of"}
    seen = 0
    for file in done_study.results.rglob("*"):
        parts = file.relative_to(done_study.results).parts
        if not file.is_file() or parts[0] in local or file.name == "vega.js":
            continue
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            text = f"{table.schema.metadata} {table.to_pylist()}"
        else:
            text = file.read_bytes().decode(errors="replace")
        seen += 1
        assert {word for word in words if word in text} == set(), file
    assert seen > 30
