"""Reading the files of a folder that may come from anywhere: regular ones, and none outside of it."""

from __future__ import annotations

import errno
import os
import stat
from functools import partial
from pathlib import Path

LARGEST = 1 << 31
"""Bytes of a file that is read at once; a picture of as many pixels as are decoded has fewer."""

LARGEST_TEXT = 1 << 20
"""Bytes of a file that holds one caption."""


def leads_out(path: Path, root: Path) -> bool:
    """Whether a path, when links and `..` in it are followed, is outside of the folder `root`."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def read_inside(path: Path, root: Path | None, most: int = LARGEST) -> bytes:
    """The bytes of a regular file in the folder `root`, or in one of its folders.

    Args:
        path: of the file; links are followed as long as they stay in `root`.
        root: None: the file may be anywhere.
        most: the largest size that is taken.

    Raises:
        OSError: it cannot be read, is a pipe or a device, leads out of `root` or is too large.
    """
    try:
        out = root is not None and leads_out(path, root)
    except ValueError:  # metadata may hold what no file can be called
        raise OSError(errno.EINVAL, "that is no name of a file") from None
    if out:
        raise OSError(errno.EXDEV, "it leads out of the folder: copy it there")
    # Opening a pipe waits for somebody who writes to it, unless told not to.
    with open(path, "rb", opener=partial(_open, os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"it is larger than {most} bytes")
        return file.read()


def _open(more: int, path: str, flags: int) -> int:
    return os.open(path, flags | more)
