"""One writer at a time in a directory, and files that are replaced together: what is read is all old or all new.

A writer locks the directory. New files are written into its hidden folder `.writing/new`; when all of them are there,
`.writing/commit` appears, which lists them: from that moment on they count. Then they are renamed to their places,
`config.json` last. Whoever next reads or writes a directory in which that was cut off renames the rest first.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import inside, read_json

STAGE = ".writing"
"""A writer's folder in the directory that it writes: its number in `pid`, new files in `new`, and `commit`."""

PARTS = ("text_encoder", "vae")
"""Folders of a model directory that are replaced together with it."""

PATIENCE = 10.0
"""Seconds that a reader waits for a writer who is renaming files."""

_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_CONFIGS = ("config.json", "adapter_config.json")


class _Damaged(StarflowError):
    """What a writer left cannot be finished: waiting does not help."""


# ---- one writer


@dataclass
class _Lock:
    """A directory that this process has locked: by which thread, and how often over."""

    file: int
    thread: int
    depth: int = 0


_locks: dict[tuple[int, int], _Lock] = {}
_guard = threading.Lock()


@contextmanager
def locked(directory: str | Path) -> Iterator[Path]:
    """The sole right to write in a directory, until the block or the process ends; within a thread it can be nested.

    Args:
        directory: made if need be, and removed again if nothing is in it at the end.

    Raises:
        StarflowError: another process or thread has it, or the directory cannot be written to.
    """
    directory = Path(directory)
    with _writing(directory):
        made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
        key, lock = _acquire(directory)
    try:
        if lock.depth == 1:
            with _writing(directory):
                (directory / STAGE).mkdir(exist_ok=True)
                (directory / STAGE / "pid").write_text(str(os.getpid()))
                _finish(directory)
            if directory.name in PARTS:
                settle(directory.parent)
        yield directory
    finally:
        try:
            with suppress(OSError):
                if lock.depth == 1:
                    (directory / STAGE / "pid").unlink(missing_ok=True)
                    (directory / STAGE).rmdir()  # only succeeds on an empty one
            with suppress(OSError):
                for folder in made:
                    folder.rmdir()
        finally:
            with _guard:
                lock.depth -= 1
                if not lock.depth:
                    del _locks[key]
                    os.close(lock.file)


def _acquire(directory: Path) -> tuple[tuple[int, int], _Lock]:
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        key = _identity(os.fstat(file))
        with _guard:
            lock = _locks.get(key)
            if lock is not None:
                os.close(file)
                if taken := lock.thread == threading.get_ident():
                    lock.depth += 1
            elif taken := _try_lock(file):
                with suppress(OSError):
                    if _identity(os.stat(directory)) == key:
                        lock = _locks[key] = _Lock(file, threading.get_ident(), 1)
                if lock is None:  # its last writer has removed it: another one has this name now
                    os.close(file)
                    continue
            else:
                os.close(file)
        if not taken:
            raise StarflowError(f"another mlx-starflow{_writer(directory)} is writing {directory}")
        assert lock is not None
        return key, lock


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems have no locks
    return True


def _writer(directory: Path) -> str:
    """Who holds the lock, as far as it has said so already."""
    for _ in range(20):
        with suppress(OSError, ValueError):
            if number := (directory / STAGE / "pid").read_text():
                return f" (pid {number})"
        time.sleep(0.05)
    return ""


# ---- files that are replaced together


