"""The pickle inside a PyTorch checkpoint, interpreted without running any of it.

Opcodes are as in Python's pickletools, calls as PyTorch's torch/_utils.py describes them. Globals stay names: nothing
is imported, nothing that the file names is called, and what is allocated is bounded.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mlx_starflow.convert.pth_zip import Record, Refused, quote

# NumPy has no bfloat16: its values are handed out as their 16 bits.
NUMPY_DTYPES = {
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

# The globals that a pickle may name, beside the calls of `_CALLS`. They stay names: nothing is imported.
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

# Far above any real model; low enough that a hostile file costs neither minutes nor gigabytes.
_MAX_OPCODES = 2_000_000
_MAX_DIMS = 32
_MAX_EXTENT = 1 << 48  # a size, stride or offset, in elements
_MAX_EXPANDED = 1 << 28  # bytes of a tensor that repeats the elements of a smaller storage
MAX_DEPTH = 32  # containers inside containers


@dataclass(frozen=True, slots=True)
class _Global:
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


class Unpickler:
    """Interprets the opcodes that `torch.save` writes for tensors, plain containers and scalars, protocols 2 to 5.

    Containers become dicts, lists and tuples; tensors become `StoredTensor`. Every step costs constant time or time in
    proportion to the bytes or stack items it consumes, and no step hashes, compares or prints a container.
    """

    def __init__(self, data: bytes, records: Mapping[str, Record]) -> None:
        self._data = data
        self._at = 0
        self._records = records
        self._storages: dict[str, Storage] = {}
        self._stack: list[object] = []
        self._marks: list[int] = []

    def load(self) -> object:
        stack, take, pop, top = self._stack, self._take, self._pop, self._top
        push, pop_mark = stack.append, self._pop_mark
        memo: dict[int, object] = {}
        for _ in range(_MAX_OPCODES):
            opcode = take(1)
            match opcode:
                case b"q":  # BINPUT
                    memo[take(1)[0]] = top()
                case b"r":  # LONG_BINPUT
                    memo[self._unsigned(4)] = top()
                case b"\x94":  # MEMOIZE
                    memo[len(memo)] = top()
                case b"h":  # BINGET
                    push(self._recall(memo, 1))
                case b"j":  # LONG_BINGET
                    push(self._recall(memo, 4))
                case b"K":  # BININT1
                    push(self._unsigned(1))
                case b"M":  # BININT2
                    push(self._unsigned(2))
                case b"J":  # BININT
                    push(int.from_bytes(take(4), "little", signed=True))
                case b"\x8a":  # LONG1
                    push(int.from_bytes(take(self._unsigned(1)), "little", signed=True))
                case b"G":  # BINFLOAT
                    push(struct.unpack(">d", take(8))[0])
                case b"N":  # NONE
                    push(None)
                case b"\x88":  # NEWTRUE
                    push(True)
                case b"\x89":  # NEWFALSE
                    push(False)
                case b"X":  # BINUNICODE
                    push(self._text(self._unsigned(4)))
                case b"\x8c":  # SHORT_BINUNICODE
                    push(self._text(self._unsigned(1)))
                case b"B":  # BINBYTES
                    push(take(self._unsigned(4)))
                case b"C":  # SHORT_BINBYTES
                    push(take(self._unsigned(1)))
                case b"(":  # MARK
                    self._marks.append(len(stack))
                case b"t":  # TUPLE
                    push(tuple(pop_mark()))
                case b")":  # EMPTY_TUPLE
                    push(())
                case b"\x85" | b"\x86" | b"\x87":  # TUPLE1, TUPLE2, TUPLE3
                    items = [pop() for _ in range(opcode[0] - 0x84)]
                    push(tuple(reversed(items)))
                case b"]":  # EMPTY_LIST
                    push([])
                case b"a":  # APPEND
                    item = pop()
                    self._top_list().append(item)
                case b"e":  # APPENDS
                    items = pop_mark()
                    self._top_list().extend(items)
                case b"}":  # EMPTY_DICT
                    push({})
                case b"s":  # SETITEM
                    value, key = pop(), pop()
                    self._set_items([key, value])
                case b"u":  # SETITEMS
                    self._set_items(pop_mark())
                case b"c":  # GLOBAL
                    push(self._global(self._line(), self._line()))
                case b"\x93":  # STACK_GLOBAL
                    name, module = pop(), pop()
                    push(self._global(module, name))
                case b"i":  # INST, a global and a call in one: only to name what it wants
                    self._global(self._line(), self._line())
                    raise self._malformed()
                case b"R":  # REDUCE
                    arguments, function = pop(), pop()
                    push(self._call(function, arguments))
                case b"Q":  # BINPERSID
                    push(self._storage(pop()))
                case b"b":  # BUILD: an OrderedDict's attributes, such as a state dict's _metadata
                    state = pop()
                    if type(top()) is not dict or type(state) is not dict:
                        raise self._malformed()
                case b"\x80":  # PROTO
                    if take(1)[0] > 5:
                        raise Refused("its pickle protocol is unknown; save it again with pickle_protocol=2")
                case b"\x95":  # FRAME: a hint how much to read ahead
                    take(8)
                case b".":  # STOP
                    if len(stack) != 1 or self._marks or self._at != len(self._data):
                        raise self._malformed()
                    return stack[0]
                case _:
                    raise Refused(
                        f"its pickle holds opcode 0x{opcode[0]:02x} at byte {self._at - 1}, which tensors and plain "
                        "containers do not need"
                    )
        raise Refused(f"its pickle takes more than {_MAX_OPCODES} steps")

    def _malformed(self) -> Refused:
        return Refused(f"its pickle is malformed at byte {self._at}; download or save it again")

    def _take(self, size: int) -> bytes:
        start = self._at
        self._at = start + size
        if self._at > len(self._data):
            raise Refused("its pickle ends too early; download or save it again")
        return self._data[start : self._at]

    def _unsigned(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _text(self, size: int) -> str:
        try:
            return self._take(size).decode()
        except UnicodeDecodeError:
            raise self._malformed() from None

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + 256)
        if end < 0:
            raise self._malformed()
        return self._text(end + 1 - self._at)[:-1]

    def _floor(self) -> int:
        """Stack items below the last mark are out of reach until the mark is taken away."""
        return self._marks[-1] if self._marks else 0

    def _pop(self) -> object:
        if len(self._stack) <= self._floor():
            raise self._malformed()
        return self._stack.pop()

    def _top(self) -> object:
        if len(self._stack) <= self._floor():
            raise self._malformed()
        return self._stack[-1]

    def _pop_mark(self) -> list[object]:
        if not self._marks:
            raise self._malformed()
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _recall(self, memo: dict[int, object], size: int) -> object:
        index = self._unsigned(size)
        if index not in memo:
            raise self._malformed()
        return memo[index]

    def _top_list(self) -> list[object]:
        target = self._top()
        if type(target) is not list:
            raise self._malformed()
        return target

    def _set_items(self, items: list[object]) -> None:
        target = self._top()
        if type(target) is not dict or len(items) % 2:
            raise self._malformed()
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing nested tuples can take for ever, and larger ints can be made to collide.
            if type(key) is not str and not (type(key) is int and abs(key) < 1 << 62):
                kind = type(key).__name__.lstrip("_")
                raise Refused(f"it holds a dict with a key of type {kind}; supported are str and int of 62 bits")
            target[key] = value

    def _global(self, module: object, name: object) -> _Global:
        if type(module) is not str or type(name) is not str:
            raise self._malformed()
        full = f"{module}.{name}"
        if full in _CALLS or full in _STORAGES or full in _DTYPES:
            return _Global(full)
        if module == "torch" and (name.endswith("Storage") or name.startswith(_OTHER_DTYPES)):
            raise Refused(f"it holds tensors of type {quote(full)}; supported are {', '.join(NUMPY_DTYPES)}")
        raise Refused(
            f"it calls for {quote(full)}, which tensors do not need; if you trust the file, open it with torch.load "
            "and torch.save its state_dict() alone"
        )

    def _call(self, function: object, arguments: object) -> object:
        if type(function) is not _Global or function.name not in _CALLS or type(arguments) is not tuple:
            raise self._malformed()
        call, least, most = _CALLS[function.name]
        if not least <= len(arguments) <= most:
            raise self._malformed()
        return call(*arguments)

    def _storage(self, identity: object) -> Storage:
        """A persistent id is ("storage", type, key, device, number of elements)."""
        if type(identity) is not tuple or len(identity) != 5:
            raise self._malformed()
        kind, storage_type, key, device, numel = identity
        known = type(storage_type) is _Global and storage_type.name in _STORAGES
        if kind != "storage" or not known or type(key) is not str or type(device) is not str or not _is_extent(numel):
            raise self._malformed()
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


def _is_extent(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_EXTENT


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
        or not all(map(_is_extent, shape))
        or not all(map(_is_extent, strides))
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
    return StoredTensor(
        dtype,
        shape,
        tuple(stride * itemsize for stride in strides),
        storage.start + offset * itemsize,
        (last + 1) * itemsize,
    )


# What REDUCE may call, with the least and the largest number of arguments.
_CALLS: dict[str, tuple[Callable[..., object], int, int]] = {
    "collections.OrderedDict": (_ordered_dict, 0, 0),
    "torch.Size": (_size, 1, 1),
    "torch._utils._rebuild_parameter": (_parameter, 3, 3),
    "torch._utils._rebuild_tensor_v2": (_tensor_v2, 6, 7),
    "torch._utils._rebuild_tensor_v3": (_tensor_v3, 7, 8),
}
