"""Folders of images: with a metadata file, with `.txt` files beside them, or sorted into classes."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.pixels import SUFFIXES
from mlx_starflow.media.sources.sample import Sample, Skip, captions_of, clean

METADATA = ("metadata.jsonl", "metadata.csv")


class MetadataFolder:
    """The images that a `metadata.jsonl` or `metadata.csv` names: `file_name`, beside it or below, and `text`.

    Raises:
        StarflowError: the file cannot be read, or a line of it is broken.
    """

    def __init__(self, index: Path, column: str | None = None):
        self.folder = index.parent
        self._rows = (_read_csv if index.suffix == ".csv" else _read_jsonl)(index, column)
        self.total: int | None = len(self._rows)

    def __iter__(self) -> Iterator[Sample | Skip]:
        for row, captions in self._rows:
            yield Sample(row["file_name"], captions, (self.folder / row["file_name"]).read_bytes, row)


class TextFolder:
    """Images in a folder and the folders in it, each with its caption in a file of the same name in `.txt`."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder, self._names = folder, names
        self.total: int | None = len(names)

    def __iter__(self) -> Iterator[Sample | Skip]:
        for name in self._names:
            path = self.folder / name
            try:
                caption = clean(path.with_suffix(".txt").read_text(encoding="utf-8-sig"))
            except FileNotFoundError:
                caption = ""
            except OSError as error:
                yield Skip(name, f"its .txt cannot be read: {one_line(error)}")
                continue
            except ValueError:
                yield Skip(name, "its .txt is not UTF-8")
                continue
            yield Sample(name, (caption,) if caption else (), path.read_bytes)


class ClassFolder:
    """Images in folders of classes: the caption is the name of the folder, with spaces for underscores."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder, self._names = folder, names
        self.total: int | None = len(names)

    def __iter__(self) -> Iterator[Sample | Skip]:
        for name in self._names:
            label = Path(name).parent.name
            caption = clean(label.replace("_", " "))
            yield Sample(name, (caption,) if caption else (), (self.folder / name).read_bytes, {"label": label})


def list_images(folder: Path) -> list[str]:
    """The images in a folder and the folders in it, by their names' endings: paths relative to it, sorted.

    What is hidden is left out, such as the `._` files that macOS leaves on other disks.

    Raises:
        StarflowError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise StarflowError(f"cannot read {error.filename}: {one_line(error)}") from None

    found = []
    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                found.append(Path(place, name).relative_to(folder).as_posix())
    return sorted(found)


_Rows = list[tuple[dict[str, Any], tuple[str, ...]]]


def _read_jsonl(path: Path, column: str | None) -> _Rows:
    rows: _Rows = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            captions = captions_of(row, column)
            if not isinstance(row["file_name"], str) or not row["file_name"]:
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise StarflowError(
                f'{path}, line {number}: expected an object with "file_name" and "{column or "text"}"'
            ) from None
        rows.append((row, captions))
    return rows


def _read_csv(path: Path, column: str | None) -> _Rows:
    rows: _Rows = []
    try:
        reader = csv.DictReader(io.StringIO(_read(path).decode(), newline=""), strict=True)
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


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise StarflowError(f"cannot read {path}: {one_line(error)}") from None
