"""The pins of envs/: requirements and conda files agree, and the light one is light."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONDA_ONLY = {"python", "pip", "cuda-nvcc", "gxx"}
# On PyPI and conda-forge the same package has two names or comes in the other way.
CONDA_NAMES = {"nvidia-cuda-nvcc": "cuda-nvcc", "ninja": "ninja"}

# Parts of nvcc, which conda's package brings along.
PARTS_OF_NVCC = ("nvidia-cuda-crt", "nvidia-nvvm")


def requirements(folder: Path, name: str) -> dict[str, str]:
    pins: dict[str, str] = {}
    for line in (folder / f"{name}.txt").read_text().splitlines():
        if line.startswith("-r "):
            pins |= requirements(folder, line.removeprefix("-r ").removesuffix(".txt"))
        elif line and not line.startswith("#"):
            package, version = line.split("==")
            pins[package] = version
    return pins


def conda(folder: Path, name: str) -> tuple[dict[str, str], dict[str, str]]:
    entries = yaml.safe_load((folder / f"{name}.yaml").read_text())["dependencies"]
    pip = dict(
        pin.split("==") for entry in entries if isinstance(entry, dict) for pin in entry["pip"]
    )
    own = dict([*entry.split("="), ""][:2] for entry in entries if isinstance(entry, str))
    return own, pip


@pytest.mark.parametrize("name", ["report", "cpu", "cuda"])
def test_conda_file_and_requirements_pin_the_same(repository: Path, name: str) -> None:
    expected = requirements(repository / "envs", name)
    own, pip = conda(repository / "envs", name)
    parts = {expected.pop(package, None) for package in PARTS_OF_NVCC}
    assert parts == {expected.get("nvidia-cuda-nvcc")}
    for package, conda_name in CONDA_NAMES.items():
        if package in expected:
            assert expected.pop(package).startswith(own.pop(conda_name))
    assert pip == expected
    assert set(own) <= CONDA_ONLY


def test_report_environment_has_no_torch(repository: Path) -> None:
    pins = requirements(repository / "envs", "report")
    assert not {"torch", "torchvision", "transformers", "nvidia-modelopt"} & set(pins)


@pytest.mark.parametrize("name", ["snakemake", "cpu", "dev"])
def test_pins_are_what_is_installed(repository: Path, name: str) -> None:
    for package, version in requirements(repository / "envs", name).items():
        assert importlib.metadata.version(package) == version, package


def test_yolo_is_optional_and_changes_no_other_pin(repository: Path) -> None:
    pins = requirements(repository / "envs", "yolo")
    for name in ("report", "cpu", "cuda", "snakemake", "dev"):
        assert not set(pins) & set(requirements(repository / "envs", name)), name
    for package, version in pins.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(
                f"{package} is not installed; run `pip install --no-deps -r envs/yolo.lock`"
            )
        assert installed == version, package


def test_every_rule_names_an_environment_that_exists(repository: Path) -> None:
    for rules in (repository / "workflow" / "rules").glob("*.smk"):
        text = rules.read_text()
        for name in re.findall(r'environment\("(\w+)"', text):
            assert (repository / "envs" / f"{name}.yaml").exists(), (rules.name, name)


# --- what is installed: the pins, all that they need, and hashes

LOCKS = {
    "cpu": ("snakemake", "cpu"),
    "dev": ("snakemake", "dev"),
    "cuda": ("snakemake", "cuda"),
    "yolo": ("yolo",),
}
"""Lock file → what it locks; the Makefile's `lock` says the same."""


def lock(repository: Path, name: str) -> list[tuple[Requirement, set[str]]]:
    """Return the requirements of a lock file, each with its hashes."""
    text = (repository / "envs" / f"{name}.lock").read_text().replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            requirement, *hashes = line.split("--hash=")
            found.append((Requirement(requirement), {text.strip() for text in hashes}))
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_every_pin_with_hashes(repository: Path, name: str) -> None:
    locked = lock(repository, name)
    for requirement, hashes in locked:
        assert [pin.operator for pin in requirement.specifier] == ["=="], requirement
        assert hashes, requirement
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", entry) for entry in hashes), requirement
    versions = {
        canonicalize_name(requirement.name): next(iter(requirement.specifier)).version
        for requirement, _ in locked
    }
    for source in LOCKS[name]:
        for package, version in requirements(repository / "envs", source).items():
            assert versions.get(canonicalize_name(package)) == version, (
                f"envs/{name}.lock does not follow envs/{source}.txt in {package}: run `make lock`"
            )


@pytest.mark.parametrize("name", ["cpu", "dev"])
def test_a_lock_is_whole_and_is_what_is_installed(repository: Path, name: str) -> None:
    """`pip --require-hashes` refuses a package that another one needs and that no line pins."""
    here = {
        canonicalize_name(requirement.name): requirement
        for requirement, _ in lock(repository, name)
        if requirement.marker is None or requirement.marker.evaluate()
    }
    for package, requirement in here.items():
        # Another version than this may be what a machine's own index gave.
        for text in importlib.metadata.requires(package) or []:
            needed = Requirement(text)
            extras = {"extra": ""}
            if needed.marker is None or needed.marker.evaluate(extras):
                assert canonicalize_name(needed.name) in here, (
                    f"{requirement.name} needs {needed.name}, which envs/{name}.lock lacks"
                )


def test_locks_agree(repository: Path) -> None:
    versions: dict[str, set[str]] = {}
    for name in LOCKS:
        for requirement, _ in lock(repository, name):
            key = f"{canonicalize_name(requirement.name)} {requirement.marker}"
            versions.setdefault(key, set()).add(str(requirement.specifier))
    assert {key: found for key, found in versions.items() if len(found) > 1} == {}


def test_the_makefile_installs_by_hashes_alone(repository: Path) -> None:
    text = (repository / "Makefile").read_text()
    installs = re.findall(r"^\t\$\(PIP\) (.*)$", text, re.MULTILINE)
    assert installs
    for line in installs:
        # The package itself has no dependencies of its own, and builds with what is locked.
        assert line.startswith("--require-hashes ") or line == (
            "--no-deps --no-build-isolation --editable ."
        )
    for name, sources in LOCKS.items():
        recipe = " ".join(f"{source}.txt" for source in sources)
        assert f"{recipe} -o {name}.lock" in text
