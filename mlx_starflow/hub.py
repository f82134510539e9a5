"""From a model's name to its directory: the embedded demo, a local folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_starflow.errors import StarflowError

DEMO = Path(__file__).parent / "demo" / "model"

_OFFICIAL = "apple/starflow"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_FILES = ["*.json", "*.safetensors", "*spiece.model"]
_CHECKPOINTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def find_model(name: str | Path) -> Path:
    """The directory of a model, downloaded if need be.

    Args:
        name: "demo"; else a folder, if there is one of this name; else a Hugging Face repository, owner/name, whose
            `.json` and `.safetensors` files and `spiece.model` are fetched into Hugging Face's cache.

    Raises:
        StarflowError: there is no such model, it cannot be downloaded, or it is a checkpoint to be converted first.
    """
    text, path = str(name), Path(name).expanduser()
    if text == "demo":
        if not (DEMO / "config.json").is_file():
            raise StarflowError(
                "the demo model is not in this installation; install a release: pip install mlx-starflow"
            )
        return DEMO
    if text and path.is_dir():
        return path
    if text and path.exists():
        fix = "give the folder of a model"
        if path.suffix in _CHECKPOINTS:
            fix = f"convert it first: mlx-starflow convert flow {text} --config YAML -o DIR"
        raise StarflowError(f"{text} is a file, not a model directory; {fix}")
    if text.lower() == _OFFICIAL:
        raise StarflowError(
            f"{text} holds PyTorch checkpoints; download one, and its YAML from github.com/apple/ml-starflow, then: "
            "mlx-starflow convert flow starflow_3B_t2i_256x256.pth --config starflow_3B_t2i_256x256.yaml -o DIR"
        )
    if isinstance(name, Path) or not _REPOSITORY.fullmatch(text) or text.startswith("."):
        raise StarflowError(
            f"unknown model {text!r}: give demo, the folder of a model, or a Hugging Face repository (owner/name)"
        )
    return _download(text)


def _download(repository: str) -> Path:
    # Here, since importing it costs more than everything else that a local model needs.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=_FILES))
    except RepositoryNotFoundError:
        reason = "the Hub has no such repository, or it needs a login (hf auth login)"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = "the Hub cannot be reached and the model is not in the cache; check the connection and HF_HUB_OFFLINE"
    except Exception as error:  # the HTTP library's own exceptions, which differ between versions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise StarflowError(f"cannot download {repository} (there is no folder of that name): {reason}")
