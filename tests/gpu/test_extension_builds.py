"""CUDA extensions on a real GPU: compiled once, then loaded without a compiler; and no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

torch = pytest.importorskip("torch")

JOB = """
import sys
from pathlib import Path
from layersense.quantization.build import {function}
from layersense.quantization.formats import known_formats
from layersense.quantization.modelopt_formats import kernel_mode
found = {call}
print(found.state, "|", found.reason, "|", {after})
"""
USE = "use([{name!r}], Path(sys.argv[1]))[{name!r}]"


def job(cache: Path, name: str, *, building: bool, after: str = "''", **changes: str) -> list[str]:
    """Build (or use) an extension in a process of its own; return state, reason and an answer."""
    call = f"build({name!r}, Path(sys.argv[1]))" if building else USE.format(name=name)
    code = JOB.format(function="build" if building else "use", call=call, after=after)
    return answer(start(code, cache, **changes))


def start(code: str, cache: Path, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(cache)],
        env={**os.environ, **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return [part.strip() for part in out.splitlines()[-1].split("|")]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Extension → a cache of its own with nothing but it, all built at the same time."""
    caches = {name: tmp_path_factory.mktemp(name) for name in ("fp8", "int", "conv3d")}
    building = {}
    for name, cache in caches.items():
        call = f"build({name!r}, Path(sys.argv[1]))"
        building[name] = start(JOB.format(function="build", call=call, after="''"), cache)
    # All of them are waited for before anything is skipped.
    answers = {name: answer(process) for name, process in building.items()}
    for name, (state, reason, _) in answers.items():
        if state == "failed":
            pytest.skip(f"the extension {name} cannot be built here: {reason}")
    return caches


def mode(format: str) -> str:
    return f"kernel_mode(known_formats()[{format!r}], 'cuda')"


@pytest.mark.parametrize(
    ("name", "format"), [("fp8", "FP8_ALL_LAYERS_CFG"), ("int", "INT8_ALL_LAYERS_CFG")]
)
def test_built_once_and_then_loaded_without_a_compiler(
    fresh: dict[str, Path], name: str, format: str
) -> None:
    cache = fresh[name]
    (library,) = cache.glob("*/*/*.so")
    written = library.stat().st_mtime_ns
    nowhere = {"PATH": "/nowhere", "CUDA_HOME": "/nowhere"}
    assert job(cache, name, building=False, after=mode(format), **nowhere) == [
        "built",
        "",
        "compiled",
    ]
    assert job(cache, name, building=True, **nowhere)[0] == "built"
    assert library.stat().st_mtime_ns == written


def test_without_a_compiler_fp8_is_simulated_and_the_reason_is_kept(tmp_path: Path) -> None:
    nowhere = {"PATH": "/nowhere", "CUDA_HOME": "/nowhere"}
    state, reason, _ = job(tmp_path, "fp8", building=True, **nowhere)
    assert state == "failed"
    assert reason
    # A compiler in reach is not tried by a job that measures.
    again = job(tmp_path, "fp8", building=False, after=mode("FP8_ALL_LAYERS_CFG"))
    assert again == ["failed", reason, "simulated"]
    assert not list(tmp_path.glob("*/*/*.so"))


def test_the_kernel_of_3d_convolutions(fresh: dict[str, Path]) -> None:
    loaded = job(
        fresh["conv3d"],
        "conv3d",
        building=False,
        after="__import__('modelopt.torch.kernels.quantization.conv.implicit_gemm_cuda', "
        "fromlist=['x'])._get_cuda_module().__file__",
        PATH="/nowhere",
        CUDA_HOME="/nowhere",
    )
    assert loaded[0] == "built"
    assert loaded[2].startswith(str(fresh["conv3d"]))
