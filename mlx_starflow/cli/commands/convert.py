"""`mlx-starflow convert`: PyTorch checkpoints to model directories."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_starflow.cli.options.groups import Group
from mlx_starflow.cli.options.outputs import OUTPUT
from mlx_starflow.model_dir.hub import hub_file, is_repository
from mlx_starflow.model_dir.precision import DTYPES, QUANTIZATIONS

_PATH = click.Path(path_type=Path)


_output = click.option("-o", "--output", type=OUTPUT, metavar="DIR", required=True, help="Folder to write.")
_dtype = click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights; the checkpoint's by default.")
_quantize = click.option(
    "--quantize", type=click.Choice(list(QUANTIZATIONS)), help="Bits of a weight, or a floating-point format."
)


class _Group(Group):
    """`convert owner/name` is `convert release owner/name`, and `convert owner/name/file.pth` is `convert flow`."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if args and (hub_file(args[0]) or (args[0].startswith("-") and any(map(hub_file, args)))):
            args = ["flow", *args]
        elif args and (is_repository(args[0]) or (args[0].startswith("-") and any(map(is_repository, args)))):
            args = ["release", *args]
        return super().parse_args(context, args)


@click.group(cls=_Group, subcommand_metavar="REPO | REPO/FILE | COMMAND [ARGS]...")
def convert() -> None:
    """Turn PyTorch checkpoints into model directories.

    An official release, text encoder and autoencoder included, downloaded and converted at once; apple/starflow-v is
    the video model:

    \b
    mlx-starflow convert apple/starflow --quantize 8
    mlx-starflow generate "a corgi in the snow" --model apple/starflow

    A flow's checkpoint that somebody has on the Hub, downloaded and converted:

    \b
    mlx-starflow convert encoreus/Transformer_Autoregressive_Flow/afhq_model_8_768_8_8_0.07.pth -o afhq

    Other checkpoints, part by part. A complete model is a flow with its text encoder and its autoencoder in folders of
    its directory:

    \b
    mlx-starflow convert flow mine.pth --config mine.yaml -o model --quantize 8
    mlx-starflow convert text-encoder flan-t5-xl -o model/text_encoder --dtype bfloat16
    mlx-starflow convert vae sd-vae-ft-ema -o model/vae

    The way back is mlx-starflow export.
    """


@convert.command()
@click.argument("repo")
@click.option(
    "-o",
    "--output",
    type=OUTPUT,
    metavar="DIR",
    help="Folder to write; by default the one in which --model REPO finds it (~/.cache/mlx-starflow).",
)
@_quantize
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Of all weights; by default the checkpoints', but bfloat16 for the text encoder.",
)
@click.option("--checkpoint", type=_PATH, metavar="PATH", help="The flow's checkpoint, if you have it already.")
@click.option("--config", type=_PATH, metavar="YAML", help="The flow's arguments, if they are not the released ones.")
@click.option("--text-encoder", type=_PATH, metavar="DIR", help="A Hugging Face T5, if you have it already.")
@click.option("--vae", type=_PATH, metavar="PATH", help="The autoencoder, if you have it already.")
def release(
    repo: str,
    output: Path | None,
    quantize: str | None,
    dtype: str | None,
    checkpoint: Path | None,
    config: Path | None,
    text_encoder: Path | None,
    vae: Path | None,
) -> None:
    """A whole release from the Hugging Face Hub: apple/starflow for pictures, apple/starflow-v for videos.

    Downloads the flow (both from apple/starflow), the text encoder (google/flan-t5-xl) and the autoencoder
    (stabilityai/sd-vae-ft-ema or, of videos, Wan-AI/Wan2.2-TI2V-5B-Diffusers) into Hugging Face's cache, 27 GB or more,
    and converts them. After an interruption the same command does what is left: files and parts that are complete are
    kept. --quantize is for the flow.
    """
    from mlx_starflow.convert.release import convert_release

    directory = convert_release(
        repo,
        output,
        quantize=quantize,
        dtype=dtype,
        checkpoint=checkpoint,
        config=config,
        text_encoder=text_encoder,
        vae=vae,
        report=click.echo,
    )
    _report(directory)
    click.echo(f'Now: mlx-starflow generate "a slice of pizza" --model {repo if output is None else directory}')


