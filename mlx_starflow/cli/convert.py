"""`mlx-starflow convert`: PyTorch checkpoints to model directories."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_starflow.weights import DTYPES, QUANTIZATIONS

_output = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to write."
)
_dtype = click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the weights; the checkpoint's by default.")
_quantize = click.option(
    "--quantize", type=click.Choice(list(QUANTIZATIONS)), help="Bits of a weight, or a floating-point format."
)


@click.group()
def convert() -> None:
    """Turn PyTorch checkpoints into model directories.

    A complete model is a flow with its text encoder and its image autoencoder in folders of its directory:

    \b
    mlx-starflow convert flow starflow_3B_t2i_256x256.pth --config starflow_3B_t2i_256x256.yaml -o model --quantize 8
    mlx-starflow convert text-encoder flan-t5-xl -o model/text_encoder --dtype bfloat16
    mlx-starflow convert vae sd-vae-ft-ema -o model/vae
    """


@convert.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), required=True, metavar="YAML", help="The official config.")
@_output
@_quantize
@_dtype
def flow(checkpoint: Path, config: Path, output: Path, quantize: str | None, dtype: str | None) -> None:
    """An official STARFlow or TarFlow CHECKPOINT, .pth or .safetensors."""
    from mlx_starflow.convert.flow import LICENSE, convert_flow

    _report(convert_flow(checkpoint, config, output, quantize=quantize, dtype=dtype))
    click.echo(LICENSE)


@convert.command()
@click.argument("folder", type=click.Path(path_type=Path))
@_output
@_quantize
@_dtype
def text_encoder(folder: Path, output: Path, quantize: str | None, dtype: str | None) -> None:
    """The encoder of a Hugging Face T5 in FOLDER, with its spiece.model."""
    from mlx_starflow.convert.t5 import convert_t5

    _report(convert_t5(folder, output, quantize=quantize, dtype=dtype))


@convert.command()
@click.argument("folder", type=click.Path(path_type=Path))
@_output
@_dtype
def vae(folder: Path, output: Path, dtype: str | None) -> None:
    """A diffusers AutoencoderKL (SD-VAE) in FOLDER."""
    from mlx_starflow.convert.vae import convert_vae

    _report(convert_vae(folder, output, dtype=dtype))


def _report(directory: Path) -> None:
    size = sum(path.stat().st_size for path in directory.glob("model*.safetensors"))
    click.echo(f"{directory}: {size / 1e6:,.1f} MB of weights")
