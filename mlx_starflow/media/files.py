"""Reading JSON, and writing files so that a crash leaves the old file or the new one, never half of one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlx_starflow.errors import StarflowError, one_line


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises StarflowError, naming it, if it is missing or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StarflowError(f"cannot read {path}: {one_line(error)}") from error
    except ValueError as error:
        raise StarflowError(f"cannot read {path}: {path.name} is not valid JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise StarflowError(f"cannot read {path}: it holds a JSON {type(content).__name__}, not an object")
    return content


@contextmanager
def replacing(
    path: Path,
    *,
    failure: str = "",
    advice: str = "",
    makes_folder: bool = False,
    overwrites_partial: bool = False,
    sync: bool = False,
) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes `path`'s place when the block ends without an error.

    Args:
        path: replaced if it exists.
        failure: how the error message begins; "`path` cannot be written" by default.
        advice: how it ends.
        makes_folder: the folder is made if need be.
        overwrites_partial: the temporary name is `partial-NAME`, so that what a killed process left is written over;
            for large files, which one process alone writes. By default it has the process's number.
        sync: the contents reach the disk before the name does, so that a power failure leaves one of both files too.

    Raises:
        StarflowError: the operating system refuses to write there (no folder, no permission, disk full).
    """
    own = f".{path.stem}.{os.getpid()}{path.suffix}"  # the suffix tells writers the format
    temporary = path.with_name(f"partial-{path.name}" if overwrites_partial else own)
    try:
        if makes_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        for left in left_behind(path):
            left.unlink(missing_ok=True)
        yield temporary
        if sync:
            _sync(temporary)
        os.replace(temporary, path)
        if sync:
            with suppress(OSError):  # not every file system can say that a folder has reached the disk
                _sync(path.parent)
    except OSError as error:
        raise StarflowError(f"{failure or f'{path} cannot be written'}: {one_line(error)}{advice}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def left_behind(path: Path) -> list[Path]:
    """Temporary files, or folders, of `path` whose processes have ended without taking them away."""
    if not path.parent.is_dir():
        return []
    name = re.compile(rf"\.{re.escape(path.stem)}\.(\d+){re.escape(path.suffix)}")
    found = [(each, name.fullmatch(each)) for each in os.listdir(path.parent)]
    return [path.parent / each for each, match in found if match and not _is_alive(int(match[1]))]


def _is_alive(number: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
