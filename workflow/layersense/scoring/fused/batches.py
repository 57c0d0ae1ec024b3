"""The scoring batches of any size, and the next one put together while one is in use."""

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

    def of(self, size: int) -> Sequence[Batch]:
        """Return all batches of a size."""
        if size not in self._batches:
            self._batches[size], self._starts[size] = self._make(size), [0]
        return self._batches[size]

    def start(self, size: int, index: int) -> int:
        """Return the first sample of a batch of a size."""
        batches, starts = self.of(size), self._starts[size]
        while len(starts) <= index:
            starts.append(starts[-1] + batches[len(starts) - 1].n_samples)
        return starts[index]

    def at(self, size: int, sample: int) -> Batch:
        """Return the batch of a size that begins with a sample."""
        index = 0
        while self.start(size, index) < sample:
            index += 1
        assert self.start(size, index) == sample
        return self.of(size)[index]


def prefetched(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Yield batches; the next one is put together while one is in use."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        ahead = worker.submit(batches.__getitem__, 0) if len(batches) else None
        for index in range(len(batches)):
            assert ahead is not None
            batch = ahead.result()
            if index + 1 < len(batches):
                ahead = worker.submit(batches.__getitem__, index + 1)
            yield batch
