"""`mlx-starflow encode`: images, or videos, to the noise that they come from."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.images import ReadableFiles, frames_option, images_argument, model_options
from mlx_starflow.cli.options.outputs import OUTPUT, files_read
from mlx_starflow.cli.options.rules import excludes, option_rules
from mlx_starflow.cli.options.sampling import latent_batch_option


@click.command()
@images_argument
@click.option("-o", "--output", type=OUTPUT, required=True, help="Noise file, .safetensors.")
@click.option("-p", "--prompt", default="", help="What is on the pictures; of a TarFlow the number of a class.")
@click.option("--captions", is_flag=True, help="Take each picture's own caption from its folder as its prompt.")
@click.option("--guidance", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Map with guidance.")
@click.option("--noise-seed", type=click.IntRange(min=0), help="Add training noise of this seed before mapping.")
@click.option(
    "--check/--no-check", default=True, help="Go the way back too, and say how exact it is.  [default: check]"
)
@latent_batch_option
@model_options
@frames_option
@option_rules(
    excludes("--captions", "--prompt", reason="--captions brings each picture's own prompt: leave out --prompt")
)
def encode(
    pictures: tuple[Path, ...],
    output: Path,
    prompt: str,
    captions: bool,
    guidance: float,
    noise_seed: int | None,
    check: bool,
    batch_size: int,
    model: str,
    size: tuple[int, int] | None,
    frames: int | None,
    dtype: str | None,
) -> None:
    """Turn PICTURES, or videos, into the noise that they come from, exactly.

    \b
    mlx-starflow encode cat.png --prompt "cat face" -o cat.safetensors
    mlx-starflow decode cat.safetensors -o again.png
    mlx-starflow encode street.mp4 -m my-video-model -o street.safetensors
    """
    from mlx_starflow.media.image_files import find_images
    from mlx_starflow.media.outputs import check_outputs
    from mlx_starflow.pipelines import open_model

    found = find_images(pictures)
    check_outputs([output], inputs=files_read(pictures, found))
    cpu.hint_if_slow()
    pipe = open_model(model, dtype=dtype)
    files = ReadableFiles(pipe, found, size=size, frames=frames)
    fitted = list(files)
    encoded, trip = pipe.encode(
        fitted,
        [each.caption for each in files.files] if captions else prompt,
        guidance=guidance,
        noise_seed=noise_seed,
        size=size,
        check=check,
        batch_size=batch_size,
        progress=None,
    )
    encoded.save(output)
    click.echo(f"{output}: noise {list(encoded.noise.shape)}, standard deviation {encoded.noise.std():.3f}")
    if trip is not None:
        click.echo(f"and back: {trip}")
