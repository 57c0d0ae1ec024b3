"""The preflight: every line from something provoked, none an exception."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from layersense import doctor
from layersense.doctor import Line, examine, worst

SCONTROL = """\
AccountingStorageType   = {accounting}
MinJobAge               = {age} sec
"""
CONFIG = {
    "datasets": {"photos": {"source": "sample", "calibration": 8, "heldout": 2}},
    "models": {"demo": {"source": "demo"}},
    "schemes": {"s": {"quant_formats": ["FP8_ALL_LAYERS_CFG"], "effective_bits": 11.0}},
    "runs": {"r": {"model": "demo", "dataset": "photos", "schemes": ["s"], "device": "cuda"}},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on it but Python."""
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("SLURM_CONF", "HF_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as where it is not installed
    return tmp_path


def program(place: Path, name: str, output: str) -> None:
    file = place / "bin" / name
    file.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{output}\nEND\n")
    file.chmod(0o755)


def slurm(place: Path, accounting: str = "accounting_storage/none", age: int = 300) -> None:
    program(place, "sbatch", "slurm-wlm 22.05.8")
    program(place, "scontrol", SCONTROL.format(accounting=accounting, age=age))
    program(place, "sinfo", "gpu:4")


def profile(place: Path, **settings: object) -> Path:
    folder = place / "profile"
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"executor": "slurm", **settings}))
    return folder


def found(config: Path | None = None, profile: Path | None = None) -> dict[str, list[Line]]:
    lines: dict[str, list[Line]] = {}
    for line in examine(config, profile):
        lines.setdefault(line.what, []).append(line)
        assert (line.status == "ok") == (not line.fix), line
    return lines


def config(place: Path, **run: object) -> Path:
    file = place / "config.yaml"
    content = {**CONFIG, "runs": {"r": {**CONFIG["runs"]["r"], **run}}}
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_machine_with_nothing_and_nothing_configured(place: Path) -> None:
    lines = found()
    assert lines["GPU"][0].status == "warning"
    assert "SLURM" not in lines
    assert "config" not in lines


def test_a_missing_gpu_is_an_error_only_where_a_run_needs_one(place: Path) -> None:
    assert found(config(place))["GPU"][0].status == "error"
    assert found(config(place, device="cpu"))["GPU"][0].status == "ok"


def test_a_wrong_config_is_told_in_full(place: Path) -> None:
    file = config(place, batch_size="four")
    (line,) = found(file)["config"]
    assert line.status == "error"
    assert "batch_size" in line.found


def test_gpus_and_formats_that_they_only_simulate(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nvml:
        nvmlInit = staticmethod(lambda: None)  # noqa: N815
        nvmlSystemGetDriverVersion = staticmethod(lambda: "580.1")  # noqa: N815
        nvmlDeviceGetCount = staticmethod(lambda: 1)  # noqa: N815
        nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)  # noqa: N815
        nvmlDeviceGetName = staticmethod(lambda handle: b"NVIDIA A100")  # noqa: N815
        nvmlDeviceGetCudaComputeCapability = staticmethod(lambda handle: (8, 0))  # noqa: N815

    monkeypatch.setitem(sys.modules, "pynvml", Nvml)
    lines = found(config(place))
    assert "NVIDIA A100, compute capability 8.0, driver 580.1" in lines["GPU"][0].found
    assert lines["formats"][0].status == "warning"
    assert "FP8_ALL_LAYERS_CFG" in lines["formats"][0].found


def test_a_missing_compiler_is_named(place: Path) -> None:
    (line,) = found()["CUDA compiler"]
    assert line.status == "warning"
    assert "g++" in line.found


def test_the_extensions_of_the_cache_are_listed(place: Path) -> None:
    (line,) = found()["extension cache"]
    assert line.found.endswith("torch_extensions: empty, filled before the first run")
    folder = place / "cache" / "sm_90-torch1"
    folder.mkdir(parents=True)
    for name, state in (("fp8", "built"), ("int", "built"), ("mx", "failed")):
        (folder / f"{name}.json").write_text(
            json.dumps(
                {"extension": name, "state": state, "key": "sm_90-torch1", "reason": "no nvcc"}
            )
        )
    file = config(place)
    file.write_text(yaml.safe_dump({**CONFIG, "extensions": str(place / "cache")}))
    lines = found(file)
    assert lines["extension cache"][0].found == "~/cache/sm_90-torch1: fp8, int"
    (failed,) = lines["extension"]
    assert (failed.status, failed.found) == ("warning", "MX formats: could not be built (no nvcc)")


def test_a_version_that_was_not_tested(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_pins", lambda: {"torch": "1.0"})
    (line,) = found()["torch"]
    assert (line.status, line.fix) == ("warning", "pip install torch==1.0")


def test_sacct_without_a_database_is_an_error(place: Path) -> None:
    slurm(place)
    assert found(profile=profile(place))["SLURM status"][0].status == "error"
    lines = found(profile=profile(place, **{"slurm-status-command": "squeue", "retries": 2}))
    assert lines["SLURM status"][0].status == "ok"
    assert "profile" not in lines
    assert lines["SLURM GPUs"][0].found == "gpu:4"


def test_squeue_that_forgets_too_soon(place: Path) -> None:
    slurm(place, age=10)
    lines = found(profile=profile(place, **{"slurm-status-command": "squeue"}))
    assert lines["SLURM status"][0].status == "warning"
    assert "10 s" in lines["SLURM status"][0].found


def test_flags_of_the_plugin_that_do_harm(place: Path) -> None:
    slurm(place, accounting="accounting_storage/slurmdbd")
    lines = found(profile=profile(place, **{"slurm-array-jobs": "all"}))
    assert {line.status for line in lines["profile"]} == {"warning", "error"}
    assert lines["SLURM status"][0].status == "ok"


def test_slurm_without_its_programs_or_its_controller(place: Path) -> None:
    assert found(profile=profile(place))["SLURM"][0].status == "error"
    program(place, "sbatch", "slurm")
    (place / "bin/scontrol").write_text("#!/bin/sh\nexit 1\n")
    (place / "bin/scontrol").chmod(0o755)
    assert "does not answer" in found(profile=profile(place))["SLURM"][0].found


def test_a_profile_that_is_not_there(place: Path) -> None:
    assert found(profile=place / "nothing")["profile"][0].status == "error"


def test_damaged_outputs_are_named(place: Path) -> None:
    (place / "results/run/scheme").mkdir(parents=True)
    (place / "results/run/scores.json").write_text("{")
    (place / "results/run/scheme/layers.parquet").write_bytes(b"PAR1")
    (line,) = found()["outputs"]
    assert line.status == "error"
    assert "results/run/scores.json" in line.found
    assert "results/run/scheme/layers.parquet" in line.found


def test_no_home_path_is_printed(place: Path) -> None:
    free = found()["free disk for checkpoints of the hub"][0].found
    assert str(place) not in free


def test_the_gravest_line_decides() -> None:
    ok, warning = Line("ok", "a", "b"), Line("warning", "a", "b", "c")
    assert worst([ok]) == "ok"
    assert worst([ok, warning]) == "warning"
    assert worst([Line("error", "a", "b", "c"), warning]) == "error"


def test_the_command_exits_by_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "layersense", "doctor", "--profile", "nothing"],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "error    profile: nothing: cannot be read" in done.stdout
    assert done.stderr == ""
