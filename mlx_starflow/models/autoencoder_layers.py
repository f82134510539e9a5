"""Layers of the image autoencoder, `[B, H, W, C]` to `[B, H, W, C]`; modules are named as in diffusers' checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.kernels import on_cpu

_NORM_EPS = 1e-6

elementwise = partial(mx.compile, shapeless=True)
"""Compiled for all shapes at once: MLX keeps what it traced as long as the function lives, and sizes are many."""


# Compiled apart from the means: those divide by sizes, and a constant of each size would be a kernel to build.
@elementwise
def _squared_distance(x: mx.array, mean: mx.array) -> mx.array:
    return mx.square(x.astype(mx.float32) - mean)


@elementwise
def _normalize(x: mx.array, mean: mx.array, scale: mx.array, bias: mx.array, silu: bool) -> mx.array:
    y = (x.astype(mx.float32) - mean) * scale + bias
    return (y * mx.sigmoid(y) if silu else y).astype(x.dtype)


class GroupNorm(nn.GroupNorm):
    """PyTorch's group norm over `[B, H, W, C]`, with SiLU after it if asked for.

    Moments a channel, then a group, need no transposed copy of the picture, and the rest fuses into one pass over it:
    several times faster than `nn.GroupNorm`. Moments are float32 in every dtype.
    """

    def __init__(self, groups: int, channels: int):
        super().__init__(groups, channels, eps=_NORM_EPS, pytorch_compatible=True)

    def __call__(self, x: mx.array, silu: bool = False) -> mx.array:
        return self.normalize(x, *self.moments([x]), silu=silu)

    def moments(self, tiles: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
        """Mean and standard deviation of the picture that tiles of rows `[B, n, W, C]` make up.

        Both are repeated for each channel, `[B, 1, 1, C]`. Several tiles are read one after the other, each of them
        evaluated before the next one.
        """
        mean = self._group_mean(tiles, lambda x: x.astype(mx.float32))
        variance = self._group_mean(tiles, lambda x: _squared_distance(x, mean))
        return mean, mx.sqrt(variance + self.eps)

    def normalize(self, x: mx.array, mean: mx.array, deviation: mx.array, silu: bool = False) -> mx.array:
        return _normalize(x, mean, self.weight / deviation, self.bias, silu)

    def _group_mean(self, tiles: Sequence[mx.array], function: Callable[[mx.array], mx.array]) -> mx.array:
        height = sum(tile.shape[1] for tile in tiles)
        # One axis after the other: a single sum over a large picture loses digits in float32.
        rows: mx.array | None = None
        for tile in tiles:
            part = function(tile).mean(axis=1)
            if len(tiles) > 1:
                part = part * (tile.shape[1] / height)
                rows = part if rows is None else rows + part
                mx.eval(rows)
            else:
                rows = part
        assert rows is not None, "a picture without tiles"
        B, _, C = rows.shape
        mean = rows.mean(axis=1).reshape(B, self.num_groups, -1).mean(axis=2, keepdims=True)
        return mx.repeat(mean, C // self.num_groups, axis=2).reshape(B, 1, 1, C)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, as the matrix product it is: the CPU's convolution copies its input first."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, kernel_size=1)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.addmm(self.bias, x, self.weight[:, 0, 0].T)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the picture's size."""

    large = 64 * 64
    """Positions of a map from which on a CPU computes it tap by tap."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, kernel_size=3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        _, H, W, C = x.shape
        if on_cpu() and x.dtype == mx.float32 and C >= 32 and self.large <= H * W:
            return self._sum_of_products(x)
        return super().__call__(x)

    def _sum_of_products(self, x: mx.array) -> mx.array:
        """One matrix product for each of the nine taps.

        MLX's convolution on the CPU gathers nine copies of the input first: more time, and for a large picture
        gigabytes. Here a tap is a run of rows of the padded picture, read where it lies. Rows that wrap around the
        picture's edge are computed as well and dropped.
        """
        B, H, W, C = x.shape
        stride = W + 2
        rows = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]).reshape(-1, C)
        lost = 2 * stride + 2
        count = rows.shape[0] - lost
        y = self.bias
        for i in range(3):
            for j in range(3):
                start = i * stride + j
                y = mx.addmm(y, rows[start : start + count], self.weight[:, i, j].T)
        return mx.pad(y, [(0, lost), (0, 0)]).reshape(B, H + 2, stride, -1)[:, :H, :W]


class ResnetBlock(nn.Module):
    """Two normalized 3x3 convolutions around which the input is added, through a 1x1 one if the width changes."""

    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, inputs)
        self.conv1 = Conv3x3(inputs, outputs)
        self.norm2 = GroupNorm(groups, outputs)
        self.conv2 = Conv3x3(outputs, outputs)
        if inputs != outputs:
            self.conv_shortcut = PointwiseConv(inputs, outputs)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv1(self.norm1(x, silu=True))
        h = self.conv2(self.norm2(h, silu=True))
        return (self.conv_shortcut(x) if "conv_shortcut" in self else x) + h


class Attention(nn.Module):
    """Single-head self-attention over all positions of the picture."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = [nn.Linear(channels, channels)]

    def __call__(self, x: mx.array) -> mx.array:
        B, H, W, C = x.shape
        h = self.group_norm(x).reshape(B, 1, H * W, C)
        h = mx.fast.scaled_dot_product_attention(
            self.to_q(h), self.to_k(h), self.to_v(h), scale=1 / math.sqrt(C), mask=None
        )
        return x + self.to_out[0](h).reshape(B, H, W, C)


class Downsample(nn.Module):
    """Halves the picture: a convolution of stride 2 that sees a zero border on the right and at the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    """Doubles the picture: every pixel four times, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        B, H, W, C = x.shape
        x = mx.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C))
        return self.conv(x.reshape(B, 2 * H, 2 * W, C))


class Stage(nn.Module):
    """The layers at one resolution, and the step to the next one, if there is one: `change` is "down" or "up"."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, change: str | None):
        super().__init__()
        self.resnets = [ResnetBlock(inputs if i == 0 else outputs, outputs, groups) for i in range(layers)]
        self.downsamplers = [Downsample(outputs)] if change == "down" else []
        self.upsamplers = [Upsample(outputs)] if change == "up" else []

    def __call__(self, x: mx.array) -> mx.array:
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """The layers at the latents' resolution, where attention is affordable."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = [ResnetBlock(channels, channels, groups) for _ in range(2)]
        self.attentions = [Attention(channels, groups)] if attention else []

    def __call__(self, x: mx.array) -> mx.array:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)
