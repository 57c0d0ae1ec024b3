"""Preflight: what is here, what is missing, and how to mend it, before anything is submitted.

Each check looks at one thing and never raises; none imports torch, which takes longer than all of
them, so a GPU is asked about through its driver.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from layersense import paths
from layersense.config import Config
from layersense.errors import LayersenseError
from layersense.files import has_locks
from layersense.quantization.extensions import (
    EXTENSIONS,
    RETRY,
    Built,
    cache_folder,
    known_builds,
)
from layersense.quantization.formats import resolve_format
from layersense.validation import load_config_file

Status = Literal["ok", "warning", "error"]

_DISTRIBUTIONS: dict[str, Status] = {
    "snakemake": "error",
    "torch": "error",
    "nvidia-modelopt": "error",
    "transformers": "error",
    "pyarrow": "error",
    "snakemake-executor-plugin-slurm": "warning",
}
_MINIMUM_FREE_GB = 10
_MIN_JOB_AGE_SECONDS = 120
_CAPABILITIES = {"FP8": (8, 9), "NVFP4": (10, 0), "MX": (10, 0)}
"""Compute capability from which a format's kernels are native; below, they are simulated."""


@dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    status: Status
    what: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f"\n         fix: {self.fix}" if self.fix else ""
        return f"{self.status:<8} {self.what}: {self.found}{fix}"


def examine(config_file: Path | None, profile: Path | None) -> Iterator[Line]:
    """Yield what is found, in the order in which a run would need it.

    Args:
        config_file: config to check the machine against; None looks at the machine alone.
        profile: folder of the profile that will be used, None for the default one.
    """
    config: Config | None = None
    if config_file is not None:
        line, config = _config(config_file)
        yield line
    yield _python()
    yield from _versions()
    yield from _gpus(config)
    yield from _compiler(config)
    yield from _memory()
    yield from _disk()
    yield from _results()
    yield from _slurm(profile)


def _config(file: Path) -> tuple[Line, Config | None]:
    try:
        config = load_config_file(file)
    except LayersenseError as error:
        return Line("error", "config", str(error), f"correct {file}"), None
    runs = f"{len(config.runs)} run(s), {len(config.schemes)} scheme(s)"
    return Line("ok", "config", f"{file}: {runs}"), config


def _python() -> Line:
    version = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036 (a clone may be started by any Python)
        return Line("error", "Python", version, "use Python 3.11 or later")
    return Line("ok", "Python", f"{version} ({sys.executable})")


def _versions() -> Iterator[Line]:
    for name, status in _DISTRIBUTIONS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            what = "is needed on a cluster alone" if status == "warning" else "is needed"
            yield Line(status, name, f"not installed ({what})", "make install")
            continue
        wanted = _pins().get(name)
        if wanted not in (None, version):
            yield Line(
                "warning", name, f"{version}, tested with {wanted}", f"pip install {name}=={wanted}"
            )
        else:
            yield Line("ok", name, version)


def _gpus(config: Config | None) -> Iterator[Line]:
    runs = [name for name, run in config.runs.items() if run.device == "cuda"] if config else []
    if config is not None and not runs:
        yield Line("ok", "GPU", "no run asks for one")
        return
    missing: Status = "error" if runs else "warning"
    fix = "set `device: cpu` in the runs, or use a machine with a GPU (on a cluster: on its nodes)"
    try:
        import pynvml

        pynvml.nvmlInit()
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        names = [_text(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
        capabilities = [
            tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)) for handle in handles
        ]
    except Exception as error:  # no package, no driver: whatever NVML says
        yield Line(missing, "GPU", f"none can be used ({error})", fix)
        return
    if not handles:
        yield Line(missing, "GPU", f"driver {driver}, no GPU", fix)
        return
    for name, (major, minor) in zip(names, capabilities, strict=True):
        yield Line("ok", "GPU", f"{name}, compute capability {major}.{minor}, driver {driver}")
    if config is not None:
        yield from _native_formats(config, min(capabilities))


def _native_formats(config: Config, capability: tuple[int, ...]) -> Iterator[Line]:
    used = {name for scheme in config.schemes.values() for name in scheme.all_formats}
    simulated = sorted(
        name
        for name in used
        if (needed := _needed_capability(name, config)) and capability < needed
    )
    if simulated:
        yield Line(
            "warning",
            "formats",
            f"{', '.join(simulated)}: simulated on compute capability "
            f"{'.'.join(map(str, capability))}; scores hold, speed does not",
            "nothing, if you measure for a newer GPU",
        )


