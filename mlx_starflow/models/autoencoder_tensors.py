"""The tensors of an autoencoder's checkpoint, in PyTorch's layout, as those of our module.

PyTorch's convolutions are `[out, in, t, h, w]` or `[out, in, h, w]`, ours `[out, t, h, w, in]` or `[out, h, w, in]`.
Kernels of a single position, of either kind there, are 1x1 convolutions of pictures or matrices here. Weights of norms
may have axes of length 1 there that they have not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.trees import flattened

Shape = tuple[int, ...]
Sources = dict[str, tuple[str, Shape]]
"""Where a checkpoint has each tensor of a module: its name there, and its shape here."""


def tensor_sources(module: nn.Module, shapes: Mapping[str, Shape], rename: Callable[[str], str]) -> Sources:
    """Where a checkpoint with tensors of these shapes has each of the module's; `rename` knows its names.

    Raises:
        StarflowError: a tensor is missing, unexpected, there twice, or of another shape than the config says.
    """
    expected = {name: parameter.shape for name, parameter in flattened(module.parameters())}
    out: Sources = {}
    for source, shape in shapes.items():
        name = rename(source)
        if name not in expected:
            raise StarflowError(f"the autoencoder's config has no place for the tensor {source}")
        if name in out:
            raise StarflowError(f"the autoencoder's tensor {name} is there twice, under two names")
        if not _fits(shape, expected[name]):
            first, *kernel = expected[name]
            said = [first, *kernel[-1:], *kernel[:-1]]
            raise StarflowError(f"the autoencoder's tensor {source} is {list(shape)}, its config says {said}")
        out[name] = source, expected[name]
    for name in expected:
        if name not in out:
            raise StarflowError(f"the autoencoder's tensor {name} is missing")
    return out


def _fits(shape: Shape, present: Shape) -> bool:
    """Whether a checkpoint's tensor of this shape is one of our shape `present`."""
    if len(present) == 1:
        return tuple(shape) == (*present, *(1 for _ in shape[1:]))
    outputs, *kernel, inputs = present
    if all(side == 1 for side in kernel):
        kernel = [1 for _ in shape[2:]]
    return len(shape) >= min(len(present), 3) and tuple(shape) == (outputs, inputs, *kernel)


def rearranged(weight: mx.array, present: Shape) -> mx.array:
    """A checkpoint's tensor in our layout, of the shape `present`."""
    return (mx.moveaxis(weight, 1, -1) if len(present) > 1 else weight).reshape(present)
