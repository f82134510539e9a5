"""The files of one network, `config.json` and `model*.safetensors`: reading them, and writing tensors.

Tensors are read when they are evaluated and written one at a time, so that no more than one need be in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import exists, inside, is_folder, is_regular, parse_json, read_json
from mlx_starflow.model_dir.transaction import settle

INDEX_FILE = "model.safetensors.index.json"

CLASSES_FILE = "classes.txt"
"""Names of the classes that a flow's labels stand for, one a line."""

PLAN_FILE = "sampling_plan.json"
"""Beside a flow, how method "auto" samples it, see `sampling.SamplingPlan`."""

STATISTICS_FILE = "likelihood.json"
"""Beside a flow, its calibration statistics, see `likelihood.calibration`."""

ORIGIN_FILE = "made_of.json"
"""Beside a flow, of which model a quantized copy was made, see `fingerprint.made_of`."""

_DTYPES = {
    mx.float64: "F64",
    mx.float32: "F32",
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.bool_: "BOOL",
    **{getattr(mx, f"uint{bits}"): f"U{bits}" for bits in (8, 16, 32, 64)},
    **{getattr(mx, f"int{bits}"): f"I{bits}" for bits in (8, 16, 32, 64)},
}

_FLOAT8, _FLOAT64, _COMPLEX = "F8_E4M3", "F64", "C64"
_READ = {name: dtype for dtype, name in _DTYPES.items()} | {_COMPLEX: mx.complex64}


class Spec(NamedTuple):
    """Shape and dtype of a tensor that is to come."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


Layout = Mapping[str, Spec | mx.array]
"""Tensors that are to come, by name; arrays stand for their shape and dtype and are never evaluated."""


# ---- reading


A_MODEL = "a model directory, such as `mlx-starflow convert` writes"


def read_config(directory: str | Path, wanted: str = A_MODEL) -> dict[str, Any]:
    """The `config.json` of a network's folder; `wanted` says what the folder should be.

    Raises:
        StarflowError: it is missing or not a JSON object, so this is no (whole) model directory.
    """
    directory = Path(directory)
    settle(directory)
    if not exists(directory / "config.json"):
        what = "holds no config.json" if is_folder(directory) else "is not a folder"
        raise StarflowError(f"{directory} {what}; give {wanted}")
    return read_json(inside(directory, "config.json"))


class StoredConfig:
    """The `config.json` of a network's folder, read once.

    Attributes:
        folder: where it is.
        content: all that it holds.

    Raises:
        StarflowError: as `read_config` does.
    """

    def __init__(self, folder: str | Path, wanted: str = A_MODEL):
        self.folder = Path(folder)
        settle(self.folder)
        self._seen = self._look()
        self.content = read_config(self.folder, wanted)

    def check(self) -> None:
        """Raise StarflowError if the file is another one now: whoever writes the folder again replaces it first."""
        if self._look() != self._seen:
            raise StarflowError(f"{self.folder} was written again while it was being read: load it again")

    def _look(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self.folder / "config.json")
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_mtime_ns


def read_safetensors(path: Path) -> dict[str, mx.array]:
    """The tensors of one file, each of them read when it is evaluated.

    Numbers of 8 bits (float8_e4m3fn) come as bfloat16, which holds each of them exactly. Those of 64 bits come as
    float32, the widest that all devices compute with; a file that has some is read at once.

    Raises:
        StarflowError: the file is missing, truncated or no safetensors file, or a tensor is of a type that MLX lacks.
    """
    if not is_regular(path):
        raise StarflowError(
            f"{path} is not a regular file" if exists(path) else f"{path} is missing; download it into {path.parent}"
        )
    try:
        # Opening it this way also compares the header with the file's size; MLX alone may notice only when it reads.
        with safe_open(path, framework="numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        for name, kind in kinds.items():
            if kind not in _READ and kind != _FLOAT8:
                raise StarflowError(f"{path}: {name} is of type {kind}, which cannot be read here; save it in float32")
        whole = _FLOAT64 in kinds.values()
        arrays = _read_at_once(path) if whole else cast(dict[str, mx.array], mx.load(str(path), format="safetensors"))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise StarflowError(f"cannot read {path}, download it again or convert it again: {one_line(error)}") from error
    # MLX takes numbers of 8 bits for bytes.
    decoded = {n: mx.from_fp8(arrays[n], dtype=mx.bfloat16) for n, kind in kinds.items() if kind == _FLOAT8}
    return arrays | decoded


def _read_at_once(path: Path) -> dict[str, mx.array]:
    """The tensors of a file that is whole; MLX itself refuses those of 64-bit numbers."""
    content = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(content[:8], "little")
    arrays = {}
    for name, entry in parse_json(bytes(content[8:start])).items():
        if name == "__metadata__":
            continue
        first, stop = entry["data_offsets"]
        numbers = content[start + first : start + stop]
        if entry["dtype"] == _FLOAT64:
            with np.errstate(over="ignore"):
                array = mx.array(np.frombuffer(numbers, "<f8").astype(np.float32))
        else:
            array = mx.array(np.array(numbers)).view(_READ.get(entry["dtype"], mx.uint8))
        arrays[name] = array.reshape(entry["shape"])
    return arrays


def read_index(path: Path) -> dict[str, str]:
    """The file that holds each tensor, from an `.index.json`.

    Raises:
        StarflowError: it is not one, or it names files that are not in its folder.
    """
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise StarflowError(f"{path} has no weight_map; download it again or convert it again")
    for file in set(index.values()):
        inside(path.parent, file)
    return index


def load_weights(directory: str | Path) -> dict[str, mx.array]:
    """Tensors by name from `model.safetensors`, or from the files of `model.safetensors.index.json`; read lazily.

    Raises:
        StarflowError: a file is missing, truncated or no safetensors file.
    """
    directory = Path(directory)
    if exists(directory / INDEX_FILE):
        files = sorted(set(read_index(inside(directory, INDEX_FILE)).values()))
    elif exists(directory / "model.safetensors"):
        files = ["model.safetensors"]
    else:
        raise StarflowError(f"{directory} holds no model.safetensors; download it again or convert it again")
    return {name: array for file in files for name, array in read_safetensors(inside(directory, file)).items()}


# ---- writing


def tensor_bytes(array: mx.array) -> memoryview:
    """The numbers of an array in order, row by row. Evaluates it."""
    if array.size == 0:  # it has no memory to look at
        return memoryview(b"")
    return memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8))  # type: ignore[arg-type]  # MLX's stubs lack it


def write_safetensors(
    files: Mapping[Path, Layout], tensors: Iterable[tuple[str, mx.array]], *, format: str = "mlx"
) -> None:
    """Write safetensors files, each tensor to its place when it comes.

    Args:
        files: which tensors each file will hold.
        tensors: each of them once, in any order.
        format: whose layout of weights it is, which transformers wants to be told: "mlx" or "pt".
    """
    places: dict[str, tuple[Path, int]] = {}
    for path, layout in files.items():
        header: dict[str, Any] = {"__metadata__": {"format": format}}
        at = 0
        # Larger elements first, so that each tensor starts at a multiple of its element's size.
        for name, spec in sorted(layout.items(), key=lambda item: -item[1].dtype.size):
            offsets = [at, at + spec.nbytes]
            header[name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
            places[name] = (path, at)
            at += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, start + at)
        places.update({name: (path, start + places[name][1]) for name in layout})
    for name, array in tensors:
        path, at = places.pop(name)
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(tensor_bytes(array))
        del array
        mx.clear_cache()
    if places:
        raise KeyError(f"no array came for {next(iter(places))}")
