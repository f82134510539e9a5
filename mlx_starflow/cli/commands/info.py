"""`mlx-starflow info`: what a model is made of, and what it takes to run it."""

from __future__ import annotations

import click

from mlx_starflow.cli.options.sampling import Size


@click.command()
@click.argument("model", default="demo")
@click.option("--size", type=Size(), help="Of pictures, in pixels; the size the model was trained at by default.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures, or videos, at once."
)
@click.option("--frames", type=click.IntRange(min=1), help="Of videos; as the model was trained by default.")
@click.option("--chip", help='Estimate the seconds a picture takes on an Apple chip, such as "M3 Max".')
def info(model: str, size: tuple[int, int] | None, batch_size: int, frames: int | None, chip: str | None) -> None:
    """Say what MODEL is made of, how much memory generating takes, and which Macs have it.

    \b
    mlx-starflow info
    mlx-starflow info apple/starflow
    mlx-starflow info model --size 512x512
    mlx-starflow info apple/starflow --chip "M3 Max"

    An official release, apple/starflow, need not have been downloaded.
    """
    from mlx_starflow.planning.summary import memory_report, summarize, time_reports

    times = time_reports(model, chip, size=size) if chip is not None else []
    for name, value in summarize(model).items():
        click.echo(f"{name:<14} {value}")
    for lines in (memory_report(model, size=size, batch=batch_size, frames=frames), *times):
        if lines:
            click.echo("\n" + "\n".join(lines))
