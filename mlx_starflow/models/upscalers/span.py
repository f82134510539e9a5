"""SPAN: blocks of three convolutions whose own result gates it, without parameters (arXiv 2311.12770).

A convolution is trained as three in a row (1x1, 3x3, 1x1) beside a 1x1 one, and is one 3x3 convolution afterwards: its
weights are computed when a checkpoint is read. Modules are named as in the official release.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.models.autoencoder_layers import PointwiseConv
from mlx_starflow.models.upscalers.network import (
    COLOURS,
    Convolution,
    Shape,
    UpscalingNetwork,
    channels_last,
    check_network,
    pixel_shuffle,
    require,
    root,
    shape_of,
)
from mlx_starflow.models.upscalers.tiling import Tiles

_BLOCKS = 6
_BLOCK_RADIUS = 3
_RANGE = 255.0
_MEAN = (0.4488, 0.4371, 0.4040)
"""Checkpoints do not say these two."""

_NO_NORM = "no_norm"
"""Tensor of a checkpoint whose network takes pictures as they are."""

_PART = re.compile(r"(.*)\.(?:sk|conv\.[012]|eval_conv)\.(?:weight|bias)")


class GatedBlock(nn.Module):
    """Three convolutions; their result, with the input added, is multiplied by how far it is from zero."""

    def __init__(self, channels: int):
        super().__init__()
        self.c1_r, self.c2_r, self.c3_r = (Convolution(channels, channels) for _ in range(3))

    def __call__(self, x: mx.array) -> mx.array:
        return self.both(x)[0]

    def both(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The result, and what the first convolution made."""
        first = nn.silu(self.c1_r(x))
        y = self.c3_r(nn.silu(self.c2_r(first)))
        return (y + x) * (mx.sigmoid(y) - 0.5), first


class SPAN(UpscalingNetwork):
    """The network.

    Args:
        channels: of the feature maps.
        scale: see `UpscalingNetwork`.
        normalized: pictures are taken from their mean, in levels of 255.
    """

    architecture = "SPAN"
    stages = _BLOCKS
    pixel_radius = _BLOCK_RADIUS + 2

    def __init__(self, channels: int, scale: int, normalized: bool = True):
        super().__init__()
        self.channels, self.scale, self.normalized = channels, scale, normalized
        self.conv_1 = Convolution(COLOURS, channels)
        for number in range(1, _BLOCKS + 1):
            setattr(self, f"block_{number}", GatedBlock(channels))
        self.conv_cat = PointwiseConv(4 * channels, channels)
        self.conv_2 = Convolution(channels, channels)
        self.upsampler = [Convolution(channels, COLOURS * scale**2)]
        self.held = 5 * channels
        self.work = 6 * channels
        self.pixel_work = 12 * channels + 4 * COLOURS * scale**2

    @classmethod
    def recognizes(cls, names: Iterable[str]) -> bool:
        return {"conv_1.sk.weight", "block_1.c1_r.sk.weight", "conv_cat.weight", "upsampler.0.weight"} <= set(names)

    @classmethod
    def sources(cls, names: Iterable[str]) -> dict[str, str]:
        return {name: name for name in names}

    @classmethod
    def of(cls, shapes: Mapping[str, Shape]) -> SPAN:
        channels, inputs, *_ = shape_of(shapes, "conv_1.sk.weight")
        outputs = shape_of(shapes, "upsampler.0.weight")[0]
        scale = root(outputs / inputs)
        require(scale, f"its last convolution makes {outputs} channels, no square times {inputs}")
        check_network(_BLOCKS, channels, scale, (inputs, inputs))
        return cls(channels, scale, _NO_NORM not in shapes)

    @classmethod
    def sanitize(cls, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
        out = {}
        for name, tensor in tensors.items():
            if match := _PART.fullmatch(name):
                kernel, bias = f"{match[1]}.weight", f"{match[1]}.bias"
                if kernel not in out:
                    out[kernel], out[bias] = _merged(tensors, match[1])
            elif name != _NO_NORM:
                out[name] = channels_last(tensor)
        return out

    def features(self, x: mx.array, tiles: Tiles) -> tuple[mx.array, ...]:
        if self.normalized:
            x = (x - mx.array(_MEAN)) * _RANGE
        first = tiles(self.conv_1, x.astype(self.conv_1.weight.dtype), radius=1)
        second = h = tiles(self.block_1, first, radius=_BLOCK_RADIUS)
        for number in range(2, _BLOCKS):
            h = tiles(self[f"block_{number}"], h, radius=_BLOCK_RADIUS)
        return first, second, h

    def pixels(self, *maps: mx.array) -> mx.array:
        first, second, h = maps
        last, inner = self[f"block_{_BLOCKS}"].both(h)
        joint = self.conv_cat(mx.concatenate([first, self.conv_2(last), second, inner], axis=-1))
        return pixel_shuffle(self.upsampler[0](joint), self.scale).astype(mx.float32)


def _merged(tensors: Mapping[str, mx.array], path: str) -> tuple[mx.array, mx.array]:
    """Weight `[out, 3, 3, in]` and bias of the convolution that those of a checkpoint at `path` are together.

    Raises StarflowError if they do not fit together.
    """
    weights: list[mx.array] = []
    biases: list[mx.array] = []
    for part in ("conv.0", "conv.1", "conv.2", "sk"):
        for kind, ndim, found in (("weight", 4, weights), ("bias", 1, biases)):
            name = f"{path}.{part}.{kind}"
            require(name in tensors, f"the tensor {name} is missing")
            require(tensors[name].ndim == ndim, f"the tensor {name} has the shape {list(tensors[name].shape)}")
            found.append(tensors[name].astype(mx.float32))
    (first, kernel, last, beside), (b0, b1, b2, b3) = weights, biases
    a, b, c = first.shape[1], first.shape[0], kernel.shape[0]
    outputs = last.shape[0]
    fits = first.shape == (b, a, 1, 1) and kernel.shape == (c, b, 3, 3) and last.shape == (outputs, c, 1, 1)
    fits = fits and beside.shape == (outputs, a, 1, 1)
    fits = fits and [each.shape for each in (b0, b1, b2, b3)] == [(b,), (c,), (outputs,), (outputs,)]
    require(fits, f"the tensors of {path} do not fit together")
    # Matrices at the ends: last [out, c] @ kernel [c, b] @ first [b, in], at each of the nine positions.
    first, last, beside = (each[:, :, 0, 0] for each in (first, last, beside))
    taps = last @ kernel.transpose(2, 3, 0, 1) @ first
    middle = mx.zeros((3, 3, 1, 1))
    middle[1, 1] = 1
    bias = last @ (kernel.sum(axis=(2, 3)) @ b0 + b1) + b2 + b3
    return (taps + middle * beside).transpose(2, 0, 1, 3), bias
