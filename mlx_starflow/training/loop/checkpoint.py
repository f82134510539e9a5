"""Checkpoints of a training: one file each, written to a temporary name and renamed; the last two are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import exists, is_folder, is_regular, parse_json, replacing
from mlx_starflow.training.loop.identity import Identity, check_identity
from mlx_starflow.training.loop.weights import Weights

KEPT = 2
_NAME = re.compile(r"checkpoint-(\d+)\.safetensors")


@dataclass
class Checkpoint:
    """All that continuing needs.

    Attributes:
        step: steps done.
        weights, average, optimizer: arrays by name.
        random: the state of the NumPy generator's bit generator.
        order: numbers of the samples that this pass over the data has still to use.
        config: the training's settings, for comparison.
        note: what else the training must remember, a JSON object.
    """

    step: int
    weights: Weights
    average: Weights
    optimizer: Weights
    random: Mapping[str, Any]
    order: np.ndarray
    config: dict[str, Any]
    note: dict[str, Any] = field(default_factory=dict)


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    if not is_folder(folder):
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def clean(folder: Path) -> None:
    """Delete what a killed process had begun to write there: no other process may be at work in it."""
    for path in folder.glob("partial-*.safetensors"):
        path.unlink(missing_ok=True)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/checkpoint-<step>.safetensors` and delete all but the newest two.

    Raises:
        StarflowError: the folder cannot be written to.
    """
    arrays = {"order": mx.array(checkpoint.order)}
    for part in ("weights", "average", "optimizer"):
        arrays.update({f"{part}:{name}": array for name, array in getattr(checkpoint, part).items()})
    note = {"step": checkpoint.step, "random": plain_state(checkpoint.random), "config": checkpoint.config}
    note["note"] = checkpoint.note
    path = folder / f"checkpoint-{checkpoint.step:08d}.safetensors"
    write_arrays(path, arrays, {"training": json.dumps(note)})
    for old in checkpoint_files(folder)[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def write_arrays(path: Path, arrays: Weights, metadata: dict[str, str]) -> None:
    """Write a safetensors file in one piece: what was there stays until the new one has reached the disk.

    Raises:
        StarflowError: the folder cannot be written to, or the disk is full.
    """
    failure = f"cannot write the checkpoint {path}"
    advice = "; make room or choose another folder (checkpoints written before are intact)"
    with replacing(
        path, failure=failure, advice=advice, makes_folder=True, overwrites_partial=True, sync=True
    ) as temporary:
        try:
            mx.save_safetensors(str(temporary), arrays, metadata)
        except RuntimeError as error:
            raise OSError(one_line(error)) from None


def read_arrays(path: Path) -> Weights:
    """The arrays of a safetensors file, read whole."""
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    return arrays


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        StarflowError: the file is missing, truncated or no checkpoint.
    """
    parts: dict[str, Weights] = {"weights": {}, "average": {}, "optimizer": {}}
    if exists(path) and not is_regular(path):
        raise StarflowError(f"the checkpoint {path} is not a regular file")
    try:
        # safetensors compares the header with the file's length, which MLX's lazy loading does not.
        note = _read_note(path)
        arrays = read_arrays(path)
        order = np.array(arrays.pop("order"))
        for name, array in arrays.items():
            part, _, name = name.partition(":")
            parts[part][name] = array
        if order.dtype.kind not in "iu" or order.ndim != 1:
            raise ValueError("its order is not a training's")
        return Checkpoint(
            note["step"], **parts, random=note["random"], order=order, config=note["config"], note=note.get("note", {})
        )
    except (OSError, RuntimeError, SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise StarflowError(
            f"the checkpoint {path} is damaged or not of this program ({one_line(error, first=True)}); "
            "delete it to use the one before"
        ) from None


def check_resume(folder: Path, identity: Identity, seed: int) -> None:
    """Raise StarflowError, naming what differs, if a run would go on from a checkpoint of another one."""
    if found := _newest_note(folder):
        check_same_run(folder, found["config"], found.get("note", {}), identity, seed)


def check_same_run(
    folder: Path, config: Mapping[str, Any], note: Mapping[str, Any], identity: Identity, seed: int
) -> None:
    """`check_resume` for a checkpoint's `config` and `note`."""
    was = config.get("seed", seed)
    more = f"seed {was} -> {seed}" if was != seed else ""
    check_identity(note.get("identity", {}), identity, f"the checkpoint in {folder}", more)


def is_anonymous(folder: Path) -> bool:
    """Whether a folder's newest checkpoint does not say what it is of, as it is of an older version."""
    found = _newest_note(folder)
    return found is not None and "identity" not in found.get("note", {})


def _newest_note(folder: Path) -> dict[str, Any] | None:
    """What the newest checkpoint says, arrays aside; None if none can be read."""
    for path in checkpoint_files(folder):
        with suppress(OSError, RuntimeError, SafetensorError, KeyError, ValueError):
            return _read_note(path)
    return None


def _read_note(path: Path) -> dict[str, Any]:
    """What a checkpoint says, arrays aside. Raises ValueError, or what reading raises, if that is no training's."""
    with safe_open(path, framework="np") as file:
        note = parse_json((file.metadata() or {})["training"])
    kinds = {"step": int, "random": dict, "config": dict}
    good = isinstance(note, dict) and all(isinstance(note[key], kind) for key, kind in kinds.items())
    about = note.get("note", {}) if good else None
    if not isinstance(about, dict) or not isinstance(about.get("identity", {}), dict) or note["step"] < 0:
        raise ValueError("its note is not a training's")
    return note


def load_latest(folder: Path) -> tuple[Checkpoint | None, str]:
    """The newest checkpoint that can be read, None if there is none, and a warning about newer, damaged ones.

    Raises:
        StarflowError: there are checkpoints, and all of them are damaged.
    """
    warning = ""
    for path in (files := checkpoint_files(folder)):
        try:
            return load_checkpoint(path), warning
        except StarflowError as error:
            warning = warning or str(error)
            if path == files[-1]:
                raise
    return None, ""


def plain_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A bit generator's state with lists in place of arrays; NumPy takes both."""
    return json.loads(json.dumps(state, default=lambda value: value.tolist()))
