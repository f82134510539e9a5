"""Tar shards in the webdataset convention: a sample is the files of one name, its endings say what they are.

They are read where they are; nothing is unpacked, so names such as `../x.jpg` are names and no more.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from mlx_starflow.errors import one_line
from mlx_starflow.media.files import parse_json
from mlx_starflow.media.pixels import SUFFIXES, UnreadableImage
from mlx_starflow.media.sources.inside import LARGEST_TEXT
from mlx_starflow.media.sources.sample import Sample, Skip, captions_of, clean

TEXTS = (".txt", ".json", ".cls")
"""Endings of what a sample's caption is read from, the first that is there."""


class Shards:
    """Samples of tar files, shard by shard; keys are `shard.tar/name`.

    A sample's name is its files' path up to the first dot after the last slash. Images are known by their ending,
    captions are in `.txt`, in `.json` (an object, see `captions_of`) or in `.cls` (a class, by name or number). Other
    files, links and folders are ignored.
    """

    def __init__(self, paths: list[Path], column: str | None = None):
        self.paths, self.column = paths, column
        self.total: int | None = None

    def __iter__(self) -> Iterator[Sample | Skip]:
        for path in self.paths:
            members, problem = _members(path)
            for name, parts in members.items():
                yield self._sample(path, f"{path.name}/{name}", parts)
            if problem:
                yield Skip(path.name, f"damaged, or not an uncompressed tar file: {problem}")

    def _sample(self, path: Path, key: str, parts: dict[str, tarfile.TarInfo]) -> Sample | Skip:
        image = next((ending for ending in parts if ending in SUFFIXES), None)
        if image is None:
            return Skip(key, "no picture")
        try:
            captions, row = self._captions(path, parts)
        except (OSError, UnreadableImage, ValueError, TypeError, AttributeError):
            return Skip(key, "its caption cannot be read")
        return Sample(key, captions, partial(_read, path, parts[image]), row)

    def _captions(self, path: Path, parts: dict[str, tarfile.TarInfo]) -> tuple[tuple[str, ...], dict[str, Any]]:
        ending = next((ending for ending in TEXTS if ending in parts), None)
        if ending is None:
            return (), {}
        if parts[ending].size > LARGEST_TEXT:
            raise ValueError
        text = _read(path, parts[ending]).decode("utf-8-sig")
        if ending == ".json":
            row = parse_json(text)
            return captions_of(row, self.column), row
        return tuple(filter(None, [clean(text)])), {}


def _members(path: Path) -> tuple[dict[str, dict[str, tarfile.TarInfo]], str]:
    """Files by name and lower-case ending, in the archive's order; and what is wrong with the archive, if anything."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    problem = ""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                stem, dot, ending = name.partition(".")
                if member.isreg() and not member.issparse() and stem and dot:
                    key = member.name[: len(member.name) - len(name)] + stem
                    found.setdefault(key, {})[f".{ending.lower()}"] = member
            # tarfile takes a broken header for the end, which is a block of zeros.
            if _block(path, archive.offset) != bytes(tarfile.BLOCKSIZE):
                problem = f"it breaks off at byte {archive.offset}"
    except Exception as error:  # headers that are not headers
        problem = one_line(error)
    usable = (*SUFFIXES, *TEXTS)
    # Of a name that has nothing of a sample, nothing need be said.
    return {key: parts for key, parts in found.items() if any(ending in usable for ending in parts)}, problem


def _block(path: Path, offset: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE)


def _read(path: Path, member: tarfile.TarInfo) -> bytes:
    with open(path, "rb") as file:
        if member.size < 0 or member.offset_data + member.size > os.fstat(file.fileno()).st_size:
            raise UnreadableImage("the archive ends before its end")
        file.seek(member.offset_data)
        return file.read(member.size)
