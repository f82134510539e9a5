"""What gives batches to a training, and the order in which it takes samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.training.config import TrainingConfig


class Order:
    """Endless passes over `count` samples, each pass in a new random order.

    With `buckets`, the bucket of each sample, what is taken at once is of one bucket: of each as often as it has
    samples, chosen at random. Every bucket has passes of its own. With `repeats`, a pass takes each sample so often.

    Attributes:
        left: indices that this pass has still to use, bucket by bucket; what a checkpoint keeps.
    """

    def __init__(
        self,
        count: int,
        buckets: Sequence[int] | np.ndarray | None = None,
        repeats: Sequence[int] | np.ndarray | None = None,
    ):
        self.count = count
        self._repeats = None if repeats is None else np.asarray(repeats, np.int64)
        self._buckets = np.zeros(count, np.int64) if buckets is None else np.unique(buckets, return_inverse=True)[1]
        self._members = [np.flatnonzero(self._buckets == bucket) for bucket in range(self._buckets.max(initial=0) + 1)]
        self.left = np.zeros(0, np.int64)

    @property
    def length(self) -> int:
        """Samples of a pass."""
        return self.count if self._repeats is None else int(self._repeats.sum())

    @property
    def left(self) -> np.ndarray:
        return np.concatenate(self._left)

    @left.setter
    def left(self, indices: np.ndarray) -> None:
        if len(indices) and (indices.min() < 0 or indices.max() >= self.count):
            raise StarflowError(
                f"the checkpoint is of a training on other data: it goes on with picture {indices.max() + 1} of "
                f"{self.count}; give the same data, or start again"
            )
        self._left = [indices[self._buckets[indices] == bucket] for bucket in range(len(self._members))]

    def take(self, number: int, rng: np.random.Generator) -> np.ndarray:
        """The next `number` indices."""
        bucket = 0
        if len(self._members) > 1:
            bucket = int(self._buckets[self._repeated(np.arange(self.count))[rng.integers(self.length)]])
        left = self._left[bucket]
        while len(left) < number:
            members = self._repeated(self._members[bucket])
            left = np.concatenate([left, members[rng.permutation(len(members))]])
        taken, self._left[bucket] = np.split(left, [number])
        return taken

    def _repeated(self, samples: np.ndarray) -> np.ndarray:
        return samples if self._repeats is None else np.repeat(samples, self._repeats[samples])

    def once(self, number: int) -> Iterator[np.ndarray]:
        """All indices, each once, `number` or fewer of one bucket at a time; the passes do not notice."""
        for members in self._members:
            for start in range(0, len(members), number):
                yield members[start : start + number]


class TrainingData(Protocol):
    """Where batches come from. `order` is the only state besides the generator that is given to `batch`."""

    order: Order

    def batch(self, rng: np.random.Generator, config: TrainingConfig, progress: float) -> dict[str, np.ndarray]:
        """The arrays of one step at `progress` 0..1, noise and masks included, all drawn from `rng`.

        Each array has a row for each of the `config.batch_size` samples.
        """
        ...


class IndexedData(TrainingData, Protocol):
    """Data whose samples can be asked for by their numbers, which validation needs too."""

    def batch(self, rng: np.random.Generator, config: TrainingConfig, progress: float) -> dict[str, np.ndarray]:
        """The arrays of the next samples of the order."""
        return self.arrays(self.order.take(config.batch_size, rng), rng, config, progress)

    def arrays(
        self, chosen: np.ndarray, rng: np.random.Generator, config: TrainingConfig, progress: float
    ) -> dict[str, np.ndarray]:
        """The arrays of the samples with the numbers `chosen`, which count from 0 to `order.count` - 1."""
        ...


def split_samples(count: int, share: float, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the samples to train on and of those to measure with: a random `share`, at least 2, at most `most`.

    A share of 0 is none. Raises StarflowError if nothing would be left to train on.
    """
    held_out = min(max(round(share * count), 2), most) if share else 0
    if held_out >= count:
        raise StarflowError(f"{count} pictures are too few to hold some out: give more, or --validation 0")
    order = np.random.default_rng([seed, 1]).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
