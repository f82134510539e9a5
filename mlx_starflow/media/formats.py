"""How images and videos on disk are named and described: suffixes, and the key of what says how one was made."""

FORMATS = (".png", ".jpg", ".jpeg", ".webp")
"""Suffixes of images that are written."""

ANIMATIONS = (".gif", ".webp")
"""Suffixes of several images in one file that need no PyAV."""

MOVIES = (".mp4", ".mov", ".m4v")
"""Suffixes of videos that are written, by PyAV."""

METADATA_KEY = "mlx-starflow"
"""What an image's or a video's description is filed under."""

UNDESCRIBED = "{} does not say how it was made: it was not written by mlx-starflow with --metadata"
"""The message, with the path to fill in."""
