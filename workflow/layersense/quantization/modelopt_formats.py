"""ModelOpt's form of a format: its config, its kernels, and which may share a call."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from modelopt.torch.quantization import extensions
from modelopt.torch.quantization.config import QuantizeAlgorithmConfig, QuantizeConfig
from modelopt.torch.quantization.nn import QuantModuleRegistry
from pydantic import ValidationError

from layersense.errors import LayersenseError
from layersense.quantization.extensions import EXTENSIONS, STAND_INS
from layersense.quantization.formats import Attributes, Format, format_settings, registry

Kernel = Literal["compiled", "simulated", "native"]


def modelopt_config(format: Format) -> dict[str, Any]:
    """Return the config that means ``format`` to `auto_quantize` and to `mtq.quantize` alike.

    Everything is off but weights and inputs; then the classes that `auto_quantize` never searches
    are off again, for `mtq.quantize` would quantize their weights and inputs too. No entry goes by
    a layer's name, and none turns outputs or key-value caches on.
    """
    exclusions = [
        {"quantizer_name": "*", "parent_class": name, "enable": False}
        for name in registry().excluded_classes
        if _is_registered(name)
    ]
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            _entry("*weight_quantizer", format.weight),
            _entry("*input_quantizer", format.input),
            *exclusions,
        ],
        "algorithm": dict(format.algorithm) if format.algorithm else None,
        "effective_bits": format.effective_bits,
    }


def validate_format(format: Format) -> None:
    """Check ``format`` by ModelOpt's own `QuantizeConfig`.

    Raises:
        LayersenseError: ModelOpt does not accept it.
    """
    try:
        QuantizeConfig(**modelopt_config(format))
        if format.algorithm:
            algorithm_configs()[format.algorithm["method"]](**format.algorithm)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Assertion failed, ").removeprefix("Value error, ")
        place = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
        raise LayersenseError(
            f"format `{format.name}` is refused by ModelOpt at {place}: "
            f"{' '.join(message.split()) or 'the value is not valid'}; change the format"
        ) from error


def algorithm_configs() -> dict[str, type[QuantizeAlgorithmConfig]]:
    """Return ModelOpt's config class of each calibration algorithm, by method."""
    found: dict[str, type[QuantizeAlgorithmConfig]] = {}
    classes = [QuantizeAlgorithmConfig]
    while classes:
        config = classes.pop()
        method = config.model_fields["method"].default
        if method is not None:
            found[method] = config
        classes.extend(config.__subclasses__())
    return found


def kernel_mode(format: Format, device: str) -> Kernel:
    """Return what quantizes under ``format`` on ``device``, building ModelOpt's kernels if needed.

    ``native``: it needs none (the CPU). ``compiled``: ModelOpt's CUDA kernels. ``simulated``: they
    could not be built, and torch operations stand in, which ModelOpt has for FP8 alone.

    Raises:
        LayersenseError: a kernel without a stand-in could not be built.
    """
    if torch.device(device).type == "cpu":
        return "native"
    missing = {name for name in format.extensions if not _LOADERS[name]()}
    if refused := missing - STAND_INS:
        titles = " and ".join(EXTENSIONS[name] for name in sorted(refused))
        raise LayersenseError(
            f"format `{format.name}` needs ModelOpt's CUDA extension for {titles}, which could not "
            "be built here; install nvcc, g++ and ninja (envs/cuda), or take an FP8 format"
        )
    return "simulated" if missing else "compiled"


def require_kernel(format: Format, device: str) -> None:
    """Check that ``format`` can be measured on ``device``; see :func:`kernel_mode`.

    Raises:
        LayersenseError: a kernel without a stand-in could not be built.
    """
    kernel_mode(format, device)


def joint_calls(formats: Sequence[Format]) -> list[list[Format]]:
    """Group ``formats`` into the calls of `auto_quantize` that may measure them, in order.

    Those calibrated by ``max``, or not at all, share the first call: they change no weight. Every
    other algorithm gets a call of its own on a freshly loaded model, and so does a format that
    differs from one in the first call by nothing but its name, as ModelOpt would merge the two.
    """
    joint: list[Format] = []
    single: list[list[Format]] = []
    for format in formats:
        rewrites = format.algorithm is not None and format.algorithm["method"] != "max"
        twin = any(format_settings(format) == format_settings(other) for other in joint)
        if rewrites or twin:
            single.append([format])
        else:
            joint.append(format)
    return [joint, *single] if joint else single


def _entry(pattern: str, stages: Sequence[Attributes]) -> dict[str, Any]:
    if not stages:
        return {"quantizer_name": pattern, "enable": False}
    configs = [modelopt_attributes(stage) for stage in stages]
    return {"quantizer_name": pattern, "cfg": configs[0] if len(configs) == 1 else configs}


def modelopt_attributes(stage: Attributes) -> dict[str, Any]:
    """Return attributes in Python's terms: axes as integers, (E, M) pairs as tuples."""
    attributes = {key: _pythonic(value) for key, value in stage.items()}
    # Nulls are left out of a format, but ModelOpt's configs spell a scale for the whole tensor.
    return attributes if "block_sizes" in attributes else {"axis": None, **attributes}


def _pythonic(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_pythonic(item) for item in value)
    if isinstance(value, dict):
        return {
            int(key) if key.lstrip("-").isdigit() else key: _pythonic(item)
            for key, item in value.items()
        }
    return value


def _is_registered(name: str) -> bool:
    """Return whether ModelOpt knows the class; some come only with their library."""
    try:
        QuantModuleRegistry[name]
    except KeyError:
        return False
    return True


def has_triton_nvfp4() -> bool:
    """Return whether a Triton kernel does NVFP4 on this GPU, so that nvcc compiles nothing."""
    # Imported here because it asks for the GPU; it has the kernel above compute capability 8.9.
    from modelopt.torch.kernels.quantization import gemm

    return hasattr(gemm, "fp4_fake_quant_block")


_LOADERS: dict[str, Callable[[], bool]] = {
    "int": lambda: extensions.get_cuda_ext() is not None,
    "fp8": lambda: extensions.get_cuda_ext_fp8() is not None,
    "mx": lambda: extensions.get_cuda_ext_mx() is not None,
    "nvfp4": lambda: has_triton_nvfp4() or extensions.get_cuda_ext_mx() is not None,
}
