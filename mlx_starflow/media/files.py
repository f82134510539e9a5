"""Reading bytes, text, JSON and YAML within limits; writing so that a crash leaves the old file or the new one.

What is read may come from anywhere: only regular files are opened, none is larger than it should be, and nothing in
them can make a parser nest, or a list grow, without end.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_starflow.errors import StarflowError, one_line

if TYPE_CHECKING:
    import yaml

MOST_BYTES = 1 << 26
"""Of a file that is read at once; an index of ten thousand tensors takes a megabyte."""

MOST_YAML = 1 << 20
"""Bytes of a YAML file, which takes long to read."""

MOST_DEPTH = 64
"""Lists and mappings inside each other."""

MOST_ITEMS = 100_000
"""Values in a YAML file, with those that aliases repeat."""

LONGEST_NAME = 255
"""Bytes of a file's name, on all the usual file systems."""

LONGEST_SUFFIX = 32
"""Bytes of what says a file's format."""

_HUB = re.compile(r"(models|datasets|spaces)--.+")


# ---- reading


def exists(path: Path) -> bool:
    """Whether there is something of this name. Raises StarflowError if that cannot be found out."""
    return _mode(path) is not None


def is_regular(path: Path) -> bool:
    """Whether this is a file: no folder, device or pipe. Raises StarflowError if that cannot be found out."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_folder(path: Path) -> bool:
    """Whether this is a folder. Raises StarflowError if that cannot be found out."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def _mode(path: Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise StarflowError(f"cannot read {shown(path)}: {one_line(error)}") from None


def shown(path: Path) -> str:
    """A name in a message: on one line, however it is made."""
    return str(path) if str(path).isprintable() and len(str(path)) <= 300 else ascii(str(path)[:300])


def expanded(path: str | Path) -> Path:
    """`path` with the user's folder for ~. Raises StarflowError if nobody knows which that is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise StarflowError(f"{path}: the user has no home folder here; set HOME, or give another path") from None


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder.

    Raises:
        StarflowError: the name, or a symbolic link of this name, leads out of the folder, or it is a device or a pipe.
            (In the Hub's cache, links into the same repository's `blobs` are what files are.)
    """
    path, parts = folder / name, Path(name).parts
    try:
        found, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise StarflowError(f"cannot read {str(path)!a}: {one_line(error)}") from None
    stays = found.is_relative_to(home) or any(
        each.name == "snapshots" and _HUB.fullmatch(each.parent.name) and found.parent == each.parent / "blobs"
        for each in (home, *home.parents)
    )
    if Path(name).is_absolute() or ".." in parts or not stays:
        raise StarflowError(f"{str(name)[:200]!a} leads out of {folder}: put the file itself into the folder")
    if exists(path) and not is_regular(path) and not is_folder(path):
        raise StarflowError(f"{path} is not a regular file")
    return path


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A regular file of at most so many bytes. Raises StarflowError, naming it."""
    with _reading(path), open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise StarflowError(f"cannot read {path}: it is not a regular file")
        content = file.read(most + 1)
    return _bounded(content, most, path)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits. Raises StarflowError, naming it, if it cannot be read."""
    with _reading(path):
        return sha256_of(path)


def sha256_of(path: Path) -> str:
    """`checksum`, for callers that say themselves what an OSError means."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StarflowError(f"cannot read {path}: {one_line(error)}") from error
    except ValueError as error:  # a name that is none
        raise StarflowError(f"cannot read {str(path)!a}: {one_line(error)}") from None


def _bounded(content: bytes, most: int, path: str | Path) -> bytes:
    if len(content) > most:
        raise StarflowError(f"cannot read {path}: it has more than {most} bytes, which no such file needs")
    return content


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file; a pipe without a writer would keep us waiting."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """A file of UTF-8, without the mark that some editors put first. Raises StarflowError, naming it."""
    return decode_text(read_bytes(path, most), path)


def read_lines(path: str | Path, most: int = MOST_BYTES) -> list[str]:
    """The lines of a text that a user names, without spaces around them and without empty ones.

    Args:
        path: of a file of UTF-8, or of a pipe such as a shell's `<(...)`; "-" is standard input.
        most: bytes that are taken.

    Raises:
        StarflowError: it cannot be read, is too long or not UTF-8.
    """
    name = "standard input" if str(path) == "-" else path
    with _reading(name):
        if str(path) != "-":
            with open(path, "rb") as file:
                content = file.read(most + 1)
        elif sys.stdin is None:
            raise StarflowError("cannot read standard input: it is closed")
        else:
            content = sys.stdin.buffer.read(most + 1)
    text = decode_text(_bounded(content, most, name), name)
    # Not splitlines: a prompt may hold any other character that Unicode calls the end of a line.
    return [line for line in map(str.strip, io.StringIO(text, newline=None)) if line]


def decode_text(content: bytes, path: str | Path) -> str:
    """UTF-8, without its mark. Raises StarflowError, naming where it came from."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise StarflowError(f"cannot read {path}: line {line} is not UTF-8; save it as UTF-8") from None


