"""The names of what commands write, and what they read that must not be written over."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import expanded, is_special

if TYPE_CHECKING:
    from mlx_starflow.media.image_files import ImageFile

_LINKS = 40
"""That a name may lead through, as in Linux."""


class OutputPath(click.ParamType):
    """A file or a folder to write: ~ is the user's folder, and of a link to a file that file is replaced."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Path:
        if not str(value):
            self.fail("an output needs a name", param, context)
        path = expanded(value)
        for _ in range(_LINKS):
            if is_special(path) or not os.path.islink(path):
                break
            path = path.parent / os.readlink(path)
        return path


OUTPUT = OutputPath()
"""The type of every option and argument that names what is written."""


def files_read(pictures: Iterable[Path], found: Iterable[ImageFile]) -> Iterator[Path]:
    """What a command reads that is given pictures: they, the folders, and the captions beside them."""
    from mlx_starflow.media.sources.folders import METADATA

    for path in pictures:
        yield from (path, *(path / name for name in METADATA))
    for each in found:
        path = Path(each.name)
        yield from (path, path.with_suffix(".txt"))


def make_folder(folder: Path) -> None:
    """Make a folder for output. Raises StarflowError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StarflowError(f"the folder {folder} cannot be made: {one_line(error)}") from None
