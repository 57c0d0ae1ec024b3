"""Fixtures that every test may use."""

from pathlib import Path

import pytest

from projects import done_study, new_study, study

__all__ = ["done_study", "new_study", "study"]

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real COCO images and foreign manifests, which are not part of the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder
