"""Models of torchvision as checkpoints: a directory with ``config.json`` and safetensors.

torchvision ships pickled weights, and its models have no config. :func:`save_checkpoint` writes one
once, and from then on it is a checkpoint like any other.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layersense.errors import LayersenseError
from layersense.models.checkpoints import Checkpoint
from layersense.models.loading import first_line, load_weights, write_weights

LIBRARY = "torchvision"


def save_checkpoint(
    builder: str,
    model: nn.Module,
    folder: str | Path,
    *,
    categories: Sequence[str],
    size: int | None = None,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    **arguments: Any,
) -> Path:
    """Write a model of torchvision as a checkpoint, and return its folder.

    Example::

        from torchvision.models import get_model, get_model_weights

        name = "retinanet_resnet50_fpn_v2"
        weights = get_model_weights(name).DEFAULT
        save_checkpoint(name, get_model(name, weights=weights), "checkpoints/retinanet",
                        categories=weights.meta["categories"])

    Args:
        builder: what ``torchvision.models.get_model`` calls it.
        model: the model, made by that builder.
        folder: directory to write.
        categories: names of its classes, in the order of its outputs (background included).
        size: for classifiers and segmenters, edge in pixels that images are resized to; default
            224, and 520 for segmenters. Detectors resize by themselves.
        mean: what classifiers and segmenters subtract from channels in 0 to 1.
        std: what they divide by.
        arguments: what the builder was given beside weights, such as ``num_classes``.
    """
    return write_weights(
        model,
        folder,
        {
            "architectures": [builder],
            "library_name": LIBRARY,
            "arguments": arguments,
            "categories": list(categories),
            "image": {"size": size, "mean": list(mean), "std": list(std)},
        },
    )


def load_torchvision(
    checkpoint: Checkpoint, config: dict[str, Any], *, dtype: str, device: torch.device | str
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a model in eval mode on ``device``, and warnings about its weights.

    Raises:
        LayersenseError: torchvision has no such model, or the weights do not fit.
    """
    from torchvision.models import get_model, get_model_builder

    builder = checkpoint.architecture
    arguments = config.get("arguments")
    try:
        defaults = inspect.signature(get_model_builder(builder)).parameters
        without = {key: None for key in ("weights", "weights_backbone") if key in defaults}
        model: nn.Module = get_model(builder, **{**(arguments or {}), **without})
    except (TypeError, ValueError) as error:
        raise LayersenseError(
            f"{checkpoint.path}/config.json: torchvision cannot build {builder} with its "
            f"`arguments` ({first_line(error)}); write the checkpoint by `save_checkpoint`"
        ) from error
    fix = "give the `arguments` that the model was built with"
    return load_weights(model, checkpoint, fix=fix, dtype=dtype, device=device)
