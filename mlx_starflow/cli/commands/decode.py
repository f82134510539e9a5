"""`mlx-starflow decode`: noise to images, or to videos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.images import exact_inversion_option, metadata_option
from mlx_starflow.cli.options.outputs import OUTPUT, claim_outputs, overwrite_option
from mlx_starflow.cli.options.sampling import latent_batch_option, lora_option, network_options
from mlx_starflow.cli.options.vocabulary import json_option, quality_option


@click.command()
@click.argument("noise", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=OUTPUT, help="By default out.png, or out.mp4 of a video.")
@click.option("-p", "--prompt", help="Another prompt than the one that the pictures were encoded with.")
@click.option("--guidance", type=click.FloatRange(min=0), help="Another guidance than that of encoding.")
@click.option("--denoise", is_flag=True, help="Clean the result with one score step, if noise was added on encoding.")
@click.option(
    "--separate", is_flag=True, help="One file for each picture (out-1.png, ...), as for videos, instead of a grid."
)
@overwrite_option
@quality_option
@json_option
@metadata_option
@exact_inversion_option
@latent_batch_option
@click.option("-m", "--model", help="The one that the pictures were encoded with by default.")
@lora_option
@network_options
def decode(
    noise: Path,
    output: Path | None,
    prompt: str | None,
    guidance: float | None,
    denoise: bool,
    separate: bool,
    quality: int | None,
    json_file: Path | None,
    metadata: bool,
    method: str,
    batch_size: int,
    model: str | None,
    adapters: tuple[tuple[str, float], ...],
    dtype: str | None,
    low_memory: bool | None,
) -> None:
    """Turn NOISE, a file that mlx-starflow encode wrote, into pictures or videos again.

    \b
    mlx-starflow decode cat.safetensors -o again.png
    mlx-starflow decode cat.safetensors --prompt "a dog" -o dog.png
    mlx-starflow decode street.safetensors -o again.mp4
    """
    from PIL import Image

    from mlx_starflow.editing import Encoded
    from mlx_starflow.media import images as media
    from mlx_starflow.media.metadata import joined
    from mlx_starflow.media.outputs import STDOUT
    from mlx_starflow.media.tables import write_json
    from mlx_starflow.media.videos import VideoWriter, check_video_output
    from mlx_starflow.pipelines import VideoPipeline, open_model
    from mlx_starflow.pipelines.recipes import check_local_model

    encoded = Encoded.load(noise)
    videos = encoded.noise.ndim == 5
    output = output or Path("out.mp4" if videos else "out.png")
    targets = media.numbered(output, len(encoded.noise)) if separate or videos else [output]
    if quality is not None and videos:
        raise click.UsageError("--quality is about pictures, and these are videos: leave it out")
    for path in targets:
        if videos:
            check_video_output(path)
        else:
            media.check_output(path, quality=quality)
    free = claim_outputs([path for path in targets if path.suffix], [json_file], inputs=[noise])
    targets = free or targets
    cpu.hint_if_slow()
    if prompt is not None:
        encoded = replace(encoded, prompts=[prompt] * len(encoded.prompts))
    if guidance is not None:
        encoded = replace(encoded, guidance=guidance)
    name = encoded.model or "demo" if model is None else model
    if model is None:
        check_local_model(noise, name)
    download = model is not None
    pipe = open_model(name, dtype=dtype, low_memory=low_memory, adapters=adapters, download=download)
    decoded, _ = pipe.decode(encoded, denoise=denoise, method=method, batch_size=batch_size, progress=None)
    made: list[Image.Image | list[Image.Image]] = [*decoded]
    described = encoded.described(pipe, denoise=denoise)
    if len(targets) < len(made):
        described = [joined(described)]
        made = [media.grid([image for image in made if isinstance(image, Image.Image)])]
    for path, image, each in zip(targets, made, described, strict=True):
        how = {**each, "source": {"noise": str(noise)}} if metadata else None
        if isinstance(image, Image.Image):
            media.save_image(image, path, how, quality=quality)
            continue
        assert isinstance(pipe, VideoPipeline)  # others make no videos
        with VideoWriter(path, pipe.settings.fps, metadata=how) as writer:
            for frame in image:
                writer.add(frame)
    if json_file is not None:
        rows = [{"file": str(targets[min(k, len(targets) - 1)]), **each} for k, each in enumerate(described)]
        write_json({"made": rows}, json_file)
    if json_file == STDOUT:
        return
    more = f" and {len(targets) - 1} more" if len(targets) > 1 else ""
    click.echo(f"{targets[0]}{more}: {len(encoded.noise)} {'videos' if videos else 'pictures'}")
