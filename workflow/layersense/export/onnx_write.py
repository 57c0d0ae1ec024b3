"""Write a quantized image model as ONNX with Q/DQ nodes (torch)."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from layersense.errors import LayersenseError
from layersense.export.allow import Plan
from layersense.export.onnx_check import WRAPPED, open_session, run_session
from layersense.export.store import ONNX_FILE, Expected, OnnxMetric
from layersense.export.write import copy_others, no_space
from layersense.manifests.schema import Manifest
from layersense.models.checkpoints import Checkpoint
from layersense.models.tasks.metrics import metrics_of, value_of
from layersense.models.tasks.protocol import Batch, ImageTask, Loaded, Metric
from layersense.quantization.formats import NONE
from layersense.verification.judging import Judge

OPSET = 20
"""From 19 on, `QuantizeLinear` takes 8-bit floats; 20 is the last that torch's tracing export
writes."""
OUTPUTS = ("logits", "pred_boxes")
ROUNDING = 2**-22
"""Relative change in the last digits of float32."""
_TRT = {
    "TRT_FP8QuantizeLinear": "QuantizeLinear",
    "TRT_FP8DequantizeLinear": "DequantizeLinear",
}


class Inference(nn.Module):
    """A model of images without labels: tensors in, tensors out.

    Args:
        model: what the task loaded.
        task: its task.
        inputs: names of its inputs, ``pixel_values`` first.
    """

    def __init__(self, model: nn.Module, task: ImageTask, inputs: Sequence[str]) -> None:
        super().__init__()
        self.task, self.inputs = task, tuple(inputs)
        self.add_module(WRAPPED, model)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return logits and, of a detector, boxes: center, width and height in shares."""
        model = self.get_submodule(WRAPPED)
        found = self.task.outputs_of(model, dict(zip(self.inputs, tensors, strict=True)))
        return tuple(found[name] for name in OUTPUTS if name in found)


