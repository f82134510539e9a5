"""RRDBNet: residual in residual dense blocks, then nearest-neighbour upsampling (ESRGAN, arXiv 1809.00219).

Real-ESRGAN (2107.10833) trained it on degraded pictures, and for scales 2 and 1 gives it squares of 2 by 2 or 4 by 4
pixels as one position. Modules are named as in its checkpoints; those of ESRGAN and of BSRGAN have other names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.models.upscalers.network import (
    COLOURS,
    Convolution,
    Shape,
    UpscalingNetwork,
    check_network,
    count_blocks,
    nearest,
    require,
    root,
    shape_of,
)
from mlx_starflow.models.upscalers.tiling import Tiles

_RESIDUAL = 0.2
_SLOPE = 0.2
_DENSE_RADIUS = 5

_BLOCK = re.compile(r"body\.(\d+)\.")
_UP = re.compile(r"conv_up(\d+)\.weight")

# ESRGAN's first names of layers: a list with the activations and upsamplings in between, which have no tensors.
_LISTED = re.compile(r"model\.(\d+)\.(weight|bias)")
_LISTED_BLOCK = re.compile(r"model\.1\.sub\.(\d+)\.RDB([123])\.conv([1-5])\.0\.(weight|bias)")
_LISTED_LAST = re.compile(r"model\.1\.sub\.\d+\.(weight|bias)")

# BSRGAN's.
_TRUNK = re.compile(r"RRDB_trunk\.(\d+)\.RDB([123])\.conv([1-5])\.(weight|bias)")
_RENAMED = {"trunk_conv": "conv_body", "HRconv": "conv_hr", "upconv": "conv_up"}


class DenseBlock(nn.Module):
    """Five convolutions, each of which reads what all before it have made, around which the input is added."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        for number in range(1, 6):
            setattr(
                self, f"conv{number}", Convolution(channels + (number - 1) * growth, growth if number < 5 else channels)
            )

    def __call__(self, x: mx.array) -> mx.array:
        known = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            known = mx.concatenate([known, nn.leaky_relu(conv(known), _SLOPE)], axis=-1)
        return _RESIDUAL * self.conv5(known) + x


class ResidualBlock(nn.Module):
    """Three dense blocks, around which the input is added."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(channels, growth) for _ in range(3))

    def __call__(self, x: mx.array, tiles: Tiles) -> mx.array:
        h = tiles(self.rdb1, x, radius=_DENSE_RADIUS)
        h = tiles(self.rdb2, h, radius=_DENSE_RADIUS)
        return tiles(lambda h, x: _RESIDUAL * self.rdb3(h) + x, h, x, radius=_DENSE_RADIUS)


class RRDBNet(UpscalingNetwork):
    """The network.

    Args:
        channels: of the feature maps.
        growth: channels that each convolution of a dense block adds.
        blocks: residual blocks.
        doublings: how often the maps are upsampled, each time to twice their size.
        unshuffle: see `UpscalingNetwork`.
    """

    architecture = "RRDBNet"
    pixel_radius = 3

    def __init__(self, channels: int, growth: int, blocks: int, doublings: int = 2, unshuffle: int = 1):
        super().__init__()
        self.channels, self.doublings, self.unshuffle = channels, doublings, unshuffle
        self.scale = 2**doublings // unshuffle
        self.stages = 1 + 3 * blocks
        self.conv_first = Convolution(COLOURS * unshuffle**2, channels)
        self.body = [ResidualBlock(channels, growth) for _ in range(blocks)]
        self.conv_body = Convolution(channels, channels)
        for number in range(1, doublings + 1):
            setattr(self, f"conv_up{number}", Convolution(channels, channels))
        self.conv_hr = Convolution(channels, channels)
        self.conv_last = Convolution(channels, COLOURS)
        # The first map, a block's and a dense block's input, and its result in parts and in one.
        self.held = 5 * channels
        # What is known, once more with what a convolution adds, and once padded.
        self.work = 3 * (channels + 4 * growth) + 3 * channels
        self.pixel_work = 6 * channels * 4**doublings

    @classmethod
    def recognizes(cls, names: Iterable[str]) -> bool:
        renamed = set(cls.sources(names).values())
        return {"conv_first.weight", "body.0.rdb1.conv1.weight", "conv_last.weight"} <= renamed

    @classmethod
    def sources(cls, names: Iterable[str]) -> dict[str, str]:
        names = list(names)
        listed = sorted({int(match[1]) for name in names if (match := _LISTED.fullmatch(name))})
        layers = {0: "conv_first"}
        if len(listed) >= 3:
            layers |= {number: f"conv_up{k}" for k, number in enumerate(listed[1:-2], 1)}
            layers |= {listed[-2]: "conv_hr", listed[-1]: "conv_last"}
        return {name: _renamed(name, layers) for name in names}

    @classmethod
    def of(cls, shapes: Mapping[str, Shape]) -> RRDBNet:
        channels, inputs, *_ = shape_of(shapes, "conv_first.weight")
        growth = shape_of(shapes, "body.0.rdb1.conv1.weight")[0]
        colours = shape_of(shapes, "conv_last.weight")[0]
        blocks = count_blocks(match[1] for name in shapes if (match := _BLOCK.match(name)))
        doublings = sum(_UP.fullmatch(name) is not None for name in shapes)
        unshuffle = root(inputs / colours)
        require(unshuffle in (1, 2, 4), f"it makes {colours} channels of {inputs}, not a colour picture of one")
        check_network(blocks, max(channels, growth), 2**doublings / unshuffle, (inputs // unshuffle**2, colours))
        return cls(channels, growth, blocks, doublings, unshuffle)

    def features(self, x: mx.array, tiles: Tiles) -> tuple[mx.array, ...]:
        x = x.astype(self.conv_first.weight.dtype)
        first = h = tiles(self.conv_first, x, radius=1)
        for block in self.body:
            h = block(h, tiles)
        return first, h

    def pixels(self, *maps: mx.array) -> mx.array:
        first, body = maps
        h = first + self.conv_body(body)
        for number in range(1, self.doublings + 1):
            h = nn.leaky_relu(self[f"conv_up{number}"](nearest(h, 2)), _SLOPE)
        return self.conv_last(nn.leaky_relu(self.conv_hr(h), _SLOPE)).astype(mx.float32)

    def pixel_side(self, side: int) -> int:
        """Smaller tiles: here the maps are as large as the result, and take most memory."""
        return max(16, side // 2**self.doublings)


def _renamed(name: str, layers: Mapping[int, str]) -> str:
    """A tensor's name as Real-ESRGAN has it; `layers` are those of ESRGAN's list."""
    if match := _LISTED_BLOCK.fullmatch(name) or _TRUNK.fullmatch(name):
        block, dense, conv, kind = match.groups()
        return f"body.{block}.rdb{dense}.conv{conv}.{kind}"
    if match := _LISTED_LAST.fullmatch(name):
        return f"conv_body.{match[1]}"
    if (match := _LISTED.fullmatch(name)) and int(match[1]) in layers:
        return f"{layers[int(match[1])]}.{match[2]}"
    for old, new in _RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
