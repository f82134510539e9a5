"""What a file says about how it was made, and what the command line says instead of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_starflow.cli.options.parallel import Ranks

if TYPE_CHECKING:
    from mlx_starflow.pipelines.recipes import Recipe


def chosen_networks(
    recipe: Recipe,
    model: str | None,
    adapters: tuple[tuple[str, float], ...],
    ranks: Ranks,
    student: Path | None = None,
) -> tuple[str, tuple[tuple[str, float], ...]]:
    """The model and the adapters that the command line names or else, if they are here already, those of a recipe;
    so must its student be unless the command line names one.

    Says which adapters a recipe brings. Raises StarflowError on all ranks if something is not here.
    """
    with ranks.together():
        recipe.check_local(model=model is None, adapters=not adapters, student=student is None)
    if recipe.adapters and not adapters and ranks.first:
        names = ", ".join(f"{name} {strength:g}" for name, strength in recipe.adapters)
        click.echo(f"{recipe.file} was made with adapters, which are used again: {names}", err=True)
    return recipe.model if model is None else model, adapters or recipe.adapters
