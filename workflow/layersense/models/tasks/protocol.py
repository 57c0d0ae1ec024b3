"""What a task is: how to load a model, what a batch holds, what the loss is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from layersense.errors import LayersenseError
from layersense.models.checkpoints import Checkpoint

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from layersense.calibration.database import Row
    from layersense.calibration.sampling import Unit
    from layersense.quantization.layers import LayerName

IGNORED = -100
"""The label of a position that does not enter the loss."""


@dataclass(frozen=True)
class Sampling:
    """How rows become batches; the part of a run that a task needs."""

    max_length: int
    """Longest sequence in tokens."""
    modality: str
    """``image_text``, ``text``, ``text_pair``, ``image_boxes``, ``image_labels`` or
    ``image_masks``."""
    prompt: str = "Describe the image."
    """What the user's turn says."""
    min_pixels: int | None = None
    """Smallest image in pixels after resizing; None is the processor's own."""
    max_pixels: int | None = None
    """Largest image in pixels after resizing; None is the processor's own."""
    seed: int = 0
    """Seed of the run, for tasks that draw at random; those here do not."""


@dataclass(frozen=True)
class Batch:
    """Some samples, ready for a model: B × T tokens, or B images."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the model's forward; ``input_ids`` has shape (B, T)."""
    labels: Tensor
    """Token ids, shape (B, T), or a class of each sample or pixel, shape (B, …); ``IGNORED`` where
    nothing is supervised."""
    n_tokens: int
    """Supervised tokens: those that enter the loss. Where there are none, samples."""
    n_samples: int
    """Samples: B."""
    n_padding: int
    """Positions (tokens, or pixels of images) that only fill up a sample."""
    n_truncated: int
    """Samples that were cut to ``max_length``."""
    targets: tuple[dict[str, Tensor], ...] = ()
    """What is to be found in each sample, where labels cannot say it: boxes and their classes."""
    positions: int | None = None
    """All positions, padding included, where they are not the elements of ``labels``."""

    @property
    def n_positions(self) -> int:
        """All positions, padding included: B × T, or pixels."""
        return self.labels.numel() if self.positions is None else self.positions

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """Return the batch on ``device``, its floating-point inputs as ``dtype``.

        Labels and targets keep their types, as losses are computed in float32. The tensors are
        detached: ``requires_grad_`` on them leaves this batch as it is.
        """
        return replace(
            self,
            inputs={
                key: value.detach().to(device, dtype if value.is_floating_point() else None)
                for key, value in self.inputs.items()
            },
            labels=self.labels.to(device),
            targets=tuple(
                {key: value.to(device) for key, value in target.items()} for target in self.targets
            ),
        )


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, with what prepares its inputs."""

    model: nn.Module
    processor: Any
    """The checkpoint's processor, or its tokenizer where it has no other."""
    name: str
    """The checkpoint's id, for error messages."""
    warnings: tuple[str, ...] = ()
    """What was odd about the checkpoint, one sentence each."""
    describe: Callable[[Sequence[str]], LayerName] | None = None
    """Names layer groups instead of the task, where names of modules alone do not tell."""
    prepared: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    """Samples that a task has prepared for the model, by what determines them."""


