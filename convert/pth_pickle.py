"""The pickle inside a PyTorch checkpoint, read without running any of it.

Python's own unpickler does the work, with three lists of what it may do: the opcodes that tensors and plain containers
need, the globals of `_CALLS`, `_STORAGES` and `_DTYPES` (which stand for themselves or for functions of this module:
nothing is imported), and dict keys whose hash is cheap. It is the one written in Python, since the one in C hashes any
key and makes room for any memo index.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeGuard

import numpy as np

from mlx_starflow.convert.pth_zip import Record, Refused, quote

# NumPy has no bfloat16: its values are handed out as their 16 bits.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}

_STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.UntypedStorage": "uint8",
    "torch.storage.UntypedStorage": "uint8",
}
_DTYPES = {f"torch.{name}": name for name in NUMPY_DTYPES}
_OTHER_DTYPES = ("complex", "uint", "int", "float", "bits", "quint", "qint", "bfloat")

# What torch.save writes for tensors, plain containers and scalars, protocols 2 to 5; INST only to name what it wants.
_OPCODES = b"qr\x94hjKMJ\x8aGN\x88\x89X\x8cBC(t)\x85\x86\x87]ae}suc\x93iRQb\x80\x95."

# Far above any real model; low enough that a hostile file costs neither minutes nor gigabytes.
_MAX_STEPS = 2_000_000
_MAX_DIMS = 32
_MAX_EXTENT = 1 << 48  # a size, stride or offset, in elements
_MAX_EXPANDED = 1 << 28  # bytes of a tensor that repeats the elements of a smaller storage


@dataclass(frozen=True, slots=True)
class _Global:
    """A storage class or a dtype."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    key: str
    dtype: str
    numel: int
    start: int

    @property
    def nbytes(self) -> int:
        return self.numel * NUMPY_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's elements lie: `extent` bytes from `start` hold them all; `strides` are in bytes."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    extent: int


def unpickle(data: bytes, records: Mapping[str, Record]) -> object:
    """What a checkpoint's pickle describes: dicts, lists and tuples, with `StoredTensor` for tensors.

    Args:
        data: the pickle.
        records: where the storages lie, by key.

    Raises:
        Refused: it is malformed, or asks for anything that tensors and plain containers do not need.
    """
    try:
        return _Unpickler(data, records).read_all()
    except Refused:
        raise
    except Exception as error:  # a damaged pickle can make any of them
        raise _malformed(str(error)) from None


def _malformed(why: str) -> Refused:
    return Refused(f"its pickle is malformed or ends too early ({quote(why)}); download or save it again")


class _Opcodes(dict[int, Callable[[Any], None]]):
    """What an unpickler does for each opcode that is allowed; it refuses others, and too many of them."""

    def __init__(self) -> None:
        stock = pickle._Unpickler.dispatch
        allowed: dict[int, Callable[[Any], None]] = {code: stock[code] for code in _OPCODES}
        own = {
            pickle.REDUCE: _Unpickler.call,
            pickle.SETITEM: _Unpickler.set_item,
            pickle.SETITEMS: _Unpickler.set_items,
            pickle.BUILD: _Unpickler.build,
        }
        super().__init__(allowed | {code[0]: method for code, method in own.items()})
        self._steps = 0

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise Refused(f"its pickle takes more than {_MAX_STEPS} steps")
        if code not in self:
            raise Refused(f"its pickle holds opcode 0x{code:02x}, which tensors and plain containers do not need")
        return super().__getitem__(code)


