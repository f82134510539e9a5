"""How long a step of a training takes on this machine, found by doing some."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

import mlx.nn as nn
import numpy as np

from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.loop import distributed
from mlx_starflow.training.loop.objective import batch_loss
from mlx_starflow.training.loop.step import StepMaker

STEPS = 3


def seconds_per_step(model: nn.Module, batch: Mapping[str, np.ndarray], config: TrainingConfig) -> float:
    """The shortest of some steps, after one that compiles it; the model's weights are changed.

    Args:
        model: a flow.
        batch: arrays of `config.batch_size` samples, as `batch_loss` takes them.
        config: of the training.
    """
    loss = partial(batch_loss, gradient_checkpointing=config.checkpoint_layers)
    step = StepMaker(model, loss, None, config, distributed.world())
    taken = []
    for _ in range(1 + STEPS):
        began = time.perf_counter()
        step(batch, 0, 0.0, config.ema)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def duration(seconds: float) -> str:
    """In words: "45 s", "12 min", "3 h 20 min", "4 d 6 h"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"


def describe_steps(seconds: float, config: TrainingConfig) -> str:
    """What `seconds_per_step` means for a training, in a line."""
    each = f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"
    return f"{each} a step here, {duration(seconds * config.steps)} for {config.steps} steps"