@convert.command()
@click.argument("checkpoint", type=_PATH)
@click.option("--config", type=_PATH, metavar="YAML", help="The official arguments of its training.")
@_output
@_quantize
@_dtype
@click.option("--ema", is_flag=True, help="Take the averaged weights that a training kept beside the last ones.")
@click.option("--img-size", type=int, metavar="N", help="Side of the pictures (TarFlow: in pixels).")
@click.option("--channel-size", type=int, metavar="N", help="Channels of a picture.")
@click.option("--patch-size", type=int, metavar="N", help="Side of a token's patch.")
@click.option("--channels", type=int, metavar="N", help="Width of the transformers.")
@click.option("--blocks", type=int, metavar="N", help="Number of flow blocks.")
@click.option("--layers-per-block", type=int, metavar="N", help="Layers of each block.")
@click.option("--num-classes", type=int, metavar="N", help="Number of class labels; 0 for none.")
@click.option("--noise-std", type=float, metavar="STD", help="Noise that was added in training.")
@click.option("--t0", type=float, metavar="STD", help="Lowest noise level of an iTARFlow's training (0.01).")
@click.option("--t1", type=float, metavar="STD", help="Highest noise level of an iTARFlow's training.")
@click.option("--nvp/--vp", default=None, help="Whether blocks scale (TarFlow's default) or only shift.")
def flow(
    checkpoint: Path,
    config: Path | None,
    output: Path,
    quantize: str | None,
    dtype: str | None,
    ema: bool,
    **arguments: int | float | bool | None,
) -> None:
    """An official STARFlow, TarFlow or iTARFlow CHECKPOINT, .pth or .safetensors.

    A STARFlow needs its YAML, unless it is a released one. A TarFlow is known by its tensors and by its official name,
    such as afhq_model_8_768_8_8_0.07.pth; options of its architecture, from --img-size on, say what these do not.
    An iTARFlow is known by its tensors, but for the highest noise level of its training, --t1.
    Where there is no such file here, owner/name/file.pth is one on the Hugging Face Hub, and is downloaded.
    A CHECKPOINT may also be a folder of .safetensors shards, or one that torch.distributed.checkpoint wrote; the latter
    needs PyTorch. Prefixes of names such as module. and _orig_mod. are taken off.
    """
    from mlx_starflow.convert.flow import LICENSE, convert_flow

    given = {name: value for name, value in arguments.items() if value is not None}
    _report(convert_flow(checkpoint, config, output, quantize=quantize, dtype=dtype, arguments=given, ema=ema))
    click.echo(LICENSE)


@convert.command()
@click.argument("folder", type=_PATH)
@_output
@_quantize
@_dtype
def text_encoder(folder: Path, output: Path, quantize: str | None, dtype: str | None) -> None:
    """The encoder of a Hugging Face T5 in FOLDER, with its spiece.model."""
    from mlx_starflow.convert.t5 import convert_t5

    _report(convert_t5(folder, output, quantize=quantize, dtype=dtype))


@convert.command()
@click.argument("source", type=_PATH)
@click.option("--config", type=_PATH, metavar="JSON", help="Its config.json, if it is not beside the weights.")
@_output
@_dtype
@click.option(
    "--later-scale", type=float, metavar="X", help="Of videos: factor of all latent frames but the first (0.6)."
)
def vae(source: Path, config: Path | None, output: Path, dtype: str | None, later_scale: float | None) -> None:
    """A diffusers AutoencoderKL (SD-VAE) in the folder SOURCE, or SOURCE alone, such as a fine-tuned decoder's file.

    SOURCE may also be Wan 2.2's autoencoder of videos: diffusers' folder of it or the official Wan2.2_VAE.pth.
    """
    from mlx_starflow.convert.vae import convert_vae

    _report(convert_vae(source, output, dtype=dtype, config=config, later_scale=later_scale))


def _report(directory: Path) -> None:
    size = sum(path.stat().st_size for path in directory.rglob("model*.safetensors"))
    click.echo(f"{directory}: {size / 1e6:,.1f} MB of weights")
