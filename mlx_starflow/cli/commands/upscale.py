"""`mlx-starflow upscale`: pictures and videos that are there, enlarged."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.images import images_argument, metadata_option
from mlx_starflow.cli.options.interrupt import resumable
from mlx_starflow.cli.options.outputs import OUTPUT, overwrite_option
from mlx_starflow.cli.options.sampling import dtype_option
from mlx_starflow.cli.options.upscaling import upscale_model_option
from mlx_starflow.cli.options.vocabulary import json_option, quality_option


@click.command()
@images_argument
@click.option(
    "-o",
    "--output",
    type=OUTPUT,
    help="Of one picture or video, a file; of several pictures, a folder. By default out.png, or out.mp4.",
)
@overwrite_option
@click.option("--upscale", type=click.Choice(["2", "4"]), help="How many times; as the weights do by default.")
@upscale_model_option
@dtype_option("the network")
@quality_option
@click.option("--crf", type=click.IntRange(0, 51), help="Quality of H.264, 0 the best.  [default: 18]")
@metadata_option
@json_option
def upscale(
    pictures: tuple[Path, ...],
    output: Path | None,
    upscale: str | None,
    upscale_model: str | None,
    dtype: str | None,
    quality: int | None,
    crf: int | None,
    metadata: bool,
    json_file: Path | None,
) -> None:
    """Enlarge PICTURES, files or folders of them, or a video, by a network such as Real-ESRGAN.

    \b
    mlx-starflow upscale small.png -o large.png
    mlx-starflow upscale holidays -o holidays-large --upscale 2
    mlx-starflow upscale clip.mp4 -o large.mp4 --upscale-model realesr-animevideov3.pth

    A folder of frames becomes a video if -o is one. Pictures that are in the folder of -o already are left alone.
    """
    from mlx_starflow.cli.options.enlarging import EnlargedPictures, EnlargedVideo
    from mlx_starflow.media.formats import MOVIES
    from mlx_starflow.media.image_files import is_video_file
    from mlx_starflow.media.tables import write_json

    one = pictures[0] if len(pictures) == 1 else None
    to_movie = output is not None and output.suffix.lower() in (*MOVIES, ".gif")
    is_video = one is not None and (is_video_file(one) or (to_movie and one.is_dir()))
    if is_video and quality is not None:
        raise click.UsageError(f"--quality is about pictures, and {one} is a video: leave it out")
    if crf is not None and not (is_video and (output is None or output.suffix.lower() in MOVIES)):
        raise click.UsageError("--crf is about H.264, and nothing of it is made: leave it out, or name an .mp4")
    # What can be wrong with names is said before the network is read.
    work: EnlargedPictures | EnlargedVideo
    if one is not None and is_video:
        work = EnlargedVideo(one, output, crf, metadata, json_file)
    else:
        work = EnlargedPictures(pictures, output, quality, metadata, json_file)

    from mlx_starflow.pipelines import Upscaler

    cpu.hint_if_slow()
    upscaler = Upscaler.load(upscale_model, scale=int(upscale) if upscale else None, dtype=dtype)
    with resumable(lambda: f"stopped: {work.summary()}"):
        work.run(upscaler)
    if json_file is not None:
        write_json({"upscaler": upscaler.metadata, "made": work.made, "skipped": work.skipped}, json_file)
