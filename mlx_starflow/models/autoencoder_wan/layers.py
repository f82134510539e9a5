"""Layers of the video autoencoder; most of them take and give tiles of rows, see `autoencoder_wan.tiling`."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.kernels import on_cpu
from mlx_starflow.kernels.silu import silu as activated
from mlx_starflow.models.autoencoder_kl_tiling import LOGITS
from mlx_starflow.models.autoencoder_layers import PointwiseConv, elementwise
from mlx_starflow.models.autoencoder_wan.tiling import RowQueue, StreamState, Tiles, joined, kept, resplit, whole
from mlx_starflow.models.minimal_filtering import correlate_3x3, correlate_doubled

_NORM_EPS = 1e-24


# ---- norm


# Compiled apart from the mean, which divides by a size. Without shapes: a trace for each would never be let go of.
@elementwise
def _square(x: mx.array) -> mx.array:
    return mx.square(x.astype(mx.float32))


@elementwise
def _normalize(x: mx.array, mean_square: mx.array, gamma: mx.array, silu: bool) -> mx.array:
    y = x.astype(mx.float32) * mx.rsqrt(mean_square + _NORM_EPS) * gamma
    return (activated(y) if silu else y).astype(x.dtype)


class RMSNorm(nn.Module):
    """Each position divided by its root mean square over the channels, times `gamma`; then SiLU if asked for."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = mx.ones((channels,))

    def __call__(self, x: mx.array, silu: bool = False) -> mx.array:
        return _normalize(x, _square(x).mean(axis=-1, keepdims=True), self.gamma, silu)


# ---- convolutions


