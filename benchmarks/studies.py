"""What the benchmarks of the workflow share: a copy of the repository, a large config, a clock."""

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

from projects import make_project  # noqa: E402


@contextmanager
def repository_copy() -> Iterator[Path]:
    """Yield a copy of what Snakemake needs of the repository, without results."""
    with tempfile.TemporaryDirectory(prefix="layersense-benchmark-") as folder:
        yield make_project(Path(folder) / "study", REPOSITORY).root


def large_config(models: int, schemes: int) -> dict[str, Any]:
    """Return a config of ``models`` runs, one a model, each with the same ``schemes`` schemes."""
    return {
        "datasets": {"sample": {"source": "sample", "calibration": 96, "heldout": 16}},
        "models": {
            f"model-{i}": {"checkpoint": f"owner/model-{i}", "task": "image-text-to-text"}
            for i in range(models)
        },
        "schemes": {
            f"fp8-{i}": {"quant_formats": ["FP8_ALL_LAYERS_CFG"], "effective_bits": 8.5 + i / 4}
            for i in range(schemes)
        },
        "runs": {
            f"run-{i}": {
                "model": f"model-{i}",
                "dataset": "sample",
                "schemes": [f"fp8-{j}" for j in range(schemes)],
            }
            for i in range(models)
        },
    }


def snakemake(*arguments: str, cores: int = 2) -> list[str]:
    """Return the command line of this environment's Snakemake."""
    return [sys.executable, "-m", "snakemake", *arguments, "--cores", str(cores)]


class Measured(NamedTuple):
    """What a command took, and what it printed."""

    seconds: float
    cpu_seconds: float
    """Of all its processes; less than the wall's where the machine had other work."""
    peak_mb: int
    """Memory of its largest process."""
    output: str


def measured(command: Sequence[str], root: Path) -> Measured:
    """Run a command in a copy, to its end."""
    environment = {**os.environ, "PYTHONPATH": str(root / "workflow")}
    start = time.perf_counter()
    with (root / "output.txt").open("w") as file:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    output = (root / "output.txt").read_text()
    if status:
        sys.exit(output)
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Measured(seconds, cpu_seconds, usage.ru_maxrss // 1024, output)


def machine() -> str:
    """Return what the numbers were measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores, {model}, Python {platform.python_version()}"
