"""Batches that are put together when they are asked for, whatever a sample is."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from layersense.models.tasks.protocol import Batch

SampleT = TypeVar("SampleT")

CACHE_BYTES = 2**31
"""How much of the prepared samples stays in memory between passes over the data."""


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
