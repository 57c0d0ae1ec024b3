"""Projects to run Snakemake in: a copy of the repository with a config of its own, and fixtures."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

COPIED = ("Snakefile", "workflow", "profiles", "envs", "config")
LOGS = Path("results") / "logs"


@dataclass(frozen=True)
class Outcome:
    """What one call of Snakemake did."""

    jobs: set[str]
    """Jobs that ran, named like their logs: ``solve/vlm.photos/fp8``."""
    returncode: int
    output: str


@dataclass(frozen=True)
class Project:
    """A folder with a Snakefile, a config and results."""

    root: Path

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def config_file(self) -> Path:
        return self.root / "config" / "config.yaml"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "snakemake", *arguments, "--cores", "2"]

    def environment(self) -> dict[str, str]:
        # Two jobs at a time on two cores: more threads each would only contend.
        return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(self, *arguments: str, check: bool = True) -> Outcome:
        before = self._log_times()
        process = subprocess.run(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=900,
        )
        output = process.stdout + process.stderr
        if check:
            assert process.returncode == 0, output
        after = self._log_times()
        jobs = {name for name, time in after.items() if before.get(name) != time}
        return Outcome(jobs, process.returncode, output)

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the config in place."""
        config = yaml.safe_load(self.config_file.read_text())
        change(config)
        self.config_file.write_text(yaml.safe_dump(config))

    def copy(self, root: Path) -> "Project":
        """Copy everything, times and Snakemake's own records included."""
        shutil.copytree(self.root, root, symlinks=True)
        return Project(root)

    def json(self, path: str) -> Any:
        return json.loads((self.results / path).read_bytes())

    def _log_times(self) -> dict[str, int]:
        logs = self.root / LOGS
        return {
            str(file.relative_to(logs).with_suffix("")): file.stat().st_mtime_ns
            for file in logs.rglob("*.log")
        }


def make_project(root: Path, repository: Path) -> Project:
    """Copy what Snakemake needs of the repository, without results."""
    root.mkdir(parents=True)
    for name in COPIED:
        source = repository / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, root / name, ignore=ignore)
        else:
            shutil.copy2(source, root / name)
    return Project(root)


STUDY: dict[str, Any] = {
    "datasets": {
        "photos": {"source": "sample", "calibration": 16, "heldout": 4},
        "words": {"source": "text", "file": "words.jsonl", "calibration": 16, "heldout": 4},
    },
    "models": {
        "vlm": {"checkpoint": "./checkpoints/vlm", "task": "image-text-to-text"},
        "llm": {"checkpoint": "./checkpoints/llm", "task": "causal-lm"},
    },
    "formats": {"MY_INT8": {"base": "INT8_DEFAULT_CFG", "weight": {"axis": None}}},
    "schemes": {
        "fp8": {"quant_formats": ["FP8_ALL_LAYERS_CFG"], "effective_bits": 11.0},
        "mixed": {
            "quant_formats": ["FP8_ALL_LAYERS_CFG", "MY_INT8"],
            "effective_bits": 10.0,
        },
    },
    "runs": {
        "vlm.photos": {
            "model": "vlm",
            "dataset": "photos",
            "schemes": ["fp8", "mixed"],
            "score_samples": 4,
            "calibration_samples": 8,
            "batch_size": 2,
            "max_length": 64,
            "device": "cpu",
        },
        "llm.words": {
            "model": "llm",
            "dataset": "words",
            "schemes": ["fp8"],
            "score_samples": 8,
            "calibration_samples": 8,
            "batch_size": 2,
            "max_length": 16,
            "device": "cpu",
        },
    },
}
"""Two models on two datasets, small enough that a scoring job is mostly imports."""


@pytest.fixture(scope="session")
def new_study(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The study before anything ran."""
    sys.path.insert(0, str(repository / "tests" / "unit"))
    from tiny_models import save_tiny_llama, save_tiny_qwen2_5_vl

    project = make_project(tmp_path_factory.mktemp("study") / "new", repository)
    save_tiny_qwen2_5_vl(project.root / "checkpoints" / "vlm")
    save_tiny_llama(project.root / "checkpoints" / "llm")
    words = "a man rides a horse on the beach while two dogs play with a ball"
    split = words.split()
    with (project.root / "words.jsonl").open("w") as file:
        for number in range(40):
            rotated = split[number % 14 :] + split[: number % 14]
            file.write(json.dumps({"text": f"{number} {' '.join(rotated)}"}) + "\n")
    project.config_file.write_text(yaml.safe_dump(STUDY))
    return project


@pytest.fixture(scope="session")
def done_study(new_study: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The study, measured and reported; not to be changed."""
    project = new_study.copy(tmp_path_factory.mktemp("study") / "done")
    project.run()
    return project


@pytest.fixture
def study(done_study: Project, tmp_path: Path) -> Project:
    """A finished study of one's own, to edit and run again."""
    return done_study.copy(tmp_path / "study")
