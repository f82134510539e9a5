"""`mlx-starflow fuse`: a model with adapters fused into its weights."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_starflow.cli.options.outputs import OUTPUT
from mlx_starflow.cli.options.vocabulary import model_argument


@click.command()
@model_argument(default=None)
@click.option(
    "--lora",
    "adapters",
    type=(str, float),
    multiple=True,
    required=True,
    metavar="PATH SCALE",
    help="An adapter's folder and its strength, 1 as trained; give it again for several, which add up.",
)
@click.option("-o", "--output", type=OUTPUT, required=True, metavar="OUT", help="Folder to write.")
@click.option(
    "--dequantize",
    is_flag=True,
    help="Make dense layers of the quantized ones that are changed: exact, but larger. They are quantized again as "
    "they were by default.",
)
def fuse(model: str, adapters: tuple[tuple[str, float], ...], output: Path, dequantize: bool) -> None:
    """Write MODEL (demo, a model directory or a Hub repository) with adapters fused into it, as a model directory.

    \b
    mlx-starflow fuse demo --lora run/adapter 1 -o my-model
    mlx-starflow fuse demo --lora run/adapter 0.7 --lora other/adapter 0.5 -o mixed --dequantize
    """
    from mlx_starflow.training.finetuning.fuse import fuse_model

    changed = fuse_model(model, adapters, output, dequantize=dequantize)
    size = sum(path.stat().st_size for path in output.glob("model*.safetensors"))
    click.echo(f"{output}: {len(changed)} layers changed, {size / 2**20:,.1f} MiB of weights in the flow")
