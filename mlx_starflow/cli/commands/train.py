"""`mlx-starflow train`: a folder of captioned pictures to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.config_file import config_option, save_options
from mlx_starflow.cli.options.interrupt import resumable
from mlx_starflow.cli.options.outputs import OUTPUT
from mlx_starflow.cli.options.rules import excludes, given_options, needs, option_rules
from mlx_starflow.cli.options.training import EVERY, SHARE, training_options
from mlx_starflow.training.config import TrainingConfig, TrainingOptions

if TYPE_CHECKING:
    from mlx_starflow.training.recipes.new_flow import NewFlow
    from mlx_starflow.training.recipes.presets import Preset


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=OUTPUT, required=True, help="Model directory to write.")
@config_option
@click.option("--preset", default="small", show_default=True, help="Sizes: small, demo; tarflow, itarflow; text.")
@click.option("--model-config", type=click.Path(path_type=Path), help="YAML or JSON file of the flow's sizes instead.")
@click.option("--init", metavar="MODEL", help="Begin with the weights of this model's flow, and train it alone.")
@click.option(
    "--only",
    type=click.Choice(["decoder"]),
    help="Train this part of the model --init alone: pictures from latents with noise.",
)
@click.option(
    "--perceptual",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Of a decoder: torchvision's VGG16, and again LPIPS' own weights; by default the model's encoder compares.",
)
@click.option("--adversarial-from", type=EVERY, help="Of a decoder: the step from which a discriminator takes part.")
@click.option(
    "--encoders", show_default="those of --init, or demo", help="Model whose encoders a flow alone is trained on."
)
@click.option("--validation", type=SHARE, default=0.1, show_default=True, help="Held out, of a flow alone's pictures.")
@click.option("--autoencoder-steps", type=int, help="Steps of the autoencoder's training.")
@click.option(
    "--text-length", type=click.IntRange(min=2), help="Tokens of a caption that the model reads; by default all."
)
@click.option("--caption", metavar="TEXT", help="Of pictures that have none, such as 'a photo of rex the dog'.")
@training_options
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on where an earlier run stopped.")
@click.option(
    "--dry-run", is_flag=True, help="Say what it would take in time and, of a flow alone, in memory; train nothing."
)
@option_rules(
    excludes("--preset", "--model-config"),
    excludes("--init", "--preset", "--model-config", reason="--init says all of the flow: leave its config out"),
    needs("--only", "--init"),
    needs("--perceptual", "--only"),
    needs("--adversarial-from", "--only"),
)
@click.pass_context
def train(
    context: click.Context,
    data: Path,
    output: Path,
    preset: str,
    model_config: Path | None,
    init: str | None,
    only: str | None,
    perceptual: tuple[Path, ...],
    adversarial_from: int | None,
    encoders: str | None,
    validation: float,
    autoencoder_steps: int | None,
    text_length: int | None,
    caption: str | None,
    training: TrainingOptions,
    resume: bool,
    dry_run: bool,
) -> None:
    """Train a model on DATA, from nothing or from another one's flow.

    DATA is a folder of captioned pictures, one with a folder for each class, or in any other form that
    `mlx-starflow cache --help` names; or a cache that it has made. A metadata.jsonl may have "split" in its lines:
    "train" (the default), "validation" (never trained on) or "autoencoder" (the flow does not see it).

    \b
    mlx-starflow train pictures -o model                            # all of it: autoencoder, text encoder, flow
    mlx-starflow train cache -o model --model-config flow.yaml      # a flow alone, on the cache's latents
    mlx-starflow train cache -o model --model-config flow.yaml --dry-run
    mlx-starflow train pictures -o model --model-config flow.yaml --encoders my-model      # the same, from pictures
    mlx-starflow train pictures -o model --init my-model            # begins with the weights of my-model's flow
    mlx-starflow train classes -o model --preset tarflow            # a TarFlow, on pixels, with classes
    mlx-starflow train classes -o model --preset itarflow           # an iTARFlow, which is sampled in many steps
    mlx-starflow train book.txt -o model --preset text              # a flow over the characters of a text
    mlx-starflow train pictures -o model --init my-model --only decoder    # clearer pictures of noisy latents
    mlx.launch -n 2 --backend ring -- mlx-starflow train pictures -o model

    A flow alone takes its autoencoder and its text encoder from the model ENCODERS. What is left out is the preset's or
    chosen by memory. Ctrl-C saves; the same command resumes. Checkpoints, logs, pictures to watch, the settings
    (config.yaml, for --config) and the list of pictures that could not be used are in OUTPUT/training.
    """
    from mlx_starflow.training.data.cache.files import is_cache
    from mlx_starflow.training.recipes.flow_config import flow_config_of, read_flow_config
    from mlx_starflow.training.recipes.new_flow import NewFlow
    from mlx_starflow.training.recipes.presets import PIXEL_FLOWS, get_preset, preset_flow
    from mlx_starflow.training.recipes.text_flow import TEXT_FLOW, TEXT_PRESET

    if only is not None:
        assert init is not None  # --only needs it
        _train_decoder(context, data, output, init, perceptual, adversarial_from, validation, training, resume)
        return
    flow = None
    if init is not None:
        flow = flow_config_of(init)
    elif model_config is not None:
        flow = read_flow_config(model_config)
    elif preset == "text":
        flow = TEXT_PRESET
    elif preset in PIXEL_FLOWS or is_cache(data):
        flow = preset_flow(preset)
    if flow is not None and flow["model_type"] == TEXT_FLOW:
        _train_text(context, data, output, flow, validation, training, resume)
        return
    if flow is not None and (autoencoder_steps is not None or text_length is not None):
        raise click.UsageError("a flow alone needs no --autoencoder-steps and no --text-length")
    pixels = flow is not None and flow["model_type"] in PIXEL_FLOWS
    if flow is None and (given := given_options("--encoders", "--validation")):
        raise click.UsageError(
            f"{given[0]} is for a flow alone: leave it out, or give a cache, --model-config or --init"
        )
    if pixels and (given := given_options("--encoders", "--context-full", "--context-partial")):
        raise click.UsageError(f"{given[0]} is for flows that read text, and a TarFlow does not: leave it out")
    has_levels = flow is not None and flow["model_type"] == "itarflow"
    if not has_levels and (given := given_options("--level-sampling", "--level-weight")):
        raise click.UsageError(f"{given[0]} is for an iTARFlow, which knows noise levels: leave it out")
    # Both say themselves that they were stopped and are saved.
    with resumable():
        if flow is not None:
            run = NewFlow(data, output, flow, training, encoders, validation, click.echo, init, caption)
            _train_flow(context, run, resume, dry_run)
        else:
            chosen = get_preset(preset).adjusted(training, autoencoder_steps=autoencoder_steps, text_length=text_length)
            _train_model(context, data, output, chosen, caption, resume, dry_run)


OF_OTHERS = (
    "--encoders", "--autoencoder-steps", "--text-length", "--caption", "--dry-run", "--caption-dropout",
    "--context-full", "--context-partial", "--level-sampling", "--level-weight", "--checkpoint-layers", "--watch-every",
    "--validate-every", "--patience",
)  # fmt: skip
"""Options that a decoder alone has no use for."""


def _train_decoder(
    context: click.Context,
    data: Path,
    output: Path,
    init: str,
    perceptual: tuple[Path, ...],
    adversarial_from: int | None,
    validation: float,
    training: TrainingOptions,
    resume: bool,
) -> None:
    from mlx_starflow.training.recipes.decoder import train_decoder

    if given := given_options(*OF_OTHERS):
        raise click.UsageError(f"{given[0]} is not about a decoder alone: leave it out")
    with resumable():
        train_decoder(
            data,
            init,
            output,
            training,
            perceptual=perceptual,
            adversarial_from=adversarial_from,
            validation=validation,
            resume=resume,
            report=click.echo,
            begin=lambda config: _save_settings(context, output, config, {}),
        )


def _train_flow(context: click.Context, run: NewFlow, resume: bool, dry_run: bool) -> None:
    if not dry_run:
        run.check_output()
    choice, macs = run.plan()
    if dry_run:
        click.echo(f"here: {choice}\n{choice.plan}\n{macs}")
        click.echo(run.step_time(choice))
        return
    run.run(resume, lambda: _save_settings(context, run.out, run.training_config(choice), {}))


NOT_OF_TEXT = (
    "--encoders", "--autoencoder-steps", "--text-length", "--caption", "--dry-run", "--noise-std", "--caption-dropout",
    "--context-full", "--context-partial", "--level-sampling", "--level-weight", "--checkpoint-layers", "--watch-every",
)  # fmt: skip
"""Options that are about pictures."""


def _train_text(
    context: click.Context,
    data: Path,
    output: Path,
    flow: Mapping[str, Any],
    validation: float,
    training: TrainingOptions,
    resume: bool,
) -> None:
    from mlx_starflow.training.recipes.text_flow import NewTextFlow

    if given := given_options(*NOT_OF_TEXT):
        raise click.UsageError(f"{given[0]} is for pictures, and this is a flow over text: leave it out")
    share = validation if given_options("--validation") else NewTextFlow.validation
    run = NewTextFlow(data, output, flow, training, share, click.echo)
    with resumable():
        run.run(resume, lambda: _save_settings(context, run.out, run.training_config(), {}))


def _train_model(
    context: click.Context,
    data: Path,
    output: Path,
    preset: Preset,
    caption: str | None,
    resume: bool,
    dry_run: bool,
) -> None:
    from mlx_starflow.media.sources import open_source
    from mlx_starflow.training.recipes.text_to_image import step_times, train_model

    if dry_run:
        open_source(data, caption=caption)
        click.echo("\n".join(step_times(preset)))
        return
    lengths = {"autoencoder_steps": preset.autoencoder_training.steps}

    def begin() -> None:
        _save_settings(context, output, preset.flow_training, lengths)

    train_model(data, output, preset, resume=resume, report=click.echo, begin=begin, caption=caption)


def _save_settings(context: click.Context, output: Path, training: TrainingConfig, others: Mapping[str, int]) -> None:
    """Write down the settings as they came out."""
    cpu.hint_if_slow()
    settings = {name: value for name, value in asdict(training).items() if name in context.params}
    save_options(context, output / "training/config.yaml", {**settings, **others})
