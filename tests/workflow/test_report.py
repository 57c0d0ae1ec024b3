"""The page that `snakemake --report` makes."""

import pytest

from conftest import Project

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


def test_the_report_is_complete(study: Project) -> None:
    study.run("--report", "study.html")
    page = (study.root / "study.html").read_text(encoding="utf-8")
    pages = ("interactive report", "Markdown report", "sensitivity along depth", "heat map")
    for text in (*pages, "frontier", "all runs, compared", "summary, Markdown"):
        assert text in page, text
    for name in ("vlm.photos", "llm.words", "mixed", "fp8", "MY_INT8"):
        assert name in page, name
    # Captions, the config, and the graph of the rules.
    for text in ("with its 95 % interval", "The whole configuration", "calibration_samples"):
        assert text in page, text
    for rule in ("solve", "frontier", "page", "index"):
        assert f'"{rule}"' in page, rule