class _Unpickler(pickle._Unpickler):
    """No step hashes, compares or prints a container, and each takes time in proportion to what it consumes."""

    # The base class's.
    stack: list[Any]
    metastack: list[list[Any]]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes, records: Mapping[str, Record]) -> None:
        self._file = io.BytesIO(data)
        super().__init__(self._file)
        self.dispatch = _Opcodes()  # type: ignore[misc]  # one for each pickle: it counts steps
        self._records = records
        self._storages: dict[str, Storage] = {}

    def read_all(self) -> object:
        root = self.load()
        if self.stack or self.metastack or self._file.read(1):
            raise _malformed("something is left over")
        return root

    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}"
        if not name or len(full) > 256:
            raise _malformed(f"it calls for {full}")
        if full in _CALLS:
            return _CALLS[full]
        if full in _STORAGES or full in _DTYPES:
            return _Global(full)
        if module == "torch" and (name.endswith("Storage") or name.startswith(_OTHER_DTYPES)):
            raise Refused(f"it holds tensors of type {quote(full)}; supported are {', '.join(NUMPY_DTYPES)}")
        raise Refused(
            f"it calls for {quote(full)}, which tensors do not need; if you trust the file, open it with torch.load "
            "and torch.save its state_dict() alone"
        )

    def persistent_load(self, pid: object) -> Storage:
        """A persistent id is ("storage", type, key, device, number of elements)."""
        kind, storage_type, key, device, numel = pid if type(pid) is tuple else ()
        known = type(storage_type) is _Global and storage_type.name in _STORAGES
        if kind != "storage" or not known or type(key) is not str or type(device) is not str or not _is_extent(numel):
            raise _malformed("persistent id")
        dtype = _STORAGES[storage_type.name]
        record = self._records.get(key)
        if record is None:
            raise Refused(f"its storage {quote(key)} is missing; download or save it again")
        if record.size != numel * NUMPY_DTYPES[dtype].itemsize:
            raise Refused(
                f"its storage {quote(key)} should hold {numel} elements of {dtype} but has {record.size} bytes; "
                "download or save it again"
            )
        storage = Storage(key, dtype, numel, record.start)
        if self._storages.setdefault(key, storage) != storage:
            raise Refused(f"its storage {quote(key)} is used with two dtypes")
        return storage

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not FunctionType or type(arguments) is not tuple:  # Python's message would print them
            raise _malformed("a call of no function")
        self.append(function(*arguments))

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def set_items(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise _malformed("items of no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing nested tuples can take for ever, and larger ints can be made to collide.
            if type(key) is not str and not (type(key) is int and abs(key) < 1 << 62):
                kind = type(key).__name__.lstrip("_")
                raise Refused(f"it holds a dict with a key of type {kind}; supported are str and int of 62 bits")
            target[key] = value

    def build(self) -> None:
        """An OrderedDict's attributes, such as a state dict's `_metadata`, are left out."""
        state = self.stack.pop()
        if type(self.stack[-1]) is not dict or type(state) is not dict:
            raise _malformed("attributes of no dict")


def _is_extent(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _MAX_EXTENT


# ---- what a pickle may call


def _ordered_dict() -> dict[object, object]:
    return {}


def _size(shape: object) -> object:
    if type(shape) is not tuple:
        raise Refused("it holds a torch.Size of something else than a tuple; download or save it again")
    return shape


def _parameter(tensor: object, requires_grad: object, hooks: object) -> StoredTensor:
    if type(tensor) is not StoredTensor:
        raise Refused("it holds a parameter that is no tensor; download or save it again")
    return tensor


def _tensor_v2(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object,
    hooks: object,
    metadata: object = None,
) -> StoredTensor:
    dtype = storage.dtype if type(storage) is Storage else ""
    return _tensor(storage, offset, shape, strides, dtype, metadata)


def _tensor_v3(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object,
    hooks: object,
    dtype: object,
    metadata: object = None,
) -> StoredTensor:
    """PyTorch 2.1 and later, for dtypes that have no storage class of their own."""
    name = _DTYPES.get(dtype.name, "") if type(dtype) is _Global else ""
    return _tensor(storage, offset, shape, strides, name, metadata)


def _tensor(
    storage: object, offset: object, shape: object, strides: object, dtype: str, metadata: object
) -> StoredTensor:
    """A tensor of `dtype` over a storage; offset and strides count elements."""
    if (
        type(storage) is not Storage
        or not dtype
        or not _is_extent(offset)
        or type(shape) is not tuple
        or type(strides) is not tuple
        or not len(shape) == len(strides) <= _MAX_DIMS
        or not all(map(_is_extent, (*shape, *strides)))
    ):
        raise Refused("it holds a tensor of impossible size, stride or offset; download or save it again")
    if metadata is not None and metadata != {}:
        raise Refused("it holds a tensor with a lazy conjugate or negation; save it resolved (torch.resolve_neg)")
    itemsize = NUMPY_DTYPES[dtype].itemsize
    numel = math.prod(shape)
    if numel == 0:  # its offset may lie behind the storage's end
        if math.prod(size or 1 for size in shape) * itemsize >= 1 << 62:
            raise Refused(f"it holds an empty tensor of impossible shape {shape}; download or save it again")
        return StoredTensor(dtype, shape, (0,) * len(shape), storage.start, 0)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if (offset + last + 1) * itemsize > storage.nbytes:
        raise Refused(
            f"its storage {quote(storage.key)} has {storage.nbytes} bytes, too few for a tensor of shape {shape} and "
            f"strides {strides} from element {offset}; download or save it again"
        )
    if numel * itemsize > max(storage.nbytes, _MAX_EXPANDED):
        raise Refused(f"it expands {storage.nbytes} bytes into a tensor of shape {shape}; save the tensor unexpanded")
    byte_strides = tuple(stride * itemsize for stride in strides)
    return StoredTensor(dtype, shape, byte_strides, storage.start + offset * itemsize, (last + 1) * itemsize)


_CALLS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
}
