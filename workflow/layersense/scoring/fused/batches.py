"""The scoring batches of any size, and the next one put together while one is in use."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from layersense.models.tasks.protocol import Batch


class Aligned:
    """Batches that are found by their first sample.

    Batches of a divisor of a size begin where those of the size begin, because both cut the same
    samples in the same order.

    Args:
        make: size → all batches of that size.
    """

    def __init__(self, make: Callable[[int], Sequence[Batch]]) -> None:
        self._make = make
        self._batches: dict[int, Sequence[Batch]] = {}
        self._starts: dict[int, list[int]] = {}
        """Size → first sample of each batch, as far as they are known, and of the next one."""

    def of(self, size: int) -> Sequence[Batch]:
        """Return all batches of a size."""
        if size not in self._batches:
            self._batches[size], self._starts[size] = self._make(size), [0]
        return self._batches[size]

    def at(self, size: int, sample: int) -> Batch:
        """Return the batch of a size that begins with a sample.

        Those of one size that are asked for in turn are each put together once.
        """
        batches, starts = self.of(size), self._starts[size]
        while starts[-1] < sample:
            starts.append(starts[-1] + batches[len(starts) - 1].n_samples)
        index = bisect_left(starts, sample)
        assert starts[index] == sample
        batch = batches[index]
        if index == len(starts) - 1:
            starts.append(sample + batch.n_samples)
        return batch


def prefetched(batches: Sequence[Batch], count: int | None = None) -> Iterator[Batch]:
    """Yield the first ``count`` batches, or all; the next is put together while one is in use."""
    count = len(batches) if count is None else count
    with ThreadPoolExecutor(max_workers=1) as worker:
        ahead = worker.submit(batches.__getitem__, 0) if count else None
        for index in range(count):
            assert ahead is not None
            batch = ahead.result()
            if index + 1 < count:
                ahead = worker.submit(batches.__getitem__, index + 1)
            yield batch
