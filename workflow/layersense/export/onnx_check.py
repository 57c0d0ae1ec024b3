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

Without its Q/DQ nodes a file would be at 1. Sound ones are at 1e-7 where layers are few.
"""
REPEATS = 3.0
"""Largest distance, as a multiple of how far the simulated outputs move where each layer rounds
otherwise in the last digits of float32. Over many quantized layers, one value that falls into the
neighbouring step makes others do so, until nothing is alike but the size of the errors.
"""
WRAPPED = "whole"
"""What the wrapper that is traced calls the model: no module of a model is called so."""
Array = npt.NDArray[Any]


def check_onnx(
    file: Path, expected: Expected, batches: Iterable[Mapping[str, Array]] | None
) -> Checked:
    """Return what is wrong with a file, and how near its outputs are to the simulated ones.

    Args:
        file: the ONNX file.
        expected: the recipe.
        batches: held-out batches: ``input.{name}``, ``simulated.{output}``, ``again.{output}``
            (rounded otherwise) and ``before.{output}`` (of the unquantized model); None if there is
            nothing to compare with any more.

    Raises:
        LayersenseError: the file cannot be read, or onnxruntime is not installed.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise LayersenseError(
            f"{file}: onnx and onnxruntime read it, and one is not installed ({error}); install "
            "envs/cpu.txt"
        ) from error
    try:
        model = onnx.load(str(file))
        onnx.checker.check_model(model)
        session = open_session(file)
    except Exception as error:  # onnxruntime has error types of its own, without a common base
        raise LayersenseError(
            f"{file}: is no ONNX file that onnxruntime loads ({str(error).splitlines()[0]}); "
            "delete checkpoint.json beside it and run `snakemake export`"
        ) from error
    problems = list(graph_problems(model, expected))
    compared = _Compared()
    for batch in batches or ():
        inputs = {
            name.removeprefix("input."): array
            for name, array in batch.items()
            if name.startswith("input.")
        }
        compared.add(run_session(session, inputs), batch)
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


def open_session(file: Path) -> Any:
    """Open a file in onnxruntime, on the CPU, with the nodes as they are written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # What a runtime fuses is its own.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run_session(session: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the outputs by name; an input that the file does not use is left out.

    Such as a mask of padding.
    """
    names = [output.name for output in session.get_outputs()]
    taken = {entry.name for entry in session.get_inputs()}
    used = {name: array for name, array in inputs.items() if name in taken}
    return dict(zip(names, session.run(names, used), strict=True))


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

    Torch names a node by the modules that were called on the way: ``/whole/encoder/layer.0/fc/…``.
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
    return ".".join(path[: path.index("weight_quantizer")]).removeprefix(f"{WRAPPED}.")


class _Compared:
    """Sums over the batches."""

    def __init__(self) -> None:
        self.samples = self.positions = self.agree = 0
        self.distance, self.moved, self.largest, self.noise = 0.0, 0.0, 0.0, 0.0
        self.not_finite = False

    def add(self, found: Mapping[str, Array], batch: Mapping[str, Array]) -> None:
        for name, ours in found.items():
            ours, simulated, again, before = (
                _by_value(array)
                for array in (
                    ours,
                    *(batch[f"{kind}.{name}"] for kind in ("simulated", "again", "before")),
                )
            )
            gap = np.abs(ours.astype(np.float64) - simulated)
            self.not_finite |= not np.isfinite(ours).all()
            self.distance += float(gap.sum())
            self.moved += float(np.abs(before.astype(np.float64) - simulated).sum())
            self.noise += float(np.abs(again.astype(np.float64) - simulated).sum())
            self.largest = max(self.largest, float(gap.max()))
        # Classes are the second axis of images and maps, and the last one of a detector's queries.
        axis = -1 if found["logits"].ndim == 3 else 1
        ours, theirs = (
            array.argmax(axis=axis) for array in (found["logits"], batch["simulated.logits"])
        )
        self.samples += len(ours)
        self.positions += ours.size
        self.agree += _same(ours, theirs, queries=axis == -1)

    def problems(self) -> Iterator[str]:
        if not self.samples:
            yield "no held-out image was compared"
        elif self.not_finite:
            yield "its outputs are not finite"
        elif self.distance > max(MOST * self.moved + 1e-5 * self.positions, REPEATS * self.noise):
            yield (
                "its outputs are not the simulated ones: they are "
                f"{self.distance / max(self.moved, 1e-30):.0%} as far from them as the unquantized "
                "model's are"
            )

    def result(self) -> OnnxChecked | None:
        if not self.samples:
            return None
        return OnnxChecked(
            samples=self.samples,
            agreement=self.agree / self.positions,
            distance=self.distance / self.moved if self.moved else 0.0,
            noise=self.noise / self.moved if self.moved else 0.0,
            largest=self.largest,
        )
