"""When a training went astray: losses that rise beyond hope, and numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.training.loop.checkpoint import load_checkpoint

ASTRAY = 1.0
"""A loss so much above the lowest one is beyond hope: the density of every dimension is e times too low."""

_MEMORY = 0.9
"""Of the running mean of the losses."""


class Losses:
    """A running mean of the losses, and the lowest it has been."""

    def __init__(self, mean: float | None = None, lowest: float | None = None):
        self.mean, self.lowest = mean, lowest

    @classmethod
    def of(cls, state: Mapping[str, Any] | None) -> Losses:
        """What `state` gave; None: those of a training that begins."""
        return cls(**(state or {}))

    def state(self) -> dict[str, float | None]:
        """For a checkpoint."""
        return {"mean": self.mean, "lowest": self.lowest}

    def add(self, loss: float) -> None:
        """The loss of a step."""
        if math.isfinite(loss):
            self.mean = loss if self.mean is None else _MEMORY * self.mean + (1 - _MEMORY) * loss
            self.lowest = self.mean if self.lowest is None else min(self.lowest, self.mean)

    @property
    def astray(self) -> bool:
        return self.mean is not None and self.lowest is not None and self.mean > self.lowest + ASTRAY


def all_finite(arrays: Iterable[mx.array]) -> bool:
    """Whether no number in any of them is infinite or NaN."""
    return bool(mx.all(mx.stack([mx.all(mx.isfinite(array)) for array in arrays] or [mx.array(True)])))


def is_sound(path: Path) -> bool:
    """Whether a checkpoint can be read, is of before the loss went astray, and has finite numbers alone."""
    try:
        checkpoint = load_checkpoint(path)
    except StarflowError:
        return False
    if Losses.of(checkpoint.note.get("losses")).astray:
        return False
    return all_finite([*checkpoint.weights.values(), *checkpoint.average.values()])
