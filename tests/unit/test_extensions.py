"""CUDA extensions: which are needed, what of a run goes on without, and that each is built once."""

import json
import multiprocessing
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from score_files import make_scores

from layersense import config
from layersense.errors import LayersenseError
from layersense.manifests.schema import Manifest
from layersense.quantization.extensions import (
    Built,
    cache_folder,
    extensions_of,
    is_complete,
    known_builds,
    needed_extensions,
    read_built,
    why_left_out,
)
from layersense.quantization.formats import known_formats, resolve_format
from layersense.recipes.decide import build_manifest

FP8, INT8 = "FP8_ALL_LAYERS_CFG", "INT8_ALL_LAYERS_CFG"
INT4 = "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG"
KEY = "sm_90-torch2"


def failed(name: str, reason: str = "nvcc: command not found") -> Built:
    return Built(extension=name, state="failed", key=KEY, reason=reason)


def there(name: str) -> Built:
    return Built(extension=name, state="built", key=KEY, library=f"{name}.so")


@pytest.mark.parametrize(
    ("name", "with_images", "text"),
    [
        (FP8, "fp8", "fp8"),
        (INT8, "int", "int"),
        (INT4, "int", "int"),
        ("W4A8_AWQ_BETA_ALL_LAYERS_CFG", "int fp8", "int fp8"),
        ("MXFP4_ALL_LAYERS_CFG", "mx", "mx"),
        ("W4A16_NVFP4_ALL_LAYERS_CFG", "nvfp4", "nvfp4"),
        ("W4A8_NVFP4_FP8_ALL_LAYERS_CFG", "fp8 nvfp4", "fp8 nvfp4"),
        # Both sides NVFP4: ModelOpt's own kernel for 3-D convolutions.
        ("NVFP4_ALL_LAYERS_CFG", "nvfp4 conv3d", "nvfp4"),
        # Static blocks: their scales are FP8.
        ("NVFP4_FOUR_OVER_SIX_ALL_LAYERS_CFG", "fp8 nvfp4 conv3d", "fp8 nvfp4"),
    ],
)
def test_what_a_format_needs(name: str, with_images: str, text: str) -> None:
    assert extensions_of(known_formats()[name], "image_text") == tuple(with_images.split())
    assert extensions_of(known_formats()[name], "text") == tuple(text.split())


def test_a_run_needs_each_extension_once() -> None:
    formats = [resolve_format(name, {}) for name in (INT4, FP8, INT8)]
    assert needed_extensions(formats, "text") == ["int", "fp8"]
    assert needed_extensions([], "text") == []


def test_only_fp8_goes_on_without_its_extension() -> None:
    built = {name: failed(name) for name in ("int", "fp8", "mx", "nvfp4")}
    for name, format in known_formats().items():
        reason = why_left_out(format, built, "text")
        assert (reason is None) == (format.extensions == ("fp8",)), name
        assert reason is None or "nvcc: command not found" in reason
    assert why_left_out(known_formats()[INT8], {"int": there("int")}, "text") is None
    assert why_left_out(known_formats()[INT8], {}, "text") is None


def test_nvfp4_falls_with_the_kernel_of_3d_convolutions_only_where_there_are_images() -> None:
    format = known_formats()["NVFP4_ALL_LAYERS_CFG"]
    built = {"nvfp4": there("nvfp4"), "conv3d": failed("conv3d", "needs SM80")}
    assert why_left_out(format, built, "text") is None
    assert why_left_out(format, built, "image_text") == (
        "ModelOpt's CUDA extension for NVFP4 in 3-D convolutions could not be built (needs SM80)"
    )


def test_complete_means_known_to_be_there() -> None:
    format = known_formats()["W4A8_AWQ_BETA_ALL_LAYERS_CFG"]
    assert not is_complete(format, {}, "text")
    assert not is_complete(format, {"int": there("int"), "fp8": failed("fp8")}, "text")
    assert is_complete(format, {"int": there("int"), "fp8": there("fp8")}, "text")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert cache_folder() == Path("/home/somebody/.cache/torch_extensions")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/scratch")
    assert cache_folder() == Path("/scratch")
    assert cache_folder("~/mine") == Path("/home/somebody/mine")


def test_a_damaged_record_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / KEY / "fp8.json"
    file.parent.mkdir()
    file.write_text("{")
    with pytest.raises(LayersenseError, match="snakemake --forcerun extension"):
        read_built(file)
    assert known_builds(tmp_path) == []


# --- a scheme without one of its formats ---------------------------------------------------------


