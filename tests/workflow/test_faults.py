"""The lines of docs/faults.md: each fault provoked for real, then a run that ends the same.

Faults of kills stand in test_kill.py, those of a cluster in tests/slurm.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from faults import injected, mounted
from volatile import stable_manifest, stable_scores

from conftest import STUDY, Project
from hub_server import hub

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

RUN = "llm.words"
SCHEME = f"{RUN}/fp8"
TARGETS = (
    f"results/{RUN}/scores.json",
    f"results/{SCHEME}/manifest.json",
    f"results/{SCHEME}/layers.parquet",
    "results/sensitivity.parquet",
    "results/runs.parquet",
    f"results/{SCHEME}/frontier.parquet",
)
PATIENCE = 240
SECRET = "planted-secret"


@pytest.fixture(scope="module")
def undisturbed(new_study: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One run of a language model, measured; not to be changed."""
    project = new_study.copy(tmp_path_factory.mktemp("faults") / "undisturbed")
    run = {**STUDY["runs"][RUN], "schemes": ["fp8"]}
    config = {
        "datasets": {"words": STUDY["datasets"]["words"]},
        "models": {"llm": STUDY["models"]["llm"]},
        "schemes": {"fp8": STUDY["schemes"]["fp8"]},
        "runs": {RUN: run},
    }
    project.config_file.write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        project.run()
    return project


@pytest.fixture
def done(undisturbed: Project, tmp_path: Path) -> Project:
    """A finished study of one's own."""
    return undisturbed.copy(tmp_path / "study")


@pytest.fixture
def unscored(done: Project) -> Project:
    """The same without its measurements."""
    shutil.rmtree(done.results / RUN)
    return done


