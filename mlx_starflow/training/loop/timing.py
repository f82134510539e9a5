"""How long a step of a training takes on this machine, found by doing some."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

import mlx.nn as nn
import numpy as np

from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.tarflow import PixelFlowConfig
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.loop import distributed
from mlx_starflow.training.loop.objective import batch_loss
from mlx_starflow.training.loop.step import Loss, StepMaker

STEPS = 3


def seconds_per_step(
    model: nn.Module, batch: Mapping[str, np.ndarray], config: TrainingConfig, loss: Loss | None = None
) -> float:
    """The shortest of some steps, after one that compiles it; the model's weights are changed.

    Args:
        model: what is trained.
        batch: arrays of `config.batch_size` samples, as the loss takes them.
        config: of the training.
        loss: see `Trainer`.
    """
    loss = loss or partial(batch_loss, gradient_checkpointing=config.checkpoint_layers)
    step = StepMaker(model, loss, None, config, distributed.world())
    taken = []
    for _ in range(1 + STEPS):
        began = time.perf_counter()
        step(batch, 0, 0.0, config.ema)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def random_batch(config: FlowConfig | PixelFlowConfig, count: int) -> dict[str, np.ndarray]:
    """`count` samples of random numbers in a flow's shapes: `latents`, `noise` and, where it reads some, `text`."""
    rng = np.random.default_rng(0)
    shape = (count, config.img_size, config.img_size, config.channel_size)
    latents, noise = rng.standard_normal((2, *shape), dtype=np.float32)
    batch: dict[str, np.ndarray] = {"latents": latents, "noise": noise}
    if isinstance(config, FlowConfig):
        batch["text"] = rng.standard_normal((count, config.txt_size, config.txt_dim), dtype=np.float32)
    elif config.num_classes:
        batch["text"] = rng.integers(config.num_classes, size=count).astype(np.int32)
    return batch


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
