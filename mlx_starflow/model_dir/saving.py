"""Writing model directories: `config.json`, `model*.safetensors` and whatever belongs beside them, all or nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import is_regular, read_json
from mlx_starflow.model_dir.directory import ModelDirectory, NetworkDirectory
from mlx_starflow.model_dir.files import CLASSES_FILE, INDEX_FILE, Layout, write_safetensors
from mlx_starflow.model_dir.transaction import transaction


def save_model(
    directory: str | Path,
    weights: Mapping[str, mx.array],
    config: Mapping[str, Any],
    *,
    max_shard_gb: float = 5,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a model directory, or the same kind of model's again: all of it or nothing, see `transaction`.

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
    layout: Layout,
    tensors: Iterable[tuple[str, mx.array]],
    config: Mapping[str, Any],
    *,
    max_shard_gb: float = 5,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """`save_model` for weights that come one at a time, in any order: no more than one of them need be in memory.

    `layout` says which will come.
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
    with transaction(directory) as new:
        new.staged("config.json").unlink(missing_ok=True)  # of an unfinished transaction: this network is not whole now
        paths = {new.file(shard): {name: layout[name] for name in names} for shard, names in shards.items()}
        write_safetensors(paths, tensors)
        for name, content in texts.items():
            new.file(name).write_bytes(content)
    return directory


def copy_network(source: NetworkDirectory[nn.Module, Any], out: str | Path, *names: str) -> Path:
    """Write a network's folder again, with the files `names` of it. Raises StarflowError."""
    return save_model(out, source.weights(), source.content, files=read_files(source.folder, *names))


def copy_parts(source: ModelDirectory, out: Path) -> dict[str, bytes]:
    """Copy a model's text encoder and autoencoder, as far as it has them; returns its licences, by name.

    Raises StarflowError if something cannot be read or written.
    """
    if source.has("text_encoder"):
        copy_network(source.text_encoder, out / "text_encoder", "spiece.model")
    if source.has("vae"):
        copy_network(source.vae, out / "vae")
    return read_notes(source)


def read_notes(source: ModelDirectory) -> dict[str, bytes]:
    """What is written beside a flow, its licences and the names of its classes, by file name. Raises StarflowError."""
    classes = [CLASSES_FILE] if is_regular(source.path / CLASSES_FILE) else []
    return read_files(source.path, *source.licences, *classes)


def read_files(directory: Path, *names: str) -> dict[str, bytes]:
    """Contents of files by name. Raises StarflowError if one of them cannot be read."""
    try:
        return {name: (directory / name).read_bytes() for name in names}
    except OSError as error:
        raise StarflowError(f"cannot read {directory}: {one_line(error)}") from error


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _refuse_other_model(directory: Path, config: Mapping[str, Any]) -> None:
    """A text encoder must not overwrite the flow in whose directory it belongs as a folder."""
    if not (directory / "config.json").is_file():
        return
    found, written = read_json(directory / "config.json").get("model_type"), config.get("model_type")
    if found != written:
        raise StarflowError(f"{directory} holds another model ({found!r}, not {written!r}); give another folder")


def _shards(layout: Layout, max_shard_gb: float) -> dict[str, list[str]]:
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
