"""Build ModelOpt's CUDA extensions once, and hand them to ModelOpt (torch).

Nothing else compiles: in a process that called :func:`use`, ModelOpt's own loaders end here, where
one kernel lock for each extension keeps two jobs from building the same, and where what failed once
is not tried again behind anybody's back.
"""

import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import torch
from modelopt.torch.kernels.quantization.conv import implicit_gemm_cuda
from modelopt.torch.quantization import extensions as modelopt_extensions
from torch.utils import cpp_extension

from layersense.errors import LayersenseError
from layersense.files import exclusive, write_record
from layersense.quantization.extensions import EXTENSIONS, Built, read_built, sentence
from layersense.quantization.modelopt_formats import has_triton_nvfp4

logger = logging.getLogger(__name__)

_NAMES = {
    "int": "modelopt_cuda_ext",
    "fp8": "modelopt_cuda_ext_fp8",
    "mx": "modelopt_cuda_ext_mx",
    "conv3d": "conv3d_implicit_gemm_cuda_v20_wmma",
}
"""Extension → name of its module; its folder in the cache is called so too."""
_original_load = modelopt_extensions.load_cpp_extension
_original_conv3d = implicit_gemm_cuda._get_cuda_module
_MAX_REASON = 300


def build(extension: str, cache: Path) -> Built:
    """Build an extension unless it is there and can be loaded, and return what came of it.

    An earlier failure is tried again.

    Raises:
        LayersenseError: there is no such extension, no GPU to build for, or the cache cannot be
            written.
    """
    if extension not in EXTENSIONS:
        raise LayersenseError(
            f"there is no extension `{extension}`; ModelOpt has {', '.join(EXTENSIONS)}"
        )
    return _ensure(extension, cache, again=True)[0]


def use(names: Iterable[str], cache: Path) -> dict[str, Built]:
    """Let ModelOpt find its extensions in a cache, and load those that are called for.

    One that was never built for this kind of GPU and these versions is built now, and the log says
    so; one that failed stays as it is.

    Returns:
        Extension → what came of building it.
    """

    def load_cpp_extension(name: str, *_: Any, raise_if_failed: bool = False, **__: Any) -> Any:
        extension = next((key for key, value in _NAMES.items() if value == name), None)
        if extension is None:
            raise LayersenseError(f"ModelOpt asks for the extension {name}, which is not known")
        built, module = _ensure(extension, cache)
        if module is None and raise_if_failed:
            raise RuntimeError(sentence(built))
        return module

    def conv3d() -> ModuleType:
        built, module = _ensure("conv3d", cache)
        if module is None:
            raise RuntimeError(sentence(built))
        return module

    modelopt_extensions.load_cpp_extension = load_cpp_extension
    implicit_gemm_cuda._get_cuda_module = conv3d
    found = {}
    for name in names:
        found[name], module = _ensure(name, cache)
        _hand_over(name, module)
        if found[name].state == "failed":
            logger.warning("%s", sentence(found[name]))
    return found