def parse_json(text: str | bytes) -> Any:
    """What JSON says. Raises ValueError for anything else, and for lists or objects nested without need."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"more than {MOST_DEPTH} lists and objects inside each other") from None
    _check_depth(content)
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises StarflowError, naming it, if it is missing or something else."""
    content = read_bytes(path)
    try:
        found = parse_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise StarflowError(f"cannot read {path}: {path.name} is not valid JSON: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise StarflowError(f"cannot read {path}: it holds a JSON {type(found).__name__}, not an object")
    return found


def parse_yaml(text: str) -> Any:
    """What YAML says, as YAML 1.2 reads numbers: 1e-4 is one, 81:16 and dates are text.

    Raises ValueError for anything else, for nesting without need, and for aliases that multiply.
    """
    import yaml

    try:
        content = yaml.load(text, Loader=_yaml_loader())
    except RecursionError:
        raise ValueError(f"more than {MOST_DEPTH} lists and mappings inside each other") from None
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)[:300]) from None
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(one_line(error)[:300]) from None
    _check_depth(content, MOST_ITEMS)
    return content


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises StarflowError, naming it, if it cannot be read or is none."""
    text = read_text(path, MOST_YAML)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise StarflowError(f"{path} is not valid YAML: {one_line(error)}") from None


def _yaml_loader() -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    left_out = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in each if tag not in left_out]
        for first, each in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    numbers = list("-+.0123456789")
    Loader.add_implicit_resolver(left_out[0], re.compile(r"[-+]?(0|[1-9][0-9]*)$"), numbers)
    point = r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$"
    point += r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    Loader.add_implicit_resolver(left_out[1], re.compile(point), numbers)
    return Loader


def _check_depth(content: Any, most: float = float("inf")) -> None:
    """Raise ValueError for too many levels, or too many values, each counted as often as it is repeated."""
    count, todo = 0, [(content, 1)]
    while todo:
        value, depth = todo.pop()
        if not isinstance(value, dict | list | tuple | set):
            continue
        count += len(value)
        if depth > MOST_DEPTH:
            raise ValueError(f"more than {MOST_DEPTH} lists and objects inside each other")
        if count > most:
            raise ValueError(f"more than {most} values, aliases counted as often as they are used")
        todo += [(each, depth + 1) for each in (value.values() if isinstance(value, dict) else value)]


# ---- writing


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

    A device or a pipe is written to at the end, and stays what it is (`is_special`).

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
    with ExitStack() as stack:
        try:
            if special := is_special(path):
                if path.is_block_device():
                    raise OSError("it is a disk")
                temporary = Path(stack.enter_context(tempfile.TemporaryDirectory())) / f"file{path.suffix}"
            else:
                temporary = path.with_name(f"partial-{path.name}") if overwrites_partial else temporary_path(path)
                stack.callback(_unlink, temporary)
            if makes_folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            for left in left_behind(path):
                left.unlink(missing_ok=True)
            yield temporary
            if special:
                with open(temporary, "rb") as source, open(path, "wb") as target:
                    shutil.copyfileobj(source, target)
                return
            if sync:
                _sync(temporary)
            os.replace(temporary, path)
            if sync:
                with suppress(OSError):  # not every file system can say that a folder has reached the disk
                    _sync(path.parent)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StarflowError(f"{failure or f'{shown(path)} cannot be written'}: {one_line(error)}{advice}") from None


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def is_special(path: Path) -> bool:
    """Whether this is a device or a pipe, such as /dev/null, /dev/stdout, or what a shell makes of `>(gzip)`.

    Links elsewhere are not followed: whoever wrote a folder shall not choose what is written to outside of it.
    """
    try:
        mode = os.lstat(path).st_mode
    except (OSError, ValueError):
        return False
    if stat.S_ISLNK(mode):
        return Path(os.path.abspath(path)).parts[1:2] in (("dev",), ("proc",))
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def temporary_path(path: Path) -> Path:
    """Where this process writes what shall be `path`: beside it, hidden, with its suffix, which says the format."""
    stem, suffix = _temporary_name(path)
    return path.with_name(f"{stem}{os.getpid()}{suffix}")


def left_behind(path: Path) -> list[Path]:
    """Temporary files, or folders, of `path` whose processes have ended without taking them away."""
    if not path.parent.is_dir():
        return []
    stem, suffix = _temporary_name(path)
    name = re.compile(rf"{re.escape(stem)}(\d+){re.escape(suffix)}")
    found = [(each, name.fullmatch(each)) for each in os.listdir(path.parent)]
    return [path.parent / each for each, match in found if match and not _is_alive(int(match[1]))]


def _temporary_name(path: Path) -> tuple[str, str]:
    """What stands before and after the process's number; together with it no longer than a name may be."""
    stem, suffix = path.stem, path.suffix
    if len(os.fsencode(suffix)) > LONGEST_SUFFIX:
        stem, suffix = path.name, ""
    room = LONGEST_NAME - len(f"..{1 << 32}") - len(os.fsencode(suffix))
    if len(os.fsencode(stem)) > room:
        digest = hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]
        stem = os.fsencode(stem)[: room - len(digest)].decode(errors="ignore") + digest
    return f".{stem}.", suffix


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
