"""What the converters share: tensors that are read when they are written, and writing them as a module's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_starflow.convert.distributed import is_distributed, open_distributed
from mlx_starflow.convert.pth import Checkpoint, read_checkpoint
from mlx_starflow.convert.tensor import Tensor
from mlx_starflow.errors import StarflowError, one_line, printable
from mlx_starflow.media.files import exists, inside, is_folder, is_regular
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.model_dir.files import read_index, read_safetensors
from mlx_starflow.model_dir.quantization import quantize_module, quantized_layers
from mlx_starflow.model_dir.saving import save_tensors
from mlx_starflow.model_dir.weights import MLX_DTYPES, check_floating, check_shapes, parameters

_INDEX = ".index.json"


def as_tensor(array: mx.array) -> Tensor:
    """A (lazy) array that is let go of when the tensor is."""
    return Tensor(array.shape, array.dtype, lambda: array)


class OpenedCheckpoint(NamedTuple):
    """The tensors of a checkpoint, none of them read yet.

    Attributes:
        tensors: by name.
        wrapper: the key of the dictionary that they were taken from; "" if they were in none.
        others: keys of further ones that hold tensors.
    """

    tensors: dict[str, Tensor]
    wrapper: str = ""
    others: tuple[str, ...] = ()


def open_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of `open_checkpoint`."""
    return open_checkpoint(path).tensors


def open_checkpoint(path: Path, ema: bool = False) -> OpenedCheckpoint:
    """Open a checkpoint.

    Args:
        path: a `.safetensors` file; the `.index.json` of shards, or a folder with one, or with `.safetensors` files
            that are one together; a folder that `torch.distributed.checkpoint` wrote (this needs PyTorch); or else a
            file of `torch.save`.
        ema: take the dictionary of averaged weights, if there is one.

    Raises:
        StarflowError: the file is missing, damaged or none of these.
    """
    if is_distributed(path):
        return OpenedCheckpoint(*open_distributed(path, ema))
    if files := shards(path):
        tensors: dict[str, Tensor] = {}
        for file in files:
            found = open_tensors(file)
            if twice := next((name for name in found if name in tensors), None):
                raise StarflowError(
                    f"{path}: the tensor {printable(twice)} is in two files; give the one that is meant"
                )
            tensors.update(found)
        return OpenedCheckpoint(tensors)
    if path.suffix == ".safetensors":
        return OpenedCheckpoint({name: as_tensor(array) for name, array in read_safetensors(path).items()})
    checkpoint = read_checkpoint(path, ema=ema)
    tensors = {name: _stored(checkpoint, name) for name in checkpoint}
    return OpenedCheckpoint(tensors, checkpoint.wrapper, checkpoint.others)


def shards(path: Path) -> list[Path]:
    """The files of a checkpoint in several: those of an index, or all `.safetensors` of a folder; [] if it is one file.

    Raises:
        StarflowError: one of them is missing, or a folder has several indices.
    """
    folder = path
    if is_folder(path):
        indices = sorted(each for each in path.iterdir() if each.name.endswith(_INDEX))
        if len(indices) > 1:
            raise StarflowError(f"{path} holds {indices[0].name} and {indices[1].name}: give the one that is meant")
        if not indices:
            return [inside(path, each.name) for each in sorted(path.iterdir()) if each.suffix == ".safetensors"]
        path = inside(folder, indices[0].name)
    elif path.name.endswith(_INDEX) and is_regular(path):
        folder = path.parent
    else:
        return []
    files = [inside(folder, name) for name in sorted(set(read_index(path).values()))]
    if absent := [file for file in files if not is_regular(file)]:
        raise StarflowError(f"{absent[0]} is missing; download it into {folder}")
    return files


def _stored(checkpoint: Checkpoint, name: str) -> Tensor:
    kind = checkpoint.dtype(name)
    dtype = mx.bool_ if kind == "bool" else getattr(mx, kind)
    return Tensor(checkpoint.shape(name), dtype, partial(checkpoint.mx, name))


def check_target(source: Path, out_dir: Path) -> None:
    """Raises StarflowError if the model cannot be written, or would be into the checkpoint's own folder."""
    if exists(out_dir) and out_dir.resolve() == source.resolve():
        raise StarflowError(f"{out_dir} is the checkpoint's own folder; give another one to write to")
    check_outputs(folders=[out_dir])


def write_module(
    out_dir: Path,
    module: nn.Module,
    tensors: dict[str, Tensor],
    config: Mapping[str, Any],
    *,
    source: Path,
    dtype: mx.Dtype | None = None,
    quantize: int | str | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a checkpoint as a model directory, one tensor in memory at a time.

    Args:
        out_dir: folder to write, made if need be.
        module: the network, newly made: it says which tensors there must be and which layers can be quantized. Its
            own numbers are not used.
        tensors: the checkpoint's, under the module's names and in its layout; emptied, so that each can be let go of.
        config: of the model directory; `quantization` is added.
        source: what error messages call the checkpoint.
        dtype: None: as in the checkpoint, and float32 for what is not a network's dtype there, such as float64.
        quantize: as in `quantize_module`.
        files: contents of further files by name.

    Raises:
        StarflowError: a tensor is missing, unexpected, of another shape, not of real numbers or cannot be read, or
            `out_dir` cannot be written.
    """
    expected = parameters(module)
    check_shapes({n: t.shape for n, t in tensors.items()}, {n: p.shape for n, p in expected.items()}, source)
    check_floating({name: tensor.dtype for name, tensor in tensors.items()}, source)
    stored = {
        name: tensor.dtype if tensor.dtype in MLX_DTYPES.values() else mx.float32 for name, tensor in tensors.items()
    }
    dtypes = {name: dtype or stored[name] for name in expected}
    # Never computed: they stand for the shapes and dtypes that quantizing makes of them.
    module.update(tree_unflatten([(name, mx.zeros(p.shape, dtypes[name])) for name, p in expected.items()]))
    if quantize is not None:
        config = {**config, "quantization": quantize_module(module, quantize)}
    layers = quantized_layers(module)

    def arrays() -> Iterator[tuple[str, mx.array]]:
        for name in list(tensors):
            try:
                # float64 exists on the CPU alone.
                with mx.stream(mx.cpu):
                    array = tensors.pop(name).read().astype(dtypes[name])
                mx.eval(array)
            except RuntimeError as error:
                raise StarflowError(f"cannot read {source}: {one_line(error)}") from error
            path, _, kind = name.rpartition(".")
            if kind == "weight" and path in layers:
                layer = layers[path]
                parts = mx.quantize(array, group_size=layer.group_size, bits=layer.bits, mode=layer.mode)
                names = [f"{path}.{part}" for part in ("weight", "scales", "biases")]
                yield from zip(names, parts, strict=False)  # only the affine mode has biases
            else:
                yield name, array

    return save_tensors(out_dir, parameters(module), arrays(), config, files=files)
