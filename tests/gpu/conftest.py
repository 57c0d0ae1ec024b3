"""What the GPU tests share; `python -m pytest tests/gpu` on a machine with a CUDA GPU and nvcc."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "unit"))

ORDER = (
    "test_kv_cache_formats.py",
    "test_engines.py",
    "test_two_gpus.py",
    "test_packed_checkpoints.py",
    "test_extension_builds.py",
)
"""Cheap files first, so that a time limit ends the long ones; one that is not named comes last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files in order, and leave the tests of other folders where they are."""
    places = [index for index, item in enumerate(items) if HERE in item.path.parents]
    ranks = {name: rank for rank, name in enumerate(ORDER)}
    ours = sorted(
        (items[index] for index in places),
        key=lambda item: ranks.get(item.path.name, len(ORDER)),
    )
    for index, item in zip(places, ours, strict=True):
        items[index] = item


@pytest.fixture(scope="session", autouse=True)
def cuda() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU here")


@pytest.fixture(scope="session", autouse=True)
def built(cuda: None) -> Mapping[str, Any]:
    """All extensions, built side by side where they are not there yet: about two minutes."""
    from cuda_extensions import use_all

    return use_all()


@pytest.fixture(scope="session")
def all_extensions(built: Mapping[str, Any]) -> None:
    """Skip what needs every extension where one could not be built, and say why it could not."""
    from layersense.quantization.extensions import sentence

    if failed := [sentence(one) for one in built.values() if one.state == "failed"]:
        pytest.skip("; ".join(failed))
