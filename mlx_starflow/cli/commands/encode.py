"""`mlx-starflow encode`: images, or videos, to the noise that they come from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.images import ReadableFiles, frames_option, images_argument, model_options
from mlx_starflow.cli.options.outputs import OUTPUT, claim_outputs, files_read, overwrite_option
from mlx_starflow.cli.options.rules import excludes, option_rules
from mlx_starflow.cli.options.sampling import latent_batch_option
from mlx_starflow.cli.options.vocabulary import json_option


@click.command()
@images_argument
@click.option("-o", "--output", type=OUTPUT, required=True, help="Noise file, .safetensors.")
@overwrite_option
@json_option
@click.option("-p", "--prompt", default="", help="What is on the pictures; of a TarFlow the number of a class.")
@click.option("--captions", is_flag=True, help="Take each picture's own caption from its folder as its prompt.")
@click.option("--guidance", type=click.FloatRange(min=0), default=0.0, help="Map with guidance.")
@click.option("--noise-seed", type=click.IntRange(min=0), help="Add training noise of this seed before mapping.")
@click.option("--check/--no-check", default=True, help="Go the way back too, and say how exact it is.")
@latent_batch_option
@model_options
@frames_option
@option_rules(
    excludes("--captions", "--prompt", reason="--captions brings each picture's own prompt: leave out --prompt")
)
def encode(
    pictures: tuple[Path, ...],
    output: Path,
    json_file: Path | None,
    prompt: str,
    captions: bool,
    guidance: float,
    noise_seed: int | None,
    check: bool,
    batch_size: int,
    model: str,
    adapters: tuple[tuple[str, float], ...],
    size: tuple[int, int] | None,
    frames: int | None,
    dtype: str | None,
    low_memory: bool | None,
) -> None:
    """Turn PICTURES, or videos, into the noise that they come from, exactly.

    \b
    mlx-starflow encode cat.png --prompt "a cat" -o cat.safetensors
    mlx-starflow decode cat.safetensors -o again.png
    mlx-starflow encode street.mp4 -m my-video-model -o street.safetensors
    """
    from mlx_starflow.media.image_files import find_images
    from mlx_starflow.media.tables import write_json
    from mlx_starflow.pipelines import open_model

    found = find_images(pictures)
    claim_outputs([], [output, json_file], inputs=files_read(pictures, found))
    cpu.hint_if_slow()
    pipe = open_model(model, dtype=dtype, low_memory=low_memory, adapters=adapters)
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
    if json_file is not None:
        rows = [{"picture": each.name, "prompt": text} for each, text in zip(files.files, encoded.prompts, strict=True)]
        told: dict[str, Any] = {"model": model, "file": str(output), "shape": list(encoded.noise.shape)}
        told["pictures"] = rows
        told |= {"standard_deviation": float(encoded.noise.std()), "skipped": files.skipped()}
        write_json({**told, "round_trip": None if trip is None else asdict(trip)}, json_file)
    if json_file == Path("-"):
        return
    click.echo(f"{output}: noise {list(encoded.noise.shape)}, standard deviation {encoded.noise.std():.3f}")
    if trip is not None:
        click.echo(f"and back: {trip}")