@dataclass
class Transaction:
    """New files of a directory, see `transaction`.

    Attributes:
        root: the directory that is locked.
        folder: where in it this part of the transaction writes, "" for the directory itself.
        names: the new files so far, relative to `root`.
        locks: what is locked until the end besides `root`.
    """

    root: Path
    folder: str = ""
    names: list[str] = field(default_factory=list)
    locks: ExitStack = field(default_factory=ExitStack)

    def staged(self, name: str) -> Path:
        """Where a new file lies before it takes its place."""
        return self.root / STAGE / "new" / self.folder / name

    def file(self, name: str) -> Path:
        """Where to write the file that is to be `name`; it takes its place at the end, with all others."""
        path = self.staged(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if (full := str(Path(self.folder) / name)) not in self.names:
            self.names.append(full)
        return path

    def keep(self, folder: str) -> None:
        """Count what an earlier, unfinished transaction wrote into a folder as written."""
        for path in self.staged(folder).iterdir():
            if path.is_file():
                self.file(str(Path(folder) / path.name))

    def _commit(self) -> None:
        if not self.names:
            return
        stage = self.root / STAGE
        for name in self.names:
            sync(stage / "new" / name)
        configs = [name for name in self.names if Path(name).name in _CONFIGS]
        folders = {Path(name).parent for name in configs if Path(name).name == "config.json"}
        old = [
            str(path.relative_to(self.root))
            for folder in folders
            if (self.root / folder).is_dir()
            for path in (self.root / folder).iterdir()
            if _WEIGHT_FILE.fullmatch(path.name)
        ]
        commit = {
            "new": [name for name in self.names if name not in configs],
            # The directory's own comes last.
            "configs": sorted(configs, key=lambda name: -len(Path(name).parts)),
            "old": [name for name in old if name not in self.names],
        }
        unfinished = stage / "new" / ".commit"
        unfinished.write_text(json.dumps(commit), encoding="utf-8")
        sync(unfinished)
        os.replace(unfinished, stage / "commit")
        with suppress(OSError):  # not every file system can say that a folder has reached the disk
            sync(stage)
        _finish(self.root)


_open = threading.local()


@contextmanager
def transaction(directory: str | Path, *, resume: bool = False) -> Iterator[Transaction]:
    """Files of a directory that are replaced together when the block ends without an error, or not at all.

    Within the block of a directory's transaction, those of the directory itself and of its `PARTS` belong to it: their
    files wait for its end.

    Args:
        directory: made if need be; other files in it are left alone.
        resume: new files that an unfinished transaction has left are there to be kept (`Transaction.keep`), and are
            left again if this one is not finished.

    Raises:
        StarflowError: another process writes there, or the directory cannot be written to; then nothing has changed.
    """
    directory = Path(directory)
    outer: Transaction | None = getattr(_open, "transaction", None)
    if outer is not None:
        for folder in ("", *PARTS):
            if directory.resolve() == outer.root.resolve() / folder:
                if folder:
                    outer.locks.enter_context(locked(directory))
                with _writing(directory):
                    yield Transaction(outer.root, folder, outer.names, outer.locks)
                return
    new, whole = directory / STAGE / "new", False
    with locked(directory), ExitStack() as locks:
        if not resume:
            _remove(new)
        _open.transaction = Transaction(directory, locks=locks)
        try:
            with _writing(directory):
                yield _open.transaction
                _open.transaction._commit()
            whole = True
        finally:
            _open.transaction = outer
            if (whole or not resume) and not (directory / STAGE / "commit").exists():
                _remove(new)


def settle(folder: str | Path) -> None:
    """Before a network's folder is read: finish a transaction in it, or in its model's directory, that was cut off.

    Raises:
        StarflowError: a writer is renaming files there and does not end, or the directory cannot be written to.
    """
    folder = Path(folder)
    for directory in (folder, folder.parent) if folder.name in PARTS else (folder,):
        end = time.monotonic() + PATIENCE
        while os.path.exists(directory / STAGE / "commit"):
            try:
                with locked(directory):  # finishes it
                    pass
            except _Damaged:
                raise
            except StarflowError:
                if time.monotonic() > end or not os.access(directory, os.W_OK):
                    raise
                time.sleep(0.02)


def _finish(directory: Path) -> None:
    """Give the new files of a transaction that counts their places; can be done again after any interruption."""
    stage = directory / STAGE
    new = stage / "new"
    try:
        commit: dict[str, Any] = read_json(inside(directory, f"{STAGE}/commit"))
        # The directory may be a stranger's, and no file outside of it is to be replaced or removed.
        lists = [commit.get(kind) for kind in ("configs", "new", "old")]
        if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
            raise StarflowError("it must list names")
        for name in {name for names in lists for name in names or ()}:
            inside(directory, name)
            inside(new, name)
    except StarflowError as error:
        if not os.path.lexists(stage / "commit"):
            return
        message = f"{stage / 'commit'} is damaged ({error}): remove {stage} and write the model again"
        raise _Damaged(message) from None

    def move(names: list[str]) -> None:
        for name in names:
            if (new / name).exists():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(new / name, directory / name)

    # Without its config.json no network loads, not even in a program that knows nothing of `commit`.
    for name in reversed(commit["configs"]):
        if (new / name).exists():
            (directory / name).unlink(missing_ok=True)
    move(commit["new"])
    for name in commit["old"]:
        (directory / name).unlink(missing_ok=True)
    move(commit["configs"])
    for folder in {(directory / name).parent for name in [*commit["new"], *commit["configs"]]}:
        with suppress(OSError):
            sync(folder)
    (stage / "commit").unlink()
    _remove(new)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Return when a file or a folder has reached the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StarflowError(f"cannot write {directory}: {one_line(error)}") from None
