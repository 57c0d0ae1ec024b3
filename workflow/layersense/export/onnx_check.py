"""Check an ONNX file in a fresh process: its graph, and its outputs in onnxruntime."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from layersense.errors import LayersenseError
from layersense.export.store import Checked, Expected, OnnxChecked

MOST = 0.5
"""Largest distance from the simulated outputs, as a share of how far quantization moved them.

Without its Q/DQ nodes a file would be at 1. Sound ones are at 1e-7 where layers are few; in deep
untrained ones, rounding that falls the other way adds up to as much as 0.3.
"""
Array = npt.NDArray[Any]


def check_onnx(
    file: Path, expected: Expected, batches: Iterable[Mapping[str, Array]] | None
) -> Checked:
    """Return what is wrong with a file, and how near its outputs are to the simulated ones.

    Args:
        file: the ONNX file.
        expected: the recipe.
        batches: held-out batches: ``input.{name}``, ``simulated.{output}``, ``before.{output}``
            (of the unquantized model) and, where there is one class for each position, ``labels``;
            None if there is nothing to compare with any more.

    Raises:
        LayersenseError: the file cannot be read, or onnxruntime is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise LayersenseError(
            f"{file}: onnx and onnxruntime read it, and one is not installed ({error}); install "
            "envs/cpu.txt"
        ) from error
    try:
        model = onnx.load(str(file))
        onnx.checker.check_model(model)
        options = onnxruntime.SessionOptions()
        # The nodes as they are written; what a runtime fuses is its own.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime has error types of its own, without a common base
        raise LayersenseError(
            f"{file}: is no ONNX file that onnxruntime loads ({str(error).splitlines()[0]}); "
            "delete checkpoint.json beside it and run `snakemake export`"
        ) from error
    problems = list(graph_problems(model, expected))
    names = [output.name for output in session.get_outputs()]
    # An input that the model does not use, such as a mask of padding, is not in the file.
    taken = {entry.name for entry in session.get_inputs()}
    compared = _Compared()
    for batch in batches or ():
        inputs = {
            name.removeprefix("input."): array
            for name, array in batch.items()
            if name.startswith("input.") and name.removeprefix("input.") in taken
        }
        compared.add(dict(zip(names, session.run(names, inputs), strict=True)), batch)
    if batches is not None:
        problems += compared.problems()
    return Checked(
        problems=problems,
        vllm=[],
        tensors=len(model.graph.initializer),
        bytes=file.stat().st_size,
        quantized_bytes=0,
        compared=0,
        differing=0.0,
        worst_steps=0.0,
        onnx=compared.result(),
    )


def graph_problems(model: Any, expected: Expected) -> Iterator[str]:
    """Yield modules whose Q/DQ nodes are not the recipe's, by the scopes of the nodes' names."""
    quantized = {
        module
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and (module := weight_of(node.name))
    }
    for module in expected.quantized:
        if module not in quantized:
            yield f"{module}: has no Q/DQ nodes at its weight, and the recipe quantizes it"
    for module in expected.unquantized:
        if module in quantized:
            yield f"{module}: has Q/DQ nodes at its weight, and the recipe does not quantize it"
    if odd := sorted(
        {node.domain for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    ):
        yield f"holds nodes of {', '.join(odd)}, which are not of the standard"


def _by_value(array: Array) -> Array:
    """Sort the queries of a detector in each column: their order has no meaning.

    Detectors that choose their queries put them in the order of scores, which rounding changes.
    """
    return np.sort(array, axis=1) if array.ndim == 3 else array


def _same(ours: Array, theirs: Array, *, queries: bool) -> int:
    """Return the number of equal choices; of queries, whatever their order."""
    if not queries:
        return int((ours == theirs).sum())
    return sum(
        int(min((mine == choice).sum(), (other == choice).sum()))
        for mine, other in zip(ours, theirs, strict=True)
        for choice in np.unique(mine)
    )


def weight_of(node: str) -> str | None:
    """Return the module whose weight a node quantizes, by the scope in the node's name.

    Torch names a node by the modules that were called on the way: ``/model/encoder/layer.0/fc/…``.
    A sequence that was called comes before its member, whose name starts with it.
    """
    path: list[str] = []
    for part in node.split("/")[1:]:
        if path and part.startswith(f"{path[-1]}."):
            path[-1] = part
        else:
            path.append(part)
    if "weight_quantizer" not in path:
        return None
    # The first one is the wrapper's own name for the model.
    return ".".join(path[1 : path.index("weight_quantizer")])


def _resized(logits: Array, labels: Array) -> Array:
    """Return the logits of a map at the resolution of its labels, as the task's loss does."""
    import torch

    found: Array = torch.nn.functional.interpolate(
        torch.from_numpy(logits).float(), labels.shape[-2:], mode="bilinear", align_corners=False
    ).numpy()
    return found


class _Compared:
    """Sums over the batches."""

    def __init__(self) -> None:
        self.samples = self.positions = self.agree = self.labelled = 0
        self.correct = {"onnx": 0, "simulated": 0, "before": 0}
        self.distance, self.moved, self.largest = 0.0, 0.0, 0.0
        self.not_finite = False

    def add(self, found: Mapping[str, Array], batch: Mapping[str, Array]) -> None:
        for name, ours in found.items():
            ours, simulated, before = (
                _by_value(array)
                for array in (ours, batch[f"simulated.{name}"], batch[f"before.{name}"])
            )
            gap = np.abs(ours.astype(np.float64) - simulated)
            self.not_finite |= not np.isfinite(ours).all()
            self.distance += float(gap.sum())
            self.moved += float(np.abs(before.astype(np.float64) - simulated).sum())
            self.largest = max(self.largest, float(gap.max()))
        logits = {
            "onnx": found["logits"],
            "simulated": batch["simulated.logits"],
            "before": batch["before.logits"],
        }
        # Classes are the second axis of images and maps, and the last one of a detector's queries.
        axis = -1 if logits["onnx"].ndim == 3 else 1
        labels = batch.get("labels")
        if labels is not None and labels.ndim == 3:
            logits = {name: _resized(array, labels) for name, array in logits.items()}
        chosen = {name: array.argmax(axis=axis) for name, array in logits.items()}
        self.samples += len(logits["onnx"])
        self.positions += chosen["onnx"].size
        self.agree += _same(chosen["onnx"], chosen["simulated"], queries=axis == -1)
        if labels is not None:
            known = labels >= 0
            self.labelled += int(known.sum())
            for name, choice in chosen.items():
                self.correct[name] += int((choice == labels)[known].sum())

    def problems(self) -> Iterator[str]:
        if not self.samples:
            yield "no held-out image was compared"
        elif self.not_finite:
            yield "its outputs are not finite"
        elif self.distance > MOST * self.moved + 1e-5 * self.positions:
            yield (
                "its outputs are not the simulated ones: they are "
                f"{self.distance / max(self.moved, 1e-30):.0%} as far from them as the unquantized "
                "model's are"
            )

    def result(self) -> OnnxChecked | None:
        if not self.samples:
            return None
        accuracy = {
            name: count / self.labelled if self.labelled else None
            for name, count in self.correct.items()
        }
        return OnnxChecked(
            samples=self.samples,
            agreement=self.agree / self.positions,
            distance=self.distance / self.moved if self.moved else 0.0,
            largest=self.largest,
            accuracy=accuracy["onnx"],
            accuracy_simulated=accuracy["simulated"],
            accuracy_before=accuracy["before"],
        )
