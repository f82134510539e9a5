"""How an image or a video was made, as its own file says it: a JSON object that no viewer minds.

A PNG has it in a text chunk of its own; JPEG and WebP in EXIF's ImageDescription, GIF and movies in their comment,
under one key, since other programs write there too.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from mlx_starflow.media.files import parse_json
from mlx_starflow.media.formats import METADATA_KEY

MOST_EXIF = 65_000
"""Bytes of text that a JPEG has room for, which are those of one segment."""

_IMAGE_DESCRIPTION = 0x010E


def describing(metadata: Mapping[str, Any] | None, path: Path) -> dict[str, Any]:
    """The options of Pillow's `save` that write `metadata`, plain values, into a file of this name.

    Warns about a JPEG that has no room for it.
    """
    if metadata is None:
        return {}
    suffix = path.suffix.lower()
    if suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text(METADATA_KEY, json.dumps(metadata))
        return {"pnginfo": info}
    text = comment_of(metadata)
    if suffix == ".gif":
        return {"comment": text}
    if suffix in (".jpg", ".jpeg") and len(text) > MOST_EXIF:
        warnings.warn(f"{path} has no room for how it was made: write a .png or a .webp to keep that", stacklevel=3)
        return {}
    exif = Image.Exif()
    exif[_IMAGE_DESCRIPTION] = text
    return {"exif": exif}


def description_of(image: Image.Image) -> dict[str, Any] | None:
    """What `describing` wrote into an image that has been opened; None if it says nothing.

    Raises ValueError if that is damaged, and whatever Pillow raises for files that are.
    """
    if image.format == "PNG":
        text = getattr(image, "text", {}).get(METADATA_KEY)
        return None if text is None else _checked(parse_json(text))
    return described(image.info.get("comment") if image.format == "GIF" else image.getexif().get(_IMAGE_DESCRIPTION))


def comment_of(metadata: Mapping[str, Any]) -> str:
    """Metadata as the text of a comment, or of EXIF."""
    return json.dumps({METADATA_KEY: metadata})


def described(comment: object) -> dict[str, Any] | None:
    """What `comment_of` wrote; None if it is somebody else's comment. Raises ValueError if it is damaged."""
    if not isinstance(comment, str | bytes) or not comment:
        return None
    try:
        content = parse_json(comment)
    except ValueError:
        if METADATA_KEY in (comment if isinstance(comment, str) else comment.decode("latin-1")):
            raise
        return None
    return _checked(content[METADATA_KEY]) if isinstance(content, dict) and METADATA_KEY in content else None


def _checked(metadata: object) -> dict[str, Any]:
    if not isinstance(metadata, dict):
        raise ValueError("no object")
    return metadata
