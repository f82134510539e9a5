"""The image autoencoder's decoder with bounded memory: every layer works on strips of rows, one after the other.

A feature map is a list of strips `[B, n, W, C]`. A convolution reads one row of the strips above and below; moments
of a norm are those of the whole picture, gathered strip by strip; queries attend to all of the picture, a few at a
time. So the result is the whole decoder's but for rounding. Each strip is evaluated before the next one, and an input
strip is let go of as soon as nothing needs it any more: what is held is little more than a residual block's input and
the picture between its convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_starflow.models.autoencoder_layers import Attention, Conv3x3, GroupNorm, ResnetBlock, Upsample

if TYPE_CHECKING:
    from mlx_starflow.models.autoencoder_kl import Decoder

Strips = list[mx.array]

LOGITS = 2**22
"""About how many attention logits are held at once."""


def decode_in_strips(decoder: Decoder, z: mx.array, rows: int) -> mx.array:
    """What `decoder(z)` gives, in strips of `rows` rows at every resolution; `z` `[B, h, w, C]`, not empty."""
    strips = list(_convolve(decoder.conv_in, _split(z, rows)))
    mid = decoder.mid_block
    strips = _resnet(mid.resnets[0], strips)
    for attention in mid.attentions:
        strips = _attend(attention, strips)
    strips = _resnet(mid.resnets[1], strips)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            strips = _resnet(resnet, strips)
        for upsample in block.upsamplers:
            strips = _upsample(upsample, strips, rows)
    return mx.concatenate(list(_convolve(decoder.conv_out, strips, decoder.conv_norm_out)), axis=1)


def _split(x: mx.array, rows: int) -> Strips:
    return [x[:, start : start + rows] for start in range(0, x.shape[1], rows)]


def _with_neighbours(strips: Strips, free: bool) -> Iterator[tuple[mx.array, int, int]]:
    """Each strip with a row of the strip above and one of that below, where there are any; how many rows stand above
    it; and how many are its own. With `free`, the list lets go of its strips."""
    above: Strips = []
    for index, strip in enumerate(strips):
        below = [strips[index + 1][:, :1]] if index + 1 < len(strips) else []
        joined = mx.concatenate([*above, strip, *below], axis=1)
        mx.eval(joined)
        count, over = strip.shape[1], len(above)
        above = [_kept(strip[:, -1:])]
        if free:
            strips[index] = above[0]
        del strip
        yield joined, over, count


def _kept(x: mx.array) -> mx.array:
    """A copy that does not hold on to the array it was sliced from."""
    x = mx.concatenate([x[:, :, :1], x[:, :, 1:]], axis=2)
    mx.eval(x)
    return x


def _convolve(conv: Conv3x3, strips: Strips, norm: GroupNorm | None = None, free: bool = True) -> Iterator[mx.array]:
    """The convolution, of the normalized strips if there is a norm, strip by strip."""
    moments = norm.moments(strips) if norm else ()
    for x, over, count in _with_neighbours(strips, free):
        if norm:
            x = norm.normalize(x, *moments, silu=True)
        # The convolution pads with zeros: right at the picture's edges, and elsewhere in rows that are dropped.
        y = mx.contiguous(conv(x)[:, over : over + count])
        del x
        mx.eval(y)
        yield y


def _resnet(layer: ResnetBlock, strips: Strips) -> Strips:
    hidden = list(_convolve(layer.conv1, strips, layer.norm1, free=False))
    shortcut = layer.get("conv_shortcut")
    for index, y in enumerate(_convolve(layer.conv2, hidden, layer.norm2)):
        x = strips[index]
        strips[index] = (shortcut(x) if shortcut else x) + y
        mx.eval(strips[index])
        del x, y
    return strips


def _attend(layer: Attention, strips: Strips) -> Strips:
    moments = layer.group_norm.moments(strips)
    keys, values = [], []
    for strip in strips:
        h = layer.group_norm.normalize(strip, *moments).flatten(1, 2)
        keys.append(layer.to_k(h))
        values.append(layer.to_v(h))
        mx.eval(keys[-1], values[-1])
    k, v = (mx.concatenate(parts, axis=1)[:, None] for parts in (keys, values))
    mx.eval(k, v)
    del keys, values, h
    count = max(1, LOGITS // k.shape[2])
    for index, strip in enumerate(strips):
        q = layer.to_q(layer.group_norm.normalize(strip, *moments).flatten(1, 2))[:, None]
        scale = 1 / math.sqrt(q.shape[-1])
        parts = []
        for start in range(0, q.shape[2], count):
            part = q[:, :, start : start + count]
            parts.append(mx.fast.scaled_dot_product_attention(part, k, v, scale=scale, mask=None))
            mx.eval(parts[-1])
        strips[index] = strip + layer.to_out[0](mx.concatenate(parts, axis=2)).reshape(strip.shape)
        mx.eval(strips[index])
    return strips


def _upsample(layer: Upsample, strips: Strips, rows: int) -> Strips:
    doubled = []
    # Half a strip makes a whole one.
    halves = [half for strip in strips for half in _split(strip, max(1, rows // 2))]
    strips.clear()
    for x, over, count in _with_neighbours(halves, free=True):
        y = mx.contiguous(layer(x)[:, 2 * over : 2 * (over + count)])
        del x
        mx.eval(y)
        doubled.append(y)
    return doubled
