"""``checkpoint.json``: what was written, and what its check found (no torch)."""

from pathlib import Path
from typing import Any

import msgspec

from layersense.files import read_record, write_record

EXPORT_VERSION = 3
"""Raised when what is written for the same recipe changes, which writes it again."""
ONNX_FILE = "model.onnx"
FOLDER = "checkpoint"
"""Name of the folder beside ``checkpoint.json``."""


class Expected(msgspec.Struct, kw_only=True):
    """What a checkpoint should hold, by the names that its tensors have on the disk."""

    original: str
    """Folder of the checkpoint that it was made from."""
    quantized: dict[str, str]
    """Module → format."""
    shapes: dict[str, list[int]]
    """Module → shape of its weight before it was packed."""
    formats: dict[str, dict[str, Any]]
    """Format → its settings."""
    unquantized: list[str]
    """Every other linear layer, convolution, router and container of experts."""
    changed: list[str]
    """Unquantized tensors that the exporter changes: norms and layers that take scales up."""
    parameters: list[str]
    """All parameters and buffers of the model that a checkpoint stores."""
    dtype: str
    """Safetensors' name of the type of what stays unquantized."""
    mixtures: list[str] = []
    """Modules that hold all experts of a layer, which are written expert by expert."""
    onnx: bool = False
    """Whether it is an ONNX file, of which ``quantized``, ``formats`` and ``unquantized`` speak."""
    kv_cache: str | None = None
    """Algorithm of the key-value cache; None if it stays as it is."""
    cached: list[str] = []
    """Attention modules whose cache has scales of its own: calibrated ones."""


class OnnxChecked(msgspec.Struct, kw_only=True):
    """What onnxruntime computes on the held-out images, beside the simulated model."""

    samples: int
    agreement: float
    """Share of positions (images, pixels, or queries of a detector) with the same first choice."""
    distance: float
    """Σ |onnx − simulated| / Σ |unquantized − simulated| over all outputs."""
    noise: float
    """The same of the simulated model itself, where each layer rounds otherwise."""
    largest: float
    """Largest difference from the simulated outputs."""


class OnnxMetric(msgspec.Struct, kw_only=True):
    """The task's own metric on the held-out images; None where nothing is labelled."""

    name: str
    unit: str
    onnx: float | None
    """Of the file, in onnxruntime."""
    simulated: float | None
    unquantized: float | None
    apart_low: float | None = None
    """Of the 95 % interval of file − simulated, by bootstrap over the images; None with one."""
    apart_high: float | None = None


class Checked(msgspec.Struct, kw_only=True):
    """What the check found."""

    problems: list[str]
    """Why it may not be shipped; empty in anything that was put in place."""
    vllm: list[str]
    """Why vLLM would not read it as it is meant; empty if it would."""
    tensors: int
    bytes: int
    """Of all tensors."""
    quantized_bytes: int
    """Of the quantized modules: weights and scales."""
    compared: int
    """Packed weights that were compared with the simulated ones."""
    differing: float
    """Share of their elements that are another value than simulated."""
    worst_steps: float
    """Largest difference, in steps of the format at that element."""
    onnx: OnnxChecked | None = None
    """None where a checkpoint in Hugging Face form was written."""


class Exported(msgspec.Struct, kw_only=True):
    """The whole file."""

    schema_version: int = EXPORT_VERSION
    run: str
    scheme: str
    digest: str
    """SHA-256 over all that determines the checkpoint."""
    recipe_digest: str
    """Of the recipe that was written, as verification knows it."""
    quant_algo: str
    effective_bits: float
    """Of the searched weights, as written."""
    effective_bits_asked: float
    """Of the scheme's recipe."""
    kept: dict[str, str]
    """Handle → why a group stays unquantized although the recipe quantizes it."""
    predicted_bytes: float
    """Of the quantized modules, by the recipe's costs."""
    files: dict[str, int]
    """Name → bytes."""
    expected: Expected
    checked: Checked
    metrics: list[OnnxMetric] = []
    """None where no ONNX file was written, or the task has none for its images."""
    seconds: dict[str, float]
    peak_memory_bytes: int
    environment: dict[str, str]

    @property
    def surplus(self) -> float:
        """Share by which the quantized modules take more bytes than predicted."""
        return self.checked.quantized_bytes / self.predicted_bytes - 1


def read_exported(path: str | Path) -> Exported:
    """Read a ``checkpoint.json``.

    Raises:
        LayersenseError: it is missing, or none of this version.
    """
    return read_record(
        path, Exported, EXPORT_VERSION, "checkpoint.json", "export", "run `snakemake export`"
    )


def write_exported(path: str | Path, content: Exported) -> None:
    """Write a ``checkpoint.json`` atomically."""
    write_record(path, content)
