"""The rules of the house that imports can break."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ORDER = [
    "errors", "logs", "failures", "files", "progress", "paths", "config", "calibration",
    "quantization", "models", "job_resources", "scoring", "manifests", "recipes", "verification",
    "export", "reports", "settings", "config_problems", "config_file", "validation",
]  # fmt: skip
"""What stands later may import what stands earlier."""
TOOLS = {"cli", "__main__", "config_docs", "doctor", "init", "resources"}
HEAVY = {"torch", "torchvision", "transformers", "modelopt", "snakemake"}


def modules(repository: Path) -> list[Path]:
    return sorted((repository / "workflow" / "layersense").rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_folders_import_only_from_those_above(repository: Path) -> None:
    for path in modules(repository):
        part = path.relative_to(repository / "workflow" / "layersense").parts[0].removesuffix(".py")
        if part in TOOLS or part == "__init__":
            continue
        assert part in ORDER, f"{part} has no place in the order"
        for name in imported(path):
            if name.startswith("layersense."):
                other = name.split(".")[1]
                if other.startswith("__"):
                    continue
                assert ORDER.index(other) <= ORDER.index(part), f"{path} imports {name}"


def test_no_module_imports_snakemake(repository: Path) -> None:
    for path in modules(repository):
        assert not any(name.split(".")[0] == "snakemake" for name in imported(path)), path


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "validation",
        "settings",
        "calibration.build",
        "scoring.job",
        "manifests.read",
        "manifests.tables",
        "manifests.findings",
        "recipes.decide",
        "export.job",
        "reports.markdown",
        "reports.html",
        "reports.index",
        "reports.terminal",
    ],
)
def test_cheap_modules_stay_cheap(module: str) -> None:
    code = f"import sys, layersense.{module}; print(*sorted(set(sys.modules) & {HEAVY!r}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert loaded == []
