"""A simulated fleet: real Snakemake, its real rules, GPUs that are a number, jobs that sleep.

    python benchmarks/fleet.py [factor] [models] [gpus]

A study of 600 models on 64 GPUs by default. Each scoring job sleeps as long as one takes, divided
by ``factor`` (5); other jobs sleep one second, divided as well. Snakemake itself is not divided,
so what it costs weighs ``factor`` times more than in a real night. Works in a copy of the
repository in a temporary folder, and prints Markdown.
"""

import json
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from studies import REPOSITORY, large_config, machine, measured, repository_copy, snakemake

sys.path.insert(0, str(REPOSITORY / "workflow"))
sys.path.insert(0, str(REPOSITORY / "tests/slurm"))

import cluster as slurm

from layersense import paths
from layersense.models.checkpoints import Checkpoint, write_checkpoint
from layersense.quantization.extensions import EXTENSIONS

FIXED, PER_GB = 32.0, 7.0
"""Seconds of a scoring job, and those for each GB of weights: measured on Qwen2.5-VL-3B (7.5 GB)
and one H100, for two formats; imports and loading are the fixed part (README.md, Scoring)."""
SIZES_GB = {1: 35, 3: 25, 7.5: 20, 15: 10, 28: 7, 56: 3}
"""GB of weights → percent of the models: many small ones, few large."""
CPU_SECONDS = 1.0
"""Seconds of the other jobs."""
SUBMISSIONS, REPEATS = 50, 3

STUB = """
import json, os, sys, time
from pathlib import Path

start = time.time()
stage, *words = sys.argv[1:]
place = Path(words[words.index("--out") + 1]) if "--out" in words else None
plan = json.loads(Path("fleet.json").read_text())
gpu = stage == "score"
time.sleep(plan["gpu"][words[0]] if gpu else plan["cpu"])
for word in ("--out", "--measured", "--sensitivity", "--runs"):
    if word in words:
        Path(words[words.index(word) + 1]).write_text("{}")
held = [stage, start, time.time()]
Path("fleet", f"{stage}-{os.getpid()}-{start}").write_text(json.dumps(held))
"""
"""What stands in for the package in the jobs, which find it in the folder where they start."""


def main() -> None:
    factor, models, gpus = (*map(int, sys.argv[1:]), *(5, 600, 64)[len(sys.argv) - 1 :])
    print(machine(), end="\n\n")
    print(f"{models} models, {gpus} GPUs, everything but Snakemake {factor} times faster:\n")
    print("| what | jobs | GPUs busy until the queue is empty | wall, s | ideal, s | jobs/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with repository_copy() as root:
        prepare(root, models)
        longest = plan(models, factor)
        row(root, "scores, longest first", longest, gpus, "scores")
        row(root, "scores, jobs that take no time", plan(models, None), gpus, "scores")
        row(root, "scores and tables, longest first", longest, gpus, "tables")
        row(root, "scores and tables, jobs that take no time", plan(models, None), gpus, "tables")
        one_job(root)
        submission()
        rule = root / "workflow/rules/scoring.smk"
        text = rule.read_text()
        assert "    priority: longest_first\n" in text
        rule.write_text(text.replace("    priority: longest_first\n", ""))
        row(root, "scores, in the order of their names", longest, gpus, "scores")


def one_job(root: Path) -> None:
    """Print what a Snakemake takes that runs one job, as one does inside of each SLURM job."""
    (root / "fleet.json").write_text(json.dumps(plan(REPEATS, None)))
    times = []
    for index in range(REPEATS):
        scores = paths.scores(f"run-{index}")
        (root / scores).unlink()
        command = snakemake(scores, "--configfile", "large.yaml", "--resources", "gpu=1")
        times.append(measured(command, root).seconds)
    print(f"| one call for one job that takes no time | 1 | | {statistics.median(times):.1f} | | |")


def submission() -> None:
    """Print what one ``sbatch`` takes, if a SLURM can be started here."""
    if reason := slurm.missing():
        print(f"| `sbatch`: not measured, {reason} | | | | | |")
        return
    times = []
    with slurm.running_cluster() as cluster:
        for _ in range(SUBMISSIONS):
            start = time.perf_counter()
            done = cluster.ask("sbatch", "--hold", "--mem=10", "--output=/dev/null", "--wrap=true")
            times.append(time.perf_counter() - start)
            assert done.returncode == 0, done.stderr
    median = statistics.median(times)
    print(
        f"| `sbatch`, one of {SUBMISSIONS} | 1 | | {median:.3f} | | {1 / median:.0f} |", flush=True
    )


def sizes(models: int) -> list[float]:
    """Return the GB of each model, in an order that says nothing."""
    population = [size for size, percent in SIZES_GB.items() for _ in range(percent)]
    chosen = (population * (models // len(population) + 1))[:models]
    random.Random(0).shuffle(chosen)
    return chosen


def plan(models: int, factor: int | None) -> dict[str, Any]:
    """Return the seconds that each job sleeps; none at all without a factor."""
    seconds = [FIXED + PER_GB * size for size in sizes(models)]
    return {
        "gpu": {f"run-{i}": each / factor if factor else 0.0 for i, each in enumerate(seconds)},
        "cpu": CPU_SECONDS / factor if factor else 0.0,
    }


def prepare(root: Path, models: int) -> None:
    """Put there what scoring jobs wait for, so that all may start at once."""
    (root / "large.yaml").write_text(yaml.safe_dump(large_config(models, 1)))
    (root / "layersense").mkdir()
    (root / "layersense/__init__.py").touch()
    (root / "layersense/__main__.py").write_text(STUB)
    for index, size in enumerate(sizes(models)):
        fields = dict.fromkeys(("path", "id", "digest", "task", "architecture", "dtype"), "x")
        checkpoint = Checkpoint(
            **fields,
            revision=None,
            n_parameters=1,
            trust_remote_code=False,
            size_bytes=int(size * 1e9),
        )
        write_checkpoint(root / paths.model(f"model-{index}"), checkpoint)
    for path in (paths.calibration("sample"), *map(paths.extension, EXTENSIONS)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def row(root: Path, what: str, plan: dict[str, Any], gpus: int, target: str) -> None:
    """Run the study and print what it took."""
    for run in plan["gpu"]:
        shutil.rmtree(root / "results" / run, ignore_errors=True)
    shutil.rmtree(root / "fleet", ignore_errors=True)
    (root / "fleet").mkdir()
    (root / "fleet.json").write_text(json.dumps(plan))
    # A core for each thread of the scoring jobs, and some for the others.
    arguments = [target, "--configfile", "large.yaml", "--resources", f"gpu={gpus}"]
    measured(snakemake(*arguments, cores=4 * gpus + 16), root)
    jobs = [json.loads(file.read_text()) for file in (root / "fleet").iterdir()]
    held = [(start, end) for stage, start, end in jobs if stage == "score"]
    assert len(held) == len(plan["gpu"])
    first, queue_empty = min(start for start, _ in held), max(start for start, _ in held)
    last = max(end for *_, end in jobs)
    used = sum(min(end, queue_empty) - start for start, end in held)
    busy = f"{used / gpus / (queue_empty - first):.1%}" if plan["cpu"] else ""
    # No schedule is shorter than the mean load, nor than the longest job.
    ideal = max(sum(plan["gpu"].values()) / gpus, max(plan["gpu"].values()))
    rate = len(jobs) / (last - first)
    print(
        f"| {what} | {len(jobs):,} | {busy} | {last - first:.1f} | {ideal:.1f} | {rate:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
