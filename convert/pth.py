"""Reading PyTorch checkpoints (.pth, .pt, .ckpt) safely, without PyTorch.

`torch.save` writes a zip of uncompressed records: `NAME/data.pkl`, a pickle that describes the objects, and one record
`NAME/data/KEY` for each storage, the flat memory that one or more tensors look into. A pickle is a program, and
Python's own `pickle.load` would let whoever wrote the file run code here. `pth_pickle.py` allows what tensors and
plain containers need, and everything else is refused with one `StarflowError` that says why.

No tensor is read when a file is opened: each is a view of a memory map, made when it is asked for. Checksums of
storages are not verified, since that would read the whole file a second time; the pickle's is.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.convert.pth_pickle import MAX_EXPANDED, NUMPY_DTYPES, Storage, StoredTensor, unpickle
from mlx_starflow.convert.pth_zip import MappedFile, Refused, quote, zip_records
from mlx_starflow.convert.wrappers import choose_wrapper
from mlx_starflow.errors import StarflowError, one_line

# Far above any real model; low enough that a hostile file costs neither minutes nor gigabytes.
_MAX_PICKLE = 1 << 24  # bytes of data.pkl; a state dict needs about 200 a tensor
_MAX_ITEMS = 1_000_000  # items of all the containers searched for tensors
_MAX_TENSORS = 100_000
_MAX_DEPTH = 32  # containers inside containers
_MAX_NAME = 1024  # characters
_MAX_REPEATED = 16  # tensors that share all of their memory


class Checkpoint(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint by name, in the file's order; made by `read_checkpoint`. Opening one reads no tensor.

    The file stays mapped as long as the checkpoint or an array taken from it lives, and must not be overwritten or
    shortened in that time (replacing it by a rename is harmless).

    Attributes:
        wrapper: the key of the dictionary that they were taken from; "" if they were in none.
        others: keys of further dictionaries of tensors beside it.
    """

    def __init__(
        self,
        tensors: dict[str, StoredTensor],
        memory: MappedFile,
        wrapper: str = "",
        others: tuple[str, ...] = (),
    ) -> None:
        self._tensors = tensors
        self._memory = memory
        self.wrapper, self.others = wrapper, others

    def __getitem__(self, name: str) -> np.ndarray:
        """A read-only view of the file, axes as in PyTorch; not contiguous where the tensor was not.

        bfloat16, for which NumPy has no type, comes as uint16 holding the same bits: see `dtype` and `mx`.

        Raises:
            KeyError: the checkpoint holds no such tensor.
        """
        tensor = self._tensors[name]
        if tensor.extent == 0:
            return np.empty(tensor.shape, NUMPY_DTYPES[tensor.dtype])
        window = memoryview(self._memory)[tensor.start : tensor.start + tensor.extent]
        return np.ndarray(tensor.shape, NUMPY_DTYPES[tensor.dtype], window, strides=tensor.strides)

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
        return math.prod(self.shape(name)) * NUMPY_DTYPES[self.dtype(name)].itemsize


def read_checkpoint(path: str | os.PathLike[str], *, ema: bool = False) -> Checkpoint:
    """Open a checkpoint that `torch.save` of PyTorch 1.6 or later wrote, running none of its code.

    A state dict keeps its names. Where the outermost dict holds no tensor itself but a dict with tensors under
    "state_dict", "model_state_dict", "model" or "module" (the first of these), or else under a key of averaged weights
    such as "ema", that dict is the checkpoint, and what stands beside it, such as an optimizer, is left alone; `ema`
    takes the averaged weights first. Such a dict may be in another one, as {"ema": {"decay": 0.999, "module": {...}}}.
    Otherwise containers inside containers join their keys and indices with dots: {"a": [t]} holds "a.0". Numbers,
    strings and the like are passed over.

    Raises:
        StarflowError: the file cannot be read, is damaged, is no such checkpoint, or wants anything but tensors and
            plain containers. The message names the file and the reason.
    """
    name = str(os.fspath(path))
    name = name if name.isprintable() else ascii(name)
    try:
        return _read(path, ema)
    except Refused as reason:
        raise StarflowError(f"cannot read checkpoint {name}: {reason}") from None
    except OSError as error:
        raise StarflowError(f"cannot read checkpoint {name}: {one_line(error)}") from None


