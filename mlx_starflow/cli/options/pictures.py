"""The files of the pictures that `generate` makes: each is written as soon as it is finished."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from mlx_starflow.errors import StarflowError

if TYPE_CHECKING:
    from mlx_starflow.pipelines import GeneratedImage, ImageStream, Upscaler
    from mlx_starflow.pipelines.image_maker import ImageMaker

SECONDS = 60.0
"""Between two writings of a grid that is not full yet, at least."""

SHARE = 0.05
"""Of the time that may be spent on such writings."""


@dataclass
class Pictures:
    """Writes pictures as they come; a context manager.

    What is finished stays, however the block ends: files of their own, or the grid with the pictures that there are,
    and their noise. An error then also says how many there are.

    Attributes:
        pipe, stream: what makes them.
        targets: a file for each, or one for the grid of all.
        images: pictures a prompt.
        columns: of the grid; None: a row for each prompt's, or nearly square.
        metadata: whether files say how they were made.
        best_of: how many samples each picture was chosen from.
        save_noise: file for the noise that they came from.
        steps_dir: folder for the states on the way to them.
        noise_file: where the noise was given, its name.
        upscaler: enlarges each picture before it is written; None: pictures are written as they are.
        quality: of JPEG and WebP files, see `media.images.save_image`.
        quiet: report on standard error, as standard output is for something else.
    """

    pipe: ImageMaker
    stream: ImageStream
    targets: Sequence[Path]
    images: int = 1
    columns: int | None = None
    metadata: bool = True
    best_of: int = 1
    save_noise: Path | None = None
    steps_dir: Path | None = None
    noise_file: Path | None = None
    upscaler: Upscaler | None = None
    quality: int | None = None
    quiet: bool = False
    made: list[GeneratedImage] = field(default_factory=list)

    def __enter__(self) -> Pictures:
        self._written, self._cost = time.monotonic(), 0.0
        return self

    def add(self, made: GeneratedImage) -> None:
        """Write a picture, or keep it for the grid. Raises StarflowError.

        A picture that cannot be enlarged, or whose enlarging is stopped, is written as it was made.
        """
        try:
            if self.upscaler is not None:
                made = made.upscaled(self.upscaler, progress=None)
        finally:
            self._keep(made)

    def _keep(self, made: GeneratedImage) -> None:
        from mlx_starflow.media.images import save_image

        self.made.append(made)
        number = len(self.made)
        if self.steps_dir is not None:
            _write_steps(made, number, self.steps_dir)
        if not self._is_grid:
            save_image(
                made.image, self.targets[number - 1], made.metadata if self.metadata else None, quality=self.quality
            )
            self._report(made, self.targets[number - 1])
        elif number < len(self.stream) and time.monotonic() - self._written > max(SECONDS, self._cost / SHARE):
            self._write_grid()

    def summary(self) -> str:
        """How many pictures there are, and where."""
        done = len(self.made)
        where = f" in {self.targets[0]}" if self._is_grid else f": {self.targets[0]}"
        if not self._is_grid and done > 1:
            where += f" to {self.targets[done - 1]}"
        return f"{done} of {len(self.stream)} pictures are finished{where if done else ''}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close()
            return
        if self.made:
            with suppress(StarflowError):  # what went wrong first is reported
                self._close()
            if isinstance(error, StarflowError):
                raise StarflowError(f"{error} ({self.summary()})") from None

    def table(self) -> dict[str, Any]:
        """What was made, for JSON: a line for each picture, the settings, and what it cost in seconds and bytes."""
        stats = self.stream.stats
        rows = [
            {
                "file": str(self.targets[0 if self._is_grid else number]),
                "prompt": made.prompt,
                "seed": made.seed,
                "fit": made.fit,
                "certificate": None if made.certificate is None else asdict(made.certificate),
            }
            for number, made in enumerate(self.made)
        ]
        cost = {
            "seconds": stats.seconds,
            "memory": stats.memory,
            "evaluations": stats.evaluations,
            "student_evaluations": stats.student_evaluations,
        }
        enlarged = {} if self.upscaler is None else {"upscaled": [self.upscaler.metadata]}
        return {**self.pipe.origin(), "pictures": rows, **enlarged, "settings": self.stream.settings.to_dict(), **cost}

    @property
    def _is_grid(self) -> bool:
        return len(self.targets) == 1 and len(self.stream) > 1

    def _close(self) -> None:
        from mlx_starflow.media.noise import save_noise

        if self._is_grid:
            self._write_grid()
            for made in self.made:
                self._report(made, self.targets[0])
        if self.save_noise is not None:
            save_noise(self.stream.collect(self.made).noise, self.save_noise)

    def _write_grid(self) -> None:
        from mlx_starflow.media.images import grid, save_image

        began = time.monotonic()
        columns = self.columns or (self.images if self.images > 1 else None)
        sheet = grid([made.image for made in self.made], columns and min(columns, len(self.made)))
        save_image(sheet, self.targets[0], self._grid_metadata() if self.metadata else None, quality=self.quality)
        self._written = time.monotonic()
        self._cost = self._written - began

    def _grid_metadata(self) -> dict[str, Any]:
        """How a grid of the pictures so far is made again."""
        result = self.stream.collect(self.made)
        how = self.pipe.grid_metadata(result) | ({"columns": self.columns} if self.columns else {})
        if self.upscaler is not None and all("upscaled" in made.metadata for made in self.made):
            how = self.upscaler.upscaled(how)
        several = len(self.made) > self.images
        if several and (self.best_of > 1 or len(self.made) % self.images):
            # No prompts times seeds make this grid again: the best of each prompt have seeds of their own, and of a
            # grid that is not full the last prompt lacks some.
            made_by = "generate --best-of" if self.best_of > 1 else "generate, stopped"
            how |= {"made_by": made_by, "prompts": result.prompts, "seeds": result.seeds}
        return how

    def _report(self, made: GeneratedImage, path: Path) -> None:
        from tqdm import tqdm

        origin = f"noise from {self.noise_file}" if made.seed is None else f"seed {made.seed}"
        large = ""
        if self.upscaler is not None and "upscaled" in made.metadata:
            large = f", enlarged by {self.upscaler}"
        fit = "" if made.fit is None else f", prompt fit {made.fit:.0f} nats, the best of {self.best_of}"
        with tqdm.external_write_mode(file=sys.stdout):  # progress bars make way
            click.echo(f"{path}: {made.prompt!r}, {origin}{fit}{large}", err=self.quiet)


def _write_steps(made: GeneratedImage, number: int, folder: Path) -> None:
    from mlx_starflow.media.images import grid, save_image

    save_image(grid(made.steps, columns=len(made.steps)), folder / f"steps-{number}.png")
    for index, step in enumerate(made.steps):
        save_image(step, folder / f"picture-{number}-step-{index}.png")
