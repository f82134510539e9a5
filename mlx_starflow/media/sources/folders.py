"""Folders of images: with a metadata file, with `.txt` files beside them, or sorted into classes."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import is_regular, parse_json
from mlx_starflow.media.pixels import SUFFIXES
from mlx_starflow.media.sources.inside import LARGEST_TEXT, leads_out, read_inside
from mlx_starflow.media.sources.sample import MOST_REPEATS, Sample, Skip, Source, captions_of, clean

METADATA = ("metadata.jsonl", "metadata.csv")

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Names of folders, in lower case, that are the parts of a data set, and the splits that these parts are."""

_REPEATED = re.compile(r"([1-9]\d{0,8})_(?=\S)(.+)", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Listing:
    """The images in a folder and the folders in it, and the links in their place that are not followed.

    Attributes:
        root: the folder that was given, which nothing is read outside of.
        folder: it, or a folder in it.
        names: of the images, relative to `folder`, sorted.
        skips: links, named relative to `folder`.
    """

    root: Path
    folder: Path
    names: list[str] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)

    def read(self, name: str) -> bytes:
        """The bytes of an image, by its name. Raises OSError."""
        return read_inside(self.folder / name, self.root)

    def has_text(self, name: str) -> bool:
        """Whether an image has a file of its name in `.txt`."""
        return is_regular((self.folder / name).with_suffix(".txt"))


class MetadataFolder:
    """The images that a `metadata.jsonl` or `metadata.csv` names: `file_name`, beside it or below, and `text`.

    `root` is the folder that no image may lead out of; None: the file's.

    Raises:
        StarflowError: the file cannot be read, or a line of it is broken.
    """

    def __init__(self, index: Path, column: str | None = None, root: Path | None = None):
        self.folder, self.root = index.parent, root or index.parent
        try:
            # A file that the user names is read wherever it is.
            content = read_inside(index, root).removeprefix(b"\xef\xbb\xbf")
        except OSError as error:
            raise StarflowError(f"cannot read {index}: {one_line(error)}") from None
        self._rows = (_read_csv if index.suffix == ".csv" else _read_jsonl)(index, content, column)
        self.total: int | None = len(self._rows)

    def __iter__(self) -> Iterator[Sample | Skip]:
        for row, captions in self._rows:
            name = row["file_name"]
            yield Sample(name, captions, partial(read_inside, self.folder / name, self.root), row)


class TextFolder:
    """Images in a folder and the folders in it, each with its caption in a file of the same name in `.txt`."""

    def __init__(self, images: Listing):
        self._images = images
        self.total: int | None = len(images.names) + len(images.skips)

    def __iter__(self) -> Iterator[Sample | Skip]:
        images = self._images
        yield from images.skips
        for name in images.names:
            path = (images.folder / name).with_suffix(".txt")
            try:
                caption = clean(read_inside(path, images.root, LARGEST_TEXT).decode("utf-8-sig"))
            except FileNotFoundError:
                caption = ""
            except OSError as error:
                yield Skip(name, f"its .txt cannot be read: {one_line(error)}")
                continue
            except ValueError:
                yield Skip(name, "its .txt is not UTF-8")
                continue
            yield Sample(name, (caption,) if caption else (), partial(images.read, name))


class ClassFolder:
    """Images in folders of classes: the caption is the name of the folder, with spaces for underscores."""

    def __init__(self, images: Listing):
        self._images = images
        self.total: int | None = len(images.names) + len(images.skips)

    def __iter__(self) -> Iterator[Sample | Skip]:
        yield from self._images.skips
        for name in self._images.names:
            label = Path(name).parent.name
            caption = clean(label.replace("_", " "))
            yield Sample(name, (caption,) if caption else (), partial(self._images.read, name), {"label": label})


class RepeatedFolders:
    """Images in folders that are called `10_name`, as kohya's scripts want them: a pass takes each 10 times.

    The caption is in a `.txt` beside the image or, without one, the folder's name behind the number, with spaces for
    underscores. `Sample.repeats` says how often.

    Raises:
        StarflowError: a number is too large.
    """

    def __init__(self, images: Listing):
        self._images, self._captions = images, TextFolder(images)
        self._names = folder_repeats(images.names)
        for count, name in self._names.values():
            if count > MOST_REPEATS:
                raise StarflowError(
                    f"{images.folder}: {count}_{name} asks for {count} repeats of each picture; at most {MOST_REPEATS} "
                    "are taken"
                )
        self.total: int | None = self._captions.total

    def __iter__(self) -> Iterator[Sample | Skip]:
        for item in self._captions:
            if isinstance(item, Sample):
                count, name = self._names[item.key.partition("/")[0]]
                captions = item.captions or tuple(filter(None, [clean(name.replace("_", " "))]))
                item = replace(item, captions=captions, row={"repeats": count})
            yield item


