"""CUDA graphs of linear layers' scoring: one launch where ModelOpt's quantizers need hundreds.

A layer is scored by the same kernels on the same weights at every batch, so a processor that
launches them one by one is most of the time of a step. The first batch of a shape launches them,
the second records them, the others replay the record.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LARGEST = 2**26
"""Elements of an input or output above which launches cost little beside the work."""
SHAPES = 8
"""Numbers of rows for which a layer is recorded; a graph takes memory of its own."""
ALIGNMENT = 8
"""Matrices of 16-bit numbers are multiplied about twice as fast where rows begin at 16 bytes."""

Body = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Input, output and its gradient, shapes (rows, …) → scores, shape (formats,)."""


@dataclass
class _Record:
    """A layer's scoring at one number of rows; ``graph`` is missing until the second batch."""

    graph: torch.cuda.CUDAGraph | None = None
    scores: Tensor | None = None


@dataclass
class _Device:
    """What the records of one GPU share."""

    scratch: dict[tuple[torch.dtype, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Input and gradient by size, which a graph reads where they were when it was recorded."""
    stream: Any = field(default_factory=torch.cuda.Stream)
    pool: Any = field(default_factory=torch.cuda.graph_pool_handle)


class Graphs:
    """The recorded layers of a model."""

    def __init__(self) -> None:
        self.on = torch.cuda.is_available()
        self._records: dict[Any, dict[int, _Record]] = {}
        self._devices: dict[torch.device, _Device] = {}

    @property
    def held(self) -> bool:
        """Whether anything was recorded."""
        return bool(self._devices)

    def close(self) -> None:
        """Record nothing any more, and give the memory back."""
        self.on = False
        self._records, self._devices = {}, {}

    def suits(self, input: Tensor, gradient: Tensor) -> bool:
        """Return whether a layer's scoring can be recorded.

        Args:
            input: shape (…, features).
            gradient: shape (rows, output features).
        """
        return (
            self.on
            and input.is_cuda
            and input.dtype == gradient.dtype
            and input.dim() > 1
            and input.numel() > 0
            and round_up_rows(len(gradient)) * max(input.shape[-1], aligned(gradient.shape[1]))
            <= LARGEST
        )

    def scores(
        self,
        key: Any,
        forward: Callable[[Tensor], Tensor],
        body: Body,
        input: Tensor,
        gradient: Tensor,
    ) -> Tensor:
        """Return the scores of a layer, as ``body`` computes them, shape (formats,).

        Rows are added up to one of few numbers of rows: copies of the first one, which change no
        range of values, with a gradient of zero, which add nothing to a score.

        Args:
            key: the layer and the formats.
            forward: input → output, shape (rows, features as ``body`` wants them).
            body: scores an input; asks the device nothing.
            input: shape (rows, features).
            gradient: ∂L/∂Y, shape (rows, output features).
        """
        with torch.cuda.device(input.device):
            device = self._devices.setdefault(input.device, _Device())
            rows = round_up_rows(len(input))
            x, g = self._fill(device, rows, input, gradient)
            records = self._records.setdefault((key, input.dtype), {})
            if rows not in records:
                if len(records) < SHAPES:
                    records[rows] = _Record()
                return body(x, forward(x), g)
            record = records[rows]
            if record.graph is None:
                self._capture(device, record, lambda: body(x, forward(x), g))
            assert record.graph is not None
            assert record.scores is not None
            record.graph.replay()
            return record.scores.clone()

    def _fill(
        self, device: _Device, rows: int, input: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        width = aligned(gradient.shape[1])
        # A power of two, so that all layers together take at most twice what the largest takes.
        size = 1 << (rows * max(input.shape[1], width) - 1).bit_length()
        key = (input.dtype, size)
        if key not in device.scratch:
            device.scratch[key] = input.new_empty(size), input.new_empty(size)
        first, second = device.scratch[key]
        x = first[: rows * input.shape[1]].view(rows, -1)
        g = second[: rows * width].view(rows, -1)
        x[: len(input)].copy_(input)
        if rows > len(input):
            x[len(input) :].copy_(input[:1].expand(rows - len(input), -1))
            g[len(input) :].zero_()
        if width > gradient.shape[1]:
            g[:, gradient.shape[1] :].zero_()
        g[: len(input), : gradient.shape[1]].copy_(gradient)
        return x, g

    def _capture(self, device: _Device, record: _Record, run: Callable[[], Tensor]) -> None:
        record.scores = torch.empty_like(run())  # once more: all kernels are loaded, none recorded
        graph = torch.cuda.CUDAGraph()
        device.stream.wait_stream(torch.cuda.current_stream())
        # Not `torch.cuda.graph`, which empties the allocator's cache before each of hundreds.
        with torch.cuda.stream(device.stream):
            graph.capture_begin(pool=device.pool, capture_error_mode="thread_local")
            try:
                record.scores.copy_(run())
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(device.stream)
        record.graph = graph


def round_up_rows(rows: int) -> int:
    """Return the number of rows to compute: at most an eighth more, few different ones."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def aligned(width: int) -> int:
    """Return the width of a row that ends where the next may begin."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def pad_to(tensor: Tensor, rows: int, width: int) -> Tensor:
    """Return a matrix with zeros added to a shape; itself if it has that shape."""
    if tuple(tensor.shape) == (rows, width):
        return tensor
    return functional.pad(tensor, (0, width - tensor.shape[1], 0, rows - tensor.shape[0]))
