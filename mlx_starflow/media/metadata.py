"""How an image or a video on disk was made, as the file itself says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_starflow.media.files import is_folder
from mlx_starflow.media.formats import ANIMATIONS, MOVIES
from mlx_starflow.media.images import read_image_metadata
from mlx_starflow.media.videos import read_video_metadata


def read_metadata(path: str | Path) -> dict[str, Any]:
    """How a PNG, a video or a folder of frames that this package wrote was made.

    Raises:
        StarflowError: it does not say, or cannot be read.
    """
    path = Path(path)
    if is_folder(path) or path.suffix.lower() in (*ANIMATIONS, *MOVIES):
        return read_video_metadata(path)
    return read_image_metadata(path)
