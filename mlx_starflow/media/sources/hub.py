"""Data sets of the Hugging Face `datasets` library, where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.pixels import UnreadableImage
from mlx_starflow.media.sources.inside import read_inside
from mlx_starflow.media.sources.sample import CAPTION_FIELDS, Sample, Skip, captions_of, clean

PREFIX = "hf:"

SAVED = ("dataset_info.json", "dataset_dict.json")
"""A folder that `save_to_disk` wrote holds one of these."""


class HubDataset:
    """The rows of one split: the first column of images, and captions from `column`, from one of the usual names or,
    failing these, from the names of a column of classes. Keys are the rows' numbers.

    Raises:
        StarflowError: it cannot be loaded, or has no such columns.
    """

    def __init__(self, rows: Any, what: str, column: str | None = None):
        library = _library(what)
        columns = dict(rows.features)
        self._image = next((name for name, kind in columns.items() if isinstance(kind, library.Image)), None)
        if self._image is None:
            raise StarflowError(f"{what} has no column of pictures, only {', '.join(columns)}")
        self._column = column
        self._classes = None
        if column is not None and column not in columns:
            raise StarflowError(f"{what} has no column {column}, only {', '.join(columns)}")
        if column is None and not any(name in columns for name in (*CAPTION_FIELDS, "captions")):
            labels = [name for name, kind in columns.items() if isinstance(kind, library.ClassLabel)]
            if not labels:
                raise StarflowError(
                    f"{what} has no column of captions (text, caption, prompt or captions), only {', '.join(columns)}; "
                    "name it with --caption-column"
                )
            self._column = labels[0]
        if isinstance(kind := columns.get(self._column), library.ClassLabel):
            self._classes = kind
        # The bytes as they are: we decode images ourselves, and report those that cannot be.
        images = rows.select_columns([self._image])
        self._images = images.cast_column(self._image, library.Image(decode=False))
        self._rows = rows.remove_columns([self._image])
        self.total: int | None = len(rows)

    @classmethod
    def load(cls, name: str, column: str | None = None) -> HubDataset:
        """`hf:NAME` or `hf:NAME:SPLIT`, from the Hub or its cache; the split is "train" if none is given."""
        repository, _, split = name.removeprefix(PREFIX).partition(":")
        library = _library(name)
        try:
            rows = library.load_dataset(repository, split=split or "train")
        except Exception as error:  # of the library's many parts: connection, files, builders
            raise StarflowError(f"cannot load {name}: {one_line(error, first=True)}") from None
        return cls(rows, name, column)

    @classmethod
    def open(cls, folder: Path, column: str | None = None) -> HubDataset:
        """A folder that `save_to_disk` wrote; of several splits "train"."""
        try:
            rows = _library(str(folder)).load_from_disk(str(folder))
        except StarflowError:
            raise
        except Exception as error:
            raise StarflowError(f"cannot load {folder}: {one_line(error, first=True)}") from None
        if not hasattr(rows, "features"):
            if "train" not in rows:
                raise StarflowError(f"{folder} holds the splits {', '.join(rows)}; give the folder of one of them")
            rows = rows["train"]
        return cls(rows, str(folder), column)

    def __iter__(self) -> Iterator[Sample | Skip]:
        for number, row in enumerate(self._rows):
            key, read = str(number), partial(self._bytes, number)
            if self._classes is not None:
                label = row[self._column]
                known = isinstance(label, int) and label >= 0
                name = clean(self._classes.int2str(label).replace("_", " ")) if known else ""
                yield Sample(key, tuple(filter(None, [name])), read, row)
                continue
            try:
                captions = captions_of(row, self._column)
            except TypeError:
                yield Skip(key, "its caption is not a text")
                continue
            yield Sample(key, captions, read, row)

    def _bytes(self, number: int) -> bytes:
        image = self._images[number][self._image]
        if image is None:
            raise UnreadableImage("there is no picture")
        if image["bytes"] is not None:
            return image["bytes"]
        return read_inside(Path(image["path"]), None)


def _library(what: str) -> ModuleType:
    try:
        import datasets

        datasets.load_dataset  # noqa: B018  any folder called datasets can be imported too
    except (ImportError, AttributeError):
        raise StarflowError(f"reading {what} needs the library datasets: pip install datasets") from None
    return datasets
