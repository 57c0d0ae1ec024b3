"""YOLO, by the package ``ultralytics``: checkpoints, its own loss, names of its layers.

The package is under AGPL-3.0, so it is optional, and imported only where a model of it is loaded. A
checkpoint of it is a pickle, which can run code when it is loaded. :func:`convert` opens one, and
from then on there is a directory with the network's description and safetensors, like that of
:func:`save_checkpoint`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from layersense.errors import LayersenseError
from layersense.models.checkpoints import Checkpoint
from layersense.models.loading import first_line, load_weights, write_weights
from layersense.models.tasks.detections import Detected, from_middles, sort_out
from layersense.quantization.layers import LayerName, describe_image_layer

GREY = 114 / 255
"""What ultralytics fills up images with."""
_HEADS = ("Detect", "v10Detect")
_CLASS = re.compile(r"(nn\.)?[A-Z]\w*")
_ACTIVATION = re.compile(r"(torch\.)?nn\.[A-Z]\w*\([\w=., -]*\)")
_GAINS = ("box", "cls", "dfl")
"""Weights of the loss's three parts; a checkpoint was trained with some."""
_SETTINGS = {
    "YOLO_OFFLINE": "true",
    "YOLO_AUTOINSTALL": "false",
    "YOLO_VERBOSE": "false",
    # Builds a network from its description without running any of it as code.
    "ULTRALYTICS_SAFE_LOAD": "true",
}


def save_checkpoint(
    model: Any, folder: str | Path, *, categories: Sequence[str] = (), size: int = 640
) -> Path:
    """Write a detector of ultralytics as a checkpoint, and return its folder.

    Args:
        model: a ``DetectionModel``, such as ``YOLO("yolo11n.pt").model``.
        folder: directory to write.
        categories: names of its classes, in the order of its outputs; default its own.
        size: the longer edge in pixels that photographs are resized to.

    Raises:
        LayersenseError: it is another model, or fused for inference.
    """
    _check_head(model)
    if model.is_fused():
        raise LayersenseError(
            "the YOLO model is fused for inference, which left its loss out; give the checkpoint "
            "that training wrote"
        )
    arguments = getattr(model, "args", {})
    arguments = arguments if isinstance(arguments, dict) else vars(arguments)
    names = [model.names[number] for number in sorted(model.names)]
    network = {key: value for key, value in model.yaml.items() if key != "yaml_file"}
    return write_weights(
        model,
        folder,
        {
            "architectures": [Path(model.yaml.get("yaml_file") or "yolo").stem],
            "library_name": "ultralytics",
            "network": network,
            "categories": list(categories) or names,
            "gains": {key: arguments[key] for key in _GAINS if key in arguments},
            "image": {"size": size},
        },
    )


def convert(file: str | Path, folder: Path) -> Path:
    """Write a checkpoint of a pickled one, running what code is in it; return its folder.

    Raises:
        LayersenseError: it is no detector of ultralytics, or the package is missing.
    """
    import_ultralytics()
    from ultralytics.nn.tasks import torch_safe_load

    path = Path(file).expanduser()
    try:
        pickled, _ = torch_safe_load(str(path), safe_only=False)
        model = (pickled.get("ema") or pickled["model"]).float()
        model.args = pickled.get("train_args") or getattr(model, "args", {})
        size = int(dict(model.args).get("imgsz", 640))
    except Exception as error:
        raise LayersenseError(
            f"{path}: is no checkpoint of ultralytics ({first_line(error)}); give a file such as "
            "yolo11n.pt, or a directory"
        ) from error
    return save_checkpoint(model, folder, size=size)


