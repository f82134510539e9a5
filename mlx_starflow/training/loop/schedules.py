"""What follows from how far a training is: its learning rate, and how fast the moving average forgets."""

from __future__ import annotations

import math


def cosine(progress: float, warm_up: float, floor: float = 0.02) -> float:
    """Learning-rate factor at `progress` 0..1: linear over the share `warm_up`, then a cosine down to `floor`."""
    if progress < warm_up:
        return progress / warm_up
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def ema_decay(limit: float, step: int) -> float:
    """Decay of the moving average at update `step` = 1, 2, ...: it ramps up, so that early weights are forgotten."""
    return min(limit, (1 + step) / (10 + step))
