"""Pairs on disk: shards of a fixed number of them in half precision, each written whole, so that making them resumes.

`pairs.json` says what they are pairs of; shards beside it count as soon as they have their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import exists, inside, is_folder, read_json, replacing
from mlx_starflow.training.data.pairs.compute import Pairs

FORMAT = 1
MANIFEST = "pairs.json"
SHARD = 128
"""Pairs in a file."""

_NAME = re.compile(r"pairs-(\d{6})\.safetensors")
_MARK = "pairs"


class PairFolder:
    """A folder of pairs, numbered from 0.

    Args:
        folder: made if need be.
        identity: what they are pairs of: plain values by name. Pairs of anything else that are there are refused.
        grid: rows and columns of their tokens.
        resume: False: what is in the folder is thrown away.

    Raises:
        StarflowError: the folder holds other pairs or other files, or cannot be written to; also from every method.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], grid: tuple[int, int], *, resume: bool = True):
        self.folder = folder
        self._content = {"format": FORMAT, "grid": list(grid), "identity": json.loads(json.dumps(identity))}
        self._open: dict[int, Any] = {}
        found = read_json(inside(folder, MANIFEST)) if exists(folder / MANIFEST) else None
        if found is None and is_folder(folder):
            others = [path.name for path in folder.iterdir() if not path.name.startswith((".", "partial-"))]
            if others:
                raise StarflowError(f"{folder} holds other files ({min(others)}); give a new or an empty folder")
        if found is not None and resume and found != self._content:
            raise StarflowError(f"{folder} holds pairs of {self._difference(found)}: --no-resume makes them again")
        if found is not None and not resume:
            for number in self.numbers():
                self._path(number).unlink(missing_ok=True)
        if found is None or not resume:
            with replacing(folder / MANIFEST, makes_folder=True, sync=True) as temporary:
                temporary.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def found(cls, folder: Path) -> PairFolder:
        """The pairs that are in a folder, whatever they are of. Raises StarflowError if there are none."""
        content = read_json(inside(folder, MANIFEST)) if exists(folder / MANIFEST) else None
        match content:
            case {"format": found, "identity": dict() as identity, "grid": [int() as rows, int() as columns]} if (
                found == FORMAT
            ):
                return cls(folder, identity, (rows, columns))
        raise StarflowError(f"{folder} has no pairs: make some with mlx-starflow distill")

    @property
    def identity(self) -> Mapping[str, Any]:
        """What they are pairs of."""
        return self._content["identity"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of their tokens."""
        rows, columns = self._content["grid"]
        return rows, columns

    def _difference(self, found: Mapping[str, Any]) -> str:
        was, now = found.get("identity"), self._content["identity"]
        if found.get("format") != FORMAT or not isinstance(was, dict):
            return "another version"
        changes = [
            f"{key} {was.get(key)!s:.40} -> {value!s:.40}" for key, value in now.items() if was.get(key) != value
        ]
        return f"another kind ({', '.join(changes) or 'another grid'})"

    def _path(self, number: int) -> Path:
        return self.folder / f"pairs-{number:06d}.safetensors"

    def numbers(self) -> list[int]:
        """Numbers of the shards that are there."""
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def has(self, number: int) -> bool:
        """Whether shard `number` is there, and is one."""
        if not exists(self._path(number)):
            return False
        try:
            with safe_open(inside(self.folder, self._path(number).name), framework="np") as file:
                return len(file.get_slice("noise")[:]) == SHARD
        except (OSError, SafetensorError):
            return False

    def write(self, number: int, pairs: Pairs) -> None:
        """Write shard `number`, `SHARD` pairs."""
        with np.errstate(over="ignore"):
            arrays = {
                name: np.ascontiguousarray(array, np.float16 if array.dtype.kind == "f" else np.int32)
                for name, array in pairs.arrays().items()
            }
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise StarflowError(f"the pairs' {name} are not finite, or too large for half precision")
        failure = f"cannot write {self._path(number)}"
        advice = "; mend that and run the same command again: it goes on"
        with replacing(
            self._path(number), failure=failure, advice=advice, overwrites_partial=True, sync=True
        ) as temporary:
            temporary.write_bytes(save(arrays, {_MARK: str(FORMAT)}))

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays of the pairs with these numbers, float32 and labels int32; each is read from its place in its file."""
        rows: dict[str, list[np.ndarray]] = {}
        for index in indices:
            number, row = divmod(int(index), SHARD)
            for name, part in self._slices(number).items():
                rows.setdefault(name, []).append(part[row : row + 1])
        joined = {name: np.concatenate(parts) for name, parts in rows.items()}
        return {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in joined.items()}

    def _slices(self, number: int) -> dict[str, Any]:
        if number not in self._open:
            path = inside(self.folder, self._path(number).name)
            try:
                file = safe_open(path, framework="np")
                self._open[number] = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise StarflowError(f"{path} is damaged ({one_line(error)}); delete it, and run this again") from None
        return self._open[number]