def decided(bits: float, *names: str) -> Manifest:
    scores = make_scores(formats=[FP8])
    scores.left_out = {INT4: "ModelOpt's CUDA extension for integers could not be built (no nvcc)"}
    scheme = config.Scheme(quant_formats=list(names), effective_bits=bits)
    return build_manifest(scores, "demo", "s", scheme, {})


def test_a_scheme_is_decided_without_what_was_left_out_and_says_so() -> None:
    manifest = decided(9.0, FP8, INT4)
    assert set(manifest.run) == {FP8}
    assert manifest.scheme.quant_formats == [FP8, INT4]
    (finding,) = [found for found in manifest.findings if found.code == "format-left-out"]
    assert finding.what == f"{INT4}: not measured, and no part of the recipe."
    assert "(no nvcc)" in finding.why
    assert "snakemake --forcerun extension" in finding.fix


def test_a_scheme_of_nothing_but_what_was_left_out_is_refused() -> None:
    with pytest.raises(LayersenseError, match=r"none of its formats could be measured; INT4.*nvcc"):
        decided(9.0, INT4)


def test_a_budget_that_needs_what_was_left_out_says_that() -> None:
    with pytest.raises(LayersenseError, match=f"cannot be met.*{INT4} could not be measured"):
        decided(5.0, FP8, INT4)


# --- the job -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_measures_the_rest_and_comes_back_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from studies import study
    from tiny_models import save_tiny_llama

    from layersense.scoring import job
    from layersense.scoring.scores import read_scores, write_scores

    checkpoint = save_tiny_llama(tmp_path / "llm")
    states = {"int": failed("int"), "fp8": failed("fp8")}
    monkeypatch.setattr(job, "extensions_here", lambda *_: states)

    def measured(*formats: str, **arguments: Any) -> Any:
        return study(tmp_path, checkpoint, "causal-lm", formats=formats, max_length=16, **arguments)

    with pytest.raises(LayersenseError, match=r"format `INT8.*command not found.*no other format"):
        measured(INT8)
    first = measured(FP8, INT8)
    assert set(first.scores.formats) == {FP8}
    assert first.scores.left_out[INT8].endswith("(nvcc: command not found)")
    assert first.findings("format-left-out")
    # As it would be on a GPU.
    file = checkpoint / "study" / "scores.json"
    scores = read_scores(file)
    scores.formats[FP8].kernel = "simulated"
    before = scores.formats[FP8].digest
    write_scores(file, scores)

    again = measured(FP8, INT8, built=states)
    assert again.scores.formats[FP8].kernel == "simulated"  # nothing new, nothing measured
    states = {"int": there("int"), "fp8": there("fp8")}
    mended = measured(FP8, INT8, built=states)
    assert set(mended.scores.formats) == {FP8, INT8}
    assert mended.scores.formats[FP8].kernel == "native"  # measured anew, on the CPU of this test
    assert mended.scores.formats[FP8].digest == before
    assert mended.scores.left_out == {}
    assert not mended.findings("format-left-out")


# --- building, with a compiler but no GPU --------------------------------------------------------

