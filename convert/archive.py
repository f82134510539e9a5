"""Writing checkpoints that PyTorch reads, without PyTorch: `.pth` archives and `.safetensors` files.

A `.pth` is the zip that `pth.py` reads, laid out as `torch.save` does: `archive/data.pkl`, `archive/byteorder`, one
record `archive/data/N` a tensor, `archive/version`. Records are stored, not compressed, and begin at multiples of 64
bytes, so that PyTorch can map them. The pickle asks for nothing that `torch.load(weights_only=True)` refuses.

Tensors are written one at a time, in the order in which they come.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.files import replacing
from mlx_starflow.model_dir.files import Spec, tensor_bytes, write_safetensors

# PyTorch's storage class of each dtype that models are saved in.
_STORAGES = {
    mx.float64: "DoubleStorage",
    mx.float32: "FloatStorage",
    mx.float16: "HalfStorage",
    mx.bfloat16: "BFloat16Storage",
    mx.int64: "LongStorage",
    mx.int32: "IntStorage",
    mx.int16: "ShortStorage",
    mx.int8: "CharStorage",
    mx.uint8: "ByteStorage",
    mx.bool_: "BoolStorage",
}

_ALIGNMENT = 64
_CHUNK = 1 << 24
_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")


def check_archive_name(path: Path) -> None:
    """Raises StarflowError if the name's suffix does not say which kind of file to write."""
    if path.suffix not in (".safetensors", *_SUFFIXES):
        raise StarflowError(f"{path}: the name must end in .pth (PyTorch) or in .safetensors")


def write_archive(path: Path, layout: Mapping[str, Spec], tensors: Iterable[tuple[str, mx.array]]) -> Path:
    """Write tensors to `path`: safetensors if it is called so, else PyTorch's zip. The file appears when it is whole.

    Args:
        path: replaced if it exists; its folder is made if need be.
        layout: which tensors will come.
        tensors: each of them once.

    Raises:
        StarflowError: the file cannot be written, or is called neither `.safetensors` nor `.pth`.
    """
    check_archive_name(path)
    with replacing(path, failure=f"cannot write {path}", makes_folder=True) as temporary:
        if path.suffix == ".safetensors":
            write_safetensors({temporary: layout}, tensors, format="pt")
        else:
            _write_zip(temporary, layout, tensors)
    return path


def _write_zip(path: Path, layout: Mapping[str, Spec], tensors: Iterable[tuple[str, mx.array]]) -> None:
    keys = {name: str(key) for key, name in enumerate(layout)}
    with open(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, file, "data.pkl", _pickle(layout, keys))
        _write_record(archive, file, "byteorder", b"little")
        for name, array in tensors:
            _write_record(archive, file, f"data/{keys.pop(name)}", tensor_bytes(array))
            del array
            mx.clear_cache()
        if keys:
            raise KeyError(f"no array came for {next(iter(keys))}")
        _write_record(archive, file, "version", b"3\n")


def _write_record(archive: zipfile.ZipFile, file: BinaryIO, name: str, content: bytes | memoryview) -> None:
    record = zipfile.ZipInfo(f"archive/{name}")  # dated 1980: equal tensors make equal files
    record.file_size = len(content)
    large = record.file_size * 1.05 > zipfile.ZIP64_LIMIT
    # Fixed header, name, sizes beyond 32 bits (20 bytes where needed) and the 4-byte head of the padding itself.
    start = file.tell() + 30 + len(record.filename) + 20 * large + 4
    padding = -start % _ALIGNMENT
    record.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(record, "w", force_zip64=large) as target:
        for at in range(0, len(content), _CHUNK):
            target.write(content[at : at + _CHUNK])


def _pickle(layout: Mapping[str, Spec], keys: Mapping[str, str]) -> bytes:
    """A dict of tensors, pickled with protocol 2: what each of them is, and which record holds it."""
    out = io.BytesIO()
    out.write(pickle.PROTO + b"\2" + pickle.EMPTY_DICT)
    for name, spec in layout.items():
        out.write(_text(name))
        # _rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks); the storage is a persistent id.
        out.write(_global("torch._utils", "_rebuild_tensor_v2") + pickle.MARK)
        out.write(pickle.MARK + _text("storage") + _global("torch", _STORAGES[spec.dtype]))
        out.write(_text(keys[name]) + _text("cpu") + _number(math.prod(spec.shape)) + pickle.TUPLE + pickle.BINPERSID)
        strides = [math.prod(spec.shape[axis + 1 :]) for axis in range(len(spec.shape))]
        out.write(_number(0) + _numbers(spec.shape) + _numbers(strides) + pickle.NEWFALSE)
        out.write(_global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE)
        out.write(pickle.TUPLE + pickle.REDUCE + pickle.SETITEM)
    out.write(pickle.STOP)
    return out.getvalue()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _number(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    encoded = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def _numbers(values: Iterable[int]) -> bytes:
    return pickle.MARK + b"".join(map(_number, values)) + pickle.TUPLE
