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
class _Device:
    """What the recordings of one GPU share: where graphs find their tensors, stream, memory."""

    scratch: dict[tuple[torch.dtype, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Input and gradient by size, which a graph reads where they were when it was recorded."""
    stream: Any = field(default_factory=torch.cuda.Stream)
    pool: Any = field(default_factory=torch.cuda.graph_pool_handle)

    def fill(self, rows: int, input: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return input and gradient in the scratch, with rows and columns added.

        Rows are copies of the first one, which change no range of values, with a gradient of zero,
        which adds nothing to a score.
        """
        width = aligned(gradient.shape[1])
        # A power of two, so that all layers together take at most twice what the largest takes.
        size = 1 << (rows * max(input.shape[1], width) - 1).bit_length()
        key = (input.dtype, size)
        if key not in self.scratch:
            self.scratch[key] = input.new_empty(size), input.new_empty(size)
        first, second = self.scratch[key]
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

    def record(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Return a graph of what a function launches, and the tensor that a replay writes."""
        result = torch.empty_like(run())  # once more: all kernels are loaded, none recorded
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        # Not `torch.cuda.graph`, which empties the allocator's cache before each of hundreds.
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result.copy_(run())
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph, result


class _Recording:
    """A layer's scoring at one number of rows: first launched, then recorded, then replayed."""

    def __init__(self, device: _Device) -> None:
        self._device = device
        self._launched = False
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def scores(self, run: Callable[[], Tensor]) -> Tensor:
        """Return the scores that ``run`` computes from the device's scratch, shape (formats,)."""
        if not self._launched:
            self._launched = True
            return run()
        if self._recorded is None:
            self._recorded = self._device.record(run)
        graph, result = self._recorded
        graph.replay()
        return result.clone()


class Graphs:
    """The recorded layers of a model."""

    def __init__(self) -> None:
        self.on = torch.cuda.is_available()
        self._recordings: dict[Any, dict[int, _Recording]] = {}
        """(key, dtype) → rows → recording."""
        self._devices: dict[torch.device, _Device] = {}

    @property
    def held(self) -> bool:
        """Whether anything was recorded."""
        return bool(self._devices)

    def close(self) -> None:
        """Record nothing any more, and give the memory back."""
        self.on = False
        self._recordings, self._devices = {}, {}

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

        Rows are added up to one of few numbers of rows, which changes no score.

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
            x, g = device.fill(rows, input, gradient)

            def run() -> Tensor:
                return body(x, forward(x), g)

            recordings = self._recordings.setdefault((key, input.dtype), {})
            if rows not in recordings:
                if len(recordings) == SHAPES:
                    return run()
                recordings[rows] = _Recording(device)
            return recordings[rows].scores(run)


@dataclass(frozen=True)
class Rows:
    """What ModelOpt's quantizers see of the dimensions before the last.

    They find a token's axis by how many there are. A range for each token they apply by one
    function where a single dimension is longer than 1, and by another where several are; the two
    differ in the last bit of a scale, and so in which way ties are rounded.
    """

    dimensions: int
    several: bool
    """Whether more than one of them is longer than 1."""

    @classmethod
    def of(cls, input: Tensor) -> "Rows":
        """Return what they see of an input, shape (…, features)."""
        sizes = input.shape[:-1]
        return cls(len(sizes), sum(size > 1 for size in sizes) > 1)

    def view(self, matrix: Tensor) -> Tensor:
        """Return a matrix of an even number of rows as quantizers would see such an input."""
        sizes = (2, len(matrix) // 2) if self.several else (len(matrix),)
        ones = (1,) * (self.dimensions - len(sizes))
        return matrix.view(*ones, *sizes, matrix.shape[1])


def round_up_rows(rows: int) -> int:
    """Return the number of rows to compute: even, about an eighth more, few different ones."""
    step = 1 << max(1, rows.bit_length() - 4)
    return -(-rows // step) * step


def aligned(width: int) -> int:
    """Return the width of a row that ends where the next may begin."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def pad_to(tensor: Tensor, rows: int, width: int) -> Tensor:
    """Return a matrix with zeros added to a shape; itself if it has that shape."""
    if tuple(tensor.shape) == (rows, width):
        return tensor
    return functional.pad(tensor, (0, width - tensor.shape[1], 0, rows - tensor.shape[0]))
