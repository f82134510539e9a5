"""What an evaluation has computed, part by part on disk, so that one that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.files import exists, inside, is_regular, parse_json, read_json, replacing

SETTINGS_FILE = "evaluation.json"

VERSION = 1


@dataclass(frozen=True)
class Part:
    """Arrays by name, and what else there is to say, as JSON has it."""

    arrays: Mapping[str, np.ndarray]
    notes: Mapping[str, Any] = field(default_factory=dict)


class Store:
    """Parts of an evaluation in a folder; without one, nothing is kept.

    Each part is a file that appears when it is whole, and says what it was computed of: of anything else, or where it
    is damaged, it is computed again.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]):
        """`settings`: what all parts have in common, as JSON has it.

        Raises:
            StarflowError: the folder holds an evaluation with other settings, or cannot be written.
        """
        self._folder = folder
        if folder is None:
            return
        settings = {"version": VERSION, **json.loads(json.dumps(settings))}
        path = folder / SETTINGS_FILE
        if exists(path):
            before = read_json(inside(folder, SETTINGS_FILE))
            for name, value in settings.items():
                if (kept := before.get(name)) != value:
                    raise StarflowError(
                        f"{folder} holds an evaluation with another {name}: {_short(kept)} there, {_short(value)} "
                        "here; give another folder, or delete it"
                    )
            return
        with replacing(path, makes_folder=True, sync=True) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")

    def keep(self, name: str, about: Any, compute: Callable[[], Part]) -> Part:
        """The part of this name, as it was kept if it was computed of the same, `about`, as JSON has it."""
        if self._folder is None:
            return compute()
        path = self._folder / f"{name}.safetensors"
        mark = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        found = _read(path, mark)
        if found is not None:
            return found
        part = compute()
        arrays = {key: np.ascontiguousarray(value) for key, value in part.arrays.items()}
        with replacing(path, sync=True) as temporary:
            save_file(arrays, temporary, metadata={"about": mark, "notes": json.dumps(part.notes)})
        return part


def _read(path: Path, mark: str) -> Part | None:
    if not is_regular(path):
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            described = file.metadata() or {}
            if described.get("about") != mark:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Part(arrays, parse_json(described["notes"]))
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
