"""What the tasks that predict the next token share."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from layersense.errors import LayersenseError
from layersense.models.checkpoints import Checkpoint
from layersense.models.loading import load_model, load_tokenizer
from layersense.models.tasks.protocol import IGNORED, Batch, Loaded, Sampling

SampleT = TypeVar("SampleT")


NEEDED = {
    "eos_token": "end token, which joins the texts",
    "pad_token": "padding token, which a batch needs",
}
"""Special token of a tokenizer → what it is for."""


def load_text_model(
    auto_class: Any, checkpoint: Checkpoint, needed: str, *, dtype: str, device: torch.device | str
) -> Loaded:
    """Load a model of texts and its tokenizer.

    Args:
        auto_class: an auto class of transformers.
        checkpoint: what to load.
        needed: key of :data:`NEEDED`, the special token that its tokenizer must have.
        dtype: as of a run.
        device: where the weights go.

    Raises:
        LayersenseError: it is no model of this class, weights are missing or not finite, or the
            tokenizer has no such token.
    """
    model, warnings = load_model(auto_class, checkpoint, dtype=dtype, device=device)
    tokenizer = load_tokenizer(checkpoint)
    if getattr(tokenizer, f"{needed}_id") is None:
        raise LayersenseError(
            f"{checkpoint.path}: its tokenizer names no {NEEDED[needed]}; set `{needed}` in "
            "tokenizer_config.json"
        )
    return Loaded(model, tokenizer, checkpoint.id, warnings)


def check_length(loaded: Loaded, sampling: Sampling) -> None:
    """Raise if ``max_length`` is more than the model's positions; relative ones (T5) have no end.

    Raises:
        LayersenseError: it is.
    """
    longest = getattr(getattr(loaded.model, "config", None), "max_position_embeddings", None)
    if longest is not None and sampling.max_length > longest:
        raise LayersenseError(
            f"`max_length` {sampling.max_length} of the run is more than the {longest} "
            f"positions of {loaded.name}; set it to {longest} or less"
        )


def supervised_logits(output: Any, batch: Batch) -> Tensor:
    """Return the logits that predict a supervised token, shape (n_tokens, vocabulary), float32.

    The logits at position t predict the token at t + 1.
    """
    supervised = batch.labels[:, 1:] != IGNORED
    logits: Tensor = output.logits[:, :-1][supervised]
    return logits.float()


def summed_cross_entropy(output: Any, batch: Batch) -> Tensor:
    """Return the cross entropy in nats, summed over the supervised tokens, a float32 scalar."""
    targets = batch.labels[:, 1:]
    return functional.cross_entropy(
        supervised_logits(output, batch), targets[targets != IGNORED], reduction="sum"
    )


def count_supervised(labels: Tensor) -> int:
    """Return how many labels, shape (B, T), enter the loss: the first position never does."""
    return int((labels[:, 1:] != IGNORED).sum())


class LazyBatches(Sequence[Batch], Generic[SampleT]):
    """Batches that are put together when they are asked for.

    Every row is prepared once at the start, so that a bad row is told before any scoring. What
    fits into ``cache_bytes`` is kept, the rest is prepared anew whenever it is read.

    Args:
        n_rows: how many rows there are.
        batch_size: samples of a batch.
        prepare: makes a sample of a row.
        size: bytes of a sample.
        collate: makes a batch of samples.
        cache_bytes: how much is kept of what nobody has kept before.
        kept: where samples are kept, by ``key`` of the row; other batches may share it.
        key: what determines a row's sample; its index, if nothing is shared.
    """

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        *,
        prepare: Callable[[int], SampleT],
        size: Callable[[SampleT], int],
        collate: Callable[[Sequence[SampleT]], Batch],
        cache_bytes: int,
        kept: dict[Hashable, SampleT] | None = None,
        key: Callable[[int], Hashable] = int,
    ) -> None:
        self._n_rows, self._batch_size = n_rows, batch_size
        self._prepare, self._collate, self._key = prepare, collate, key
        self._kept = {} if kept is None else kept
        for index in range(n_rows):
            if key(index) in self._kept:
                continue
            sample = prepare(index)
            cache_bytes -= size(sample)
            if cache_bytes >= 0:
                self._kept[key(index)] = sample

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self._n_rows // self._batch_size)

    def __getitem__(self, index: Any) -> Any:
        """Return one batch, or the batches of a slice."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        rows = range(self._n_rows)[position * self._batch_size :][: self._batch_size]
        return self._collate([self._sample(row) for row in rows])

    def _sample(self, row: int) -> SampleT:
        sample = self._kept.get(self._key(row))
        return self._prepare(row) if sample is None else sample


def pad_right(tensors: Sequence[Tensor], value: int) -> Tensor:
    """Stack vectors of lengths ≤ T into (B, T), filling up with ``value`` on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)