MODULE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "modelopt_cuda_ext"};
PyMODINIT_FUNC PyInit_modelopt_cuda_ext(void) { return PyModule_Create(&definition); }
"""


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module that builds, as on a machine with a GPU whose compiler is the system's own.

    ``compile.source`` is what it is given, and each compilation adds a line to ``compilations``.
    """
    pytest.importorskip("torch")
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        pytest.skip(f"{include}/Python.h is not there")
    from layersense.quantization import build

    log = tmp_path / "compilations"
    log.touch()

    def compile() -> Any:
        with log.open("a") as file:
            file.write("one\n")
        folder = tmp_path / "cache" / KEY / "modelopt_cuda_ext"
        folder.mkdir(exist_ok=True)
        source, library = folder / "source.cpp", folder / "modelopt_cuda_ext.so"
        source.write_text(compile.source)  # type: ignore[attr-defined]
        time.sleep(0.3)
        done = subprocess.run(
            ["g++", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(library)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(
                f"Error building extension 'modelopt_cuda_ext': [1/1]\n{done.stderr}"
            )
        return build._load("modelopt_cuda_ext", library)

    compile.source = MODULE  # type: ignore[attr-defined]
    monkeypatch.setattr(build, "key_of_this_machine", lambda: KEY)
    monkeypatch.setitem(build.BUILDERS, "int", compile)
    monkeypatch.setattr(
        build.modelopt_extensions,
        "load_cpp_extension",
        build.modelopt_extensions.load_cpp_extension,
    )
    monkeypatch.setattr(
        build.implicit_gemm_cuda, "_get_cuda_module", build.implicit_gemm_cuda._get_cuda_module
    )
    yield build
    for getter in build._GETTERS.values():  # what `use` has put into ModelOpt
        getter.__dict__.pop("extension", None)


def compilations(folder: Path) -> int:
    return len((folder / "compilations").read_text().splitlines())


@pytest.mark.slow
def test_what_is_built_is_loaded_and_not_built_again(builds: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = builds.build("int", cache)
    assert (first.state, first.key) == ("built", KEY)
    assert first.library == "modelopt_cuda_ext/modelopt_cuda_ext.so"
    assert builds.build("int", cache) == first
    assert builds.use(["int"], cache) == {"int": first}
    assert builds._GETTERS["int"].extension.__name__ == "modelopt_cuda_ext"
    assert compilations(tmp_path) == 1
    assert known_builds(cache) == [first]
    # Without its library the record is worth nothing.
    (cache / KEY / first.library).unlink()
    assert builds.use(["int"], cache)["int"].state == "built"
    assert compilations(tmp_path) == 2


@pytest.mark.slow
def test_what_failed_is_tried_again_by_its_own_job_alone(builds: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    compile: Any = builds.BUILDERS["int"]
    compile.source = "#include <cuda_of_nobody.h>"
    found = builds.build("int", cache)
    assert found.state == "failed"
    assert "cuda_of_nobody.h: No such file or directory" in found.reason
    compile.source = MODULE
    assert builds.use(["int"], cache) == {"int": found}
    # ModelOpt's own loader, in the midst of a measurement, ends at the same answer.
    builds._GETTERS["int"].__dict__.pop("extension", None)
    assert builds._GETTERS["int"]() is None
    builds._GETTERS["int"].__dict__.pop("extension")
    with pytest.raises(RuntimeError, match="cuda_of_nobody"):
        builds._GETTERS["int"](raise_if_failed=True)
    assert compilations(tmp_path) == 1
    assert builds.build("int", cache).state == "built"
    assert compilations(tmp_path) == 2


@pytest.mark.slow
def test_another_gpu_or_version_is_built_for_openly(
    builds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    builds.build("int", cache)
    monkeypatch.setattr(builds, "key_of_this_machine", lambda: "sm_80-torch2")
    monkeypatch.setitem(
        builds.BUILDERS, "int", lambda: (_ for _ in ()).throw(OSError("CUDA_HOME is not set"))
    )
    with caplog.at_level("INFO"):
        found = builds.use(["int"], cache)["int"]
    assert (found.state, found.reason) == ("failed", "CUDA_HOME is not set")
    assert "sm_80-torch2: building the extension for integers" in caplog.text
    assert {record.key: record.state for record in known_builds(cache)} == {
        KEY: "built",
        "sm_80-torch2": "failed",
    }


@pytest.mark.slow
def test_jobs_at_once_build_once(builds: Any, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()

    def job() -> None:
        answers.put(builds.build("int", tmp_path / "cache").state)

    jobs = [context.Process(target=job) for _ in range(3)]
    for process in jobs:
        process.start()
    states = [answers.get(timeout=60) for _ in jobs]
    for process in jobs:
        process.join()
    assert states == ["built"] * 3
    assert compilations(tmp_path) == 1


@pytest.mark.slow
def test_the_compiler_that_pip_has_installed_is_found(
    builds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builds.cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("LIBRARY_PATH", "/mine")
    packages, folder = tmp_path / "packages", tmp_path / "folder"
    folder.mkdir()
    builds._find_installed_compiler(packages, folder)
    assert builds.cpp_extension.CUDA_HOME is None
    home = packages / "nvidia" / "cu13"
    for file in ("bin/nvcc", "lib/libcudart.so.13"):
        (home / file).parent.mkdir(parents=True)
        (home / file).touch()
    for _ in range(2):  # a second build finds the link
        builds._find_installed_compiler(packages, folder)
    assert Path(builds.cpp_extension.CUDA_HOME) == home
    assert (folder / "lib/libcudart.so").resolve() == (home / "lib/libcudart.so.13").resolve()
    assert f"{folder}/lib:" in builds.os.environ["LIBRARY_PATH"]
    assert builds.os.environ["LIBRARY_PATH"].endswith(":/mine")


@pytest.mark.slow
def test_modelopt_itself_says_why_it_builds_nothing_here(builds: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = builds.build("fp8", tmp_path / "cache")
    assert found.state == "failed"
    assert "CUDA is not available" in found.reason
    record = json.loads((tmp_path / "cache" / KEY / "fp8.json").read_text())
    assert record["reason"] == found.reason


@pytest.mark.slow
def test_without_a_gpu_there_is_nothing_to_build_for(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from layersense.quantization.build import build

    with pytest.raises(LayersenseError, match="no NVIDIA GPU can be used"):
        build("fp8", tmp_path)
    assert list(tmp_path.iterdir()) == []
