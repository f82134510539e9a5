"""The images and videos that a command is given: files, and folders of images with or without captions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import is_folder, is_regular
from mlx_starflow.media.formats import ANIMATIONS, MOVIES
from mlx_starflow.media.pixels import UnreadableImage, decode_image, decode_with_transparency, no_remarks
from mlx_starflow.media.sources import Skip, open_source, skip_report
from mlx_starflow.media.sources.folders import METADATA, SPLITS, Listing, list_images
from mlx_starflow.media.sources.hub import SAVED
from mlx_starflow.media.sources.inside import read_inside

VIDEOS = (*MOVIES, ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
"""How names of videos end, in lower case; animations can be images too."""


@dataclass(frozen=True)
class ImageFile:
    """An image, or a video, that has not been read yet.

    Attributes:
        name: its path as the user gave it, or the folder and its name there.
        caption: the usual one; "" if it has none.
        read: gives the bytes of its file.
        path: of that file, if it is one that the user named.
    """

    name: str
    caption: str
    read: Callable[[], bytes]
    path: Path | None = None

    @property
    def is_video(self) -> bool:
        """Whether it is a video, or an animation, in a file that the user named."""
        return self.path is not None and is_video_file(self.path)

    def open(self, *, transparency: bool = False) -> Image.Image:
        """The image: RGB, upright, transparency on white or, if asked for, as `pixels.visible_picture` has it.

        Raises StarflowError.
        """
        if Path(self.name).suffix.lower() in VIDEOS:
            raise StarflowError(
                f"{self.name} is a video, and this takes pictures: score, classify and encode take videos, with a "
                "model that makes videos"
            )
        try:
            with no_remarks():
                return (decode_with_transparency if transparency else decode_image)(self.read())
        except (OSError, ValueError, UnreadableImage) as error:  # a name that is none is a ValueError
            raise StarflowError(f"cannot read the picture {self.name}: {one_line(error)}") from None


def is_video_file(path: Path) -> bool:
    """Whether a file is a video, or an animation."""
    if path.suffix.lower() not in (*VIDEOS, *ANIMATIONS):
        return False
    if path.suffix.lower() in VIDEOS:
        return True
    try:
        with no_remarks(), Image.open(path) as opened:
            return getattr(opened, "n_frames", 1) > 1
    except Exception:  # reading it will tell what is wrong with it
        return False


def find_images(paths: Iterable[str | Path], split: str | None = None) -> list[ImageFile]:
    """Images in files and folders, in the order given; folders are read as `media.sources.open_source` does.

    Args:
        split: keep only those of folders whose metadata has this `split` ("train" where it has none).

    A folder that holds nothing but images is taken too.

    Raises:
        StarflowError: there is no such file or folder, or no image at all.
    """
    found: list[ImageFile] = []
    for path in map(Path, paths):
        if is_folder(path):
            found += _in_folder(path, split)
        elif is_regular(path):
            found.append(ImageFile(str(path), "", partial(read_inside, path, None), path))
        else:
            raise StarflowError(f"{path} does not exist: give pictures, or folders of pictures")
    if not found:
        of = f" of the split {split!r}" if split else ""
        raise StarflowError(f"there are no pictures{of}: give picture files, or folders of pictures")
    return found


def _in_folder(folder: Path, split: str | None) -> Iterator[ImageFile]:
    if images := _uncaptioned(folder):
        if images.skips:
            warnings.warn(f"{folder}: {skip_report(images.skips)}", stacklevel=2)
        for name in images.names:
            if split in (None, SPLITS.get(name.partition("/")[0].lower(), "train")):
                yield ImageFile(str(folder / name), "", partial(images.read, name))
        return
    skips: list[Skip] = []
    for sample in open_source(folder):
        if isinstance(sample, Skip):
            skips.append(sample)
        elif split in (None, sample.split):
            yield ImageFile(str(folder / sample.key), sample.captions[0] if sample.captions else "", sample.read)
    if skips:
        warnings.warn(f"{folder}: {skip_report(skips)}", stacklevel=2)


def _uncaptioned(folder: Path) -> Listing | None:
    """The images of a folder that is no training data: there is nothing in it that could hold a caption."""
    special = (*METADATA, *SAVED)
    try:
        if any(path.suffix == ".tar" or path.name in special for path in folder.iterdir()):
            return None
    except OSError as error:
        raise StarflowError(f"cannot read {folder}: {one_line(error)}") from None
    images = list_images(folder)
    if any(map(images.has_text, images.names)) or any(is_regular(folder / name) for name in _metadata(images.names)):
        return None
    # Folders that are splits are no classes.
    paths = [name.split("/") for name in images.names]
    return None if all(len(path) > (2 if path[0].lower() in SPLITS else 1) for path in paths) else images


def _metadata(names: Iterable[str]) -> set[str]:
    """Where metadata of the folders in a folder would be."""
    folders = {name.partition("/")[0] for name in names if "/" in name}
    return {f"{folder}/{name}" for folder in folders for name in METADATA}


def read_image(path: Path, *, transparency: bool = False) -> Image.Image:
    """One image file, as `ImageFile.open` gives it. Raises StarflowError."""
    return ImageFile(str(path), "", partial(read_inside, path, None)).open(transparency=transparency)
