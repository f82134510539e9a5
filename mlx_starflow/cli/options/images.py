"""Options of the commands that score and invert images and videos, and the files that they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_starflow.cli.options.outputs import OUTPUT
from mlx_starflow.cli.options.sampling import Number, Size, lora_option, network_options, with_options
from mlx_starflow.errors import StarflowError

if TYPE_CHECKING:
    from PIL import Image

    from mlx_starflow.likelihood import ImageModel, ImageOrVideo
    from mlx_starflow.media.image_files import ImageFile
    from mlx_starflow.media.sources import Skip

images_argument = click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
"""Files, and folders of images."""

frames_option = click.option(
    "--frames", type=click.IntRange(min=1), help="Of videos: so many from their start, 1 + a multiple of 4."
)

model_options = with_options(
    click.option("-m", "--model", default="demo", help="demo, a model directory, or a Hub repository."),
    lora_option,
    click.option("--size", type=Size(), help="Of the pictures, in pixels; the model's own by default."),
    network_options,
)

INVERSIONS = click.Choice(["auto", "sequential", "jacobi", "rolling"])
HOW = "How noise is made a picture again; auto follows the plan of `mlx-starflow tune`, exactly without one."

inversion_option = click.option("--method", type=INVERSIONS, help=HOW)
exact_inversion_option = click.option("--method", type=INVERSIONS, default="sequential", help=HOW)

noise_options = with_options(
    click.option("--draws", type=click.IntRange(1, 10_000), default=4, help="Of the training noise."),
    click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the training noise."),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=16,
        help="Pictures, or latent frames, at once.",
    ),
)

metadata_option = click.option("--metadata/--no-metadata", default=True, help="Say in the file how it was made.")

noise_level_option = click.option(
    "--noise-level",
    type=Number(min=0, min_open=True),
    metavar="T",
    help="Standard deviation of the noise that an iTARFlow adds and knows of; its highest level by default.",
)

table_options = with_options(
    click.option("--csv", "csv_file", type=OUTPUT, metavar="FILE", help="Write a table; - prints it."),
    click.option("--json", "json_file", type=OUTPUT, metavar="FILE", help="Write JSON; - prints it."),
)


def check_split(split: str | None, pictures: Sequence[Path]) -> None:
    """Raise UsageError if there is no folder whose metadata could have a split."""
    if split is not None and pictures and not any(path.is_dir() for path in pictures):
        raise click.UsageError("--split is about folders with a metadata.jsonl, and there are only files: leave it out")


LISTED = 10
"""Files that were skipped, on standard error; JSON has all."""


class ReadableFiles:
    """The images or, for a model of videos, the videos in files, as the model sees them: see `ImageModel.fit`.

    A pass over it reads them one by one. Those that cannot be read are left out, and said on standard error at the
    end.

    Attributes:
        files: that were read in the last pass, in order.
        skips: those that were not, and why.

    Raises:
        StarflowError: here, there are images and videos, or the model makes no videos of so many frames; in a pass,
            none can be read.
    """

    def __init__(
        self,
        model: ImageModel,
        files: Sequence[ImageFile],
        *,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        videos: bool = True,
    ):
        """`frames`: of videos, so many from their start; all by default. `videos`: False: take pictures alone."""
        from mlx_starflow.media.image_files import ImageFile

        self.files: list[ImageFile] = []
        self.skips: list[Skip] = []
        self._model, self._all, self._size = model, files, size
        self._open = _opener(model, files, frames) if videos else ImageFile.open

    def __iter__(self) -> Iterator[Image.Image | list[Image.Image]]:
        from mlx_starflow.media.sources import Skip

        self.files, self.skips, problem = [], [], ""
        for file in self._all:
            try:
                fitted = self._model.fit(self._open(file), self._size)
            except StarflowError as error:
                problem = problem or str(error)
                reason = str(error).removeprefix(f"cannot read the picture {file.name}: ").removeprefix(f"{file.name} ")
                self.skips.append(Skip(file.name, reason))
                continue
            self.files.append(file)
            yield fitted
        if not self.files:
            raise StarflowError(problem if len(self.skips) == 1 else f"nothing can be read: {self.report()}")
        if self.skips:
            click.echo(self.report(), err=True)

    def report(self) -> str:
        """One line about what was skipped."""
        from mlx_starflow.media.sources import skip_report

        return skip_report(self.skips, most=LISTED)

    def skipped(self) -> list[dict[str, str]]:
        """What was skipped, for JSON."""
        return [{"picture": skip.key, "reason": skip.reason} for skip in self.skips]


def _opener(model: ImageModel, files: Sequence[ImageFile], frames: int | None) -> Callable[[ImageFile], ImageOrVideo]:
    """What opens each of these files."""
    from mlx_starflow.media.videos import read_video
    from mlx_starflow.pipelines import VideoPipeline

    videos = {each.is_video for each in files} if isinstance(model, VideoPipeline) else {False}
    if len(videos) > 1:
        raise StarflowError("give pictures or videos, not both together: stills and videos are scored differently")
    if isinstance(model, VideoPipeline) and True in videos:
        if frames is not None:
            model.format.latent_frames(frames)
        fps = model.settings.fps
        return lambda each: read_video(each.name, fps=fps, frames=frames)
    if frames is not None:
        raise StarflowError("--frames is about videos, and there are none: leave it out")
    return lambda each: each.open()
