"""What kind of training data a path or name is."""

from __future__ import annotations

from pathlib import Path

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.sources.folders import (
    METADATA,
    SPLITS,
    ClassFolder,
    Listing,
    MetadataFolder,
    Parts,
    RepeatedFolders,
    TextFolder,
    WithCaption,
    folder_repeats,
    list_images,
)
from mlx_starflow.media.sources.hub import PREFIX, SAVED, HubDataset
from mlx_starflow.media.sources.inside import leads_out
from mlx_starflow.media.sources.sample import Source, clean, skip_report
from mlx_starflow.media.sources.shards import Shards

KINDS = (
    "metadata.jsonl, metadata.csv, .tar shards, a saved data set, "
    "pictures with .txt files beside them, folders such as 10_name, folders of classes"
)


def open_source(data: str | Path, caption_column: str | None = None, caption: str | None = None) -> Source:
    """Training data by what it is.

    Args:
        data: the first of these that fits:
            `hf:NAME` or `hf:NAME:SPLIT`, a data set on the Hugging Face Hub;
            a `metadata.jsonl`, `metadata.csv` or `.tar` file, or a folder with the first or second, or with the third;
            a folder that `datasets` saved to disk;
            a folder whose folders have metadata or shards, or are called "train" and "test" (see `SPLITS`): each of
            them is data of its own, and its name is the split;
            a folder whose images are all in folders `10_name`: each counts 10 times, see `RepeatedFolders`;
            a folder of images, its own and those of folders in it, some of which have a `.txt` file beside them;
            a folder whose images are all in folders: these are classes.
        caption_column: the field of metadata that holds the caption, instead of `CAPTION_FIELDS`.
        caption: of images that have none; folders are no classes then.

    Raises:
        StarflowError: there is no training data, or its metadata is broken.
    """
    if caption is not None:
        if not (text := clean(caption)):
            raise StarflowError("the caption is empty: write what the pictures show, such as 'a photo of rex the dog'")
        return WithCaption(_open(data, caption_column, True), text)
    return _open(data, caption_column, False)


def _open(data: str | Path, caption_column: str | None, captioned: bool) -> Source:
    """The data; `captioned`: images need no captions of their own."""
    if str(data).startswith(PREFIX):
        return HubDataset.load(str(data), caption_column)
    try:
        path = Path(data).expanduser()
        if path.is_dir():
            return _in_folder(path, path, caption_column, captioned)
        if not path.is_file():
            what = "is neither a folder nor a regular file" if path.exists() else "does not exist"
            raise StarflowError(f"{path} {what}; give a folder of pictures with captions, or hf:NAME")
    except (OSError, RuntimeError) as error:  # a name that is too long, no permission, no such home
        raise StarflowError(f"cannot read {data}: {one_line(error)}") from None
    if path.name in METADATA:
        return MetadataFolder(path, caption_column)
    if path.suffix == ".tar":
        return Shards([path], caption_column)
    raise StarflowError(f"{path} is no training data: give a folder, a metadata.jsonl, a metadata.csv or a .tar file")


def _in_folder(path: Path, root: Path, caption_column: str | None, captioned: bool) -> Source:
    """The data of a folder; nothing is read outside of `root`, which is the folder or one that it is in."""
    for name in METADATA:
        if (path / name).is_file():
            return MetadataFolder(path / name, caption_column, root)
    if any((path / name).is_file() for name in SAVED):
        return HubDataset.open(path, caption_column)
    if shards := _shards(path, root):
        return Shards(shards, caption_column)
    images = list_images(path, root)
    if parts := _parts(path, images):
        opened = {name: _in_folder(path / name, root, caption_column, captioned) for name in parts}
        return Parts(opened, [skip for skip in images.skips if "/" not in skip.key])
    if not images.names:
        skipped = f"; {skip_report(images.skips)}" if images.skips else ""
        raise StarflowError(f"{path} holds no training data: looked for {KINDS}{skipped}")
    if caption_column is not None:
        raise StarflowError(f"{path} has no metadata with a field {caption_column!r}: leave out the caption column")
    if folder_repeats(images.names):
        return RepeatedFolders(images)
    if captioned or any(map(images.has_text, images.names)):
        return TextFolder(images)
    if all("/" in name for name in images.names):
        return ClassFolder(images)
    raise StarflowError(
        f"{path} has {len(images.names)} pictures but no captions: give one for all of them (--caption), put a .txt "
        'file beside each, or write a metadata.jsonl with a line {"file_name": ..., "text": ...} for each'
    )


def _shards(path: Path, root: Path) -> list[Path]:
    shards = sorted(p for p in path.iterdir() if p.suffix == ".tar" and not p.name.startswith(".") and p.is_file())
    for shard in shards:
        if leads_out(shard, root):
            raise StarflowError(f"{shard} is a link that leads out of {root}: give the folder that it leads to")
    return shards


def _parts(path: Path, images: Listing) -> list[str]:
    """Names of the folders in a folder that are sources of their own; none, if it is one source.

    They are if one of them has metadata or shards, or if they are the splits of a data set.
    """
    linked = {skip.key for skip in images.skips}
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in linked)
    described = [
        folder.name
        for folder in folders
        if any((folder / name).is_file() for name in (*METADATA, *SAVED))
        or any(p.suffix == ".tar" and p.is_file() for p in folder.iterdir())
    ]
    pictured = dict.fromkeys(name.partition("/")[0] for name in images.names if "/" in name)
    if not described:
        splits = [SPLITS.get(name.lower()) for name in pictured]
        return list(pictured) if None not in splits and "train" in splits and len(splits) > 1 else []
    if loose := next((name for name in images.names if "/" not in name), None):
        raise StarflowError(
            f"{path} has pictures ({loose}) beside folders with metadata ({described[0]}): "
            "give one of these folders, or put the pictures into one"
        )
    return sorted({*described, *pictured})
