"""Load a checkpoint's weights with transformers, refusing what would score as garbage."""

import sys
from typing import Any

import torch
from torch import nn

from layersense.errors import LayersenseError
from layersense.models.checkpoints import Checkpoint


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
    try:
        model, info = auto_class.from_pretrained(
            checkpoint.path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=checkpoint.trust_remote_code,
            output_loading_info=True,
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise LayersenseError(
            f"{checkpoint.path}: transformers cannot load it as a model of task "
            f"{checkpoint.task} ({first_line(error)}); check `task` and the checkpoint's files"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise LayersenseError(
            f"{checkpoint.path}: holds no weights for {_some(missing)}, which "
            f"{type(model).__name__} needs; give a complete checkpoint of {checkpoint.architecture}"
        )
    warnings = []
    if unexpected := sorted(info["unexpected_keys"]):
        warnings.append(
            f"{checkpoint.id}: holds weights that {type(model).__name__} does not use: "
            f"{_some(unexpected)}"
        )
    model = model.to(device).eval()
    if broken := [
        name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()
    ]:
        raise LayersenseError(
            f"{checkpoint.path}: not every weight of {_some(broken)} is finite as "
            f"{model.dtype}; give a sound checkpoint or, if float16 overflowed, another `dtype`"
        )
    return model, tuple(warnings)


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
