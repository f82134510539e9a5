"""Whether a training may write where it is told to: what is found out before the first step."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import exists, inside, read_json, read_text, replacing
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.training.loop.checkpoint import checkpoint_files

CLAIM = "training/model.txt"
"""In a training's output, the fingerprint of the model there that an earlier run wrote."""


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

    A model that is there must be of an earlier run of the same training: there are checkpoints of its flow or, where a
    run that started again has thrown them away, what `claim_model` wrote.
    """
    check_run_folder(out)
    if not (out / "config.json").exists():
        return
    found = read_json(out / "config.json").get("model_type")
    if found != model_type or not (checkpoint_files(out / "training/flow") or _is_claimed(out)):
        kind = "" if found == model_type else f" ({found!r}, not {model_type!r})"
        raise StarflowError(f"{out} holds another model{kind}; give another folder")


def claim_model(out: Path) -> None:
    """Write down that the model in `out`, if there is one, is this training's, before checkpoints are thrown away.

    Call it after `check_model_output`.
    """
    with suppress(StarflowError):  # a damaged model is nobody's
        mark = fingerprint(out)
        with replacing(out / CLAIM, makes_folder=True) as temporary:
            temporary.write_text(mark + "\n", encoding="utf-8")


def _is_claimed(out: Path) -> bool:
    try:
        return exists(out / CLAIM) and read_text(inside(out, CLAIM)).strip() == fingerprint(out)
    except StarflowError:
        return False
