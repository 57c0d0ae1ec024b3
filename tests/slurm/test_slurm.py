"""The workflow on a real SLURM, through what clusters do to jobs.

One bad night: the whole demo, and for every fault a study of its own, all at the same time on one
node, because most of a fault is waiting. Each test then looks at one of them. The studies end with
the results of one that ran undisturbed on the local machine.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import cluster as slurm
import psutil
import pytest
from cluster import Cluster

from projects import Project, make_project

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow"))

from volatile import stable_manifest, stable_scores

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

RUN = "llm.words"
TARGET = f"results/{RUN}/fp8/layers.parquet"
LOG = f"logs/score/{RUN}.jsonl"
GPU = "score:gpu=1"
"""What lets a scoring job on the CPU hold a GPU as one on a GPU does."""
DEMO_PATIENCE = 900
"""Seconds for the demo, which takes three minutes where nothing else runs."""
PATIENCE = 420
"""Seconds after which a test gives up waiting for what must happen; nothing may hang."""
PROFILE = (
    "--profile=profiles/slurm",
    # The profile's own are for clusters where thousands of people ask.
    "--slurm-init-seconds-before-status-checks=1",
    "--seconds-between-status-checks=1",
    "--latency-wait=10",
)


@dataclass
class Story:
    """What happened to one study."""

    project: Project
    output: str = ""
    returncode: int | None = None
    states: dict[str, dict[str, str]] = field(default_factory=dict)
    """SLURM job → what ``scontrol show job`` said of it at the end."""
    notes: dict[str, Any] = field(default_factory=dict)

    def rules(self, rule: str) -> list[dict[str, str]]:
        """Return the SLURM jobs of a rule, in the order of their submission."""
        jobs = sorted(self.states.items(), key=lambda item: int(item[0]))
        return [job for _, job in jobs if job.get("Comment", "").startswith(f"rule_{rule}")]


def started(story: Story, cluster: Cluster, *arguments: str) -> psutil.Popen:
    environment = {**story.project.environment(), **cluster.environment}
    with (story.project.root / "output.txt").open("a") as file:
        return psutil.Popen(
            [sys.executable, "-m", "snakemake", *PROFILE, *arguments],
            cwd=story.project.root,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def ended(
    story: Story, cluster: Cluster, process: psutil.Popen, patience: float = PATIENCE
) -> Story:
    """Wait for Snakemake and note how all went."""
    try:
        story.returncode = process.wait(patience)
    except psutil.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        story.notes["hung"] = True
    story.output = (story.project.root / "output.txt").read_text()
    folder = str(story.project.root)
    for number in cluster.jobs("all"):
        job = cluster.job(number)
        if job.get("WorkDir") == folder:
            story.states[number] = job
    return story


def until(condition: Callable[[], Any], what: str, process: psutil.Popen) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert process.poll() is None, f"Snakemake ended before {what}"
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)
    return found


def records(project: Project, log: str = LOG) -> list[dict[str, Any]]:
    path = project.results / log
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def scoring(project: Project, process: psutil.Popen) -> dict[str, Any]:
    """Wait until a scoring job computes; return its ``start``."""

    def measuring() -> dict[str, Any] | None:
        lines = records(project)
        return lines[0] if any(line.get("phase") == "import" for line in lines) else None

    found: dict[str, Any] = until(measuring, "the scoring job", process)
    return found


# --- the faults ----------------------------------------------------------------------------------


def late(story: Story, cluster: Cluster) -> Story:
    """A job that is over its time limit, because it stands still."""
    limit = "score:runtime=1 if attempt == 1 else 30"
    process = started(story, cluster, TARGET, "--set-resources", limit, GPU)
    psutil.Process(scoring(story.project, process)["pid"]).suspend()
    return ended(story, cluster, process)


def hungry(story: Story, cluster: Cluster) -> Story:
    """A job that needs more memory than it asked for at first."""
    memory = "score:mem_mb=500*attempt**3"
    process = started(story, cluster, TARGET, "--set-resources", memory, GPU)
    return ended(story, cluster, process)


def cancelled(story: Story, cluster: Cluster) -> Story:
    """A job that somebody cancels."""
    process = started(story, cluster, TARGET, "--set-resources", GPU)
    number = scoring(story.project, process)["slurm_job_id"]
    assert cluster.ask("scancel", number).returncode == 0
    return ended(story, cluster, process)


def preempted(story: Story, cluster: Cluster) -> Story:
    """A job that has to make room for one of a better partition, with 30 s of grace."""
    resources = ("score:slurm_partition=low", "score:gres=slot:1")
    process = started(story, cluster, TARGET, "--set-resources", *resources)
    scoring(story.project, process)
    better = ("--partition=high", "--gres=slot:1", "--mem=10", "--output=/dev/null")
    assert cluster.ask("sbatch", *better, "--wrap=sleep 1").returncode == 0
    ending = until(
        lambda: [line for line in records(story.project) if line["event"] == "end"],
        "the end of the preempted job",
        process,
    )
    story.notes["end"] = ending[0]
    return ended(story, cluster, process)


def orphaned(story: Story, cluster: Cluster) -> Story:
    """A submitter that is killed, and started again while its job still runs."""
    process = started(story, cluster, TARGET)
    orphan = psutil.Process(scoring(story.project, process)["pid"])
    orphan.suspend()
    process.kill()
    process.wait()
    started(story, cluster, "--unlock").wait(PATIENCE)
    successor = started(story, cluster, TARGET)
    text = story.project.results / LOG.replace(".jsonl", ".log")
    until(
        # Snakemake deletes the log of the job before it.
        lambda: text.exists() and "another job works on this run; waiting" in text.read_text(),
        "the successor",
        successor,
    )
    story.notes["while waiting"] = text.read_text()
    orphan.resume()
    return ended(story, cluster, successor)


def dead_node(story: Story, cluster: Cluster) -> Story:
    """A node that loses power and comes back."""
    process = started(story, cluster, TARGET)
    number = scoring(story.project, process)["slurm_job_id"]
    cluster.kill_slurmd()
    until(lambda: cluster.node_state().startswith("DOWN"), "the end of the node", process)
    cluster.start_slurmd()
    # SLURM put the job back and lets it wait two minutes, in case the node comes and goes.
    cluster.ask("scontrol", "update", f"JobId={number}", "StartTime=now")
    return ended(story, cluster, process)


def demo(story: Story, cluster: Cluster) -> Story:
    """The whole demo, with GPUs for what measures and a cap of one."""
    doctor = subprocess.run(
        [sys.executable, "-m", "layersense", "doctor", "--profile", "profiles/slurm"],
        cwd=story.project.root,
        env={**os.environ, **cluster.environment},
        capture_output=True,
        text=True,
    )
    story.notes["doctor"] = doctor.stdout + doctor.stderr
    gpu = ("--resources=gpu=1", "--set-resources", GPU, "verify:gpu=1")
    return ended(story, cluster, started(story, cluster, *gpu), DEMO_PATIENCE)


FAULTS = (late, hungry, cancelled, preempted, orphaned)


@pytest.fixture(scope="module")
def night(
    repository: Path, done_study: Project, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Callable[..., Story]], Story]]:
    """Return what gives the story of a fault; all happen at once."""
    if reason := slurm.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("night")
    with ExitStack() as stack:
        shared = stack.enter_context(slurm.running_cluster())
        lonely = stack.enter_context(slurm.running_cluster())
        pool = stack.enter_context(ThreadPoolExecutor(len(FAULTS) + 2))
        stories: dict[str, Future[Story]] = {}
        for fault in (*FAULTS, dead_node):
            project = done_study.copy(folder / fault.__name__)
            for file in sorted((project.results / RUN).rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            (project.results / LOG).unlink()
            machine = lonely if fault is dead_node else shared
            stories[fault.__name__] = pool.submit(fault, Story(project), machine)
        clone = make_project(folder / "demo", repository)
        stories["demo"] = pool.submit(demo, Story(clone), shared)
        yield lambda fault: stories[fault.__name__].result()


def assert_same(story: Story, done_study: Project) -> None:
    """Compare with the study that ran on the local machine."""
    assert "hung" not in story.notes, story.output
    assert story.returncode == 0, story.output
    ours, theirs = story.project.results / RUN, done_study.results / RUN
    assert stable_scores(ours / "scores.json") == stable_scores(theirs / "scores.json")
    assert (ours / "measured.json").read_bytes() == (theirs / "measured.json").read_bytes()
    for table in sorted(theirs.glob("*/layers.parquet")):
        path = ours / table.relative_to(theirs)
        assert path.read_bytes() == table.read_bytes()
        manifest = path.with_name("manifest.json")
        assert stable_manifest(manifest) == stable_manifest(table.with_name("manifest.json"))


Night = Callable[[Callable[..., Story]], Story]


def test_the_demo_through_sbatch(night: Night) -> None:
    story = night(demo)
    assert "hung" not in story.notes, story.output
    assert story.returncode == 0, story.output
    assert {job["JobState"] for job in story.states.values()} == {"COMPLETED"}
    # A database, two scoring jobs, one job for each scheme's recipe and tables, a verification.
    assert len(story.states) == 1 + 2 + 4 + 1
    measuring = [*story.rules("score"), *story.rules("verify")]
    assert len(measuring) == 2 + 1
    assert {job["TresPerJob"] for job in measuring} == {"gres:gpu:1"}
    others = [job for job in story.states.values() if job not in measuring]
    assert not any("gpu" in job.get("TresPerJob", "") for job in others)
    # All that the demo promises is there.
    assert "Nothing to be done" in story.project.run().output


def test_the_demo_decides_on_the_cluster_as_on_the_local_machine(night: Night) -> None:
    project = night(demo).project
    place = project.results / "demo.image-text/int4_fp8_all_layers"
    tables = [place / "layers.parquet", place / "frontier.parquet"]
    before = [table.read_bytes() for table in tables]
    manifest = stable_manifest(place / "manifest.json")
    for file in (*tables, place / "manifest.json"):
        file.unlink()
    project.run(*(str(table.relative_to(project.root)) for table in tables))
    assert [table.read_bytes() for table in tables] == before
    assert stable_manifest(place / "manifest.json") == manifest


def test_the_cap_on_gpus_holds(night: Night) -> None:
    """Three jobs that want a GPU, and one GPU: one after the other."""
    story = night(demo)
    measuring = [*story.rules("score"), *story.rules("verify")]
    times = sorted((job["StartTime"], job["EndTime"]) for job in measuring)
    assert len(times) == 3
    for (_, end), (start, _) in pairwise(times):
        assert end <= start


def test_no_two_jobs_on_one_gpu_and_its_number_reaches_them(night: Night) -> None:
    held = []
    for story in map(night, (demo, late, hungry, cancelled)):
        for log in (story.project.results / "logs/score").glob("*.jsonl"):
            lines = records(story.project, f"logs/score/{log.name}")
            if lines[0].get("slurm_job_id") in story.states:
                held.append((lines[0]["cuda_visible_devices"], lines[0]["time"], lines[-1]["time"]))
    assert len(held) == 2 + 3
    assert {device for device, *_ in held} <= {str(number) for number in range(slurm.GPUS)}
    for (device, _, end), (other, start, _) in pairwise(sorted(held)):
        assert device != other or end <= start


def test_a_job_over_its_time_limit_is_retried_with_more(night: Night, done_study: Project) -> None:
    story = night(late)
    first, second = story.rules("score")
    assert (first["JobState"], first["TimeLimit"]) == ("TIMEOUT", "00:01:00")
    assert (second["JobState"], second["TimeLimit"]) == ("COMPLETED", "00:30:00")
    assert "SLURM status is: 'TIMEOUT'" in story.output
    assert_same(story, done_study)


def test_a_job_over_its_memory_is_retried_with_more(night: Night, done_study: Project) -> None:
    story = night(hungry)
    first, second = story.rules("score")
    assert (first["JobState"], first["MinMemoryNode"]) == ("FAILED", "500M")
    assert (second["JobState"], second["MinMemoryNode"]) == ("COMPLETED", "4000M")
    assert "exceeded memory limit" in story.output
    assert_same(story, done_study)


def test_a_cancelled_job_is_submitted_again(night: Night, done_study: Project) -> None:
    story = night(cancelled)
    assert [job["JobState"] for job in story.rules("score")] == ["CANCELLED", "COMPLETED"]
    assert_same(story, done_study)


def test_a_preempted_job_ends_within_its_grace_and_runs_again(
    night: Night, done_study: Project
) -> None:
    story = night(preempted)
    assert story.notes["end"]["error"].startswith("terminated (SIGTERM)")
    first, second = story.rules("score")
    assert first["PreemptTime"] != "None"
    assert second["JobState"] == "COMPLETED"
    assert_same(story, done_study)


def test_a_killed_submitter_and_its_successor(night: Night, done_study: Project) -> None:
    story = night(orphaned)
    assert "to measure" not in story.notes["while waiting"].split("waiting for it")[1]
    assert [job["JobState"] for job in story.rules("score")] == ["COMPLETED", "COMPLETED"]
    # The orphan measured; its successor found everything there.
    text = (story.project.results / LOG.replace(".jsonl", ".log")).read_text()
    assert text.rstrip().endswith("all 1 format(s) are measured already")
    assert_same(story, done_study)


def test_a_dead_node(night: Night, done_study: Project) -> None:
    story = night(dead_node)
    first, *others = story.rules("score")
    assert int(first["Restarts"]) >= 1  # put back into the queue by SLURM
    # A node that is just back may refuse it; then Snakemake submits it again.
    assert len(others) <= 1
    assert (others or [first])[0]["JobState"] == "COMPLETED"
    assert_same(story, done_study)


def test_the_status_command_needs_no_accounting(night: Night, repository: Path) -> None:
    """``sacct`` is installed and answers nothing; Snakemake would ask it for ever."""
    story = night(demo)
    assert story.returncode == 0
    profile = (repository / "profiles/slurm/config.yaml").read_text()
    assert "\nslurm-status-command: squeue\n" in profile


def test_the_doctor_knows_this_cluster(night: Night) -> None:
    text = night(demo).notes["doctor"]
    assert "ok       SLURM: slurm" in text
    assert "ok       SLURM status: squeue, jobs are kept 3600 s" in text
    assert f"gpu:{slurm.GPUS}" in text
    assert "warning  SLURM_CONF" in text  # this cluster's own way of not touching /etc