def run(model: nn.Module, task: ImageTask, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's outputs by name, on the CPU in float32."""
    with torch.no_grad():
        outputs = Inference(model, task, list(inputs))(*inputs.values())
    return {name: tensor.float().cpu() for name, tensor in zip(OUTPUTS, outputs, strict=False)}


@contextmanager
def _rounded_otherwise(model: nn.Module) -> Iterator[None]:
    """Change the outputs of all quantized layers in their last digits, as another runtime does."""
    generator = torch.Generator().manual_seed(0)

    def change(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
        return output * (1 + ROUNDING * signs.to(output.device))

    hooks = [
        module.register_forward_hook(change)
        for module in model.modules()
        if hasattr(module, "weight_quantizer")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Heldout:
    """Held-out images, and what the model makes of them: unquantized, simulated, in onnxruntime.

    Args:
        loaded: the model before it is quantized.
        task: its task.
        batches: batches of one image size.
        device: where the model is.
        dtype: of its inputs.
    """

    def __init__(
        self,
        loaded: Loaded,
        task: ImageTask,
        batches: Sequence[Batch],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.task, (self.metrics, _) = task, metrics_of(task, loaded)
        self.batches = [batch.to(device, dtype) for batch in batches]
        self.called: set[str] = set()
        hooks = [
            module.register_forward_hook(lambda *_, name=name: self.called.add(name))
            for name, module in loaded.model.named_modules()
        ]
        try:
            self.before = [run(loaded.model, task, batch.inputs) for batch in self.batches]
        finally:
            for hook in hooks:
                hook.remove()
        self.simulated: list[dict[str, Tensor]] = []
        self.again: list[dict[str, Tensor]] = []

    def simulate(self, model: nn.Module) -> None:
        """Keep what the quantized model makes of the images, then with another rounding."""
        self.simulated = [run(model, self.task, batch.inputs) for batch in self.batches]
        with _rounded_otherwise(model):
            self.again = [run(model, self.task, batch.inputs) for batch in self.batches]

    def frames(self) -> Iterator[dict[str, Tensor]]:
        """Yield what :func:`layersense.export.onnx_check.check_onnx` compares, batch by batch."""
        kinds = {"before": self.before, "simulated": self.simulated, "again": self.again}
        for index, batch in enumerate(self.batches):
            frame = {f"input.{name}": tensor.cpu() for name, tensor in batch.inputs.items()}
            for kind, outputs in kinds.items():
                frame |= {f"{kind}.{name}": tensor for name, tensor in outputs[index].items()}
            yield frame

    def judge(self, file: Path) -> list[OnnxMetric]:
        """Return the task's metrics by the outputs of a file, beside the model's own.

        None of those that say nothing of these images.
        """
        if not self.metrics:
            return []
        session = open_session(file)
        batches = [batch.to(torch.device("cpu"), torch.float32) for batch in self.batches]
        outputs = {
            "unquantized": self.before,
            "simulated": self.simulated,
            "onnx": [
                {
                    name: torch.from_numpy(array)
                    for name, array in run_session(
                        session, {name: tensor.numpy() for name, tensor in batch.inputs.items()}
                    ).items()
                }
                for batch in batches
            ],
        }
        records: dict[str, dict[str, list[Any]]] = {
            metric.name: {name: [] for name in outputs} for metric in self.metrics
        }
        for name, found in outputs.items():
            for batch, tensors in zip(batches, found, strict=True):
                output = self.task.output_of(tensors)
                logits = self.task.supervised_logits(output, batch)
                for metric in self.metrics:
                    records[metric.name][name] += metric.records(output, logits, batch)
        return [
            _judged(metric, records[metric.name])
            for metric in self.metrics
            if all(records[metric.name].values())
        ]


def _judged(metric: Metric, records: Mapping[str, Sequence[Any]]) -> OnnxMetric:
    """Return a metric of the file and of both models, by their records."""
    file = Judge(metric, records["simulated"]).of(records["onnx"])
    return OnnxMetric(
        name=metric.name,
        unit=metric.unit,
        onnx=file.value,
        simulated=value_of(metric, records["simulated"]),
        unquantized=value_of(metric, records["unquantized"]),
        apart_low=file.difference_low,
        apart_high=file.difference_high,
    )


def expect(
    manifest: Manifest,
    plan: Plan,
    formats: Mapping[str, Any],
    original: str,
    called: Collection[str],
) -> Expected:
    """Return what an ONNX file should hold.

    What only training calls, such as the heads of a detector's inner layers, is not in ``called``
    and not in the file.
    """
    modules = {
        name: format
        for handle, format in plan.recipe.items()
        if format != NONE
        for name in manifest.layer_sensitivity[handle].module_names
        if name in called
    }
    return Expected(
        original=original,
        quantized=modules,
        shapes={},
        formats={format: formats[format] for format in sorted(set(modules.values()))},
        unquantized=[name for name in manifest.layers if name not in modules],
        changed=[],
        parameters=[],
        dtype="F32",
        onnx=True,
    )


def write_onnx(model: nn.Module, task: ImageTask, inputs: Mapping[str, Tensor], file: Path) -> None:
    """Write a quantized model: any number of images, all of the size of those in ``inputs``.

    ModelOpt's quantizers become Q/DQ nodes; those of 8-bit floats, which it writes as nodes of
    TensorRT's own, are made standard ones of the same meaning.

    Raises:
        LayersenseError: torch cannot trace the model.
    """
    wrapped = Inference(model, task, list(inputs)).eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            count = len(wrapped(*inputs.values()))
            torch.onnx.export(
                wrapped,
                tuple(inputs.values()),
                str(file),
                opset_version=OPSET,
                dynamo=False,
                input_names=list(inputs),
                output_names=list(OUTPUTS[:count]),
                dynamic_axes={name: {0: "images"} for name in (*inputs, *OUTPUTS[:count])},
            )
    except (RuntimeError, TypeError, ValueError, torch.onnx.errors.OnnxExporterError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LayersenseError(
            f"{type(model).__name__}: torch cannot write this model as ONNX ({first}); leave "
            "`export` of the run out"
        ) from error
    graph = onnx.load(str(file))
    standard_fp8(graph)
    onnx.save(graph, str(file))


def standard_fp8(model: Any) -> None:
    """Turn TensorRT's own Q/DQ nodes of 8-bit floats into those of the standard, in place."""
    kept, zeros = [], 0
    for node in model.graph.node:
        if node.op_type in _TRT:
            zero = f"{node.name or node.output[0]}_zero_point"
            # The zero point says which type the quantized values have.
            value = helper.make_tensor(zero, TensorProto.FLOAT8E4M3FN, [], [0.0])
            kept.append(helper.make_node("Constant", [], [zero], name=f"{zero}_node", value=value))
            node.op_type, node.domain = _TRT[node.op_type], ""
            node.input.append(zero)
            zeros += 1
        kept.append(node)
    if zeros:
        # Types that the exporter noted down for its own nodes, whose values were bytes.
        del model.graph.value_info[:]
        nodes = [*kept]
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def write_folder(model: nn.Module, heldout: Heldout, folder: Path, checkpoint: Checkpoint) -> None:
    """Write the ONNX file of a quantized model, with config and image processor of the original.

    Raises:
        LayersenseError: torch cannot trace the model, or the disk is full.
    """
    try:
        write_onnx(model, heldout.task, heldout.batches[0].inputs, folder / ONNX_FILE)
        made = ("model.safetensors.index.json",)
        copy_others(Path(checkpoint.path), folder, made, code=checkpoint.trust_remote_code)
    except OSError as error:
        raise no_space(folder, error) from error
