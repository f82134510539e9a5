"""`mlx-starflow info`: what a model is made of and what it takes to run it; how an image or a video was made."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_starflow.cli.options.outputs import claim_outputs, overwrite_option
from mlx_starflow.cli.options.rules import given_options
from mlx_starflow.cli.options.sampling import Size
from mlx_starflow.cli.options.vocabulary import json_option, model_argument


@click.command()
@model_argument()
@click.option("--size", type=Size(), help="Of pictures, in pixels; the size the model was trained at by default.")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, help="Pictures, or videos, at once.")
@click.option("--frames", type=click.IntRange(min=1), help="Of videos; as the model was trained by default.")
@click.option("--kv-bits", type=click.Choice(["8", "8,4", "4"]), help="Memory with keys and values in so many bits.")
@click.option("--chip", help='Estimate the seconds a picture takes on an Apple chip, such as "M3 Max".')
@json_option
@overwrite_option
def info(
    model: str,
    size: tuple[int, int] | None,
    batch_size: int,
    frames: int | None,
    kv_bits: str | None,
    chip: str | None,
    json_file: Path | None,
) -> None:
    """Say what MODEL is made of, how much memory generating takes, and which Macs have it.

    \b
    mlx-starflow info
    mlx-starflow info apple/starflow
    mlx-starflow info model --size 512x512
    mlx-starflow info apple/starflow --chip "M3 Max"
    mlx-starflow info out.png
    mlx-starflow info RealESRGAN_x4plus.pth

    An official release, apple/starflow, need not have been downloaded. Of a picture or a video that mlx-starflow has
    made, say how. Of an upscaler's file, say which network it is of, and the memory that it takes.
    """
    from mlx_starflow.convert.upscalers import is_upscaler
    from mlx_starflow.media.formats import ANIMATIONS, FORMATS, MOVIES
    from mlx_starflow.planning.summary import memory_report, summarize, summarize_file, time_reports
    from mlx_starflow.planning.upscaling import describe_upscaler
    from mlx_starflow.sampling.cache import KV_CHOICES

    claim_outputs([], [json_file])
    given = given_options("--size", "--batch-size", "--frames", "--kv-bits", "--chip")
    path = Path(model)
    if path.suffix.lower() in {*FORMATS, *ANIMATIONS, *MOVIES} and not path.is_dir():
        if given:
            raise click.UsageError(f"{given[0]} is about models, and {model} is a picture or a video: leave it out")
        _print(summarize_file(path), [], json_file)
        return
    if is_upscaler(path):
        if given:
            raise click.UsageError(f"{given[0]} is about models, and {model} is a file of weights: leave it out")
        facts, lines = describe_upscaler(path)
        _print(facts, [lines], json_file)
        return
    times = time_reports(model, chip, size=size) if chip is not None else []
    report = memory_report(
        model, size=size, batch=batch_size, frames=frames, kv_bits=KV_CHOICES[kv_bits or "none"] or 0
    )
    if given and not report and not times:
        raise click.UsageError(f"{given[0]} is about making pictures of prompts, and {model} makes none: leave it out")
    _print(summarize(model), [lines for lines in (report, *times) if lines], json_file)


def _print(facts: dict[str, str], reports: list[list[str]], json_file: Path | None) -> None:
    from mlx_starflow.media.outputs import STDOUT
    from mlx_starflow.media.tables import write_json

    if json_file is not None:
        write_json({**facts, "reports": reports} if reports else facts, json_file)
    if json_file == STDOUT:
        return
    for name, value in facts.items():
        click.echo(f"{name:<14} {value}")
    for lines in reports:
        click.echo("\n" + "\n".join(lines))
