"""Writing model directories: `config.json`, `model*.safetensors` and whatever belongs beside them, all or nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.weights import INDEX_FILE, one_line, read_json

_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

_SAFETENSORS_DTYPES = {
    mx.float64: "F64",
    mx.float32: "F32",
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.bool_: "BOOL",
    **{getattr(mx, f"uint{bits}"): f"U{bits}" for bits in (8, 16, 32, 64)},
    **{getattr(mx, f"int{bits}"): f"I{bits}" for bits in (8, 16, 32, 64)},
}


def save_model(
    directory: str | Path,
    weights: Mapping[str, mx.array],
    config: Mapping[str, Any],
    *,
    max_shard_gb: float = 5,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a model directory, or the same kind of model's again: all of it or, as far as loading goes, nothing.

    Every file is written under another name first. Then the old `config.json` and weights go, the new files take their
    names, and `config.json`, without which no directory loads, comes last.

    Args:
        directory: made if need be; other files in it are left alone.
        weights: tensors by name; lazy ones are computed one after the other.
        config: what `config.json` is to hold.
        max_shard_gb: weights beyond this size, in 10^9 bytes, go to several files with an index.
        files: contents of further files by name.

    Returns:
        `directory`.

    Raises:
        StarflowError: it cannot be written, or holds a model of another `model_type`.
    """
    return save_tensors(directory, weights, weights.items(), config, max_shard_gb=max_shard_gb, files=files)


def save_tensors(
    directory: str | Path,
    layout: Mapping[str, mx.array],
    tensors: Iterable[tuple[str, mx.array]],
    config: Mapping[str, Any],
    *,
    max_shard_gb: float = 5,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """`save_model` for weights that come one at a time, in any order: no more than one of them need be in memory.

    `layout` says which will come, by arrays of the same shape and dtype that are never evaluated.
    """
    directory = Path(directory)
    _refuse_other_model(directory, config)
    shards = _shards(layout, max_shard_gb)
    texts = dict(files or {})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(array.nbytes for array in layout.values())},
            "weight_map": {name: shard for shard, names in shards.items() for name in names},
        }
        texts[INDEX_FILE] = _json(index)
    texts["config.json"] = _json(config)
    with _partial_files(directory, [*shards, *texts]) as partial:
        _write_shards({partial[shard]: {n: layout[n] for n in names} for shard, names in shards.items()}, tensors)
        for name, content in texts.items():
            partial[name].write_bytes(content)
        (directory / "config.json").unlink(missing_ok=True)
        for old in list(directory.iterdir()):
            if _WEIGHT_FILE.fullmatch(old.name):
                old.unlink()
        for name, path in partial.items():
            os.replace(path, directory / name)
    return directory


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _refuse_other_model(directory: Path, config: Mapping[str, Any]) -> None:
    """A text encoder must not overwrite the flow in whose directory it belongs as a folder."""
    if not (directory / "config.json").is_file():
        return
    found, written = read_json(directory / "config.json").get("model_type"), config.get("model_type")
    if found != written:
        raise StarflowError(f"{directory} holds another model ({found!r}, not {written!r}); give another folder")


@contextmanager
def _partial_files(directory: Path, names: list[str]) -> Iterator[dict[str, Path]]:
    """Where to write files before they get their names, in that order; what is left of them is removed."""
    partial = {name: directory / f"partial-{name}" for name in names}
    created = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield partial
    except OSError as error:
        raise StarflowError(f"cannot write {directory}: {one_line(error)}") from error
    finally:
        with suppress(OSError):
            for path in partial.values():
                path.unlink(missing_ok=True)
            if created:
                directory.rmdir()  # only succeeds on an empty one


def _shards(layout: Mapping[str, mx.array], max_shard_gb: float) -> dict[str, list[str]]:
    """Tensors' names by file, in order; a tensor larger than a shard has a file of its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, array in layout.items():
        if groups[-1] and size + array.nbytes > max_shard_gb * 1e9:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += array.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_shards(shards: Mapping[Path, Mapping[str, mx.array]], tensors: Iterable[tuple[str, mx.array]]) -> None:
    """Safetensors files, each tensor written to its place when it comes."""
    places: dict[str, tuple[Path, int]] = {}
    for path, layout in shards.items():
        header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        at = 0
        # Larger elements first, so that each tensor starts at a multiple of its element's size.
        for name, array in sorted(layout.items(), key=lambda item: -item[1].dtype.size):
            end = at + array.nbytes
            dtype = _SAFETENSORS_DTYPES[array.dtype]
            header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, end]}
            places[name] = (path, at)
            at = end
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
            file.write(memoryview(array.reshape(-1).view(mx.uint8)))
        del array
        mx.clear_cache()
    if places:
        raise KeyError(f"no array came for {next(iter(places))}")
