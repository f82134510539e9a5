"""The options of `train` that say how a network is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

import click

from mlx_starflow.cli.options.sampling import with_options
from mlx_starflow.model_dir.precision import DTYPES
from mlx_starflow.training.config import LEVEL_SAMPLINGS, LEVEL_WEIGHTS, OPTIMIZERS, TrainingOptions

Result = TypeVar("Result")

COUNT, EVERY, SHARE = click.IntRange(min=1), click.IntRange(min=0), click.FloatRange(0, 1)

_options = with_options(
    click.option("--steps", type=int, help="Steps of the training."),
    click.option("--batch-size", type=int, help="Samples a step, of all processes together."),
    click.option("--accumulate", type=int, help="Parts that a batch is computed in, one by one, to save memory."),
    click.option("--lr", type=float, help="Highest learning rate; muon's and sinkgd's is 2e-2 by default."),
    click.option("--warm-up", type=float, help="Share of the steps over which the learning rate rises."),
    click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="What steps."),
    click.option("--weight-decay", type=float, help="Of the optimizer."),
    click.option("--clip", type=float, help="Largest norm of the gradient."),
    click.option("--skip", type=float, help="Skip steps whose gradient's norm is larger; 0: none."),
    click.option("--ema", type=float, help="Decay of the average of the weights; 0 is none, and saves memory."),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="What networks compute in; the trained weights are float32 then.",
    ),
    click.option(
        "--checkpoint-layers/--no-checkpoint-layers", default=None, help="Compute layers twice, to save memory."
    ),
    click.option("--noise-std", type=float, help="Noise on the latents."),
    click.option(
        "--level-sampling", type=click.Choice(LEVEL_SAMPLINGS), help="How an iTARFlow's noise levels t are drawn."
    ),
    click.option("--level-weight", type=click.Choice(LEVEL_WEIGHTS), help="Weight of a level t in an iTARFlow's loss."),
    click.option("--caption-dropout", type=float, help="Share of pictures trained without caption, for guidance."),
    click.option("--context-full", type=SHARE, help="Share of samples that read the text alone."),
    click.option("--context-partial", type=SHARE, help="Share of samples that read part of the picture."),
    click.option("--seed", type=click.IntRange(min=0), help="Of everything random."),
    click.option("--save-seconds", type=float, help="Time between checkpoints."),
    click.option("--save-steps", type=EVERY, help="Steps between checkpoints; 0: by time alone."),
    click.option("--log-every", type=COUNT, help="Steps between lines of the log."),
    click.option("--watch-every", type=EVERY, help="Steps between sample grids and loss curves; 0: none."),
    click.option("--validate-every", type=EVERY, help="Steps between validations; 0: none but the last."),
    click.option("--patience", type=EVERY, help="Validations without a better one that end the training; 0: none."),
    click.option("--shard/--no-shard", default=None, help="Split large weights over processes (not on ring)."),
)


def training_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """Add an option for each field of `TrainingOptions` but betas; the command gets them as one, `training`."""

    @wraps(command)
    def with_training(*arguments: Any, **options: Any) -> Result:
        given = {field.name: options.pop(field.name) for field in fields(TrainingOptions) if field.name in options}
        return command(*arguments, training=TrainingOptions(**given), **options)

    return _options(with_training)
