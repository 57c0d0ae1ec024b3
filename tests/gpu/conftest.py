"""What the GPU tests share; `python -m pytest tests/gpu` on a machine with a CUDA GPU and nvcc."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "unit"))


@pytest.fixture(scope="session", autouse=True)
def cuda() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU here")
