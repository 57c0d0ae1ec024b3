"""Load a checkpoint's weights with transformers, refusing what would score as garbage."""

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layersense.errors import LayersenseError, is_out_of_memory
from layersense.files import write_json
from layersense.models.checkpoints import Checkpoint
from layersense.models.devices import connect, free_memory, plan_devices, wanted_gpus
from layersense.models.experts import watch_experts

logger = logging.getLogger(__name__)

_WITHOUT_WEIGHTS: ContextVar[bool] = ContextVar("without_weights", default=False)


def load_model(
    auto_class: Any, checkpoint: Checkpoint, *, dtype: str, device: torch.device | str
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a model in eval mode on ``device``, and warnings about its weights.

    Args:
        auto_class: transformers' auto class of the task, such as ``AutoModelForCausalLM``.
        checkpoint: what to load; nothing is downloaded.
        dtype: ``auto`` (the checkpoint's), ``bfloat16``, ``float16`` or ``float32``.
        device: where the weights go.

    Raises:
        LayersenseError: transformers cannot load it as that class, weights are missing, or a
            weight is not finite.
    """
    quiet_progress_bars()
    if are_weights_left_out():
        return skeleton(auto_class, checkpoint, dtype), ()
    gpus = wanted_gpus()
    plan: dict[str, int] = {}
    try:
        if gpus > 1:
            plan = plan_devices(
                skeleton(auto_class, checkpoint, dtype),
                torch_dtype(checkpoint, dtype),
                free_memory(gpus),
            )
            logger.info("layers on each GPU: %s", _shares(plan))
        model, info = auto_class.from_pretrained(
            checkpoint.path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=checkpoint.trust_remote_code,
            output_loading_info=True,
            **({"device_map": plan} if plan else {}),
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise LayersenseError(
            f"{checkpoint.path}: transformers cannot load it as a model of task "
            f"{checkpoint.task} ({first_line(error)}); check `task` and the checkpoint's files"
        ) from error
    refuse_missing(checkpoint, type(model).__name__, sorted(info["missing_keys"]))
    warnings = warn_unexpected(checkpoint, type(model).__name__, sorted(info["unexpected_keys"]))
    if plan:
        connect(model.eval(), plan)
    else:
        model = model.to(device).eval()
    check_finite(checkpoint, model)
    watch_experts(model)
    return model, warnings


@contextmanager
def without_weights() -> Iterator[None]:
    """Let the models that are loaded in the block have no weights: see :func:`skeleton`."""
    token = _WITHOUT_WEIGHTS.set(True)
    try:
        yield
    finally:
        _WITHOUT_WEIGHTS.reset(token)


def are_weights_left_out() -> bool:
    """Return whether a model that is loaded now is to have no weights."""
    return _WITHOUT_WEIGHTS.get()


def skeleton(auto_class: Any, checkpoint: Checkpoint, dtype: str = "auto") -> nn.Module:
    """Return the model as its config describes it, on the meta device: no weight is read.

    Raises:
        LayersenseError: transformers cannot build it.
    """
    from transformers import AutoConfig

    remote = checkpoint.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=remote
        )
        with torch.device("meta"):
            model: nn.Module = auto_class.from_config(config, trust_remote_code=remote)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise LayersenseError(
            f"{checkpoint.path}: transformers cannot build a model of task {checkpoint.task} from "
            f"its config ({first_line(error)}); check `task` and the checkpoint's files"
        ) from error
    model.tie_weights()  # type: ignore[operator]
    return model.to(torch_dtype(checkpoint, dtype)).eval()


def torch_dtype(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """Return the type of a checkpoint's weights while they are scored."""
    found: torch.dtype = getattr(torch, checkpoint.dtype if dtype == "auto" else dtype)
    return found


def _shares(plan: dict[str, int]) -> str:
    """Return how many parts of a plan each GPU has."""
    return ", ".join(f"{gpu}: {count}" for gpu, count in sorted(Counter(plan.values()).items()))


def load_weights(
    model: nn.Module, checkpoint: Checkpoint, *, fix: str, dtype: str, device: torch.device | str
) -> tuple[nn.Module, tuple[str, ...]]:
    """Fill a model that its library has built; return it in eval mode, and warnings.

    Activations that overwrite their inputs are told not to: the output of the layer before is what
    sensitivity is measured at.

    Args:
        model: the model with any weights.
        checkpoint: a directory with ``model.safetensors``, see :func:`write_weights`.
        fix: what to do if the weights do not fit.
        dtype: ``auto`` (the checkpoint's), ``bfloat16``, ``float16`` or ``float32``.
        device: where the weights go.

    Raises:
        LayersenseError: the weights do not fit, some are missing, or one is not finite; the run
            wants several GPUs.
    """
    from safetensors.torch import load_file

    if wanted_gpus() > 1:
        raise LayersenseError(
            f"{checkpoint.path}: models of torchvision and ultralytics do not say which layers "
            "must stay on one GPU; set `gpus: 1` in the run"
        )
    if are_weights_left_out():
        return model.to(device="meta", dtype=torch_dtype(checkpoint, dtype)).eval(), ()
    name = checkpoint.architecture
    try:
        keys = model.load_state_dict(
            load_file(Path(checkpoint.path) / "model.safetensors"), strict=False
        )
    except RuntimeError as error:
        raise LayersenseError(
            f"{checkpoint.path}: the weights do not fit {name} ({first_line(error)}); {fix}"
        ) from error
    refuse_missing(checkpoint, name, sorted(keys.missing_keys))
    warnings = warn_unexpected(checkpoint, name, sorted(keys.unexpected_keys))
    model = model.to(device=device, dtype=torch_dtype(checkpoint, dtype)).eval()
    check_finite(checkpoint, model)
    for module in model.modules():
        if getattr(module, "inplace", False):
            setattr(module, "inplace", False)  # noqa: B010 (torch types attributes as modules)
    return model, warnings


def write_weights(model: nn.Module, folder: str | Path, config: Mapping[str, Any]) -> Path:
    """Write a model's weights and what it is built from as a checkpoint; return its folder."""
    from safetensors.torch import save_file

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_json(target / "config.json", dict(config))
    return target


def refuse_missing(checkpoint: Checkpoint, class_name: str, missing: list[str]) -> None:
    """Raise if a checkpoint lacks weights.

    Raises:
        LayersenseError: it does.
    """
    if missing:
        raise LayersenseError(
            f"{checkpoint.path}: holds no weights for {_some(missing)}, which {class_name} needs; "
            f"give a complete checkpoint of {checkpoint.architecture}"
        )


def warn_unexpected(
    checkpoint: Checkpoint, class_name: str, unexpected: list[str]
) -> tuple[str, ...]:
    """Return a warning if a checkpoint holds weights that its model does not use."""
    if not unexpected:
        return ()
    return (f"{checkpoint.id}: holds weights that {class_name} does not use: {_some(unexpected)}",)


def check_finite(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Raise unless every weight of a model is finite.

    Raises:
        LayersenseError: one is not.
    """
    if broken := [
        name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()
    ]:
        dtype = next(model.parameters()).dtype
        raise LayersenseError(
            f"{checkpoint.path}: not every weight of {_some(broken)} is finite as {dtype}; give a "
            "sound checkpoint or, if float16 overflowed, another `dtype`"
        )


def start_gradients(model: nn.Module) -> None:
    """Let gradients start wherever a model detaches: at each layer that none would reach.

    Detectors detach their queries, so the first layers of a decoder work on tensors that require
    no gradient, although the loss depends on what these layers put out.
    """

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if (
            torch.is_grad_enabled()
            and isinstance(output, torch.Tensor)
            and output.is_floating_point()
            and not output.requires_grad
        ):
            output.requires_grad_(True)

    for module in model.modules():
        if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
            module.register_forward_hook(hook)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return a checkpoint's tokenizer.

    Raises:
        LayersenseError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    return _load_part(AutoTokenizer, checkpoint, "its tokenizer", "the tokenizer's files")


def load_image_processor(checkpoint: Checkpoint) -> Any:
    """Return what prepares a checkpoint's images.

    Raises:
        LayersenseError: transformers cannot load it.
    """
    from transformers import AutoImageProcessor

    return _load_part(
        AutoImageProcessor, checkpoint, "its image processor", "preprocessor_config.json"
    )


def load_processor(checkpoint: Checkpoint) -> Any:
    """Return what prepares a checkpoint's images and texts.

    Raises:
        LayersenseError: transformers cannot load it.
    """
    from transformers import AutoProcessor

    return _load_part(
        AutoProcessor, checkpoint, "its processor", "the processor's and tokenizer's files"
    )


def _load_part(auto_class: Any, checkpoint: Checkpoint, what: str, files: str) -> Any:
    try:
        return auto_class.from_pretrained(
            checkpoint.path,
            local_files_only=True,
            trust_remote_code=checkpoint.trust_remote_code,
        )
    except (ImportError, OSError, ValueError) as error:
        raise LayersenseError(
            f"{checkpoint.path}: {what} cannot be loaded ({first_line(error)}); add {files} of "
            "the original checkpoint"
        ) from error


def quiet_progress_bars() -> None:
    """Turn transformers' progress bars off where no terminal shows them, as in a log file."""
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something, or the error's type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