def correlate(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """`[B, T, H, W, C]` with kernels `[O, t, h, w, C]`, nowhere padded.

    On the CPU it is a sum of matrix products, in float32: MLX's convolution would gather a copy of the input for each
    tap of the kernel. Large frames take `minimal_filtering`, which has fewer products.
    """
    if on_cpu():
        frames = [x[i : i + 1] for i in range(x.shape[0])]
        if _is_large(x, weight):
            return _stacked([correlate_3x3(each[0], weight, bias) for each in frames])
        return mx.concatenate([_sum_of_products(each, weight, bias) for each in frames])
    if weight.shape[1] == 1:
        y = mx.conv2d(x.flatten(0, 1), weight[:, 0])
        return y.reshape(*x.shape[:2], *y.shape[1:]) + bias
    return mx.conv3d(x, weight) + bias


def _stacked(videos: list[mx.array]) -> mx.array:
    """Without a copy if there is only one."""
    return videos[0][None] if len(videos) == 1 else mx.stack(videos)


LARGE = 512
"""Positions that a convolution makes at least for `minimal_filtering` to pay: its kernels are combined first."""


def _is_large(x: mx.array, weight: mx.array) -> bool:
    _, T, H, W, C = x.shape
    positions = (T - weight.shape[1] + 1) * (H - 2) * (W - 2)
    return weight.shape[2:4] == (3, 3) and positions >= LARGE and min(C, weight.shape[0]) >= 32


def _sum_of_products(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    _, T, H, W, C = x.shape
    O, t, h, w, _ = weight.shape  # noqa: E741
    flat = x.reshape(-1, C).astype(mx.float32)
    last = ((t - 1) * H + h - 1) * W + w - 1
    count = flat.shape[0] - last
    y = bias.astype(mx.float32)
    for k in range(t):
        for i in range(h):
            for j in range(w):
                start = (k * H + i) * W + j
                y = mx.addmm(y, flat[start : start + count], weight[:, k, i, j].astype(mx.float32).T)
        # Each product copies its part of the kernel; so no more than a third of the copies exist at once.
        mx.eval(y)
    # Positions at which the kernel would wrap around an edge are computed as well, and dropped here.
    y = mx.pad(y.astype(x.dtype), [(0, (h - 1) * W + w - 1), (0, 0)])
    return y.reshape(1, T - t + 1, H, W, O)[:, :, : H - h + 1, : W - w + 1]


class _RowConv(nn.Module):
    """What the spatial convolutions share: windows of rows that overlap from tile to tile."""

    stride = 1
    frames = 0
    """How many of the frames before it reads."""

    columns = (1, 1)
    """Of zeros, on the left and on the right."""

    def compute(self, x: mx.array) -> mx.array:
        """Of a window of rows: with the frames before, the columns, and a row more above and below it (stride 2: below
        only)."""
        raise NotImplementedError

    def __call__(self, tiles: Tiles, state: StreamState, norm: RMSNorm | None = None) -> Tiles:
        """The convolution of the tiles; if there is a norm, of their SiLU after it."""
        carry: mx.array | None = None
        index = 0
        for x, last in tiles:
            if norm is not None:
                x = norm(x, silu=True)
            if self.frames:
                x = state.continued(self, index, x, self.frames)
            index += 1
            x = mx.pad(x, [(0, 0), (0, 0), (0, 0), self.columns, (0, 0)])
            B, T, _, W, C = x.shape
            border = mx.zeros((B, T, 1, W, C), x.dtype)
            if carry is None and self.stride == 1:
                carry = border
            x = mx.concatenate([part for part in (carry, x, border if last else None) if part is not None], axis=2)
            count = (x.shape[2] - 3) // self.stride + 1
            if count <= 0:
                carry = x
                continue
            carry = None if last else kept(x[:, :, count * self.stride :])
            y = self.compute(x[:, :, : (count - 1) * self.stride + 3])
            mx.eval(y, *([] if last else [carry]))
            tile = [(y, last)]
            del x, y, border
            yield tile.pop()


def _conv_weight(outputs: int, *shape: int) -> mx.array:
    scale = 1 / math.sqrt(math.prod(shape))
    return mx.random.uniform(-scale, scale, (outputs, *shape))


class CausalConv(_RowConv):
    """A 3x3x3 convolution that keeps the video's size; in time it sees a frame and the two before it."""

    frames = 2

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = _conv_weight(outputs, 3, 3, 3, inputs)
        self.bias = mx.zeros((outputs,))

    def compute(self, x: mx.array) -> mx.array:
        # A video's first frame comes alone: the frames before it are zero.
        return correlate(x, self.weight[:, -1:] if x.shape[1] == 1 else self.weight, self.bias)


class TimeConv(nn.Module):
    """A convolution over three frames, valid: `[B, T + 2, H, W, C]` to `[B, T, H, W, outputs]`, or every second."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = _conv_weight(outputs, 3, 1, 1, inputs)
        self.bias = mx.zeros((outputs,))

    def __call__(self, x: mx.array, stride: int = 1) -> mx.array:
        B, T, H, W, C = x.shape
        count = (T - 3) // stride + 1
        y = self.bias
        for k in range(3):
            # As a plain matrix: for a stack of them MLX would copy the kernel for each.
            frames = x[:, k : k + (count - 1) * stride + 1 : stride].reshape(-1, C)
            y = mx.addmm(y, frames, self.weight[:, k, 0, 0].T)
        return y.reshape(B, count, H, W, -1)


class Downsample(_RowConv):
    """Half as many rows and columns, by a 3x3 convolution of each frame.

    It sees a zero border on the right and at the bottom only. With `temporal` also half as many frames, but a video's
    first frame stays the one it is.
    """

    stride = 2
    columns = (0, 1)

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.Conv2d(channels, channels, kernel_size=3, stride=2)
        if temporal:
            self.time_conv = TimeConv(channels, channels)

    def __call__(self, tiles: Tiles, state: StreamState, norm: RMSNorm | None = None) -> Tiles:
        tiles = super().__call__(tiles, state, norm)
        return self._fewer_frames(tiles, state) if "time_conv" in self else tiles

    def compute(self, x: mx.array) -> mx.array:
        y = self.resample(x.flatten(0, 1))
        return y.reshape(*x.shape[:2], *y.shape[1:])

    def _fewer_frames(self, tiles: Tiles, state: StreamState) -> Tiles:
        for index, tile in enumerate(map(list[Any], tiles)):
            last, x = tile.pop(), tile.pop()
            if state.first:
                state.remember(self, index, x[:, -1:])
            else:
                x = self.time_conv(state.continued(self, index, x, 1), stride=2)
                mx.eval(x)
            tile = [(x, last)]
            del x
            yield tile.pop()


class Upsample(_RowConv):
    """Twice as many rows and columns: every pixel four times, then a 3x3 convolution of each frame.

    With `temporal` also twice as many frames, but a video's first frame stays the one it is.
    """

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.Conv2d(channels, channels, kernel_size=3)
        if temporal:
            self.time_conv = TimeConv(channels, 2 * channels)

    def __call__(self, tiles: Tiles, state: StreamState, norm: RMSNorm | None = None) -> Tiles:
        if "time_conv" in self:
            tiles = self._more_frames(tiles, state)
        return super().__call__(tiles, state, norm)

    def compute(self, x: mx.array) -> mx.array:
        B, T, n, W, C = x.shape
        weight, bias = self.resample.weight[:, None], self.resample.bias
        if on_cpu():
            return _stacked([correlate_doubled(x[i], weight, bias) for i in range(B)])
        x = mx.broadcast_to(x[:, :, :, None, :, None], (B, T, n, 2, W, 2, C)).reshape(B, T, 2 * n, 2 * W, C)
        # Of the window's borders, one of the two rows and columns that they have become is enough.
        return correlate(x[:, :, 1:-1, 1:-1], weight, bias)

    def _more_frames(self, tiles: Tiles, state: StreamState) -> Tiles:
        for index, tile in enumerate(map(list[Any], tiles)):
            last, x = tile.pop(), tile.pop()
            if not state.first:
                y = self.time_conv(state.continued(self, index, x, 2))
                # The halves of the channels are two frames, one after the other.
                B, T, n, W, C = x.shape
                x = y.reshape(B, T, n, W, 2, C).transpose(0, 1, 4, 2, 3, 5).reshape(B, 2 * T, n, W, C)
                mx.eval(x)
                del y
            tile = [(x, last)]
            del x
            yield tile.pop()


# ---- shortcuts without weights


def average_down(x: mx.array, channels: int, frames: int, side: int) -> mx.array:
    """Cells of `frames` x `side` x `side` positions become channels, which are averaged in groups down to `channels`.

    `[B, T, H, W, C]` to `[B, T / frames, H / side, W / side, channels]`; frames are filled up with zeros at the front.
    """
    if missing := -x.shape[1] % frames:
        x = mx.pad(x, [(0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)])
    B, T, H, W, C = x.shape
    x = x.reshape(B, T // frames, frames, H // side, side, W // side, side, C).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(*x.shape[:4], channels, -1).mean(axis=-1)


def duplicate_up(x: mx.array, channels: int, frames: int, side: int) -> mx.array:
    """The opposite: channels are repeated, and groups of them become cells of `frames` x `side` x `side` positions."""
    B, T, H, W, C = x.shape
    x = mx.repeat(x, channels * frames * side * side // C, axis=-1)
    x = x.reshape(B, T, H, W, channels, frames, side, side).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(B, T * frames, H * side, W * side, channels)


# ---- blocks


class ResidualBlock(nn.Module):
    """Two normalized causal convolutions around which the input is added, through a 1x1 one if the width changes."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = RMSNorm(inputs)
        self.conv1 = CausalConv(inputs, outputs)
        self.norm2 = RMSNorm(outputs)
        self.conv2 = CausalConv(outputs, outputs)
        if inputs != outputs:
            self.conv_shortcut = PointwiseConv(inputs, outputs)

    def __call__(self, tiles: Tiles, state: StreamState) -> Tiles:
        queue = RowQueue()
        hidden = self.conv1(queue.watch(tiles), state, self.norm1)
        for y, last in self.conv2(hidden, state, self.norm2):
            x = queue.take(y.shape[2])
            y = y + (self.conv_shortcut(x) if "conv_shortcut" in self else x)
            mx.eval(y)
            tile = [(y, last)]
            del x, y
            yield tile.pop()


class Attention(nn.Module):
    """Single-head self-attention over all positions of a frame, for each frame by itself."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels)
        self.to_qkv = PointwiseConv(channels, 3 * channels)
        self.proj = PointwiseConv(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        B, T, H, W, C = x.shape
        q, k, v = mx.split(self.to_qkv(self.norm(x)).reshape(B * T, 1, H * W, 3 * C), 3, axis=-1)
        count = max(1, LOGITS // (B * T * H * W))
        parts = []
        for start in range(0, H * W, count):
            part = q[:, :, start : start + count]
            parts.append(mx.fast.scaled_dot_product_attention(part, k, v, scale=1 / math.sqrt(C), mask=None))
            mx.eval(parts[-1])
        return x + self.proj(mx.concatenate(parts, axis=2).reshape(B, T, H, W, C))


class MidBlock(nn.Module):
    """The layers at the latents' resolution, on whole frames."""

    def __init__(self, channels: int):
        super().__init__()
        self.resnets = [ResidualBlock(channels, channels) for _ in range(2)]
        self.attentions = [Attention(channels)]

    def __call__(self, x: mx.array, state: StreamState) -> mx.array:
        x = joined(self.resnets[0](whole(x), state))
        x = self.attentions[0](x)
        return joined(self.resnets[1](whole(x), state))


class DownBlock(nn.Module):
    """The encoder's layers at one resolution, and the step to the next one if there is one; around all, the average."""

    def __init__(self, inputs: int, outputs: int, layers: int, down: bool, temporal: bool):
        super().__init__()
        self.outputs = outputs
        self.side = 2 if down else 1
        self.frames = 2 if temporal else 1
        self.resnets = [ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(layers)]
        if down:
            self.downsampler = Downsample(outputs, temporal)

    def __call__(self, tiles: Tiles, state: StreamState) -> Tiles:
        queue = RowQueue()
        tiles = queue.watch(tiles)
        for resnet in self.resnets:
            tiles = resnet(tiles, state)
        if "downsampler" in self:
            tiles = self.downsampler(tiles, state)
        for y, last in tiles:
            x = queue.take(y.shape[2] * self.side)
            y = y + average_down(x, self.outputs, self.frames, self.side)
            mx.eval(y)
            tile = [(y, last)]
            del x, y
            yield tile.pop()


class UpBlock(nn.Module):
    """The decoder's layers at one resolution; if there is a next one, the step to it, and around all duplication."""

    def __init__(self, inputs: int, outputs: int, layers: int, up: bool, temporal: bool):
        super().__init__()
        self.outputs = outputs
        self.frames = 2 if temporal else 1
        self.resnets = [ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(layers)]
        if up:
            self.upsampler = Upsample(outputs, temporal)

    def __call__(self, tiles: Tiles, state: StreamState) -> Tiles:
        queue = RowQueue()
        if "upsampler" in self:
            tiles = queue.watch(tiles)
        for resnet in self.resnets:
            tiles = resnet(tiles, state)
        if "upsampler" not in self:
            return tiles
        return resplit(self._upsample(tiles, state, queue), state.rows)

    def _upsample(self, tiles: Tiles, state: StreamState, queue: RowQueue) -> Tiles:
        # Half a tile makes a whole one.
        for y, last in self.upsampler(resplit(tiles, max(1, state.rows // 2)), state):
            x = duplicate_up(queue.take(y.shape[2] // 2), self.outputs, self.frames, 2)
            y = y + (x[:, self.frames - 1 :] if state.first else x)
            mx.eval(y)
            tile = [(y, last)]
            del x, y
            yield tile.pop()