def key_of_this_machine() -> str:
    """Return the GPU's architecture and the versions that an extension is built for.

    Raises:
        LayersenseError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise LayersenseError(
            "no NVIDIA GPU can be used on this machine, and extensions are built for the GPU they "
            "run on; set `device: cpu` in the run, or run it where there is a GPU"
        )
    major, minor = torch.cuda.get_device_capability()
    modelopt = importlib.metadata.version("nvidia-modelopt")
    tag = sys.implementation.cache_tag
    return f"sm_{major}{minor}-torch{torch.__version__}-modelopt{modelopt}-{tag}"


def _ensure(extension: str, cache: Path, *, again: bool = False) -> tuple[Built, ModuleType | None]:
    """Return what came of building an extension, and its module if there is one.

    Args:
        extension: one of :data:`EXTENSIONS`.
        cache: folder for all kinds of GPU and versions.
        again: whether to try again what failed before.
    """
    if extension == "nvfp4":
        if has_triton_nvfp4():
            return Built(extension=extension, state="not needed", key=key_of_this_machine()), None
        built, module = _ensure("mx", cache, again=again)
        return msgspec.structs.replace(built, extension=extension), module
    key = key_of_this_machine()
    folder = cache / key
    record = folder / f"{extension}.json"
    with exclusive(
        folder / f".{extension}.lock",
        f"another job builds the extension for {EXTENSIONS[extension]}; waiting for it",
        "two jobs may compile the same extension at once",
    ):
        if record.exists():
            with suppress(LayersenseError):
                built = read_built(record)
                if built.state == "failed" and not again:
                    return built, None
                if built.library is not None:
                    try:
                        return built, _load(_NAMES[extension], folder / built.library)
                    except (ImportError, OSError) as error:
                        logger.warning(
                            "%s: cannot be loaded (%s); it is built again", built.library, error
                        )
        logger.info("%s: building the extension for %s, about a minute", key, EXTENSIONS[extension])
        built, module = _build(extension, folder, key)
        write_record(record, built)
    return built, module


def _build(extension: str, folder: Path, key: str) -> tuple[Built, ModuleType | None]:
    # Under our own lock nobody builds here: torch's lock file can only be a dead builder's.
    (folder / _NAMES[extension] / "lock").unlink(missing_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    # ninja stands beside Python where a virtual environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    if cpp_extension.CUDA_HOME is None:
        _find_installed_compiler(Path(torch.__file__).parents[1], folder)
    started = time.monotonic()
    reason, module = "", None
    try:
        module = BUILDERS[extension]()
    except (Exception, SystemExit) as error:
        if isinstance(error, LayersenseError):
            raise
        logger.error("building %s failed: %s", extension, error)
        reason = _reason(error)
    seconds = round(time.monotonic() - started, 1)
    if module is None:
        reason = reason or "ModelOpt gave no reason"
        failed = Built(extension=extension, state="failed", key=key, reason=reason, seconds=seconds)
        return failed, None
    library = Path(str(module.__file__)).relative_to(folder)
    logger.info("built %s in %.0f s", library, seconds)
    built = Built(
        extension=extension, state="built", key=key, library=str(library), seconds=seconds
    )
    return built, module


def _find_installed_compiler(packages: Path, folder: Path) -> None:
    """Let torch find the nvcc that pip has installed, which lies where no CUDA is looked for.

    Args:
        packages: Python's folder of packages.
        folder: where a link to the CUDA runtime is made, which pip installs under no name that a
            linker looks for.
    """
    for home in sorted(packages.glob("nvidia/cu*"), reverse=True):
        runtimes = sorted(home.glob("lib/libcudart.so.*"))
        if not (home / "bin" / "nvcc").is_file() or not runtimes:
            continue
        cpp_extension.CUDA_HOME = str(home)
        link = folder / "lib" / "libcudart.so"
        link.parent.mkdir(exist_ok=True)
        with suppress(FileExistsError):
            link.symlink_to(runtimes[-1])
        paths = [str(link.parent), *filter(None, [os.environ.get("LIBRARY_PATH")])]
        os.environ["LIBRARY_PATH"] = ":".join(paths)
        logger.info("nvcc of %s", home)
        return


def _by_modelopt(getter: Any) -> Callable[[], ModuleType | None]:
    """Return a function that lets ModelOpt compile by its own sources and flags."""

    def compile() -> ModuleType | None:
        ours = modelopt_extensions.load_cpp_extension
        modelopt_extensions.load_cpp_extension = _original_load
        getter.__dict__.pop("extension", None)
        try:
            module: ModuleType | None = getter(raise_if_failed=True)
        finally:
            modelopt_extensions.load_cpp_extension = ours
        return module

    return compile


BUILDERS: dict[str, Callable[[], ModuleType | None]] = {
    "int": _by_modelopt(modelopt_extensions.get_cuda_ext),
    "fp8": _by_modelopt(modelopt_extensions.get_cuda_ext_fp8),
    "mx": _by_modelopt(modelopt_extensions.get_cuda_ext_mx),
    "conv3d": lambda: _original_conv3d(),
}
"""Extension → what compiles and loads it."""
_GETTERS = {
    "int": modelopt_extensions.get_cuda_ext,
    "fp8": modelopt_extensions.get_cuda_ext_fp8,
    "mx": modelopt_extensions.get_cuda_ext_mx,
}


def _hand_over(extension: str, module: ModuleType | None) -> None:
    """Put a module where ModelOpt remembers what it has loaded; None: it is not there."""
    if extension in _GETTERS:
        _GETTERS[extension].extension = module
    elif extension == "nvfp4" and module is not None:
        _GETTERS["mx"].extension = module


def _load(name: str, library: Path) -> ModuleType:
    """Import a compiled extension, which needs no compiler."""
    if not library.exists():  # Python would answer with what this process has loaded before
        raise FileNotFoundError(f"{library} is gone")
    spec = importlib.util.spec_from_file_location(name, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is no extension of Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reason(error: BaseException) -> str:
    """Return the line of a failed build that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [
        line
        for line in lines
        if re.search(r"\berror\b|not found|No such file|No space left|not set", line, re.I)
        and not line.startswith("Error building extension")
    ]
    found = (telling or lines or [type(error).__name__])[0]
    return found if len(found) <= _MAX_REASON else f"{found[:_MAX_REASON]}…"