def folder_repeats(names: Sequence[str]) -> dict[str, tuple[int, str]]:
    """The folders `10_name` that all of these images are in, with the number and the name; {} if one is elsewhere.

    Three folders or more that are numbered 1, 2, 3 (or from 0) are classes in an order, and numbers with leading zeros
    are too: nobody's repeats.
    """
    found: dict[str, tuple[int, str]] = {}
    for folder in {name.partition("/")[0] if "/" in name else "" for name in names}:
        if (match := _REPEATED.fullmatch(folder)) is None:
            return {}
        found[folder] = int(match[1]), match[2]
    numbers = sorted(count for count, _ in found.values())
    return {} if len(numbers) > 2 and numbers == list(range(1, len(numbers) + 1)) else found


class WithCaption:
    """A source whose images have a caption where it gives them none."""

    def __init__(self, source: Source, caption: str):
        self._source, self._caption = source, caption
        self.total: int | None = source.total

    def __iter__(self) -> Iterator[Sample | Skip]:
        for item in self._source:
            if isinstance(item, Sample) and not item.captions:
                item = replace(item, captions=(self._caption,))
            yield item


class Parts:
    """Folders in a folder that are each a source: keys begin with the folder's name.

    A folder whose name is one of `SPLITS` is that split, as far as its own metadata does not say otherwise.
    """

    def __init__(self, parts: Mapping[str, Source], skips: Sequence[Skip] = ()):
        self._parts, self._skips = parts, skips
        totals = [part.total for part in parts.values()]
        known = [total for total in totals if total is not None]
        self.total: int | None = sum(known) + len(skips) if len(known) == len(totals) else None

    def __iter__(self) -> Iterator[Sample | Skip]:
        yield from self._skips
        for name, part in self._parts.items():
            split = SPLITS.get(name.lower())
            for item in part:
                item = replace(item, key=f"{name}/{item.key}")
                if split and isinstance(item, Sample) and not item.row.get("split"):
                    item = replace(item, row={**item.row, "split": split})
                yield item


def list_images(folder: Path, root: Path | None = None) -> Listing:
    """The images in a folder and the folders in it, by their names' endings.

    Left out are what is hidden, such as the `._` files that macOS leaves on other disks, and the folders of models and
    trainings, whose images are made of the data. Links to folders are not followed, and are listed.

    Args:
        folder: to look in.
        root: the folder that was given, if this is one in it.

    Raises:
        StarflowError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise StarflowError(f"cannot read {error.filename}: {one_line(error)}") from None

    found = Listing(root or folder, folder)
    for place, folders, files in os.walk(folder, onerror=fail):
        inside = Path(place)
        if inside != folder and _is_output(folders, files):
            folders[:] = []
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (path := inside / name).is_symlink():
                out = leads_out(path, found.root)
                where = "out of the data: copy it there" if out else "to another folder of the data"
                found.skips.append(Skip(path.relative_to(folder).as_posix(), f"a link {where}"))
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                found.names.append((inside / name).relative_to(folder).as_posix())
    found.names.sort()
    found.skips.sort(key=lambda skip: skip.key)
    return found


def _is_output(folders: Sequence[str], files: Sequence[str]) -> bool:
    """Whether a folder with these folders and files in it is a model's or a training's."""
    weights = any(name.startswith("model") and ".safetensors" in name for name in files)
    return "log.jsonl" in files or ("config.json" in files and weights) or _is_run(folders, files)


def _is_run(folders: Sequence[str], files: Sequence[str]) -> bool:
    return "config.yaml" in files and any(name in folders for name in ("checkpoints", "flow", "autoencoder"))


_Rows = list[tuple[dict[str, Any], tuple[str, ...]]]


def _read_jsonl(path: Path, content: bytes, column: str | None) -> _Rows:
    rows: _Rows = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            captions = captions_of(row, column)
            if not isinstance(row["file_name"], str) or not row["file_name"]:
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise StarflowError(
                f'{path}, line {number}: expected an object with "file_name" and "{column or "text"}"'
            ) from None
        rows.append((row, captions))
    return rows


def _read_csv(path: Path, content: bytes, column: str | None) -> _Rows:
    rows: _Rows = []
    try:
        reader = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
        fields = reader.fieldnames or []
        if "file_name" not in fields or (column and column not in fields):
            raise StarflowError(
                f"{path}, line 1: expected the columns file_name and {column or 'text'}, not {', '.join(fields)}"
            )
        for row in reader:
            if None in row or not row["file_name"]:
                raise StarflowError(f"{path}, line {reader.line_num}: expected {len(fields)} fields and a file_name")
            rows.append((dict(row), captions_of(row, column)))
    except (csv.Error, ValueError) as error:
        raise StarflowError(f"{path} is not a CSV file in UTF-8: {one_line(error)}") from None
    return rows
