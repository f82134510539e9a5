"""Whether a training may write where it is told to: what is found out before the first step."""

from __future__ import annotations

import os
from pathlib import Path

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import read_json
from mlx_starflow.training.loop.checkpoint import checkpoint_files


def check_run_folder(out: Path) -> None:
    """Raise StarflowError unless a folder can be made, or written to, at `out`."""
    there = out
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            raise StarflowError(f"{out} cannot be written: {there} is a file; give a folder")
    except OSError as error:  # a name that is too long, no permission
        raise StarflowError(f"{out} cannot be written: {one_line(error)}") from None
    if not os.access(there, os.W_OK | os.X_OK):
        raise StarflowError(f"{out} cannot be written: there is no permission to write to {there}")


def check_model_output(out: Path, model_type: str) -> None:
    """Raise StarflowError unless a training may write its model to `out`, checkpoints and logs to `out/training`.

    A model that is there must be of an earlier run of the same training.
    """
    check_run_folder(out)
    if not (out / "config.json").exists():
        return
    found = read_json(out / "config.json").get("model_type")
    if found != model_type or not checkpoint_files(out / "training/flow"):
        kind = "" if found == model_type else f" ({found!r}, not {model_type!r})"
        raise StarflowError(f"{out} holds another model{kind}; give another folder")
