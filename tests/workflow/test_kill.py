"""kill -9 in the middle of scoring, then the commands of docs/operations.md; equal seeds."""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml
from volatile import stable_manifest, stable_scores

from conftest import STUDY, Project

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

RUN = "vlm.photos"
FIRST, SECOND = "FP8_ALL_LAYERS_CFG", "INT8_SMOOTHQUANT_ALL_LAYERS_CFG"
"""SmoothQuant is a call of its own after the first: between them a partial file lies there."""
PARTIAL = f"{RUN}/.scores.json.partial"
LOG = f"logs/score/{RUN}.log"
PATIENCE = 240
"""Seconds after which a test gives up waiting for what must happen."""


@pytest.fixture(scope="module")
def prepared(new_study: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The data and the model are there, nothing is scored."""
    project = new_study.copy(tmp_path_factory.mktemp("kill") / "prepared")
    # The stock engine, because the fused one scores both formats in one pass.
    run = {**STUDY["runs"][RUN], "schemes": ["both"], "batch_size": 1, "engine": "modelopt"}
    config = {
        "datasets": {"photos": STUDY["datasets"]["photos"]},
        "models": {"vlm": STUDY["models"]["vlm"]},
        "schemes": {"both": {"quant_formats": [FIRST, SECOND], "effective_bits": 11.0}},
        "runs": {RUN: run},
    }
    project.config_file.write_text(yaml.safe_dump(config))
    project.run("results/calibration/photos.sqlite", "results/models/vlm/model.json")
    return project


@pytest.fixture(scope="module")
def undisturbed(prepared: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = prepared.copy(tmp_path_factory.mktemp("kill") / "undisturbed")
    project.run()
    return project


@pytest.fixture
def study(prepared: Project, tmp_path: Path) -> Project:
    return prepared.copy(tmp_path / "study")


def documented_commands(repository: Path, heading: str) -> list[list[str]]:
    """Return the arguments of the commands that docs/operations.md gives under a heading."""
    text = (repository / "docs" / "operations.md").read_text()
    section = text.split(f"### {heading}\n")[1].split("\n#")[0]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block is not None
    commands = [shlex.split(line, comments=True) for line in block[1].splitlines()]
    assert commands
    assert all(command[0] == "snakemake" for command in commands)
    return [command[1:] for command in commands]


def call(project: Project, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*project.command()[:3], *arguments],
        cwd=project.root,
        env=project.environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )


@contextmanager
def started(project: Project, arguments: list[str]) -> Iterator[psutil.Popen]:
    """Start Snakemake; whatever is left of it at the end is killed."""
    output = project.root / f"output-{time.monotonic_ns()}.txt"
    with output.open("w") as file:
        process = psutil.Popen(
            [*project.command()[:3], *arguments],
            cwd=project.root,
            env=project.environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition, process: psutil.Popen) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, "Snakemake ended before"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def scoring_process(snakemake: psutil.Popen) -> psutil.Process:
    """Return the process that scores, not the shell around it."""
    (process,) = (
        child
        for child in snakemake.children(recursive=True)
        if child.cmdline()[1:4] == ["-m", "layersense", "score"]
    )
    return process


def stopped_in_the_middle(project: Project, snakemake: psutil.Popen) -> psutil.Process:
    """Return the scoring process, held still with one format measured and one under way."""
    wait_for((project.results / PARTIAL).exists, snakemake)
    process = scoring_process(snakemake)
    process.suspend()
    assert not (project.results / RUN / "scores.json").exists()
    return process


def log(project: Project) -> str:
    path = project.results / LOG
    return path.read_text() if path.exists() else ""


def assert_same(project: Project, undisturbed: Project) -> None:
    ours, theirs = project.results / RUN, undisturbed.results / RUN
    assert stable_scores(ours / "scores.json") == stable_scores(theirs / "scores.json")
    for name in ("both/layers.parquet", "measured.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    manifest = "both/manifest.json"
    assert stable_manifest(ours / manifest) == stable_manifest(theirs / manifest)
    assert not (project.results / PARTIAL).exists()
    assert "Nothing to be done" in project.run().output


def test_after_the_scoring_job_was_killed(
    study: Project, undisturbed: Project, repository: Path
) -> None:
    (command,) = documented_commands(repository, "A job was killed")
    with started(study, command) as snakemake:
        stopped_in_the_middle(study, snakemake).kill()
        assert snakemake.wait(PATIENCE) != 0
    assert call(study, command).returncode == 0
    # The first format's numbers are those of the killed job.
    assert f"to measure: {SECOND}\n" in log(study)
    assert_same(study, undisturbed)


def test_after_snakemake_was_killed_and_its_job_lives_on(
    study: Project, undisturbed: Project, repository: Path
) -> None:
    unlock, command = documented_commands(repository, "Snakemake itself was killed")
    with started(study, command) as snakemake:
        orphan = stopped_in_the_middle(study, snakemake)
        snakemake.kill()
        snakemake.wait(PATIENCE)
        refused = call(study, command)
        assert refused.returncode != 0
        assert "--unlock" in refused.stdout + refused.stderr
        assert call(study, unlock).returncode == 0
        with started(study, command) as successor:
            wait_for(lambda: "another job works on this run; waiting" in log(study), successor)
            # The successor measures nothing as long as the orphan holds the run.
            assert "to measure" not in log(study).split("waiting for it")[1]
            orphan.resume()
            assert successor.wait(PATIENCE) == 0
    assert log(study).rstrip().endswith("all 2 format(s) are measured already")
    assert_same(study, undisturbed)


def test_after_snakemake_and_its_job_were_killed(
    study: Project, undisturbed: Project, repository: Path
) -> None:
    unlock, command = documented_commands(repository, "Snakemake itself was killed")
    with started(study, command) as snakemake:
        orphan = stopped_in_the_middle(study, snakemake)
        snakemake.kill()
        orphan.kill()
        snakemake.wait(PATIENCE)
    assert call(study, unlock).returncode == 0
    assert call(study, command).returncode == 0
    assert f"to measure: {SECOND}\n" in log(study)
    assert_same(study, undisturbed)


def test_two_runs_with_one_seed_give_the_same_bytes(study: Project, undisturbed: Project) -> None:
    study.run()
    assert_same(study, undisturbed)
