"""How long a step of a fine-tuning takes on this machine, found by doing some."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from mlx_starflow.model_dir.weights import dtype_name
from mlx_starflow.planning.finetune_memory import Choice
from mlx_starflow.training.data.cache.model import CacheModel
from mlx_starflow.training.finetuning.base import (
    batch_parts,
    computed_dtype,
    held_dtype,
    load_base,
    make_trainable,
)
from mlx_starflow.training.finetuning.config import FinetuneConfig
from mlx_starflow.training.finetuning.data import anchored, finetune_loss
from mlx_starflow.training.loop.timing import describe_steps, random_batch, seconds_per_step


def finetune_step_time(model: str | Path, config: FinetuneConfig, choice: Choice) -> str:
    """A line: seconds of a step of `finetune`, and of all of them. Some are done, on random data of the model's size.

    Args:
        model: the base; its weights are read.
        config: of the fine-tuning.
        choice: what `plan_finetune` has chosen.

    Raises:
        StarflowError: the model is not one that can be fine-tuned, or its weights cannot be read.
    """
    CacheModel(model)
    computed = computed_dtype(config)
    flow = load_base(model, choice.quantization, held_dtype(config))
    base = None
    if config.anchor and config.kind == "full":
        base = load_base(model, None, computed)
        base.freeze()
    make_trainable(flow, config, None, choice.rank)
    other = config.dtype is not None or computed != held_dtype(config)
    training = config.training(choice.batch_size, choice.checkpoint, dtype_name(computed) if other else None)
    count = anchored(training.batch_size, config.anchor, batch_parts(config))
    batch = random_batch(flow.config, training.batch_size - count)
    if count:
        held = random_batch(flow.config, count)
        batch |= {"anchor_x": held["latents"], "anchor_text": held["text"]}
    if config.dropout:
        words = np.random.default_rng(0).integers(2**32, size=(training.batch_size - count, 2), dtype=np.uint32)
        batch["dropout"] = words
    loss = partial(
        finetune_loss, anchor_weight=config.anchor_weight, base=base, gradient_checkpointing=choice.checkpoint
    )
    return describe_steps(seconds_per_step(flow, batch, training, loss), training)
