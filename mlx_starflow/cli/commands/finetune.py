"""`mlx-starflow finetune`: a model, and pictures in another style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_starflow.cli.options.config_file import config_option
from mlx_starflow.cpu import blas

INTERRUPTED = 130
"""What a shell expects of a command that Ctrl-C ended."""


@click.command()
@click.argument("model")
@click.argument("data")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="RUN", help="The run's folder.")
@config_option
@click.option("--lora", type=int, metavar="RANK", help="Train a LoRA adapter of this rank; 0: 16, or what fits.")
@click.option("--dora", type=int, metavar="RANK", help="Train a DoRA adapter of this rank.")
@click.option("--full", is_flag=True, help="Train all weights of the flow, and write a model.")
@click.option("--scale", type=float, help="Multiplies the adapter's change, alpha / rank in papers.  [default: 2]")
@click.option("--dropout", type=float, help="Share of inputs that an adapter does not see while training.")
@click.option("--layers", multiple=True, metavar="NAME", help="Layers with an adapter, such as qkv; all by default.")
@click.option("--blocks", metavar="WHICH", help="all, deep, shallow, or numbers such as 0,2.  [default: all]")
@click.option("--quantize", metavar="BITS", help="Hold the base so while training: auto, none, 8, 4, mixed, ...")
@click.option("--checkpoint-layers/--no-checkpoint-layers", default=None, help="Compute layers twice, to save memory.")
@click.option("--steps", type=int, help="Optimizer steps.  [default: 400]")
@click.option("--batch-size", type=click.IntRange(min=0), help="By default as many as fit into memory, at most 16.")
@click.option("--lr", type=float, help="Highest learning rate.  [default: 2e-3, with --full 1e-4]")
@click.option("--caption-dropout", type=float, help="Share of pictures without caption, for guidance.  [default: 0.1]")
@click.option("--ema", type=float, help="Decay of the average of the weights.  [default: 0.99]")
@click.option("--context-full", type=float, help="Share of samples that read the text alone.  [default: 0]")
@click.option("--context-partial", type=float, help="Share of samples that read part of the picture.  [default: 0]")
@click.option("--anchor", type=float, metavar="SHARE", help="Of each batch, held to the base, against forgetting.")
@click.option("--anchor-weight", type=float, help="Of the KL divergence from the base there.  [default: 1]")
@click.option("--anchor-data", metavar="DATA", help="Pictures to hold it to; samples of the base by default.")
@click.option("--anchor-samples", type=int, help="How many samples of the base to draw.  [default: 128]")
@click.option("--validation", type=float, metavar="SHARE", help="Of the pictures, held out to measure.  [default: 0.1]")
@click.option("--draws", type=int, help="Of the noise, for each held-out picture.  [default: 4]")
@click.option("--samples", type=int, help="Pictures in the grid at the end.  [default: 8]")
@click.option("--seed", type=int, help="Of everything random.  [default: 0]")
@click.option("--save-seconds", type=float, help="Time between checkpoints.  [default: 180]")
@click.option("--log-every", type=int, help="Steps between lines of the log.  [default: 20]")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on where an earlier run stopped.")
@click.option("--dry-run", is_flag=True, help="Say what it would take in memory, and do nothing.")
def finetune(
    model: str,
    data: str,
    output: Path,
    lora: int | None,
    dora: int | None,
    full: bool,
    layers: tuple[str, ...],
    resume: bool,
    dry_run: bool,
    **settings: Any,
) -> None:
    """Fine-tune MODEL on DATA, captioned pictures or a cache of them (see `mlx-starflow cache --help`).

    \b
    mlx-starflow finetune demo my-pictures -o run
    mlx-starflow generate "a red apple" --lora run/adapter 1
    mlx-starflow finetune my-model my-pictures -o run --dora 8 --blocks deep --anchor 0.25 --anchor-data old-pictures

    What is not said about rank, batch size, the base's precision and computing layers twice is chosen so that it fits
    into memory: --dry-run prints it, for this machine and for Macs of 16, 32 and 64 GB.

    RUN/adapter is the adapter (RUN/model the model, with --full), RUN/grid.png shows samples, RUN/report.json the exact
    likelihood of held-out pictures before and after, RUN/config.yaml all settings. Ctrl-C saves; the same command
    resumes.
    """
    from mlx_starflow.training.finetuning.finetune import FinetuneConfig, plan_finetune
    from mlx_starflow.training.finetuning.finetune import finetune as run

    if (lora is not None) + (dora is not None) + full > 1:
        raise click.UsageError("--lora, --dora and --full exclude each other: give one of them")
    settings = {name: value for name, value in settings.items() if value is not None}
    if layers:
        settings["layers"] = tuple(layers)
    settings["kind"] = "full" if full else "dora" if dora is not None else "lora"
    if (rank := dora if dora is not None else lora) is not None:
        settings["rank"] = rank
    config = FinetuneConfig(**settings)
    if dry_run:
        choice, macs = plan_finetune(model, config)
        click.echo(f"here: {choice}\n{choice.plan}\n{macs}")
        return
    blas.hint_if_slow()
    try:
        result = run(model, data, output, config, resume=resume, report=click.echo)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    click.echo(str(result))
