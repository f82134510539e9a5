"""`mlx-starflow info`: what a model is made of."""

from __future__ import annotations

import click


@click.command()
@click.argument("model", default="demo")
def info(model: str) -> None:
    """Say what MODEL is made of and where it would run."""
    from mlx_starflow.summary import summarize

    for name, value in summarize(model).items():
        click.echo(f"{name:<14} {value}")
