"""`mlx-starflow info`: what a model is made of, and what it takes to run it."""

from __future__ import annotations

import click

from mlx_starflow.cli.generate import Size


@click.command()
@click.argument("model", default="demo")
@click.option("--size", type=Size(), help="Of pictures, in pixels; the size the model was trained at by default.")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures at once.")
def info(model: str, size: tuple[int, int] | None, batch_size: int) -> None:
    """Say what MODEL is made of, how much memory generating takes, and which Macs have it.

    \b
    mlx-starflow info
    mlx-starflow info apple/starflow
    mlx-starflow info model --size 512x512

    An official release, apple/starflow, need not have been downloaded.
    """
    from mlx_starflow.summary import memory_report, summarize

    for name, value in summarize(model).items():
        click.echo(f"{name:<14} {value}")
    if lines := memory_report(model, size=size, batch=batch_size):
        click.echo("\n" + "\n".join(lines))
