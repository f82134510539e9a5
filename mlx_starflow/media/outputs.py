"""What will be written, checked before the work begins that makes it."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import LONGEST_NAME, is_special, shown

STDOUT = Path("-")
"""As the name of a table: standard output."""

_OF_A_MODEL = re.compile(r"(adapter_)?config\.json|spiece\.model|(model|adapters)\b.*\.safetensors(\.index\.json)?")


def check_outputs(
    files: Iterable[Path | None] = (), *, folders: Iterable[Path | None] = (), inputs: Iterable[str | Path] = ()
) -> None:
    """Find out whether all that will be written can be: better before the work than after it.

    Args:
        files: that will be written, each into a folder that is there; None stands for one that nobody wants. Devices
            and pipes can be written to; "-" is standard output.
        folders: that will be written into, made if need be.
        inputs: files and folders that are read.

    Raises:
        StarflowError: there is no folder for a file, or no permission, or one is where the other should be; the file
            system takes no such name; two outputs are the same, or one of them is an input or a file of a model.
    """
    files, folders = ([path for path in paths if path is not None] for paths in (files, folders))
    tried: set[Path] = set()
    for path in files:
        if path != STDOUT:
            _check_file(path, tried)
    for path in folders:
        check_folder(path)
    taken: set[str] = set()
    for path in (*files, *folders):
        place = os.path.realpath(path)
        if place in taken and not is_special(path):
            where = "standard output" if path == STDOUT else path
            raise StarflowError(f"two outputs would be written to {where}: give each of them a name of its own")
        taken.add(place)
    _check_inputs([*files, *folders], inputs)


def check_folder(out: Path) -> None:
    """Raise StarflowError unless a folder can be made, or written to, at `out`."""
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in out.parts):
        raise _refusal(out, "the name is too long")
    there = out
    while (mode := _mode(there)) is None and not os.path.islink(there) and there != there.parent:
        there = there.parent
    if mode is None or not stat.S_ISDIR(mode):
        raise _refusal(out, f"{there} is {_kind(mode)}; give a folder")
    _try(there, out)


def _check_file(path: Path, tried: set[Path]) -> None:
    """Raise StarflowError unless a file can be written at `path`; `tried` are folders that can be written to."""
    mode = _mode(path)
    if mode is not None and stat.S_ISDIR(mode):
        raise _refusal(path, "it is a folder")
    if mode is not None and not os.access(path, os.W_OK):
        raise _refusal(path, "there is no permission")
    if is_special(path) and not path.is_block_device():
        return
    if mode is not None and not stat.S_ISREG(mode):
        raise _refusal(path, f"it is {_kind(mode)}")
    folder = path.parent
    if folder in tried:
        return
    mode = _mode(folder)
    if mode is None or not stat.S_ISDIR(mode):
        missing = f"the folder {shown(folder)} does not exist"
        raise _refusal(path, missing if mode is None else f"{shown(folder)} is {_kind(mode)}")
    _try(folder, path)
    tried.add(folder)


def _try(folder: Path, path: Path) -> None:
    """Raise StarflowError, about `path`, unless files can be made in a folder."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _refusal(path, f"there is no permission to write to {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _refusal(path, one_line(error)) from None


def _check_inputs(outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Raise StarflowError if an output that is there already is an input, or a file of a model."""
    there = {identity: path for path in outputs if (identity := _identity(path)) is not None}
    for path in there.values():
        if _OF_A_MODEL.fullmatch(path.name) and any(
            (path.parent / name).is_file() for name in ("config.json", "adapter_config.json")
        ):
            raise StarflowError(f"{path} is a file of the model in {path.parent}: give another name to write to")
    if not there:
        return
    for each in inputs:
        if (identity := _identity(Path(os.path.expanduser(each)))) in there:
            raise StarflowError(f"{there[identity]} is read, and would be replaced: give another name to write to")


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file or folder this is, under whatever name; None if there is none, or it is a device or a pipe."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    kind = stat.S_IFMT(status.st_mode)
    return (status.st_dev, status.st_ino) if kind in (stat.S_IFREG, stat.S_IFDIR) else None


def _mode(path: Path) -> int | None:
    """What is at `path`. Raises StarflowError if nothing can be."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise _refusal(path, one_line(error)) from None


def _kind(mode: int | None) -> str:
    if mode is None:
        return "a link that leads nowhere"
    return "a file" if stat.S_ISREG(mode) else "not a regular file"


def _refusal(path: Path, why: str) -> StarflowError:
    return StarflowError(f"{shown(path)} cannot be written: {why}")
