"""The names of what commands write, and what they read that must not be written over."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
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


# ---- files that are there already

_OVERWRITE = "mlx_starflow.overwrite"


def _keep_overwrite(context: click.Context, option: click.Parameter, value: bool) -> None:
    context.meta[_OVERWRITE] = value


overwrite_option = click.option(
    "--overwrite",
    is_flag=True,
    expose_value=False,
    callback=_keep_overwrite,
    help="Replace files that are there already. Pictures and videos get another number otherwise, and other files are "
    "refused.",
)
"""Of commands that call `claim_outputs`."""


def overwrites() -> bool:
    """Whether the current command was given `--overwrite`."""
    return bool(click.get_current_context().meta.get(_OVERWRITE))


def claim_outputs(
    made: Sequence[Path] = (),
    files: Iterable[Path | None] = (),
    *,
    folders: Iterable[Path | None] = (),
    inputs: Iterable[str | Path] = (),
) -> list[Path]:
    """`media.outputs.check_outputs`, and nothing that is there already is replaced unless `--overwrite` is given.

    Args:
        made: images or videos that are written.
        files: tables, noise and other files that are written.
        folders, inputs: as `check_outputs` takes them.

    Returns:
        Where the images or videos go: if one of them is there already, all get a number, which is said.

    Raises:
        StarflowError: as `check_outputs` does, or one of the files is there already.
    """
    from mlx_starflow.media.outputs import check_outputs

    others = [path for path in files if path is not None]
    check_outputs([*made, *others], folders=folders, inputs=inputs)
    if overwrites():
        return [*made]
    for path in others:
        if _is_there(path):
            raise StarflowError(f"{path} is there already: give --overwrite to replace it, or another name")
    taken = next((path for path in made if _is_there(path)), None)
    if taken is None:
        return [*made]
    number = 2
    while any(map(_is_there, free := [_with_number(path, number) for path in made])):
        number += 1
    more = " and so on" if len(free) > 1 else ""
    click.echo(f"{taken} is there already: writing {free[0]}{more} (--overwrite replaces files)", err=True)
    return free


def _with_number(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _is_there(path: Path) -> bool:
    return str(path) != "-" and os.path.lexists(path) and not is_special(path)
