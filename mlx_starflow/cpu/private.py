"""Folders for machine code, which runs with the user's rights: nobody else may write to them.

MLX keeps the fused operations that it compiles on a Linux CPU below the system's folder of temporary files, which all
users share, and loads whatever lies there. It looks at TMPDIR whenever it compiles: `install` names a folder there.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from functools import cache
from pathlib import Path


def is_private(path: Path) -> bool:
    """Whether a file or a folder is the user's own and nobody else can change, replace or remove it."""
    try:
        real = path.resolve(strict=True)
        own = os.stat(real)
        above = [os.stat(folder) for folder in real.parents]
    except (OSError, RuntimeError):
        return False
    return (
        own.st_uid == os.geteuid()
        and not own.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        and all(each.st_uid in (0, os.geteuid()) for each in above)
        # In a sticky folder, such as /tmp, nobody can rename what is another's.
        and not any(each.st_mode & stat.S_IWOTH and not each.st_mode & stat.S_ISVTX for each in above)
    )


def cache_folder(name: str) -> Path | None:
    """A private folder that stays, in the user's cache, or one for this process where that one is not private.

    None if there is no cache, or no library can be loaded from there.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.stat(folder).st_uid == os.geteuid():
            folder.chmod(0o700)
        if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
            return None
    except (OSError, RuntimeError):  # the user has no home folder, or cannot write there
        return None
    return folder if is_private(folder) else own_folder()


@cache
def own_folder() -> Path:
    """A private folder of temporary files, for this process."""
    folder = tempfile.mkdtemp(prefix="mlx-starflow-")
    atexit.register(_remove, folder, os.getpid())
    return Path(folder)


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # and not a fork of it
        shutil.rmtree(folder, ignore_errors=True)


def install() -> None:
    """Give MLX's compiled operations a private folder, if they have none; Python's temporary files stay where they are.

    Never raises.
    """
    try:
        shared = Path(tempfile.gettempdir())  # Python asks once, and now
        if not is_private(shared):
            os.environ["TMPDIR"] = str(cache_folder("mlx-starflow-compiled") or own_folder())
    except OSError:
        pass  # there is no folder for temporary files at all: MLX says so when it needs one