def _needed_capability(name: str, config: Config) -> tuple[int, int] | None:
    try:
        format = resolve_format(name, config.formats)
    except LayersenseError:
        return None
    words = f"{format.weight_format} {format.act_format}"
    return max((need for word, need in _CAPABILITIES.items() if word in words), default=None)


def _compiler(config: Config | None) -> Iterator[Line]:
    cuda = config is None or any(run.device == "cuda" for run in config.runs.values())
    if not cuda:
        return
    missing = [name for name in ("nvcc", "g++", "ninja") if _program(name) is None]
    if missing:
        yield Line(
            "warning",
            "CUDA compiler",
            f"no {', '.join(missing)}: FP8 is simulated; INT8, INT4 and MX are left out on a GPU",
            "pip install --require-hashes -r envs/cuda.lock; apt-get install g++",
        )
    else:
        yield Line("ok", "CUDA compiler", "nvcc, g++ and ninja")
    folder = cache_folder(config.extensions if config else None)
    by_key: dict[str, list[Built]] = {}
    for record in known_builds(folder):
        by_key.setdefault(record.key, []).append(record)
    if not by_key:
        yield Line("ok", "extension cache", f"{_short(folder)}: empty, filled before the first run")
    for key, records in by_key.items():
        there = ", ".join(record.extension for record in records if record.state == "built")
        yield Line("ok", "extension cache", f"{_short(folder)}/{key}: {there or 'nothing built'}")
        for record in records:
            if record.state == "failed":
                yield Line(
                    "warning",
                    "extension",
                    f"{EXTENSIONS[record.extension]}: could not be built ({record.reason})",
                    f"mend that, then `{RETRY}`",
                )


def _memory() -> Iterator[Line]:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError):
        return
    if total < 8:
        yield Line(
            "warning", "memory", f"{total:.0f} GB, scoring asks for 8", "use a larger machine"
        )
    else:
        yield Line("ok", "memory", f"{total:.0f} GB")


def _disk() -> Iterator[Line]:
    results = Path(paths.RESULTS)
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for what, folder in (("results", results), ("checkpoints of the hub", hub)):
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents)
                     if parent.exists())  # fmt: skip
        free = shutil.disk_usage(there).free / 1e9
        name = f"free disk for {what}"
        if not os.access(there, os.W_OK):
            yield Line("error", name, f"{_short(there)} is not writable", "make it writable")
        elif free < _MINIMUM_FREE_GB:
            move = "set HF_HOME to a larger disk" if folder is hub else "link results/ elsewhere"
            yield Line("warning", name, f"{free:.1f} GB in {_short(there)}", move)
        else:
            yield Line("ok", name, f"{free:.0f} GB in {_short(there)}")


def _results() -> Iterator[Line]:
    results = Path(paths.RESULTS)
    if not results.is_dir():
        return
    try:
        locks = has_locks(results)
    except OSError as error:
        yield Line("error", "locks", f"no file can be made in results/ ({error.strerror})",
                   "make the folder writable")  # fmt: skip
        return
    if locks:
        yield Line("ok", "locks", "kernel locks work in results/")
    else:
        yield Line(
            "warning",
            "locks",
            "the file system of results/ has none: a second job of a run is not kept from "
            "measuring the same",
            "after a kill, see that no job of the run is left; or link results/ to another disk",
        )
    damaged, sound = [], 0
    for file, read in _outputs(results):
        try:
            read(file)
            sound += 1
        except Exception:  # whatever a damaged file provokes
            damaged.append(str(file))
    if damaged:
        shown = ", ".join(damaged[:5]) + (f" and {len(damaged) - 5} more" if damaged[5:] else "")
        yield Line("error", "outputs", f"damaged: {shown}", "delete them and run `snakemake` again")
    elif sound:
        yield Line("ok", "outputs", f"{sound} file(s) in results/ can be read")


def _outputs(results: Path) -> Iterator[tuple[Path, Callable[[Path], object]]]:
    import pyarrow.parquet as pq

    from layersense.calibration.database import open_database
    from layersense.manifests.read import read_manifest
    from layersense.scoring.scores import read_scores

    def database(path: Path) -> None:
        with open_database(path):
            pass

    readers: tuple[tuple[str, Callable[[Path], object]], ...] = (
        ("calibration/*.sqlite", database),
        ("*/scores.json", read_scores),
        ("*/*/manifest.json", read_manifest),
        ("*.parquet", pq.read_metadata),
        ("*/*/*.parquet", pq.read_metadata),
    )
    for pattern, read in readers:
        for file in sorted(results.glob(pattern)):
            yield file, read


