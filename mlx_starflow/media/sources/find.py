"""What kind of training data a path or name is."""

from __future__ import annotations

from pathlib import Path

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.sources.folders import METADATA, ClassFolder, MetadataFolder, TextFolder, list_images
from mlx_starflow.media.sources.hub import PREFIX, SAVED, HubDataset
from mlx_starflow.media.sources.sample import Source
from mlx_starflow.media.sources.shards import Shards

KINDS = (
    "metadata.jsonl, metadata.csv, .tar shards, a saved data set, "
    "pictures with .txt files beside them, folders of classes"
)


def open_source(data: str | Path, caption_column: str | None = None) -> Source:
    """Training data by what it is.

    Args:
        data: the first of these that fits:
            `hf:NAME` or `hf:NAME:SPLIT`, a data set on the Hugging Face Hub;
            a `metadata.jsonl`, `metadata.csv` or `.tar` file, or a folder with the first or second, or with the third;
            a folder that `datasets` saved to disk;
            a folder of images, its own and those of folders in it, some of which have a `.txt` file beside them;
            a folder whose images are all in folders: these are classes.
        caption_column: the field of metadata that holds the caption, instead of `CAPTION_FIELDS`.

    Raises:
        StarflowError: there is no training data, or its metadata is broken.
    """
    if str(data).startswith(PREFIX):
        return HubDataset.load(str(data), caption_column)
    path = Path(data).expanduser()
    if path.is_file():
        if path.name in METADATA:
            return MetadataFolder(path, caption_column)
        if path.suffix == ".tar":
            return Shards([path], caption_column)
        raise StarflowError(
            f"{path} is no training data: give a folder, a metadata.jsonl, a metadata.csv or a .tar file"
        )
    if not path.is_dir():
        raise StarflowError(f"{path} does not exist; give a folder of pictures with captions, or hf:NAME")
    for name in METADATA:
        if (path / name).is_file():
            return MetadataFolder(path / name, caption_column)
    if any((path / name).is_file() for name in SAVED):
        return HubDataset.open(path, caption_column)
    shards = sorted(p for p in path.iterdir() if p.suffix == ".tar" and not p.name.startswith(".") and p.is_file())
    if shards:
        return Shards(shards, caption_column)
    images = list_images(path)
    if not images:
        raise StarflowError(f"{path} holds no training data: looked for {KINDS}")
    if any((path / name).with_suffix(".txt").is_file() for name in images):
        return TextFolder(path, images)
    if all("/" in name for name in images):
        return ClassFolder(path, images)
    raise StarflowError(
        f"{path} has {len(images)} pictures but no captions: put a .txt file beside each of them, or write a "
        'metadata.jsonl with a line {"file_name": ..., "text": ...} for each'
    )
