"""How an image or a video on disk was made, as the file itself says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_starflow.media.files import is_folder
from mlx_starflow.media.formats import MOVIES
from mlx_starflow.media.images import read_image_metadata
from mlx_starflow.media.videos import read_video_metadata


def joined(metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metadata of several images as that of one file which shows them: what differs becomes a list, in their order."""
    first = metadata[0]
    result: dict[str, Any] = {}
    for key, value in first.items():
        values: list[Any] = [each.get(key) for each in metadata]
        if all(each == value for each in values):
            result[key] = value
        else:
            lists = [each for each in values if isinstance(each, list)]
            result[key] = [item for each in lists for item in each] if len(lists) == len(values) else values
    return result


def read_metadata(path: str | Path) -> dict[str, Any]:
    """How an image (PNG, JPEG or WebP), a video or a folder of frames that this package wrote was made.

    Raises:
        StarflowError: it does not say, or cannot be read.
    """
    path = Path(path)
    if is_folder(path) or path.suffix.lower() in MOVIES:
        return read_video_metadata(path)
    return read_image_metadata(path)
