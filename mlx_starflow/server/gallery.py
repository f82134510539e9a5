"""The gallery: a folder of finished images and videos, each of which says how it was made.

The folder is its own index. An image is written under a temporary name and renamed, so a process that is killed
leaves whole files alone, and a server that begins finds all of them: what their metadata say is read when they are
first listed. Names are times and random numbers; nothing of them comes from a client, and ids that clients send are
only ever looked up.
"""

from __future__ import annotations

import base64
import io
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.description import describing
from mlx_starflow.media.files import expanded, is_regular, left_behind, read_bytes, temporary_path
from mlx_starflow.media.images import QUALITY, read_image_metadata
from mlx_starflow.server.refusals import Refusal

FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
"""Formats that images are given in, and their media types."""

MOST_FILE = 1 << 30
"""Bytes of a file of the gallery."""

_ID = re.compile(r"\d{8}-\d{6}-\d{6}-[0-9a-f]{8}")
_NAME = re.compile(rf"({_ID.pattern})\.(png|webp)")
_TEMPORARY = re.compile(rf"\.({_ID.pattern}|scratch-[0-9a-f]{{16}})\.\d+(\.[a-z]+)")


def encoded(
    image: Image.Image, format: str = "png", metadata: dict[str, Any] | None = None, quality: int | None = None
) -> bytes:
    """The bytes of an image's file, with its metadata: for PNG those that `media.images.save_image` writes."""
    options = describing(metadata, Path(f"image.{format}"))
    if format != "png":
        options["quality"] = QUALITY if quality is None else quality
    target = io.BytesIO()
    image.save(target, format, **options)
    return target.getvalue()


def data_url(content: bytes, format: str = "png") -> str:
    """Bytes of an image as a URL that holds them."""
    return f"data:{FORMATS[format]};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class Item:
    """What lies in the gallery.

    Attributes:
        id: of it; ids sort by time.
        kind: "image" or "video".
        path: of its file.
        size: (width, height) in pixels.
        bytes: of the file.
        metadata: how it was made, as the file says.
    """

    id: str
    kind: str
    path: Path
    size: tuple[int, int]
    bytes: int
    metadata: dict[str, Any]

    @property
    def created(self) -> float:
        """Seconds since 1970."""
        moment = datetime.strptime(self.id[:22], "%Y%m%d-%H%M%S-%f").replace(tzinfo=timezone.utc)
        return moment.timestamp()

    def describe(self) -> dict[str, Any]:
        """What clients are told."""
        return {
            "id": self.id,
            "kind": self.kind,
            "url": f"/api/gallery/{self.path.name}",
            "created": self.created,
            "width": self.size[0],
            "height": self.size[1],
            "bytes": self.bytes,
            "metadata": self.metadata,
        }


class LooseItem(NamedTuple):
    """An image that no gallery keeps; `describe` tells of it as `Item.describe` of those that are kept.

    Attributes:
        image: itself.
        metadata: how it was made.
    """

    image: Image.Image
    metadata: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """What clients are told: no id, and a URL that holds the image."""
        content = encoded(self.image, "png", self.metadata)
        return {
            "id": None,
            "kind": "image",
            "url": data_url(content),
            "created": time.time(),
            "width": self.image.width,
            "height": self.image.height,
            "bytes": len(content),
            "metadata": self.metadata,
        }


