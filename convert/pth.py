"""Reading PyTorch checkpoints (.pth, .pt, .ckpt) safely, without PyTorch.

`torch.save` writes a zip of uncompressed records: `NAME/data.pkl`, a pickle that describes the objects, and one record
`NAME/data/KEY` for each storage, the flat memory that one or more tensors look into. A pickle is a program, and
Python's own `pickle` would let whoever wrote the file run code here. So this module has its own interpreter: it knows
the opcodes that tensors and plain containers need, imports nothing, calls nothing that the file names, and bounds what
it allocates. Everything else is refused with one `StarflowError` that says why.

No tensor is read when a file is opened: each is a view of a memory map, made when it is asked for. Checksums of
storages are not verified, since that would read the whole file a second time; the pickle's is.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError

# NumPy has no bfloat16: its values are handed out as their 16 bits.
_NUMPY = {
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
_DTYPES = {f"torch.{name}": name for name in _NUMPY}
_OTHER_DTYPES = ("complex", "uint", "int", "float", "bits", "quint", "qint", "bfloat")

# Keys under which training scripts put the state dict, beside an optimizer, a step counter and the like.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")

# Far above any real model; low enough that a hostile file costs neither minutes nor gigabytes.
_MAX_DIRECTORY = 1 << 23  # bytes of the zip's central directory; a storage needs about 60
_MAX_PICKLE = 1 << 24  # bytes of data.pkl; a state dict needs about 200 a tensor
_MAX_OPCODES = 2_000_000
_MAX_DIMS = 32
_MAX_EXTENT = 1 << 48  # a size, stride or offset, in elements
_MAX_EXPANDED = 1 << 28  # bytes of a tensor that repeats the elements of a smaller storage
_MAX_DEPTH = 32  # containers inside containers
_MAX_ITEMS = 1_000_000  # items of all the containers searched for tensors
_MAX_TENSORS = 100_000
_MAX_NAME = 1024  # characters

_TORCHSCRIPT = "it is a TorchScript program; save the model's state_dict() with torch.save instead"


class _Refused(Exception):
    """Why a file is not read; `read_checkpoint` adds the file's name."""


