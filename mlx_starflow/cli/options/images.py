"""Options of the commands that score and invert images and videos, and the files that they are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_starflow.cli.options.outputs import OUTPUT
from mlx_starflow.cli.options.sampling import Size, dtype_option, with_options
from mlx_starflow.errors import StarflowError

if TYPE_CHECKING:
    from mlx_starflow.likelihood import ImageModel, ImageOrVideo
    from mlx_starflow.media.image_files import ImageFile

images_argument = click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
"""Files, and folders of images."""

frames_option = click.option(
    "--frames", type=click.IntRange(min=1), help="Of videos: so many from their start, 1 + a multiple of 4."
)

model_options = with_options(
    click.option(
        "-m", "--model", default="demo", show_default=True, help="demo, a model directory, or a Hub repository."
    ),
    click.option("--size", type=Size(), help="Of the pictures, in pixels; the model's own by default."),
    dtype_option("the networks"),
)

noise_options = with_options(
    click.option("--draws", type=click.IntRange(min=1), default=4, show_default=True, help="Of the training noise."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the training noise."),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        help="Pictures, or latent frames, at once.",
    ),
)

table_options = with_options(
    click.option("--csv", "csv_file", type=OUTPUT, metavar="FILE", help="Write a table; - prints it."),
    click.option("--json", "json_file", type=OUTPUT, metavar="FILE", help="Write JSON; - prints it."),
)


def open_files(model: ImageModel, files: Sequence[ImageFile], frames: int | None = None) -> Iterator[ImageOrVideo]:
    """The images, or, for a model of videos, the videos in files, each opened when it is asked for.

    Args:
        frames: of videos, so many from their start; all by default.

    Raises:
        StarflowError: there are images and videos, a file cannot be read, a video has not so many frames, or the model
            makes no videos of so many.
    """
    from mlx_starflow.media.videos import read_video
    from mlx_starflow.pipelines import VideoPipeline

    videos = {each.is_video for each in files} if isinstance(model, VideoPipeline) else {False}
    if len(videos) > 1:
        raise StarflowError("give pictures or videos, not both together: stills and videos are scored differently")
    if isinstance(model, VideoPipeline) and True in videos:
        if frames is not None:
            model.format.latent_frames(frames)
        fps = model.settings.fps
        return (read_video(each.name, fps=fps, frames=frames) for each in files)
    if frames is not None:
        raise StarflowError("--frames is about videos, and there are none: leave it out")
    return (each.open() for each in files)