def call(
    project: Project, *arguments: str, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Return the exit code and the output of Snakemake."""
    done = subprocess.run(
        project.command(*(arguments or TARGETS)),
        cwd=project.root,
        env={**project.environment(), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return done.returncode, done.stdout + done.stderr


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def assert_same(project: Project, undisturbed: Project) -> None:
    ours, theirs = project.results, undisturbed.results
    for name in ("sensitivity.parquet", "runs.parquet", f"{SCHEME}/layers.parquet"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    name = f"{SCHEME}/frontier.parquet"
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    name = f"{RUN}/scores.json"
    assert stable_scores(ours / name) == stable_scores(theirs / name)
    name = f"{SCHEME}/manifest.json"
    assert stable_manifest(ours / name) == stable_manifest(theirs / name)


def assert_ends_well(project: Project, undisturbed: Project) -> None:
    code, output = call(project)
    assert code == 0, output
    assert_same(project, undisturbed)


def cut(path: Path) -> None:
    """Leave the first half of a file, as a power cut may."""
    os.truncate(path, path.stat().st_size // 2)


def test_no_secret_and_no_folder_of_the_user_in_what_is_shown(undisturbed: Project) -> None:
    files = [file for file in undisturbed.results.rglob("*") if file.is_file()]
    files += [file for file in (undisturbed.root / ".snakemake").rglob("*") if file.is_file()]
    assert len(files) > 20
    for file in files:
        assert SECRET.encode() not in file.read_bytes(), file
    shown = [*undisturbed.results.rglob("*.md"), *undisturbed.results.rglob("*.html")]
    shown += [*undisturbed.results.rglob("*.parquet"), *undisturbed.results.rglob("manifest.json")]
    assert len(shown) > 5
    for file in shown:
        assert str(undisturbed.root).encode() not in file.read_bytes(), file


# --- files that are damaged ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damaged", "before"),
    [
        (f"{SCHEME}/manifest.json", f"{SCHEME}/layers.parquet"),
        (f"{SCHEME}/layers.parquet", "sensitivity.parquet"),
        (f"{RUN}/scores.json", f"{SCHEME}/manifest.json"),
    ],
)
def test_a_file_that_is_cut_short_is_named_and_made_again(
    done: Project, undisturbed: Project, damaged: str, before: str
) -> None:
    file = done.results / damaged
    cut(file)
    (done.results / before).unlink()
    code, output = call(done)
    assert code != 0
    (sentence,) = set(errors(output))
    assert f"results/{damaged}: " in sentence
    assert "delete it" in sentence
    assert re.search(r"^\d jobs? failed, 1 cause:$", output, re.MULTILINE), output
    assert "\n   fix: delete it" in output
    assert not (done.results / before).exists()
    file.unlink()
    assert_ends_well(done, undisturbed)


def test_a_database_that_is_cut_short_is_named_before_torch_is_loaded(
    unscored: Project, undisturbed: Project
) -> None:
    database = unscored.results / "calibration/words.sqlite"
    cut(database)
    code, output = call(unscored)
    assert code != 0
    assert "results/calibration/words.sqlite: the calibration database is damaged" in output
    assert "imported" not in output
    database.unlink()
    assert_ends_well(unscored, undisturbed)


def test_the_index_of_the_scores_may_be_lost(done: Project, undisturbed: Project) -> None:
    (done.results / RUN / "measured.json").write_text("{")
    assert_ends_well(done, undisturbed)


# --- disks ---------------------------------------------------------------------------------------


def test_a_full_disk_and_a_linked_results_folder(
    done: Project, undisturbed: Project, tmp_path: Path
) -> None:
    shutil.rmtree(done.results / SCHEME)
    disk = tmp_path / "disk"
    size = sum(file.stat().st_size for file in done.results.rglob("*") if file.is_file())
    with mounted(disk, "-t", "tmpfs", "-o", f"size={size + 200_000}", "tmpfs"):
        shutil.copytree(done.results, disk / "results")
        shutil.rmtree(done.results)
        done.results.symlink_to(disk / "results")
        filler = disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        code, output = call(done)
        assert code != 0
        # Not even a job's log can be written, so the end of the run says it.
        assert "No space left on device" in output or "the disk is full" in output
        assert not (done.results / SCHEME / "manifest.json").exists()
        filler.unlink()
        call(done, "--unlock")
        assert_ends_well(done, undisturbed)
        assert done.results.is_symlink()


def test_read_only_results(done: Project, undisturbed: Project) -> None:
    shutil.rmtree(done.results / SCHEME)
    with mounted(done.results, "--bind", "-o", "ro", str(done.results)):
        code, output = call(done)
        assert code != 0
        assert f"{done.results}: nothing can be written there" in output
        assert "Traceback" not in output
    assert_ends_well(done, undisturbed)


def test_a_file_system_without_locks(
    unscored: Project, undisturbed: Project, tmp_path: Path
) -> None:
    environment = injected(
        tmp_path / "fault",
        """
        import errno, fcntl
        def flock(file, operation):
            raise OSError(errno.ENOLCK, "No locks available")
        fcntl.flock = flock
        """,
    )
    code, output = call(unscored, environment=environment)
    assert code == 0, output
    log = (unscored.results / f"logs/score/{RUN}.log").read_text()
    assert "this file system has no locks" in log
    assert_same(unscored, undisturbed)


# --- paths ---------------------------------------------------------------------------------------


def test_spaces_and_other_letters_and_shell_words_in_the_path(
    undisturbed: Project, tmp_path: Path
) -> None:
    strange = undisturbed.copy(tmp_path / "Ünï cödé 模型 $(touch pwned) `touch pwned` 'q' & x")
    shutil.rmtree(strange.results / SCHEME)
    (strange.results / "calibration/words.sqlite").unlink()
    code, output = call(
        strange, f"results/{SCHEME}/manifest.json", "results/calibration/words.sqlite"
    )
    assert code == 0, output
    assert_ends_well(strange, undisturbed)
    assert not list(tmp_path.rglob("pwned"))
    assert not Path("pwned").exists()


def test_braces_in_the_path_are_refused_in_a_sentence(undisturbed: Project, tmp_path: Path) -> None:
    strange = undisturbed.copy(tmp_path / "{run}")
    code, output = call(strange)
    assert code != 0
    assert "takes braces in a folder's name for wildcards" in output
    assert "Traceback" not in output


# --- faults while scoring ------------------------------------------------------------------------


NO_MORE_MEMORY = """import resource
                    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
                    resource.setrlimit(resource.RLIMIT_AS, (held + 2**20, resource.RLIM_INFINITY))
                    torch.empty(2**30)"""
"""The system refuses what the process asks, as it does when there is none."""


@pytest.mark.parametrize(
    ("happens", "expected"),
    [
        (
            "raise torch.AcceleratorError('CUDA error: an illegal memory access')",
            "the GPU failed (CUDA error",
        ),
        (NO_MORE_MEMORY, "does not fit into memory"),
    ],
    ids=["CUDA error", "out of memory"],
)
def test_an_error_in_the_middle_of_scoring(
    unscored: Project, undisturbed: Project, tmp_path: Path, happens: str, expected: str
) -> None:
    environment = injected(
        tmp_path / "fault",
        f"""
        def patch(torch):
            backward, calls = torch.Tensor.backward, []
            def failing(tensor, *args, **kwargs):
                calls.append(None)
                if len(calls) >= 3:
                    {happens}
                return backward(tensor, *args, **kwargs)
            torch.Tensor.backward = failing
        """,
        module="torch",
    )
    code, output = call(unscored, environment=environment)
    assert code != 0
    (sentence,) = set(errors(output))
    assert expected in sentence
    assert "please report" not in sentence
    assert not (unscored.results / RUN / "scores.json").exists()
    assert_ends_well(unscored, undisturbed)


def test_a_loss_that_is_nan_at_one_batch_makes_no_recipe(
    unscored: Project, undisturbed: Project, tmp_path: Path
) -> None:
    environment = injected(
        tmp_path / "fault",
        """
        def patch(torch):
            backward, calls = torch.Tensor.backward, []
            def broken(tensor, *args, **kwargs):
                calls.append(None)
                loss = tensor * torch.nan if len(calls) == 3 else tensor
                return backward(loss, *args, **kwargs)
            torch.Tensor.backward = broken
        """,
        module="torch",
    )
    code, output = call(unscored, environment=environment)
    assert code != 0
    (sentence,) = set(errors(output))
    assert "because its score is not finite" in sentence
    (unscored.results / RUN / "scores.json").unlink()
    assert_ends_well(unscored, undisturbed)


def test_weights_that_are_not_finite(unscored: Project, undisturbed: Project) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = unscored.root / "checkpoints/llm/model.safetensors"
    sound = weights.read_bytes()
    tensors = load_file(weights)
    name = next(name for name in sorted(tensors) if "mlp" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    record = unscored.results / "models/llm/model.json"
    record.unlink()
    code, output = call(unscored)
    assert code != 0
    (sentence,) = set(errors(output))
    assert "is finite" in sentence
    assert name.removesuffix(".weight") in sentence
    weights.write_bytes(sound)
    record.unlink()
    assert_ends_well(unscored, undisturbed)


def take_a_shard(folder: Path) -> None:
    """Put the weights into two files, of which the second is lost."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    save_file({name: weights[name] for name in names[::2]}, folder / "model-1.safetensors")
    index = {name: f"model-{1 + number % 2}.safetensors" for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink()


def make_a_pickle(folder: Path) -> None:
    """Leave the weights as a pickle alone, which runs a command when it is loaded."""
    command = f"touch {folder / 'pwned'}"
    # The opcodes of os.system(command).
    code = f"cposix\nsystem\n(V{command}\ntR.".encode()
    (folder / "pytorch_model.bin").write_bytes(code)
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (take_a_shard, "model-2.safetensors: is named in model.safetensors.index.json but missing"),
        (make_a_pickle, "holds only pickled weights (pytorch_model.bin), which can run code"),
    ],
)
def test_a_checkpoint_that_is_no_whole_one(
    done: Project,
    undisturbed: Project,
    tmp_path: Path,
    break_it: Callable[[Path], None],
    expected: str,
) -> None:
    folder = done.root / "checkpoints/llm"
    sound = tmp_path / "sound"
    shutil.copytree(folder, sound)
    break_it(folder)
    record = "results/models/llm/model.json"
    (done.root / record).unlink()
    code, output = call(done, record, *TARGETS)
    assert code != 0
    (sentence,) = set(errors(output))
    assert expected in sentence
    assert not (folder / "pwned").exists()
    shutil.rmtree(folder)
    shutil.copytree(sound, folder)
    code, output = call(done, record, *TARGETS)
    assert code == 0, output
    assert_same(done, undisturbed)