class Metric(Protocol):
    """What a task is judged by, such as token accuracy: one number over all held-out rows."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def unit(self) -> str:
        """``share`` (0 to 1, shown in percent), or any other word that is written behind it."""

    @property
    def higher_is_better(self) -> bool:
        """Whether more of it is better."""

    def records(self, output: Any, logits: Tensor, batch: Batch) -> list[Any]:
        """Return what :meth:`values` needs of one batch, as values of JSON.

        One record a sample, in order, so that all of one photograph can be drawn together for the
        interval; or one of the batch where its samples cannot be told apart.

        Args:
            output: what the task's ``forward`` returned.
            logits: what its ``supervised_logits`` made of that.
            batch: on its device.
        """

    def values(
        self, records: Sequence[Any], counts: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """Return the metric over the records of all batches, once for each row of ``counts``.

        Args:
            records: of all batches, in their order.
            counts: how often each record counts, shape (n, records): all of them once for the
                metric itself, and then as the resamples of the bootstrap draw them.

        Returns:
            Shape (n,); NaN where the metric says nothing.
        """


@runtime_checkable
class WrittenMetric(Protocol):
    """What a task is judged by that goes by what the model writes when nothing is given to it.

    Writing takes a pass of the model for each token, so that it is measured where ``captions`` of
    ``verify`` asks for it, on one row of each photograph, and never of single groups.
    """

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def unit(self) -> str:
        """As of a :class:`Metric`."""

    @property
    def higher_is_better(self) -> bool:
        """Whether more of it is better."""

    @property
    def most_passes(self) -> int:
        """How many passes of the model :meth:`write` takes for a batch at most."""

    def write(self, model: nn.Module, batch: Batch) -> list[str]:
        """Return what the model, quantized as it is at present, writes for each sample."""

    def values(
        self, records: Sequence[Any], counts: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """As of a :class:`Metric`; a record is ``[written, [reference, …]]`` of a photograph."""


class Task(Protocol):
    """One kind of model. Each task is one file, and stateless.

    Where an output is more than distributions, or stands in the order of what a model chose on the
    way, a task also has ``divergence`` or ``same_choices``: see ``Divergence`` and ``Choices`` in
    :mod:`layersense.verification.measure`.
    """

    @property
    def name(self) -> str:
        """The task's name in the config."""

    @property
    def modalities(self) -> frozenset[str]:
        """What its batches may hold; see :class:`Sampling`."""

    def unit(self, modality: str) -> Unit:
        """Return the calibration database's unit that makes one row of ``modality``."""

    def load(self, checkpoint: Checkpoint, *, dtype: str, device: torch.device | str) -> Loaded:
        """Load a checkpoint for scoring, without network.

        Args:
            checkpoint: what :func:`layersense.models.checkpoints.resolve` found.
            dtype: ``auto`` (the checkpoint's), ``bfloat16``, ``float16`` or ``float32``.
            device: where the weights go.

        Raises:
            LayersenseError: it is no model of this task, weights are missing or not finite.
        """

    def batches(
        self, loaded: Loaded, rows: Sequence[Row], sampling: Sampling, batch_size: int
    ) -> Sequence[Batch]:
        """Return the batches of ``rows``, in row order, on the CPU.

        The same arguments always give the same batches, and the samples do not depend on
        ``batch_size``. All rows are checked before this returns.

        Raises:
            LayersenseError: a row cannot be used.
        """

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model; the batch is on its device."""

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the batch's loss, **summed** over its supervised tokens, as a float32 scalar.

        Where there are no tokens it is summed over samples: a loss that the model normalises over
        the batch is brought to the sum of what each sample alone would give.
        """

    def supervised_logits(self, output: Any, batch: Batch) -> Tensor:
        """Return the logits that are compared, float32; for ``kl_div`` and ``verify``.

        Returns:
            Shape (n, classes); or (n, k, classes) of a task that is verified and not scored by
            ``kl_div``, where a position has k independent distributions.

        Raises:
            LayersenseError: the task has no one output distribution.
        """

    def describe(self, module_names: Sequence[str]) -> LayerName:
        """Return subsystem, block and kind of a layer group."""

    def metrics(self, loaded: Loaded) -> Sequence[Metric | WrittenMetric]:
        """Return what whole recipes are judged by, each of another name.

        Optional: a task of the user's own that lacks this method has none.
        """


class ImageTask(Task, Protocol):
    """A task whose models are written as ONNX."""

    def outputs_of(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a model without labels: ``logits`` and, of a detector, ``pred_boxes``.

        Boxes are center, width and height, in shares of the image.
        """

    def output_of(self, outputs: Mapping[str, Tensor]) -> Any:
        """Return what ``forward`` would, for the ``logits`` and ``pred_boxes`` of such a file."""


def no_distribution(task: Task) -> LayersenseError:
    """Return the error of a task that cannot be measured by ``kl_div``."""
    return LayersenseError(
        f"task {task.name} has no one output distribution, which `method: kl_div` compares; set "
        "`method: gradient`"
    )


def check_modality(task: Task, modality: str) -> None:
    """Raise unless ``task`` has batches of ``modality``.

    Raises:
        LayersenseError: it has none.
    """
    if modality not in task.modalities:
        raise LayersenseError(
            f"modality {modality}: a model of task {task.name} takes "
            f"{' or '.join(sorted(task.modalities))}; set `modality` of the run to that"
        )
