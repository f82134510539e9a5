"""Batches of pairs for the training of a student."""

from __future__ import annotations

import numpy as np

from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.batches import IndexedData, Order
from mlx_starflow.training.data.pairs.files import PairFolder

REFINED = 0.5
"""Share of an inverse student's steps in which it is fed with its own sample."""


class PairData(IndexedData):
    """Batches for `Trainer` and a student.

    Args:
        folder: the pairs.
        subset: numbers of those that are used, which are counted from 0 here.
        matching: whether times are drawn, for a matching student.
        independent: put fresh noise, times this, in the place of the flow's: ordinary flow matching; None: pairs.
        refined: share of the steps with `refined`; 0 for validation.
    """

    def __init__(
        self,
        folder: PairFolder,
        subset: np.ndarray,
        *,
        matching: bool = False,
        independent: float | None = None,
        refined: float = REFINED,
    ):
        self.folder, self.subset, self.matching = folder, subset, matching
        self.independent, self.refined = independent, 0.0 if matching else refined
        self.order = Order(len(subset))

    def arrays(
        self, chosen: np.ndarray, rng: np.random.Generator, config: TrainingConfig, progress: float
    ) -> dict[str, np.ndarray]:
        """As `PairFolder.read` gives them: `noise` and `clean` `[B, N, C]`, `states` `[B, S, N, C]`, `condition`.

        With times `time` `[B]` in place of states; in a share of the steps `refined`, ones `[B]`.
        """
        batch = self.folder.read(self.subset[chosen])
        if self.independent is not None:
            batch["noise"] = np.float32(self.independent) * rng.standard_normal(batch["noise"].shape, np.float32)
        if self.matching:
            del batch["states"]
            batch["time"] = rng.random(len(chosen), np.float32)
        elif rng.random() < self.refined:
            batch["refined"] = np.ones(len(chosen), np.float32)
        return batch
