"""From a model's name to its directory: the embedded demo, a local folder, a converted release, or a Hub repository."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import exists, expanded, is_folder, is_regular
from mlx_starflow.model_dir.transaction import settle

DEMO = Path(__file__).parents[1] / "demo" / "model"

OWN_STUDENT = "student"
"""The folder, inside a model's, of a student that comes with it."""

CACHE_VARIABLE = "MLX_STARFLOW_CACHE"
"""Environment variable that names the folder of converted releases; `~/.cache/mlx-starflow` without it."""

_OFFICIAL = ("apple/starflow", "apple/starflow-v")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)/((?:[\w-][\w.-]*/)*[\w-][\w.-]*)", re.ASCII)
_FILES = ["*.json", "*.safetensors", "*spiece.model", "classes.txt", "LICEN[CS]E*", "NOTICE*"]
# `files.CLASSES_FILE` by its name: what `--help` imports loads neither MLX nor NumPy.
_CHECKPOINTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def find_model(name: str | Path, *, download: bool = True) -> Path:
    """The directory of a model, downloaded if need be.

    Args:
        name: "demo"; else a folder, if there is one of this name; else a Hugging Face repository, owner/name: what
            `mlx-starflow convert` made of it (see `converted_directory`), or else its own `.json` and `.safetensors`
            files, `spiece.model`, classes and licences, which are fetched into Hugging Face's cache.
        download: False: of a repository only what is in that cache already.

    Raises:
        StarflowError: there is no such model, it cannot or must not be downloaded, or it is a checkpoint to be
            converted first.
    """
    text, path = str(name), expanded(name)
    if text == "demo":
        if not (DEMO / "config.json").is_file():
            raise StarflowError(
                "the demo model is not in this installation; install mlx-starflow again from a clone: pip install ."
            )
        return DEMO
    if text and is_folder(path):
        return path
    if text and exists(path):
        fix = "give the folder of a model"
        if path.suffix in _CHECKPOINTS:
            fix = f"convert it first: mlx-starflow convert flow {text} --config YAML -o DIR"
        raise StarflowError(f"{text} is a file, not a model directory; {fix}")
    if isinstance(name, Path) or not is_repository(text):
        raise StarflowError(
            f"unknown model {text!r}: give demo, the folder of a model, or a Hugging Face repository (owner/name)"
        )
    converted = None
    with suppress(StarflowError):  # without a home folder nothing has been converted there
        converted = converted_directory(text)
    if converted is not None:
        settle(converted)
        if is_regular(converted / "config.json"):
            return converted
    if text.lower() in _OFFICIAL:
        raise StarflowError(
            f"{text} holds PyTorch checkpoints; download and convert them once with: mlx-starflow convert {text} "
            "(--quantize 8 makes a quarter of the size)"
        )
    return fetch(text, _FILES, note=" (there is no folder of that name)", download=download)


def find_student(name: str | Path) -> Path:
    """The folder of a student, which may not be there: the folder of this name or, where a model on this machine is
    called so (see `find_model`) and has a student of its own, its `student`."""
    folder = expanded(name)
    with suppress(StarflowError):  # no model is called so
        folder = find_model(str(name), download=False)
    own = folder / OWN_STUDENT
    return own if is_regular(own / "config.json") else folder


def is_repository(name: str) -> bool:
    """Whether this could be a repository on the Hub, owner/name."""
    return _REPOSITORY.fullmatch(name) is not None and not name.startswith(".")


def hub_file(name: str | Path) -> tuple[str, str] | None:
    """(repository, file in it) where a checkpoint's name, owner/name/file, means one on the Hub; else None.

    What is on this machine wins: where there is such a file, or a folder called as the owner, it is a path.
    """
    found = _HUB_FILE.fullmatch(str(name))
    if found is None or not str(name).endswith(_CHECKPOINTS):
        return None
    if exists(Path(name)) or exists(Path(Path(name).parts[0])):
        return None
    return found[1], found[2]


def find_checkpoint(name: str | Path) -> Path:
    """A checkpoint's path: its own or, of a file on the Hub (see `hub_file`), where that is downloaded to.

    Raises:
        StarflowError: it cannot be downloaded.
    """
    if (found := hub_file(name)) is None:
        return Path(name)
    repository, file = found
    path = fetch(repository, [file], note=f" (there is no file {name} here)") / file
    if not is_regular(path):
        raise StarflowError(f"{repository} on the Hub has no file {file}, and there is no file {name} here")
    return path


def converted_directory(repository: str) -> Path:
    """Where a converted release is kept, and found again by its repository's name.

    Raises:
        StarflowError: the user has no home folder, and the environment variable names none either.
    """
    return _cache() / repository.lower().replace("/", "--")


def upscaler_folder() -> Path:
    """Where files of upscalers are looked for: `upscalers` in the folder of converted releases.

    Raises:
        StarflowError: as `converted_directory`.
    """
    return _cache() / "upscalers"


def _cache() -> Path:
    return expanded(os.environ.get(CACHE_VARIABLE) or "~/.cache/mlx-starflow")


def fetch(
    repository: str, patterns: Sequence[str], *, revision: str | None = None, note: str = "", download: bool = True
) -> Path:
    """Download a repository's files into Hugging Face's cache.

    When a connection breaks, the download goes on where it stopped. Files that are complete are not downloaded again.

    Args:
        repository: owner/name.
        patterns: which files, as shell patterns; one that matches nothing is not an error.
        revision: a commit; None: the newest or, offline, the newest that is in the cache.
        note: what an error message adds to the repository's name.
        download: False: nothing is, and the Hub is not asked; what is in the cache is taken.

    Returns:
        The folder of the commit, whose name is the commit's.

    Raises:
        StarflowError: they cannot be downloaded, and are not all in the cache.
    """
    # Here, since importing it costs more than everything else that a local model needs.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    options: dict[str, Any] = {"revision": revision} if revision else {}
    if not download:
        options["local_files_only"] = True
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), **options))
    except RepositoryNotFoundError:
        reason = "the Hub has no such repository, or it needs a login (hf auth login)"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        if not download:
            raise StarflowError(f"{repository} is not on this machine") from None
        reason = "the Hub cannot be reached and the model is not in the cache; check the connection and HF_HUB_OFFLINE"
    except Exception as error:  # the HTTP library's own exceptions, which differ between versions
        reason = one_line(error, first=True) + "; files that are complete are kept, so try again"
    raise StarflowError(f"cannot download {repository}{note}: {reason}")