def load_yolo(
    checkpoint: Checkpoint, config: dict[str, Any], *, dtype: str, device: torch.device | str
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a detector in eval mode on ``device``, and warnings about its weights.

    Raises:
        LayersenseError: the package is missing, cannot build the network, or the weights do not
            fit.
    """
    import_ultralytics()
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import DEFAULT_CFG_DICT, IterableSimpleNamespace

    _check_network(checkpoint, config["network"])
    try:
        built: Any = DetectionModel(dict(config["network"]), verbose=False)
    except Exception as error:
        raise LayersenseError(
            f"{checkpoint.path}/config.json: ultralytics cannot build its `network` "
            f"({first_line(error)}); write the checkpoint by `save_checkpoint`"
        ) from error
    _check_head(built)
    built.args = IterableSimpleNamespace(**{**DEFAULT_CFG_DICT, **config.get("gains", {})})
    fix = "write the checkpoint by `save_checkpoint`"
    return load_weights(built, checkpoint, fix=fix, dtype=dtype, device=device)


def _check_head(model: Any) -> None:
    """Raise unless a model of ultralytics finds boxes, and nothing else."""
    last = type(model.model[-1]).__name__
    if type(model).__name__ != "DetectionModel" or last not in _HEADS:
        raise LayersenseError(
            f"{type(model).__name__} with a {last} at its end: of ultralytics, detectors that end "
            f"in {' or '.join(_HEADS)} can be scored; give one of these"
        )


def _check_network(checkpoint: Checkpoint, network: dict[str, Any]) -> None:
    """Raise unless a description names classes and an activation alone.

    Versions of ultralytics evaluate the activation as Python code, and call whatever is named as a
    layer.
    """
    layers = [*network["backbone"], *network["head"]]
    wrong = [str(layer[2]) for layer in layers if not _CLASS.fullmatch(str(layer[2]))]
    activation = network.get("activation")
    if activation is not None and not _ACTIVATION.fullmatch(str(activation)):
        wrong.append(str(activation))
    if wrong:
        raise LayersenseError(
            f"{checkpoint.path}/config.json: `network` names {wrong[0]}, which is no layer; write "
            "the checkpoint by `save_checkpoint`"
        )


def forward(model: Any, pixels: Tensor) -> Detected:
    """Run a detector in eval mode.

    In eval mode the one-to-one head of an end-to-end model, which is what is deployed, hands its
    gradient on to the neck; training keeps it from that.
    """
    decoded, outputs = model(pixels)
    criterion = model.init_criterion()

    def one(index: int, target: dict[str, Tensor]) -> Tensor:
        classes = target["class_labels"]
        sample = {
            "batch_idx": torch.zeros_like(classes, dtype=torch.float32),
            "cls": classes.float(),
            "bboxes": target["boxes"],
        }
        loss: Tensor = criterion(_cut(outputs, index), sample)[0]
        return loss.float().sum()

    # Of two heads, that which the model answers by.
    head = model.model[-1]
    deployed = outputs
    if "one2many" in outputs:
        deployed = outputs["one2one" if head.end2end else "one2many"]
    if head.end2end:
        decoded = head._inference(deployed)  # instead of the best of them
    height, width = pixels.shape[-2:]
    return Detected(
        loss=one,
        logits=deployed["scores"].transpose(1, 2),
        boxes=partial(_boxes, decoded, height, width),
        raw=decoded,
    )


def refuse_two_heads(model: Any) -> None:
    """Refuse a model that has a head for training beside that which it answers by.

    Raises:
        LayersenseError: it has.
    """
    if getattr(model.model[-1], "one2one_cv2", None) is not None:
        raise LayersenseError(
            "a YOLO of two heads (one to one, one to many) is not exported: the file would hold "
            "one of them, and the recipe quantizes both; leave `export` of the run out"
        )


def _boxes(decoded: Tensor, height: int, width: int) -> Tensor:
    middles = decoded[:, :4].transpose(1, 2)
    return from_middles(middles) / torch.tensor([width, height] * 2, device=decoded.device)


def found(output: Detected, size: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Sort out as ultralytics does to validate: scores above 0.001, IoU of neighbours up to 0.7."""
    if isinstance(output.raw, SimpleNamespace):  # of a file
        return sort_out(output, size, 0.001, 0.7)
    from ultralytics.utils.nms import non_max_suppression

    rows = non_max_suppression(output.raw, conf_thres=0.001, iou_thres=0.7, max_det=300)
    return [
        {"boxes": row[:, :4], "scores": row[:, 4], "labels": row[:, 5].to(torch.int64)}
        for row in rows
    ]


def _cut(value: Any, index: int) -> Any:
    """Return one photograph's part of nested outputs, in float32, with a batch of one."""
    if isinstance(value, dict):
        return {key: _cut(part, index) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_cut(part, index) for part in value]
    return value[index : index + 1].float()


def describe(backbone: int, head: int, module_names: Sequence[str]) -> LayerName:
    """Return subsystem, block and kind of a layer group.

    Args:
        backbone: how many layers, from the first, the network's description calls its backbone.
        head: number of the last layer.
        module_names: names of the group's modules, such as ``model.4.cv1.conv``.
    """
    layer = describe_image_layer(module_names)
    match = re.match(r"model\.(\d+)\.", module_names[0])
    number = int(match[1]) if match else head
    if number == head:
        return LayerName("head", number, layer.kind)
    # Blocks of a backbone have branches called as those of the head.
    kind = "conv" if layer.kind in ("class_head", "box_head") else layer.kind
    return LayerName("backbone" if number < backbone else "neck", number, kind)


def import_ultralytics() -> None:
    """Import ultralytics, which then neither reaches the network nor installs anything.

    Raises:
        LayersenseError: it is not installed.
    """
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    threads, open_image = os.environ.get("OMP_NUM_THREADS"), Image.open
    try:
        import ultralytics.nn.tasks  # noqa: F401
    except ImportError as error:
        raise LayersenseError(
            f"YOLO needs the package ultralytics, which is under AGPL-3.0 and not installed "
            f"({error}); if its licence suits you, run `pip install --no-deps -r envs/yolo.lock`"
        ) from error
    finally:
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        # ultralytics puts one in its place that asks for a package where a file is no image.
        Image.open = open_image
