"""`mlx-starflow export`: model directories to PyTorch checkpoints."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_starflow.cli.options.outputs import OUTPUT
from mlx_starflow.cli.options.vocabulary import model_argument


@click.command()
@model_argument(default=None, metavar="DIR", then="checkpoint")
@click.argument("checkpoint", type=OUTPUT, required=False, metavar="CHECKPOINT")
def export(model: str, checkpoint: Path) -> None:
    """Write the model in DIR as a PyTorch CHECKPOINT, .pth or .safetensors.

    DIR is a flow's model directory: its tensors get the official names, bit for bit, for apple/ml-starflow. Or it is
    the folder text_encoder or vae of one: for Hugging Face's T5EncoderModel, or for diffusers' AutoencoderKL.

    \b
    mlx-starflow export models/mine mine.pth
    mlx-starflow export models/mine/vae vae/diffusion_pytorch_model.safetensors
    """
    from mlx_starflow.convert.export import export_model
    from mlx_starflow.model_dir.files import read_config
    from mlx_starflow.model_dir.hub import find_model

    directory = find_model(model)
    export_model(directory, checkpoint)
    click.echo(f"{checkpoint}: {checkpoint.stat().st_size / 1e6:,.1f} MB")
    if quantization := read_config(directory).get("quantization"):
        bits, mode = quantization.get("bits"), quantization.get("mode", "affine")
        click.echo(f"The weights were quantized ({mode}, {bits} bits): dequantized, they are close to the original's.")
    if (directory / "NOTICE").is_file():
        click.echo(f"Pass {directory / 'NOTICE'} on with it.")
