"""`--upscale` and `--upscale-model`: what is made is enlarged by a network of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mlx_starflow.cli.options.rules import needs
from mlx_starflow.cli.options.sampling import with_options

if TYPE_CHECKING:
    from mlx_starflow.pipelines import Upscaler
    from mlx_starflow.pipelines.recipes import Recipe

upscale_model_option = click.option(
    "--upscale-model",
    metavar="FILE",
    help="Weights to enlarge with: a .pth or .safetensors file of Real-ESRGAN's or SPAN's, or its name in "
    "~/.cache/mlx-starflow/upscalers, where one is looked for by default.",
)

upscale_options = with_options(
    click.option("--upscale", type=click.Choice(["2", "4"]), help="Enlarge the result so many times, see the docs."),
    upscale_model_option,
)
"""Of commands that make pictures or videos; `UPSCALE_RULE` goes with them."""

UPSCALE_RULE = needs("--upscale-model", "--upscale")


def chosen_upscaler(upscale: str | None, model: str | None, recipe: Recipe | None = None) -> Upscaler | None:
    """The upscaler that is asked for; None if there is none.

    Says so if a file is made again that was enlarged, and nobody asks for that. Raises StarflowError.
    """
    if upscale is not None:
        from mlx_starflow.pipelines import Upscaler

        return Upscaler.load(model, scale=int(upscale))
    if recipe is not None and recipe.upscaled:
        steps = ", ".join(f"{each['scale']} times by {each['file']}" for each in recipe.upscaled)
        click.echo(f"{recipe.file} was enlarged {steps}: give --upscale to do that again", err=True)
    return None