def _read(path: str | os.PathLike[str], ema: bool) -> Checkpoint:
    try:
        mode = os.stat(path).st_mode
    except ValueError:
        raise Refused("that is no file name") from None
    if stat.S_ISDIR(mode):
        raise Refused("it is a directory; name the file itself")
    if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
        raise Refused("it is not a regular file")
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) == 0:
            raise Refused("it is empty")
        try:
            memory = MappedFile(file.fileno(), size, access=mmap.ACCESS_READ)
        except ValueError:
            raise Refused("it changed while it was being read") from None
    records = zip_records(memory)
    folders = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise Refused(f"a file of torch.save has one data.pkl, this zip has {len(folders)}")
    folder = folders[0]
    if folder + "byteorder" in records:
        order = memory.contents(records[folder + "byteorder"], limit=16)
        if order != b"little":
            raise Refused(f"its byte order is {quote(order.decode('latin1'))}; only 'little' is supported")
    pickled = memory.contents(records[folder + "data.pkl"], _MAX_PICKLE)
    prefix = folder + "data/"
    storages = {name[len(prefix) :]: record for name, record in records.items() if name.startswith(prefix)}
    root, wrapper, others = _state_dict(unpickle(pickled, storages), ema)
    checkpoint = Checkpoint(_named_tensors(root), memory, wrapper, others)
    total = sum(map(checkpoint.nbytes, checkpoint))
    if total > _MAX_REPEATED * size + MAX_EXPANDED:
        raise Refused(f"its tensors take {total} bytes and the file {size}: save them unexpanded, and each once")
    return checkpoint


def _state_dict(root: Any, ema: bool) -> tuple[Any, str, tuple[str, ...]]:
    """The dictionary of the model's tensors in a training's, its key, and the keys of others; see `read_checkpoint`."""
    if type(root) is not dict or _holds_tensor(root):
        return root, "", ()
    inner = {key: _inner(value) for key, value in root.items() if isinstance(key, str)}
    found = {key: value for key, value in inner.items() if value is not None}
    wrapper = choose_wrapper(found, ema)
    return (found[wrapper] if wrapper else root), wrapper, tuple(key for key in found if key != wrapper)


def _inner(value: Any) -> Any:
    """A dictionary that holds tensors: this one, or one in it under a key of weights; None if there is none."""
    if _holds_tensor(value):
        return value
    if type(value) is not dict:
        return None
    known = [key for key, each in value.items() if isinstance(key, str) and _holds_tensor(each)]
    wrapper = choose_wrapper(known, ema=False)
    return value[wrapper] if wrapper else None


def _named_tensors(root: Any) -> dict[str, StoredTensor]:
    """The tensors inside nested containers by dotted name; see `read_checkpoint` for the rule."""
    if type(root) not in (dict, list, tuple):
        raise Refused("its outermost object is no dict, list or tuple; save the model's state_dict()")
    tensors: dict[str, StoredTensor] = {}
    items = 0

    def walk(container: Any, prefix: str, depth: int) -> None:
        nonlocal items
        items += len(container)
        if items > _MAX_ITEMS or depth > _MAX_DEPTH:
            raise Refused("its containers are too large or too deeply nested for a state dict")
        for key, value in container.items() if type(container) is dict else enumerate(container):
            kind = type(value)
            if kind not in (dict, list, tuple, StoredTensor, Storage):
                continue
            name = f"{prefix}{key}"
            if len(name) > _MAX_NAME or not name.isprintable():
                raise Refused(f"it holds a tensor of impossible name {quote(name)}")
            if kind is StoredTensor:
                if name in tensors or len(tensors) == _MAX_TENSORS:
                    reason = "two tensors of one name," if name in tensors else f"more than {_MAX_TENSORS} tensors, at"
                    raise Refused(f"it holds {reason} {quote(name)}")
                tensors[name] = value
            elif kind is Storage:
                raise Refused(f"it holds a storage without a tensor, {quote(name)}; save tensors alone")
            else:
                walk(value, f"{name}.", depth + 1)

    walk(root, "", 1)
    if not tensors:
        raise Refused("it holds no tensors")
    return tensors


def _holds_tensor(value: object) -> bool:
    return type(value) is dict and any(type(item) is StoredTensor for item in value.values())
