"""`mlx-starflow finetune`: a model, and pictures in another style."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.config_file import config_option
from mlx_starflow.cli.options.interrupt import resumable
from mlx_starflow.cli.options.outputs import OUTPUT
from mlx_starflow.cli.options.rules import excludes, needs, option_rules
from mlx_starflow.cli.options.training import EVERY
from mlx_starflow.cli.options.vocabulary import model_argument
from mlx_starflow.model_dir.precision import DTYPES
from mlx_starflow.training.config import OPTIMIZERS, REPORTERS


@click.command(context_settings={"show_default": True})
@model_argument(default=None, then="data")
@click.argument("data", required=False, metavar="DATA")
@click.option("-o", "--output", type=OUTPUT, required=True, metavar="RUN", help="The run's folder.")
@config_option
@click.option("--lora", type=int, metavar="RANK", help="Train a LoRA adapter of this rank; 0: 16, or what fits.")
@click.option("--dora", type=int, metavar="RANK", help="Train a DoRA adapter of this rank.")
@click.option("--full", is_flag=True, help="Train all weights of the flow, and write a model.")
@click.option("--scale", default=2.0, help="Multiplies the adapter's change, alpha / rank in papers.")
@click.option("--dropout", default=0.0, help="Share of inputs that an adapter does not see while training.")
@click.option("--layers", multiple=True, metavar="NAME", help="Layers with an adapter, such as qkv; all by default.")
@click.option("--blocks", default="all", metavar="WHICH", help="all, deep, shallow, or numbers such as 0,2.")
@click.option(
    "--quantize", default="auto", metavar="BITS", help="Hold the base so while training: auto, none, 8, 4, mixed, ..."
)
@click.option("--checkpoint-layers/--no-checkpoint-layers", default=None, help="Compute layers twice, to save memory.")
@click.option("--dtype", type=click.Choice(DTYPES), help="What networks compute in; by default this machine's.")
@click.option("--caption", metavar="TEXT", help="Of pictures that have none, such as 'a photo of rex the dog'.")
@click.option("--steps", default=400, help="Optimizer steps.")
@click.option("--batch-size", default=0, show_default="as many as fit, at most 16", help="Samples a step.")
@click.option("--accumulate", default=1, help="Parts that a batch is computed in, one by one, to save memory.")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), default="adamw", help="What steps.")
@click.option("--lr", default=0.0, show_default="2e-3, with --full 1e-4", help="Highest learning rate.")
@click.option("--caption-dropout", default=0.1, help="Share of pictures without caption, for guidance.")
@click.option("--ema", default=0.99, help="Decay of the average of the weights.")
@click.option("--context-full", default=0.0, help="Share of samples that read the text alone.")
@click.option("--context-partial", default=0.0, help="Share of samples that read part of the picture.")
@click.option("--anchor", default=0.0, metavar="SHARE", help="Of each batch, held to the base, against forgetting.")
@click.option("--anchor-weight", default=1.0, help="Of the KL divergence from the base there.")
@click.option("--anchor-data", metavar="DATA", help="Pictures to hold it to; samples of the base by default.")
@click.option("--anchor-samples", default=128, help="How many samples of the base to draw.")
@click.option("--validation", default=0.1, metavar="SHARE", help="Of the pictures, held out to measure.")
@click.option("--validate-every", default=0, type=EVERY, help="Steps between validations, the best of which is kept.")
@click.option("--patience", default=0, type=EVERY, help="Validations without a better one that end it; 0: none.")
@click.option("--watch-every", default=0, type=EVERY, help="Steps between sample grids and loss curves; 0: none.")
@click.option("--draws", default=4, help="Of the noise, for each held-out picture.")
@click.option("--samples", default=8, help="Pictures in the grid at the end.")
@click.option("--seed", default=0, help="Of everything random.")
@click.option("--save-seconds", default=180.0, help="Time between checkpoints.")
@click.option("--log-every", default=20, help="Steps between lines of the log.")
@click.option("--report-to", type=click.Choice(REPORTERS), help="Show log and pictures there too.")
@click.option("--resume/--no-resume", default=True, help="Go on where an earlier run stopped.")
@click.option("--dry-run", is_flag=True, help="Say what it would take in memory and time, and do nothing.")
@option_rules(
    *(excludes("--full", name) for name in ("--scale", "--dropout", "--layers", "--blocks")),
    *(needs(name, "--anchor") for name in ("--anchor-weight", "--anchor-data", "--anchor-samples")),
    excludes("--anchor-samples", "--anchor-data"),
    needs("--patience", "--validate-every"),
    needs("--validate-every", "--validation", reason="--validate-every needs pictures: leave out --validation 0"),
    needs("--draws", "--validation", reason="--draws is of the held-out pictures, and --validation holds none out"),
)
def finetune(
    model: str,
    data: str,
    output: Path,
    lora: int | None,
    dora: int | None,
    full: bool,
    scale: float,
    dropout: float,
    layers: tuple[str, ...],
    blocks: str,
    quantize: str,
    checkpoint_layers: bool | None,
    dtype: str | None,
    caption: str | None,
    steps: int,
    batch_size: int,
    accumulate: int,
    optimizer: str,
    lr: float,
    caption_dropout: float,
    ema: float,
    context_full: float,
    context_partial: float,
    anchor: float,
    anchor_weight: float,
    anchor_data: str | None,
    anchor_samples: int,
    validation: float,
    validate_every: int,
    patience: int,
    watch_every: int,
    draws: int,
    samples: int,
    seed: int,
    save_seconds: float,
    log_every: int,
    report_to: str | None,
    resume: bool,
    dry_run: bool,
) -> None:
    """Fine-tune MODEL on DATA, captioned pictures or a cache of them (see `mlx-starflow cache --help`).

    \b
    mlx-starflow finetune demo my-pictures -o run
    mlx-starflow generate "a red apple" --lora run/adapter 1
    mlx-starflow finetune apple/starflow photos -o run --caption "a photo of rex the dog" --validate-every 50
    mlx-starflow finetune my-model my-pictures -o run --dora 8 --blocks deep --anchor 0.25 --anchor-data old-pictures

    What is not said about rank, batch size, the base's precision and computing layers twice is chosen so that it fits
    into memory: --dry-run prints it, for this machine and for Macs of 16, 32 and 64 GB, and does a few steps with
    random numbers to say how long one takes here.

    RUN/adapter is the adapter (RUN/model the model, with --full), RUN/grid.png shows samples, RUN/report.json the exact
    likelihood of held-out pictures before and after, RUN/config.yaml all settings. RUN/checkpoints has the log and,
    with --watch-every, loss.png and samples. The adapter can be used while the run goes on. Ctrl-C saves; the same
    command resumes.
    """
    from mlx_starflow.training.finetuning.adapters import LAYERS
    from mlx_starflow.training.finetuning.base import plan_finetune
    from mlx_starflow.training.finetuning.config import FinetuneConfig
    from mlx_starflow.training.finetuning.finetune import check_data
    from mlx_starflow.training.finetuning.finetune import finetune as run
    from mlx_starflow.training.finetuning.timing import finetune_step_time
    from mlx_starflow.training.loop import distributed

    if (lora is not None) + (dora is not None) + full > 1:
        raise click.UsageError("--lora, --dora and --full exclude each other: give one of them")
    config = FinetuneConfig(
        kind="full" if full else "dora" if dora is not None else "lora",
        rank=lora or dora or 0,
        scale=scale,
        dropout=dropout,
        layers=layers or LAYERS,
        blocks=blocks,
        quantize=quantize,
        checkpoint_layers=checkpoint_layers,
        dtype=dtype,
        caption=caption,
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        optimizer=optimizer,
        lr=lr,
        caption_dropout=caption_dropout,
        ema=ema,
        context_full=context_full,
        context_partial=context_partial,
        anchor=anchor,
        anchor_weight=anchor_weight,
        anchor_data=anchor_data,
        anchor_samples=anchor_samples,
        validation=validation,
        validate_every=validate_every,
        patience=patience,
        watch_every=watch_every,
        draws=draws,
        samples=samples,
        seed=seed,
        save_seconds=save_seconds,
        log_every=log_every,
        report_to=report_to,
    )
    if dry_run:
        check_data(data, config)
        choice, macs = plan_finetune(model, config)
        click.echo(f"here: {choice}\n{choice.plan}\n{macs}")
        cpu.hint_if_slow()
        click.echo(finetune_step_time(model, config, choice))
        return
    cpu.hint_if_slow()
    with resumable():
        result = run(model, data, output, config, resume=resume, report=click.echo)
    if distributed.world().rank() == 0:
        click.echo(str(result))
