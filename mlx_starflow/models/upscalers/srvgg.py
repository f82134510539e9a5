"""SRVGGNet, Real-ESRGAN's compact network: plain convolutions, and a pixel shuffle onto the picture itself.

Modules are named as in its checkpoints, such as realesr-general-x4v3 and realesr-animevideov3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

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
    pixel_shuffle,
    require,
    root,
    shape_of,
)
from mlx_starflow.models.upscalers.tiling import Tiles

_AT_ONCE = 8
"""Convolutions that a tile goes through before the next one."""

_LAYER = re.compile(r"body\.(\d+)\.(weight|bias)")


class SRVGGNet(UpscalingNetwork):
    """The network.

    Args:
        channels: of the feature maps.
        convolutions: between the first and the last one.
        scale: see `UpscalingNetwork`.
    """

    architecture = "SRVGGNet"
    pixel_radius = 1

    def __init__(self, channels: int, convolutions: int, scale: int):
        super().__init__()
        self.channels, self.scale = channels, scale
        inputs = [COLOURS, *(channels for _ in range(convolutions))]
        self.body: list[nn.Module] = []
        for count in inputs:
            self.body += [Convolution(count, channels), nn.PReLU(channels)]
        self.body.append(Convolution(channels, COLOURS * scale**2))
        self.stages = len(self._runs())
        self.held = 3 * channels + COLOURS
        self.work = 7 * channels
        self.pixel_work = 2 * channels + 6 * COLOURS * scale**2

    @classmethod
    def recognizes(cls, names: Iterable[str]) -> bool:
        names = set(names)
        return {"body.0.weight", "body.1.weight", "body.2.weight"} <= names and all(map(_LAYER.fullmatch, names))

    @classmethod
    def sources(cls, names: Iterable[str]) -> dict[str, str]:
        return {name: name for name in names}

    @classmethod
    def of(cls, shapes: Mapping[str, Shape]) -> SRVGGNet:
        channels, inputs, *_ = shape_of(shapes, "body.0.weight")
        # The last convolution stands after pairs of one and its activation.
        layers = count_blocks(match[1] for name in shapes if (match := _LAYER.fullmatch(name)))
        require(layers % 2, "its last layer is no convolution: it is not complete")
        outputs = shape_of(shapes, f"body.{layers - 1}.weight")[0]
        scale = root(outputs / inputs)
        require(scale, f"its last convolution makes {outputs} channels, no square times {inputs}")
        check_network(layers // 2, channels, scale, (inputs, inputs))
        return cls(channels, layers // 2 - 1, scale)

    def _runs(self) -> list[Sequence[nn.Module]]:
        layers = self.body[:-1]
        return [layers[start : start + 2 * _AT_ONCE] for start in range(0, len(layers), 2 * _AT_ONCE)]

    def features(self, x: mx.array, tiles: Tiles) -> tuple[mx.array, ...]:
        h = x.astype(self.body[0].weight.dtype)
        for run in self._runs():
            h = tiles(nn.Sequential(*run), h, radius=len(run) // 2)
        return h, x

    def pixels(self, *maps: mx.array) -> mx.array:
        h, x = maps
        return pixel_shuffle(self.body[-1](h), self.scale).astype(mx.float32) + nearest(x, self.scale)
