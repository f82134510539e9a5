"""What every source of training data gives: samples, and notes on what it had to leave out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mlx_starflow.errors import printable
from mlx_starflow.media.files import replacing

CAPTION_FIELDS = ("text", "caption", "prompt")
"""Fields that hold a sample's caption, the first of them that is there; `captions` holds a list of further ones."""


MOST_REPEATS = 10_000
"""Of an image in a pass of a training."""


@dataclass(frozen=True)
class Sample:
    """An image that has not been read yet, and what is known about it.

    Attributes:
        key: what the image is called in its source, such as its path; the same in every pass.
        captions: its usual caption first, none of them empty; there may be none.
        read: gives the bytes of the image's file; raises OSError or `UnreadableImage`.
        row: the line of metadata it came with.
    """

    key: str
    captions: tuple[str, ...]
    read: Callable[[], bytes]
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def split(self) -> str:
        """`split` of the metadata, "train" if it has none."""
        return split_of(self.row)

    @property
    def repeats(self) -> int:
        """How often a pass of a training takes it: 10 in a folder `10_name`, else once."""
        return repeats_of(self.row)

    def problem(self) -> str | None:
        """Why its captions are no use, if so."""
        if not self.captions:
            return "no caption"
        try:
            "".join(self.captions).encode()
        except UnicodeEncodeError:
            return "its caption is not valid Unicode"
        return None


@dataclass(frozen=True)
class Skip:
    """Something that cannot be used: what it is called, and in a few words why."""

    key: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.key)} ({printable(self.reason)})"


class Source(Protocol):
    """Where samples come from. Each pass over it gives the same in the same order; images can be read at any time.

    Attributes:
        total: how many samples and skips a pass gives, if that is known beforehand.
    """

    total: int | None

    def __iter__(self) -> Iterator[Sample | Skip]: ...


def clean(text: str) -> str:
    """A caption on one line, without spaces around it: what the tokenizer makes of it anyway."""
    return " ".join(text.split())


def captions_of(row: Mapping[str, Any], column: str | None = None) -> tuple[str, ...]:
    """The captions in a line of metadata, from the field `column` or else `CAPTION_FIELDS`, and from `captions`.

    Fields may hold a text, a list of texts or nothing. Raises TypeError if they hold anything else.
    """
    name = column or next((name for name in CAPTION_FIELDS if row.get(name) is not None), CAPTION_FIELDS[0])
    texts: list[Any] = []
    for field_name in dict.fromkeys([name, "captions"]):
        value = row.get(field_name)
        texts += [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} is not a text")
    return tuple(dict.fromkeys(filter(None, map(clean, texts))))


def split_of(row: Mapping[str, Any]) -> str:
    """The split that a line of metadata says its image belongs to."""
    return str(row.get("split") or "train")


def repeats_of(row: Mapping[str, Any]) -> int:
    """How often a pass takes the image of a line of metadata: `repeats`, once without one."""
    found = row.get("repeats")
    return min(found, MOST_REPEATS) if isinstance(found, int) and found > 0 else 1


def skip_report(skips: Sequence[Skip], file: Path | None = None, most: int = 3) -> str:
    """One line: how many were skipped, the first `most` of them, and the file that lists all."""
    names = ", ".join(map(str, skips[:most])) + (", ..." if len(skips) > most else "")
    return f"skipped {len(skips)}: {names}" + (f"; all of them are in {file}" if file else "")


def skip_line(skip: Skip) -> str:
    """A line of the file that lists what was skipped: key, tab, reason."""
    return f"{printable(skip.key)}\t{printable(skip.reason)}\n"


def write_skips(path: Path, skips: Sequence[Skip]) -> None:
    """Write the list; none, no file. Raises StarflowError."""
    if not skips:
        path.unlink(missing_ok=True)
        return
    with replacing(path, makes_folder=True) as temporary:
        temporary.write_text("".join(map(skip_line, skips)), encoding="utf-8")
