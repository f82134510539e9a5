"""From a model's name to its directory: the embedded demo, a local folder, a converted release, or a Hub repository."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from mlx_starflow.errors import StarflowError, one_line

DEMO = Path(__file__).parents[1] / "demo" / "model"

CACHE_VARIABLE = "MLX_STARFLOW_CACHE"
"""Environment variable that names the folder of converted releases; `~/.cache/mlx-starflow` without it."""

_OFFICIAL = ("apple/starflow", "apple/starflow-v")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_FILES = ["*.json", "*.safetensors", "*spiece.model"]
_CHECKPOINTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def find_model(name: str | Path) -> Path:
    """The directory of a model, downloaded if need be.

    Args:
        name: "demo"; else a folder, if there is one of this name; else a Hugging Face repository, owner/name: what
            `mlx-starflow convert` made of it (see `converted_directory`), or else its own `.json` and `.safetensors`
            files and `spiece.model`, which are fetched into Hugging Face's cache.

    Raises:
        StarflowError: there is no such model, it cannot be downloaded, or it is a checkpoint to be converted first.
    """
    text, path = str(name), Path(name).expanduser()
    if text == "demo":
        if not (DEMO / "config.json").is_file():
            raise StarflowError(
                "the demo model is not in this installation; install mlx-starflow again from a clone: pip install ."
            )
        return DEMO
    if text and path.is_dir():
        return path
    if text and path.exists():
        fix = "give the folder of a model"
        if path.suffix in _CHECKPOINTS:
            fix = f"convert it first: mlx-starflow convert flow {text} --config YAML -o DIR"
        raise StarflowError(f"{text} is a file, not a model directory; {fix}")
    if isinstance(name, Path) or not is_repository(text):
        raise StarflowError(
            f"unknown model {text!r}: give demo, the folder of a model, or a Hugging Face repository (owner/name)"
        )
    converted = converted_directory(text)
    if (converted / "config.json").is_file():
        return converted
    if text.lower() in _OFFICIAL:
        raise StarflowError(
            f"{text} holds PyTorch checkpoints; download and convert them once with: mlx-starflow convert {text} "
            "(--quantize 8 makes a quarter of the size)"
        )
    return fetch(text, _FILES, note=" (there is no folder of that name)")


def is_repository(name: str) -> bool:
    """Whether this could be a repository on the Hub, owner/name."""
    return _REPOSITORY.fullmatch(name) is not None and not name.startswith(".")


def converted_directory(repository: str) -> Path:
    """Where a converted release is kept, and found again by its repository's name."""
    cache = os.environ.get(CACHE_VARIABLE) or "~/.cache/mlx-starflow"
    return Path(cache).expanduser() / repository.lower().replace("/", "--")


def fetch(repository: str, patterns: Sequence[str], *, revision: str | None = None, note: str = "") -> Path:
    """Download a repository's files into Hugging Face's cache.

    When a connection breaks, the download goes on where it stopped. Files that are complete are not downloaded again.

    Args:
        repository: owner/name.
        patterns: which files, as shell patterns; one that matches nothing is not an error.
        revision: a commit; None: the newest or, offline, the newest that is in the cache.
        note: what an error message adds to the repository's name.

    Returns:
        The folder of the commit, whose name is the commit's.

    Raises:
        StarflowError: they cannot be downloaded, and are not all in the cache.
    """
    # Here, since importing it costs more than everything else that a local model needs.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
    except RepositoryNotFoundError:
        reason = "the Hub has no such repository, or it needs a login (hf auth login)"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = "the Hub cannot be reached and the model is not in the cache; check the connection and HF_HUB_OFFLINE"
    except Exception as error:  # the HTTP library's own exceptions, which differ between versions
        reason = one_line(error, first=True) + "; files that are complete are kept, so try again"
    raise StarflowError(f"cannot download {repository}{note}: {reason}")
