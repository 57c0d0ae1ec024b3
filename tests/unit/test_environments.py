"""The pins of envs/: requirements and conda files agree, and the light one is light."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml

CONDA_ONLY = {"python", "pip", "cuda-nvcc", "gxx"}
# On PyPI and conda-forge the same package has two names or comes in the other way.
CONDA_NAMES = {"nvidia-cuda-nvcc": "cuda-nvcc", "ninja": "ninja"}


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
            pytest.skip(f"{package} is not installed; run `pip install --no-deps -r envs/yolo.txt`")
        assert installed == version, package


def test_every_rule_names_an_environment_that_exists(repository: Path) -> None:
    for rules in (repository / "workflow" / "rules").glob("*.smk"):
        text = rules.read_text()
        for name in re.findall(r'environment\("(\w+)"', text):
            assert (repository / "envs" / f"{name}.yaml").exists(), (rules.name, name)
