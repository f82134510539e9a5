"""`mlx-starflow train`: a folder of captioned pictures to a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlx_starflow.cli.options.config_file import config_option, save_options
from mlx_starflow.cpu import blas

COUNT, EVERY, SHARE = click.IntRange(min=1), click.IntRange(min=0), click.FloatRange(0, 1)

BOTH = ("seed", "save_seconds", "save_steps", "log_every")
"""Flags for the autoencoder's training too; the others are for the flow's."""


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that are fields of `TrainingConfig`; one that is left out is None."""
    options = [
        click.option("--steps", type=int, help="Steps of the training."),
        click.option("--batch-size", type=int, help="Samples a step, of all processes together."),
        click.option("--accumulate", type=int, help="Parts that a batch is computed in, one by one, to save memory."),
        click.option("--lr", type=float, help="Highest learning rate."),
        click.option("--warm-up", type=float, help="Share of the steps over which the learning rate rises."),
        click.option("--optimizer", type=click.Choice(["adamw", "adafactor", "muon", "sinkgd"]), help="What steps."),
        click.option("--weight-decay", type=float, help="Of the optimizer."),
        click.option("--clip", type=float, help="Largest norm of the gradient."),
        click.option("--skip", type=float, help="Skip steps whose gradient's norm is larger; 0: none."),
        click.option("--ema", type=float, help="Decay of the average of the weights; 0 is none, and saves memory."),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            help="What networks compute in; the trained weights are float32 then.",
        ),
        click.option(
            "--checkpoint-layers/--no-checkpoint-layers", default=None, help="Compute layers twice, to save memory."
        ),
        click.option("--noise-std", type=float, help="Noise on the latents."),
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
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Model directory to write.")
@config_option
@click.option("--preset", default="small", show_default=True, help="Sizes: small, demo, or tarflow for pixels.")
@click.option("--model-config", type=click.Path(path_type=Path), help="YAML or JSON file of the flow's sizes instead.")
@click.option("--encoders", default="demo", show_default=True, help="Model whose encoders a flow alone is trained on.")
@click.option("--validation", type=SHARE, default=0.1, show_default=True, help="Held out, of a flow alone's pictures.")
@click.option("--autoencoder-steps", type=int, help="Steps of the autoencoder's training.")
@click.option("--text-length", type=click.IntRange(min=2), help="Tokens of a caption that the model reads.")
@training_options
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on where an earlier run stopped.")
@click.option("--dry-run", is_flag=True, help="Say what a flow alone would take in memory, and train nothing.")
@click.pass_context
def train(
    context: click.Context,
    data: Path,
    output: Path,
    preset: str,
    model_config: Path | None,
    encoders: str,
    validation: float,
    autoencoder_steps: int | None,
    text_length: int | None,
    resume: bool,
    dry_run: bool,
    **settings: Any,
) -> None:
    """Train a model on DATA, from nothing.

    DATA is a folder of captioned pictures, one with a folder for each class, or in any other form that
    `mlx-starflow cache --help` names; or a cache that it has made. A metadata.jsonl may have "split" in its lines:
    "train" (the default), "validation" (never trained on) or "autoencoder" (the flow does not see it).

    \b
    mlx-starflow train pictures -o model                            # all of it: autoencoder, text encoder, flow
    mlx-starflow train cache -o model --model-config flow.yaml      # a flow alone, on the cache's latents
    mlx-starflow train cache -o model --model-config flow.yaml --dry-run
    mlx-starflow train pictures -o model --model-config flow.yaml --encoders my-model      # the same, from pictures
    mlx-starflow train classes -o model --preset tarflow            # a TarFlow, on pixels, with classes
    mlx.launch -n 2 --backend ring -- mlx-starflow train pictures -o model

    A flow alone takes its autoencoder and its text encoder from the model ENCODERS. What is left out is the preset's or
    chosen by memory. Ctrl-C saves; the same command resumes. Checkpoints, logs, pictures to watch, the settings
    (config.yaml, for --config) and the list of pictures that could not be used are in OUTPUT/training.
    """
    from mlx_starflow.training.data.cache_files import MANIFEST
    from mlx_starflow.training.recipes.new_flow import read_flow_config

    if model_config is not None:
        flow = read_flow_config(model_config)
    elif preset == "tarflow":
        flow = {"model_type": "tarflow", **TARFLOW}
    elif (data / MANIFEST).is_file():
        from mlx_starflow.training.recipes.recipe import get_preset

        flow = {"model_type": "starflow", **get_preset(preset).flow, "pipeline": get_preset(preset).pipeline}
        flow.pop("txt_size")
    else:
        flow = None
    try:
        if flow is not None:
            if autoencoder_steps is not None or text_length is not None:
                raise click.UsageError("a flow alone needs no --autoencoder-steps and no --text-length")
            _train_flow(context, data, output, flow, encoders, validation, settings, resume, dry_run)
        else:
            if dry_run:
                raise click.UsageError("--dry-run is for a flow alone: a cache, or --model-config")
            _train_model(context, data, output, preset, autoencoder_steps, text_length, settings, resume)
    except KeyboardInterrupt:
        # Said and saved already; 130 is what a shell expects of an interrupted command.
        raise SystemExit(130) from None


TARFLOW = {"img_size": 32, "channel_size": 3, "patch_size": 4, "channels": 256, "blocks": 4, "layers_per_block": 2}


def _train_flow(
    context: click.Context,
    data: Path,
    output: Path,
    flow: dict[str, Any],
    encoders: str,
    validation: float,
    settings: dict[str, Any],
    resume: bool,
    dry_run: bool,
) -> None:
    from mlx_starflow.training.loop import distributed
    from mlx_starflow.training.recipes.new_flow import NewFlow

    run = NewFlow(data, output, flow, settings, encoders, validation, click.echo)
    choice, macs = run.plan()
    if dry_run:
        click.echo(f"here: {choice}\n{choice.plan}\n{macs}")
        return
    if distributed.world().rank() == 0:
        blas.hint_if_slow()
        training = run.training_config(choice)
        save_options(context, output / "training/config.yaml", {name: getattr(training, name) for name in settings})
    run.run(resume)


def _train_model(
    context: click.Context,
    data: Path,
    output: Path,
    preset: str,
    autoencoder_steps: int | None,
    text_length: int | None,
    settings: dict[str, Any],
    resume: bool,
) -> None:
    from mlx_starflow.training.loop import distributed
    from mlx_starflow.training.recipes.recipe import get_preset, train_model

    chosen = get_preset(preset)
    given = {name: value for name, value in settings.items() if value is not None}
    autoencoder = {name: value for name, value in given.items() if name in BOTH}
    if autoencoder_steps is not None:
        autoencoder["steps"] = autoencoder_steps
    chosen = replace(
        chosen,
        flow={**chosen.flow, **({"txt_size": text_length} if text_length else {})},
        flow_training=replace(chosen.flow_training, **given),
        autoencoder_training=replace(chosen.autoencoder_training, **autoencoder),
    )
    if distributed.world().rank() == 0:
        blas.hint_if_slow()
        training = chosen.flow_training
        effective = {name: getattr(training, name) for name in settings}
        effective |= {"autoencoder_steps": chosen.autoencoder_training.steps, "text_length": chosen.flow["txt_size"]}
        save_options(context, output / "training/config.yaml", effective)
    train_model(data, output, chosen, resume=resume, report=click.echo)
