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
from safetensors import SafetensorError, safe_open

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import read_json

INDEX_FILE = "model.safetensors.index.json"

PLAN_FILE = "sampling_plan.json"
"""Beside a flow, how method "auto" samples it, see `sampling.SamplingPlan`."""

STATISTICS_FILE = "likelihood.json"
"""Beside a flow, its calibration statistics, see `likelihood.calibration`."""

_DTYPES = {
    mx.float64: "F64",
    mx.float32: "F32",
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.bool_: "BOOL",
    **{getattr(mx, f"uint{bits}"): f"U{bits}" for bits in (8, 16, 32, 64)},
    **{getattr(mx, f"int{bits}"): f"I{bits}" for bits in (8, 16, 32, 64)},
}


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


def read_config(directory: str | Path) -> dict[str, Any]:
    """The `config.json` of a network's folder.

    Raises:
        StarflowError: it is missing or not a JSON object, so this is no (whole) model directory.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        what = "holds no config.json" if directory.is_dir() else "is not a folder"
        raise StarflowError(f"{directory} {what}; give a model directory, such as `mlx-starflow convert` writes")
    return read_json(directory / "config.json")


def read_safetensors(path: Path) -> dict[str, mx.array]:
    """The tensors of one file, each of them read when it is evaluated.

    Raises:
        StarflowError: the file is missing, truncated or no safetensors file.
    """
    if not path.is_file():
        raise StarflowError(f"{path} is missing; download it into {path.parent}")
    try:
        # Opening it this way also compares the header with the file's size; MLX alone may notice only when it reads.
        with safe_open(path, framework="numpy"):
            pass
        return cast(dict[str, mx.array], mx.load(str(path), format="safetensors"))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise StarflowError(f"cannot read {path}, download it again or convert it again: {one_line(error)}") from error


def read_index(path: Path) -> dict[str, str]:
    """The file that holds each tensor, from an `.index.json`. Raises StarflowError if it is not one."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise StarflowError(f"{path} has no weight_map; download it again or convert it again")
    return index


def load_weights(directory: str | Path) -> dict[str, mx.array]:
    """Tensors by name from `model.safetensors`, or from the files of `model.safetensors.index.json`; read lazily.

    Raises:
        StarflowError: a file is missing, truncated or no safetensors file.
    """
    directory = Path(directory)
    if (directory / INDEX_FILE).is_file():
        files = sorted(set(read_index(directory / INDEX_FILE).values()))
    elif (directory / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        raise StarflowError(f"{directory} holds no model.safetensors; download it again or convert it again")
    return {name: array for file in files for name, array in read_safetensors(directory / file).items()}


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
