"""Folders that `torch.distributed.checkpoint` wrote, as sharded training does: `.metadata` and `__*.distcp` files.

Unlike `.pth` files, which `pth.py` reads, their format belongs to PyTorch, so PyTorch reads them. Their `.metadata` is
a pickle that PyTorch opens without a guard: here it is first looked through, and refused if it names anything but the
classes that describe tensors.
"""

from __future__ import annotations

import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_starflow.convert.tensor import Tensor
from mlx_starflow.convert.wrappers import choose_wrapper
from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import is_regular

_METADATA = ".metadata"
# All that the pickle may name, in any version of PyTorch, beside dtypes.
_GLOBALS = {
    "collections.OrderedDict",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "torch.Size",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.serialization._get_layout",
}


def is_distributed(path: Path) -> bool:
    """Whether this is a folder that `torch.distributed.checkpoint` wrote."""
    return is_regular(path / _METADATA)


def open_distributed(path: Path, ema: bool = False) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """The tensors of the folder, none of them read yet; what is not a tensor is left alone.

    Trainers put the model's beside an optimizer's: they are chosen as in `pth.read_checkpoint`.

    Returns:
        What an `OpenedCheckpoint` is made of.

    Raises:
        StarflowError: PyTorch is not installed, or the folder is damaged or holds no tensors.
    """
    try:
        import torch
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    except ImportError:
        raise StarflowError(
            f"{path} was written by torch.distributed.checkpoint, which only PyTorch reads: pip install torch"
        ) from None
    try:
        with open(path / _METADATA, "rb") as file:
            _Guard(file).load()
        entries = FileSystemReader(path).read_metadata().state_dict_metadata
    except StarflowError as error:
        raise StarflowError(f"cannot read {path / _METADATA}: {error}") from None
    except Exception as error:  # a damaged pickle can make any of them
        raise StarflowError(f"cannot read {path / _METADATA}: {one_line(error)}") from error
    tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    keys = dict.fromkeys(name.partition(".")[0] for name in tensors if "." in name)
    wrapper = choose_wrapper(keys, ema)
    prefix = f"{wrapper}." if wrapper else ""
    out = {}
    for name, entry in tensors.items():
        dtype = getattr(mx, str(entry.properties.dtype).removeprefix("torch.").replace("bool", "bool_"), None)
        if not name.startswith(prefix):
            continue
        if dtype is None:
            raise StarflowError(f"{path}: {name} has type {entry.properties.dtype}, which no model here has")
        read = partial(_read, torch, path, name, tuple(entry.size), entry.properties.dtype)
        out[name.removeprefix(prefix)] = Tensor(tuple(entry.size), dtype, read)
    if not out:
        raise StarflowError(f"{path} holds no tensors")
    return out, wrapper, tuple(key for key in keys if key != wrapper)


def _read(torch: Any, path: Path, name: str, shape: tuple[int, ...], dtype: Any) -> mx.array:
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load

    state = {name: torch.empty(shape, dtype=dtype)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group, which is meant
            load(state, storage_reader=FileSystemReader(path), no_dist=True)
    except (CheckpointException, Exception) as error:  # the first is no Exception, and wraps the others
        failures = list(getattr(error, "failures", {}).values())
        cause = failures[0][0] if failures else error
        raise StarflowError(f"cannot read {name} from {path}: {one_line(cause)}") from error
    tensor = state[name]
    if dtype == torch.bfloat16:
        return mx.array(tensor.view(torch.int16).numpy()).view(mx.bfloat16)
    # Without a dtype MLX would make float32 of float64.
    return mx.array(tensor.numpy(), dtype=mx.float64 if dtype == torch.float64 else None)


class _Guard(pickle.Unpickler):
    """Reads the metadata for nothing but finding out whether it asks for something that does not belong there."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        full = f"{module}.{name}"
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if full not in _GLOBALS and not is_dtype:
            raise StarflowError(f"it calls for {full[:100]!a}, which tensors do not need")
        return super().find_class(module, name)
