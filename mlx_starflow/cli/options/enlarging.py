"""What `upscale` does with pictures, and with a video: names are checked first, and what is finished stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_starflow.cli.options.outputs import claim_outputs, files_read, make_folder, overwrites
from mlx_starflow.errors import StarflowError

if TYPE_CHECKING:
    from mlx_starflow.pipelines import Upscaler


class EnlargedPictures:
    """Picture files, each of which is enlarged and written before the next one is read.

    Args:
        pictures: files, and folders of pictures.
        output: a file for a single one; a folder for several. In a folder, files that are there already are left alone
            unless `--overwrite` is given: whoever has stopped the command goes on so.
        quality: of JPEG and WebP.
        metadata: whether files say how they were made.
        json_file: is written besides.

    Raises:
        StarflowError, UsageError: there are no such pictures, or the output cannot be written.
    """

    def __init__(
        self, pictures: Sequence[Path], output: Path | None, quality: int | None, metadata: bool, json_file: Path | None
    ):
        from mlx_starflow.media.formats import FORMATS
        from mlx_starflow.media.image_files import find_images
        from mlx_starflow.media.images import LOSSY, check_output

        self._quality, self._metadata, self._quiet = quality, metadata, json_file == Path("-")
        self.made: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        found = [(each, path) for path in pictures for each in find_images([path])]
        read = list(files_read(pictures, (each for each, _ in found)))
        self._several = len(pictures) > 1 or pictures[0].is_dir()
        if not self._several:
            target = output or Path("out.png")
            check_output(target, quality=quality)
            targets = claim_outputs([target], [json_file], inputs=read)
            self._work = [(found[0][0], targets[0])]
            return
        if output is None or output.suffix.lower() in FORMATS:
            raise click.UsageError("several pictures go into a folder: give it with -o FOLDER")
        names = [_name_in(path, each.name, FORMATS) for each, path in found]
        if quality is not None and not any(name.suffix.lower() in LOSSY for name in names):
            raise click.UsageError("--quality is of JPEG and WebP files, and there are none: leave it out")
        claim_outputs([], [json_file], folders=[output], inputs=read)
        work = [(each, output / name) for (each, _), name in zip(found, names, strict=True)]
        there = {target for _, target in work if target.exists() and not overwrites()}
        if there:
            click.echo(f"{len(there)} pictures are in {output} already (--overwrite makes them again)", err=True)
        self._work = [(each, target) for each, target in work if target not in there]
        for folder in {target.parent for _, target in self._work}:
            make_folder(folder)
        claim_outputs([target for _, target in self._work], [json_file], inputs=read)

    def run(self, upscaler: Upscaler) -> None:
        """Enlarge them. Those that cannot be are said at the end. Raises StarflowError if there is nothing else."""
        from mlx_starflow.media.images import LOSSY, save_image
        from mlx_starflow.media.pixels import model_picture
        from mlx_starflow.sampling.bars import Bar

        several = self._several
        for file, target in Bar(self._work, desc="pictures", unit="picture", disable=None if several else True):
            try:
                (image,) = upscaler(file.open(transparency=True), progress=None)
                if target.suffix.lower() in (".jpg", ".jpeg"):
                    profile = image.info.get("icc_profile")
                    image = model_picture(image)  # it has no transparency
                    image.info = {"icc_profile": profile} if profile else {}
                how = _described(upscaler, Path(file.name)) if self._metadata else None
                lossy = target.suffix.lower() in LOSSY
                save_image(image, target, how, quality=self._quality if lossy else None)
            except StarflowError as error:
                if not several:
                    raise
                self.skipped.append({"picture": file.name, "reason": str(error)})
                continue
            width, height = image.size
            self.made.append({"picture": file.name, "file": str(target), "size": [width, height]})
            if not several:
                click.echo(f"{target}: {width}x{height}, enlarged by {upscaler}", err=self._quiet)
        for each in self.skipped:
            click.echo(f"left out: {each['reason']}", err=True)
        if self.skipped and not self.made:
            raise StarflowError(f"none of {len(self.skipped)} pictures could be enlarged")
        if several:
            click.echo(f"{self.summary()}, enlarged by {upscaler}", err=self._quiet)

    def summary(self) -> str:
        """How many pictures there are, and where."""
        where = f" in {self._work[0][1].parent}" if self.made else ""
        return f"{len(self.made)} of {len(self._work)} pictures are finished{where}"


class EnlargedVideo:
    """A video, or a folder of frames, whose frames are enlarged and written one after the other.

    Args:
        source: the video.
        output: the file, or a folder for frames.
        crf: quality of H.264; None: the usual one.
        metadata, json_file: as of `EnlargedPictures`.

    Raises:
        StarflowError: the output cannot be written.
    """

    def __init__(self, source: Path, output: Path | None, crf: int | None, metadata: bool, json_file: Path | None):
        from mlx_starflow.media.videos import check_video_output

        self._source, self._crf, self._metadata, self._quiet = source, crf, metadata, json_file == Path("-")
        self.made: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self._frames = 0
        target = output or Path("out.mp4")
        check_video_output(target)
        free = claim_outputs([target] if target.suffix else [], [json_file], inputs=[source])
        self._target = free[0] if free else target

    def run(self, upscaler: Upscaler) -> None:
        """Enlarge it. Who stops that gets a video of the frames that are finished. Raises StarflowError."""
        from mlx_starflow.media.videos import CRF, VideoWriter, read_video

        frames = read_video(self._source)
        how = _described(upscaler, self._source) if self._metadata else None
        stopped = False
        size = (0, 0)
        with VideoWriter(self._target, frames.fps, crf=self._crf or CRF, metadata=how) as writer:
            try:
                for frame in upscaler.frames(frames, progress=None):
                    writer.add(frame)
                    size, self._frames = frame.size, writer.frames
            except KeyboardInterrupt:
                stopped = True
                if not self._frames:
                    raise
        if stopped:
            raise KeyboardInterrupt
        row = {"picture": str(self._source), "file": str(self._target), "size": [*size], "frames": self._frames}
        self.made.append({**row, "fps": frames.fps})
        shape = f"{self._frames} frames of {size[0]}x{size[1]} at {frames.fps:g} a second"
        click.echo(f"{self._target}: {shape}, enlarged by {upscaler}", err=self._quiet)

    def summary(self) -> str:
        """How many frames there are, and where."""
        return f"{self._frames} frames are finished" + (f", in {self._target}" if self._frames else "")


def _name_in(given: Path, name: str, formats: Sequence[str]) -> Path:
    """Where a picture goes in the output's folder: as in the folder that was given, in a format that is written."""
    inner = Path(name).relative_to(given) if given.is_dir() else Path(Path(name).name)
    return inner if inner.suffix.lower() in formats else inner.with_suffix(".png")


def _described(upscaler: Upscaler, source: Path) -> dict[str, Any]:
    """The description of a file that is enlarged: its own, if it has one, and by what it was enlarged."""
    from mlx_starflow import __version__
    from mlx_starflow.media.metadata import read_metadata

    try:
        found = read_metadata(source)
    except StarflowError:
        found = {"version": __version__, "made_by": "upscale", "source": {"picture": str(source)}}
    return upscaler.upscaled(found)