@dataclass(frozen=True, slots=True)
class _Record:
    """One stored file of the zip: `size` bytes from `start`."""

    start: int
    size: int
    crc: int


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: str
    numel: int
    start: int

    @property
    def nbytes(self) -> int:
        return self.numel * _NUMPY[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where a tensor's elements lie: `extent` bytes from `start` hold them all; `strides` are in bytes."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    extent: int


class Checkpoint(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint by name, in the file's order; made by `read_checkpoint`. Opening one reads no tensor.

    The file stays mapped as long as the checkpoint or an array taken from it lives, and must not be overwritten or
    shortened in that time (replacing it by a rename is harmless).
    """

    def __init__(self, tensors: dict[str, _Tensor], memory: mmap.mmap) -> None:
        self._tensors = tensors
        self._memory = memory

    def __getitem__(self, name: str) -> np.ndarray:
        """A read-only view of the file, axes as in PyTorch; not contiguous where the tensor was not.

        bfloat16, for which NumPy has no type, comes as uint16 holding the same bits: see `dtype` and `mx`.

        Raises:
            KeyError: the checkpoint holds no such tensor.
        """
        tensor = self._tensors[name]
        if tensor.extent == 0:
            return np.empty(tensor.shape, _NUMPY[tensor.dtype])
        window = memoryview(self._memory)[tensor.start : tensor.start + tensor.extent]
        return np.ndarray(tensor.shape, _NUMPY[tensor.dtype], window, strides=tensor.strides)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def mx(self, name: str) -> mx.array:
        """A copy of the tensor as an MLX array of its own dtype, bfloat16 and float64 included.

        The file's pages are let go after the copy, so that going through a checkpoint tensor by tensor needs memory
        for one tensor, not for the file. MLX computes float64 on the CPU only: cast it there.

        Raises:
            KeyError: the checkpoint holds no such tensor.
        """
        tensor, values = self._tensors[name], self[name]
        # Without a dtype MLX would make float32 of float64.
        array = mx.array(values, dtype=mx.float64) if tensor.dtype == "float64" else mx.array(values)
        if tensor.extent and hasattr(mmap, "MADV_DONTNEED"):
            first = tensor.start - tensor.start % mmap.PAGESIZE
            self._memory.madvise(mmap.MADV_DONTNEED, first, tensor.start + tensor.extent - first)
        return array.view(mx.bfloat16) if tensor.dtype == "bfloat16" else array

    def dtype(self, name: str) -> str:
        """PyTorch's name of the dtype without "torch.": "float32", "bfloat16", "int64", "bool"..."""
        return self._tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._tensors[name].shape

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor's elements, without reading them."""
        return math.prod(self.shape(name)) * _NUMPY[self.dtype(name)].itemsize


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint that `torch.save` of PyTorch 1.6 or later wrote, running none of its code.

    A state dict keeps its names. Where the outermost dict holds no tensor itself but a dict with tensors under
    "state_dict", "model_state_dict", "model" or "module" (the first of these), that dict is the checkpoint, and what
    stands beside it, such as an optimizer, is left alone. Otherwise containers inside containers join their keys and
    indices with dots: {"a": [t]} holds "a.0". Numbers, strings and the like are passed over.

    Raises:
        StarflowError: the file cannot be read, is damaged, is no such checkpoint, or wants anything but tensors and
            plain containers. The message names the file and the reason.
    """
    name = str(os.fspath(path))
    name = name if name.isprintable() else ascii(name)
    try:
        return _read(path)
    except _Refused as reason:
        raise StarflowError(f"cannot read checkpoint {name}: {reason}") from None
    except OSError as error:
        raise StarflowError(f"cannot read checkpoint {name}: {error.strerror or error}") from None


def _read(path: str | os.PathLike[str]) -> Checkpoint:
    try:
        mode = os.stat(path).st_mode
    except ValueError:
        raise _Refused("that is no file name") from None
    if stat.S_ISDIR(mode):
        raise _Refused("it is a directory; name the file itself")
    if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
        raise _Refused("it is not a regular file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        records = _zip_records(file, size)
        folders = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise _Refused(f"a file of torch.save has one data.pkl, this zip has {len(folders)}")
        folder = folders[0]
        if folder + "constants.pkl" in records:
            raise _Refused(_TORCHSCRIPT)
        if folder + "byteorder" in records:
            order = _contents(file, records[folder + "byteorder"], limit=16)
            if order != b"little":
                raise _Refused(f"its byte order is {_quote(order.decode('latin1'))}; only 'little' is supported")
        pickled = _contents(file, records[folder + "data.pkl"], _MAX_PICKLE)
        prefix = folder + "data/"
        storages = {name[len(prefix) :]: record for name, record in records.items() if name.startswith(prefix)}
        tensors = _named_tensors(_Unpickler(pickled, storages).load())
        try:
            return Checkpoint(tensors, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
        except ValueError:
            raise _Refused("it changed while it was being read") from None


def _quote(text: str) -> str:
    """Text that came from the file, fit for a message: short, one line, nothing a terminal obeys."""
    return ascii(text if len(text) <= 100 else text[:100] + "...")


# ---- the zip: PKWARE's APPNOTE 6.3, sections 4.3 to 4.5


def _read_at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    data = file.read(size)
    if len(data) != size:
        raise _Refused("it is truncated or damaged; download or save it again")
    return data


def _contents(file: BinaryIO, record: _Record, limit: int) -> bytes:
    if record.size > limit:
        raise _Refused(f"its description of the tensors takes {record.size} bytes, more than {limit}")
    data = _read_at(file, record.start, record.size)
    # PyTorch writes 0 where checksums are switched off.
    if record.crc and zlib.crc32(data) != record.crc:
        raise _Refused("its description of the tensors is damaged (wrong checksum); download or save it again")
    return data


def _zip_records(file: BinaryIO, file_size: int) -> dict[str, _Record]:
    """The records by name, each one found to be uncompressed, inside the file, and apart from every other."""
    if file_size == 0:
        raise _Refused("it is empty")
    head = _read_at(file, 0, min(file_size, 512))
    if not head.startswith(b"PK\3\4"):
        raise _Refused(_what_it_is(head))
    count, directory_start, directory_size = _zip_end(file, file_size)
    if directory_size > _MAX_DIRECTORY:
        raise _Refused(f"its zip directory takes {directory_size} bytes, more than {_MAX_DIRECTORY}")
    directory = _read_at(file, directory_start, directory_size)
    damaged = _Refused("its zip directory is damaged; download or save it again")

    records: dict[str, _Record] = {}
    spans: list[tuple[int, int]] = []
    at = 0
    for _ in range(count):
        if directory[at : at + 4] != b"PK\1\2" or at + 46 > len(directory):
            raise damaged
        flags, method, crc, packed, size, name_size, extra_size, comment_size, disk, header = struct.unpack_from(
            "<4xHH4x3I4H6xI", directory, at + 4
        )
        raw_name = directory[at + 46 : at + 46 + name_size]
        extra = directory[at + 46 + name_size : at + 46 + name_size + extra_size]
        at += 46 + name_size + extra_size + comment_size
        try:
            name = raw_name.decode()
            size, packed, header = _zip64_fields(extra, size, packed, header)
        except (UnicodeDecodeError, struct.error):
            raise damaged from None
        if method != 0 and "/code/" in name:
            raise _Refused(_TORCHSCRIPT)
        if flags & 1 or method != 0 or packed != size:
            raise _Refused(f"its record {_quote(name)} is compressed or encrypted, which torch.save never does")
        if at > len(directory) or disk != 0 or name in records or header + 30 > directory_start:
            raise damaged
        start = _data_start(file, header, raw_name, size)
        if start is None or start + size > directory_start:
            raise _Refused(f"its record {_quote(name)} is not where the zip directory says; download or save it again")
        records[name] = _Record(start, size, crc)
        spans.append((header, start + size))
    if at != len(directory):
        raise damaged
    spans.sort()
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise _Refused("its zip records overlap; download or save it again")
    return records


def _data_start(file: BinaryIO, header: int, name: bytes, size: int) -> int | None:
    """Where a record's bytes begin, after its local header; None if that disagrees with the central directory.

    The local header's extra block is not the directory's: PyTorch pads with it, so that storages start at multiples of
    64 bytes. Where flag 8 is set it may give the sizes as 0, because they follow behind the data.
    """
    signature, flags, method, *sizes, name_size, extra_size = struct.unpack("<4s2xHH8xIIHH", _read_at(file, header, 30))
    allowed = (size, 0xFFFFFFFF, 0) if flags & 8 else (size, 0xFFFFFFFF)
    if (
        signature != b"PK\3\4"
        or flags & 1
        or method != 0
        or any(said not in allowed for said in sizes)
        or name_size != len(name)
        or _read_at(file, header + 30, name_size) != name
    ):
        return None
    return header + 30 + name_size + extra_size


def _zip_end(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Number of records, start and size in bytes of the central directory."""
    truncated = _Refused("it is truncated (the zip's end is missing); download or save it again")
    # The last record, a comment of up to 65535 bytes included.
    tail_start = max(0, size - 22 - 0xFFFF)
    tail = _read_at(file, tail_start, size - tail_start)
    found = tail.rfind(b"PK\5\6")
    while found >= 0 and int.from_bytes(tail[found + 20 : found + 22], "little") != len(tail) - found - 22:
        found = tail.rfind(b"PK\5\6", 0, found)
    if found < 0:
        raise truncated
    end = tail_start + found
    fields = struct.unpack_from("<4HII", tail, found + 4)
    if end >= 20 + 56:
        locator = _read_at(file, end - 20, 20)
        if locator.startswith(b"PK\6\7"):
            disk, end64, _ = struct.unpack_from("<IQI", locator, 4)
            if disk != 0 or end64 + 56 > end - 20:
                raise truncated
            record = _read_at(file, end64, 56)
            if not record.startswith(b"PK\6\6"):
                raise truncated
            fields, end = struct.unpack_from("<IIQQQQ", record, 16), end64
    disk, directory_disk, count_here, count, directory_size, directory_start = fields
    if disk or directory_disk or count_here != count or directory_start + directory_size != end:
        raise truncated
    return count, directory_start, directory_size


def _zip64_fields(extra: bytes, *fields: int) -> list[int]:
    """The 32-bit fields, those of all ones replaced, in this order, by the 64-bit ones in the extra block 1."""
    at = 0
    while at < len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            wanted = sum(field == 0xFFFFFFFF for field in fields)
            large = iter(struct.unpack_from(f"<{wanted}Q", extra[at + 4 : at + 4 + length]))
            return [next(large) if field == 0xFFFFFFFF else field for field in fields]
        at += 4 + length
    return list(fields)


def _what_it_is(head: bytes) -> str:
    """What a file is that does not begin as a zip does."""
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull` or download the file"
    if head.startswith(b"\x80") or head[257:262] == b"ustar":
        return "it has the format of torch before 1.6; open it with torch.load and torch.save it again"
    if head[8:9] == b"{":
        return "it is a safetensors file, not a checkpoint of torch.save"
    return "it is not a checkpoint of torch.save (no zip file)"


# ---- the pickle: opcodes as in Python's pickletools, calls as PyTorch's torch/_utils.py describes them


class _Unpickler:
    """Interprets the opcodes that `torch.save` writes for tensors, plain containers and scalars, protocols 2 to 5.

    Containers become dicts, lists and tuples; tensors become `_Tensor`. Every step costs constant time or time in
    proportion to the bytes or stack items it consumes, and no step hashes, compares or prints a container.
    """

    def __init__(self, data: bytes, records: Mapping[str, _Record]) -> None:
        self._data = data
        self._at = 0
        self._records = records
        self._storages: dict[str, _Storage] = {}
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
                        raise _Refused("its pickle protocol is unknown; save it again with pickle_protocol=2")
                case b"\x95":  # FRAME: a hint how much to read ahead
                    take(8)
                case b".":  # STOP
                    if len(stack) != 1 or self._marks or self._at != len(self._data):
                        raise self._malformed()
                    return stack[0]
                case _:
                    raise _Refused(
                        f"its pickle holds opcode 0x{opcode[0]:02x} at byte {self._at - 1}, which tensors and plain "
                        "containers do not need"
                    )
        raise _Refused(f"its pickle takes more than {_MAX_OPCODES} steps")

    def _malformed(self) -> _Refused:
        return _Refused(f"its pickle is malformed at byte {self._at}; download or save it again")

    def _take(self, size: int) -> bytes:
        start = self._at
        self._at = start + size
        if self._at > len(self._data):
            raise _Refused("its pickle ends too early; download or save it again")
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
                raise _Refused(f"it holds a dict with a key of type {kind}; supported are str and int of 62 bits")
            target[key] = value

    def _global(self, module: object, name: object) -> _Global:
        if type(module) is not str or type(name) is not str:
            raise self._malformed()
        full = f"{module}.{name}"
        if full in _CALLS or full in _STORAGES or full in _DTYPES:
            return _Global(full)
        if module == "torch" and (name.endswith("Storage") or name.startswith(_OTHER_DTYPES)):
            raise _Refused(f"it holds tensors of type {_quote(full)}; supported are {', '.join(_NUMPY)}")
        raise _Refused(
            f"it calls for {_quote(full)}, which tensors do not need; if you trust the file, open it with torch.load "
            "and torch.save its state_dict() alone"
        )

    def _call(self, function: object, arguments: object) -> object:
        if type(function) is not _Global or function.name not in _CALLS or type(arguments) is not tuple:
            raise self._malformed()
        call, least, most = _CALLS[function.name]
        if not least <= len(arguments) <= most:
            raise self._malformed()
        return call(*arguments)

    def _storage(self, identity: object) -> _Storage:
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
            raise _Refused(f"its storage {_quote(key)} is missing; download or save it again")
        if record.size != numel * _NUMPY[dtype].itemsize:
            raise _Refused(
                f"its storage {_quote(key)} should hold {numel} elements of {dtype} but has {record.size} bytes; "
                "download or save it again"
            )
        storage = _Storage(key, dtype, numel, record.start)
        if self._storages.setdefault(key, storage) != storage:
            raise _Refused(f"its storage {_quote(key)} is used with two dtypes")
        return storage


def _is_extent(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_EXTENT


def _ordered_dict() -> dict[object, object]:
    return {}


def _size(shape: object) -> object:
    if type(shape) is not tuple:
        raise _Refused("it holds a torch.Size of something else than a tuple; download or save it again")
    return shape


def _parameter(tensor: object, requires_grad: object, hooks: object) -> _Tensor:
    if type(tensor) is not _Tensor:
        raise _Refused("it holds a parameter that is no tensor; download or save it again")
    return tensor


def _tensor_v2(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object,
    hooks: object,
    metadata: object = None,
) -> _Tensor:
    dtype = storage.dtype if type(storage) is _Storage else ""
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
) -> _Tensor:
    """PyTorch 2.1 and later, for dtypes that have no storage class of their own."""
    name = _DTYPES.get(dtype.name, "") if type(dtype) is _Global else ""
    return _tensor(storage, offset, shape, strides, name, metadata)


def _tensor(storage: object, offset: object, shape: object, strides: object, dtype: str, metadata: object) -> _Tensor:
    """A tensor of `dtype` over a storage; offset and strides count elements."""
    if (
        type(storage) is not _Storage
        or not dtype
        or not _is_extent(offset)
        or type(shape) is not tuple
        or type(strides) is not tuple
        or not len(shape) == len(strides) <= _MAX_DIMS
        or not all(map(_is_extent, shape))
        or not all(map(_is_extent, strides))
    ):
        raise _Refused("it holds a tensor of impossible size, stride or offset; download or save it again")
    if metadata is not None and metadata != {}:
        raise _Refused("it holds a tensor with a lazy conjugate or negation; save it resolved (torch.resolve_neg)")
    itemsize = _NUMPY[dtype].itemsize
    numel = math.prod(shape)
    if numel == 0:  # its offset may lie behind the storage's end
        if math.prod(size or 1 for size in shape) * itemsize >= 1 << 62:
            raise _Refused(f"it holds an empty tensor of impossible shape {shape}; download or save it again")
        return _Tensor(dtype, shape, (0,) * len(shape), storage.start, 0)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if (offset + last + 1) * itemsize > storage.nbytes:
        raise _Refused(
            f"its storage {_quote(storage.key)} has {storage.nbytes} bytes, too few for a tensor of shape {shape} and "
            f"strides {strides} from element {offset}; download or save it again"
        )
    if numel * itemsize > max(storage.nbytes, _MAX_EXPANDED):
        raise _Refused(f"it expands {storage.nbytes} bytes into a tensor of shape {shape}; save the tensor unexpanded")
    return _Tensor(
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


def _named_tensors(root: object) -> dict[str, _Tensor]:
    """The tensors inside nested containers by dotted name; see `read_checkpoint` for the rule."""
    if type(root) not in (dict, list, tuple):
        raise _Refused("its outermost object is no dict, list or tuple; save the model's state_dict()")
    if type(root) is dict and not _holds_tensor(root):
        root = next((root[key] for key in _WRAPPERS if _holds_tensor(root.get(key))), root)

    tensors: dict[str, _Tensor] = {}
    items = 0

    def walk(container: object, prefix: str, depth: int) -> None:
        nonlocal items
        items += len(container)
        if items > _MAX_ITEMS or depth > _MAX_DEPTH:
            raise _Refused("its containers are too large or too deeply nested for a state dict")
        for key, value in container.items() if type(container) is dict else enumerate(container):
            kind = type(value)
            if kind not in (dict, list, tuple, _Tensor, _Storage):
                continue
            name = f"{prefix}{key}"
            if len(name) > _MAX_NAME or not name.isprintable():
                raise _Refused(f"it holds a tensor of impossible name {_quote(name)}")
            if kind is _Tensor:
                if name in tensors or len(tensors) == _MAX_TENSORS:
                    reason = "two tensors of one name," if name in tensors else f"more than {_MAX_TENSORS} tensors, at"
                    raise _Refused(f"it holds {reason} {_quote(name)}")
                tensors[name] = value
            elif kind is _Storage:
                raise _Refused(f"it holds a storage without a tensor, {_quote(name)}; save tensors alone")
            else:
                walk(value, f"{name}.", depth + 1)

    walk(root, "", 1)
    if not tensors:
        raise _Refused("it holds no tensors")
    return tensors


def _holds_tensor(value: object) -> bool:
    return type(value) is dict and any(type(item) is _Tensor for item in value.values())
