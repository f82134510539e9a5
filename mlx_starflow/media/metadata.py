"""How an image or a video on disk was made, as the file itself says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.files import exists, is_folder, is_regular
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
            lists = all(isinstance(each, list) for each in values)
            result[key] = [item for each in values for item in each] if lists else values
    return result


def read_metadata(path: str | Path) -> dict[str, Any]:
    """How an image (PNG, JPEG or WebP), a video or a folder of frames that this package wrote was made.

    Raises:
        StarflowError: it does not say, or cannot be read.
    """
    path = Path(path)
    if is_folder(path):
        return read_video_metadata(path)
    if path.suffix.lower() in MOVIES:
        if exists(path) and not is_regular(path):
            raise StarflowError(f"{path} cannot be read as a video: it is not a regular file")
        return read_video_metadata(path)
    return read_image_metadata(path)