def test_a_config_edited_while_it_runs_and_a_second_snakemake(
    unscored: Project, undisturbed: Project
) -> None:
    (unscored.results / f"logs/score/{RUN}.jsonl").unlink()  # of the run that it is a copy of
    with (unscored.root / "output.txt").open("w") as file:
        first = psutil.Popen(
            unscored.command(*TARGETS),
            cwd=unscored.root,
            env=unscored.environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        log = unscored.results / f"logs/score/{RUN}.jsonl"
        deadline = time.monotonic() + PATIENCE
        while '"event": "phase"' not in (log.read_text() if log.exists() else ""):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        job = psutil.Process(json.loads(log.read_text().splitlines()[0])["pid"])
        job.suspend()
        code, output = call(unscored)
        assert code != 0
        assert "Directory cannot be locked" in output
        text = unscored.config_file.read_text()
        unscored.edit(lambda config: config["schemes"]["fp8"].update(effective_bits=9.0))
        job.resume()
        assert first.wait(PATIENCE) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
    # The run went by the config that it was started with.
    assert_same(unscored, undisturbed)
    outcome = unscored.run(*TARGETS)
    assert f"solve/{SCHEME}" in outcome.jobs
    assert not any(name.startswith("score/") for name in outcome.jobs)
    unscored.config_file.write_text(text)
    assert_ends_well(unscored, undisturbed)


def test_a_database_build_killed_in_the_middle_of_its_write(
    unscored: Project, undisturbed: Project, tmp_path: Path
) -> None:
    database = unscored.results / "calibration/words.sqlite"
    database.unlink()
    environment = injected(
        tmp_path / "fault",
        """
        import os, signal, sys
        if "dataset" in sys.orig_argv:
            # The file is written and not yet renamed.
            os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    code, _ = call(unscored, "results/calibration/words.sqlite", environment=environment)
    assert code != 0
    assert not database.exists()
    assert list(database.parent.glob(".words.sqlite.*.part"))  # what the kill left
    assert_ends_well(unscored, undisturbed)


def test_an_export_killed_in_the_middle_of_its_write(
    done: Project, undisturbed: Project, tmp_path: Path
) -> None:
    done.edit(lambda config: config["runs"][RUN].update(export=["fp8"]))
    environment = injected(
        tmp_path / "fault",
        """
        import os, signal, sys
        if "export" in sys.orig_argv:
            # The files are written, and the folder has not its name yet.
            os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    code, _ = call(done, "export", environment=environment)
    assert code != 0
    folder = done.results / SCHEME
    assert (folder / ".checkpoint.part/model.safetensors").exists()  # what the kill left
    assert not (folder / "checkpoint").exists()
    assert not (folder / "checkpoint.json").exists()
    code, output = call(done, "export")
    assert code == 0, output
    assert not (folder / ".checkpoint.part").exists()
    exported = done.json(f"{SCHEME}/checkpoint.json")
    assert exported["checked"]["problems"] == []
    assert exported["files"] == {
        file.name: file.stat().st_size for file in (folder / "checkpoint").iterdir()
    }
    assert_same(done, undisturbed)


# --- the hub -------------------------------------------------------------------------------------


def test_a_hub_that_fails(unscored: Project, undisturbed: Project, tmp_path: Path) -> None:
    """Each failure is told before any GPU job starts; then the hub is sound, and all goes on."""
    files = unscored.root / "checkpoints/llm"
    local = json.loads((unscored.results / "models/llm/model.json").read_bytes())
    unscored.edit(lambda config: config["models"]["llm"].update(checkpoint="owner/llm"))
    environment = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_planted_secret",
        "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",  # which a command run by an earlier test may have set
    }
    for behaviour, expected in (
        ("silent", "the hub cannot be reached"),
        ("401", "log in with `hf auth login`"),
        ("404", "there is no owner/llm on the hub"),
        ("half", "owner/llm"),
    ):
        with hub(behaviour, files) as address:
            code, output = call(unscored, environment={**environment, "HF_ENDPOINT": address})
        assert code != 0, behaviour
        (sentence,) = set(errors(output))
        assert expected in sentence
        assert "please report" not in sentence, output
        assert not (unscored.results / f"{RUN}/scores.json").exists()
    with hub("sound", files) as address:
        code, output = call(unscored, environment={**environment, "HF_ENDPOINT": address})
    assert code == 0, output
    for log in (unscored.results / "logs").rglob("*"):
        assert log.is_dir() or b"hf_planted_secret" not in log.read_bytes()
    record = json.loads((unscored.results / "models/llm/model.json").read_bytes())
    assert record["digest"] == local["digest"]
    ours, theirs = unscored.results, undisturbed.results
    # The same weights under another name, which stands in the tables' metadata and the manifest.
    for name in ("sensitivity.parquet", f"{SCHEME}/layers.parquet", f"{SCHEME}/frontier.parquet"):
        assert pq.read_table(ours / name).equals(pq.read_table(theirs / name)), name
    manifest = stable_manifest(ours / SCHEME / "manifest.json")
    manifest = manifest.replace('"owner/llm"', '"./checkpoints/llm"')
    manifest = manifest.replace(f'"{record["revision"]}"', "null")
    copied = undisturbed.json(f"{RUN}/scores.json")["formats"]
    for name, entry in unscored.json(f"{RUN}/scores.json")["formats"].items():
        # It covers where the model came from.
        manifest = manifest.replace(entry["digest"], copied[name]["digest"])
    assert manifest == stable_manifest(theirs / SCHEME / "manifest.json")