def _slurm(profile: Path | None) -> Iterator[Line]:
    settings = _profile(profile)
    wanted = settings.get("executor") == "slurm"
    if isinstance(settings.get("problem"), str):
        yield Line("error", "profile", str(settings["problem"]), "give the profile's folder")
        return
    if shutil.which("sbatch") is None:
        if wanted:
            yield Line("error", "SLURM", "no sbatch on this machine", "start it on a login node")
        return
    answer = _ask("scontrol", "show", "config")
    if answer is None:
        status: Status = "error" if wanted else "warning"
        yield Line(status, "SLURM", "the controller does not answer", "ask the cluster's operators")
        return
    yield Line("ok", "SLURM", (_ask("sbatch", "--version") or "").strip())
    accounting = _setting(answer, "AccountingStorageType")
    command = settings.get("slurm-status-command")
    age = int(re.match(r"\d+", _setting(answer, "MinJobAge") or "0")[0])  # type: ignore[index]
    if accounting == "accounting_storage/none" and command != "squeue":
        yield Line(
            "error" if wanted else "warning",
            "SLURM status",
            "there is no accounting database, and `sacct` would be asked for ever",
            "slurm-status-command: squeue in the profile",
        )
    elif command == "squeue" and age < _MIN_JOB_AGE_SECONDS:
        yield Line(
            "warning",
            "SLURM status",
            f"ended jobs are forgotten after {age} s, too soon for `squeue`",
            "slurm-status-command: sacct in the profile, if there is a database",
        )
    else:
        yield Line("ok", "SLURM status", f"{command or 'sacct'}, jobs are kept {age} s")
    if "SLURM_CONF" in os.environ:
        yield Line(
            "warning",
            "SLURM_CONF",
            "is set, and the job steps of Snakemake's plugin lose it",
            "see that nodes find the configuration without it: `env -u SLURM_CONF srun hostname`",
        )
    gres = sorted(set((_ask("sinfo", "--noheader", "--format=%G") or "").split()))
    if gres in ([], ["(null)"]):
        yield Line(
            "warning", "SLURM GPUs", "no partition offers any", "ask for the right partition"
        )
    else:
        yield Line("ok", "SLURM GPUs", ", ".join(gres))
    if wanted and not settings.get("retries"):
        yield Line(
            "warning",
            "profile",
            "no `retries`: a job at its time limit or preempted is not submitted again",
            "retries: 3",
        )
    if settings.get("slurm-array-jobs"):
        yield Line(
            "error",
            "profile",
            "`slurm-array-jobs` gives every job the resources of the first",
            "remove it",
        )


def _profile(folder: Path | None) -> Mapping[str, Any]:
    if folder is None:
        return {}
    file = folder / "config.yaml" if folder.is_dir() else folder
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return {"problem": f"{file}: cannot be read ({type(error).__name__})"}
    return content if isinstance(content, dict) else {}


def _pins() -> dict[str, str]:
    """Return the tested versions, where the repository's pins lie beside the package."""
    pins: dict[str, str] = {}
    for name in ("snakemake.txt", "report.txt", "cpu.txt"):
        file = Path(__file__).resolve().parents[2] / "envs" / name
        if file.is_file():
            pins.update(re.findall(r"^([\w.-]+)==(\S+)", file.read_text(), flags=re.MULTILINE))
    return pins


def _setting(text: str, key: str) -> str | None:
    found = re.search(rf"^{key}\s*=\s*(.*)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else None


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _program(name: str) -> str | None:
    beside = Path(sys.executable).parent
    # pip installs nvcc among Python's packages.
    installed = beside.parent.glob("lib/python*/site-packages/nvidia/cu*/bin")
    folders = [beside, *installed, os.environ.get("PATH", "")]
    return shutil.which(name, path=":".join(map(str, folders)))


def _short(path: Path) -> str:
    """Return a path with the home folder as ``~``: what is printed may be shown to others."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def worst(lines: Sequence[Line]) -> Status:
    """Return the gravest status of all lines."""
    found = {line.status for line in lines}
    return "error" if "error" in found else "warning" if "warning" in found else "ok"