class Gallery:
    """A folder of finished images and videos. Any thread may call it.

    Args:
        folder: is made if need be; files there that are not the gallery's stay as they are and are not shown.
    """

    def __init__(self, folder: str | Path):
        self.folder = expanded(folder).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in os.listdir(self.folder):
                if match := _TEMPORARY.fullmatch(name):
                    for left in left_behind(self.folder / f"{match[1]}{match[2]}"):
                        left.unlink(missing_ok=True)
        except OSError as error:
            raise StarflowError(f"the gallery {self.folder} cannot be used: {one_line(error)}") from None
        self._lock = threading.Lock()
        self._items: dict[str, Item] = {}
        self._seen = -1

    # ---- writing

    def add(self, image: Image.Image, metadata: dict[str, Any]) -> Item:
        """Keep an image. Raises Refusal if it cannot be written."""
        id = _new_id()
        path, content = self.folder / f"{id}.png", encoded(image, "png", metadata)
        try:
            with self.scratch(".png") as temporary:
                temporary.write_bytes(content)
                os.replace(temporary, path)
        except OSError as error:
            raise Refusal(507, f"the gallery cannot be written: {one_line(error)}", code="gallery") from None
        return self._keep(Item(id, "image", path, image.size, len(content), metadata))

    def add_video(self, frames: list[Image.Image], fps: float, metadata: dict[str, Any]) -> Item:
        """Keep a video, as an animated WebP. Raises StarflowError."""
        from mlx_starflow.media.videos import VideoWriter

        id = _new_id()
        path = self.folder / f"{id}.webp"
        with VideoWriter(path, fps, metadata=metadata) as writer:
            for frame in frames:
                writer.add(frame)
        return self._keep(Item(id, "video", path, frames[0].size, path.stat().st_size, metadata))

    def remove(self, id: str) -> None:
        """Delete the file of an id. Raises Refusal if there is none."""
        item = self.find(id)
        with self._lock:
            self._items.pop(id, None)
        try:
            item.path.unlink(missing_ok=True)
        except OSError as error:
            raise Refusal(500, f"{item.path.name} cannot be deleted: {one_line(error)}") from None

    @contextmanager
    def scratch(self, suffix: str) -> Iterator[Path]:
        """A name in the folder for a file that is gone afterwards."""
        path = temporary_path(self.folder / f"scratch-{secrets.token_hex(8)}{suffix}")
        try:
            yield path
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    # ---- reading

    def find(self, id: str) -> Item:
        """What has this id. Raises Refusal if there is nothing."""
        item = None
        if _ID.fullmatch(id):
            with self._lock:
                item = self._items.get(id)
            if item is None:
                self._look()
                with self._lock:
                    item = self._items.get(id)
        if item is None:
            raise Refusal(404, "there is no such picture in the gallery", code="not_found")
        return item

    def page(self, limit: int = 50, before: str | None = None) -> tuple[list[Item], bool]:
        """The newest items, or those that are older than the one of id `before`; and whether there are more."""
        self._look()
        with self._lock:
            ids = sorted(id for id in self._items if before is None or id < before)[::-1]
            return [self._items[id] for id in ids[:limit]], len(ids) > limit

    def __len__(self) -> int:
        self._look()
        return len(self._items)

    def content(self, item: Item) -> bytes:
        """The bytes of an item's file. Raises Refusal if it is gone."""
        try:
            return read_bytes(item.path, MOST_FILE)
        except StarflowError:
            with self._lock:
                self._items.pop(item.id, None)
            raise Refusal(404, "there is no such picture in the gallery", code="not_found") from None

    def _keep(self, item: Item) -> Item:
        with self._lock:
            self._items[item.id] = item
        return item

    def _look(self) -> None:
        """Learn what has come into the folder, or gone, since the last look."""
        with self._lock:
            known = set(self._items)  # whose files were there before the folder is listed
        try:
            changed = self.folder.stat().st_mtime_ns
            if changed == self._seen:
                return
            names = [match for name in os.listdir(self.folder) if (match := _NAME.fullmatch(name))]
        except OSError as error:
            raise Refusal(500, f"the gallery cannot be read: {one_line(error)}") from None
        found = [self._read(match[1], self.folder / match[0]) for match in names if match[1] not in known]
        there = {match[1] for match in names}
        with self._lock:
            for item in found:
                if item is not None:
                    self._items.setdefault(item.id, item)
            for id in known - there:
                self._items.pop(id, None)
            # A change within the clock's resolution of the last one would not be seen.
            self._seen = changed if time.time_ns() - changed > 2_000_000_000 else -1

    def _read(self, id: str, path: Path) -> Item | None:
        """What a file says about itself; None if it is damaged, or none that a gallery holds."""
        try:
            if path.is_symlink() or not is_regular(path):
                return None
            metadata = read_image_metadata(path)
            with Image.open(path, formats=("PNG", "WEBP")) as image:
                size = image.size
            return Item(id, "image" if path.suffix == ".png" else "video", path, size, path.stat().st_size, metadata)
        except (StarflowError, OSError, ValueError):
            return None


def _new_id() -> str:
    return f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}-{secrets.token_hex(4)}"
