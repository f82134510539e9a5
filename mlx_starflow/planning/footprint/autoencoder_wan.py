"""Bytes that encoding and decoding a video takes besides weights, from the autoencoder's config.

Both work on one latent frame's frames at a time, so the length does not count. What is held from one to the next are
the last two frames of every temporal convolution's input; on top comes the work on one tile of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mlx_starflow.models.autoencoder_wan.config import CHANNELS, PATCH, AutoencoderWanConfig


class Layer(NamedTuple):
    """A convolution: what it reads, `[frames, rows, columns, inputs]`, and how many frames of that it keeps.

    `doubles` says that rows and columns are doubled before it, `whole` that it does not work in tiles.
    """

    frames: int
    rows: int
    columns: int
    inputs: int
    outputs: int
    kept: int = 2
    doubles: bool = False
    whole: bool = False


def decode_video(config: AutoencoderWanConfig, height: int, width: int, item: int) -> int:
    """Decoding latent frames of `height` x `width`, the frames of one of them included."""
    frames = config.temporal_downscale
    pixels = frames * height * width * config.downscale**2 * CHANNELS
    layers = decoder_layers(config, height, width)
    return _peak(layers, config.tile_rows(width), 6.0, item) + 2 * pixels * item


def encode_video(config: AutoencoderWanConfig, height: int, width: int, item: int) -> int:
    """Encoding to latent frames of `height` x `width`, without the frames themselves."""
    return _peak(encoder_layers(config, height, width), config.tile_rows(width), 6.9, item)


def _peak(layers: Iterable[Layer], tile_rows: int, copies: float, item: int) -> int:
    """The frames that are kept; two rows of every layer that works in tiles; and some copies of the largest tile."""
    held, work = 0, 0.0
    for layer in layers:
        row = layer.columns * layer.inputs
        held += layer.kept * layer.rows * row
        if not layer.whole and layer.rows > tile_rows:
            held += 2 * (layer.frames + layer.kept) * row
        rows = layer.rows
        if not layer.whole:
            rows = min(rows, tile_rows // 2 + 1 if layer.doubles else tile_rows + 2)
        positions = layer.frames * rows * layer.columns * (4 if layer.doubles else 1)
        work = max(work, copies * positions * max(layer.inputs, layer.outputs))
    return int((held + work) * item)


def decoder_layers(config: AutoencoderWanConfig, height: int, width: int) -> Iterator[Layer]:
    """The decoder's convolutions over a later latent frame of `height` x `width`."""
    widths = [config.decoder_base_dim * mult for mult in (config.dim_mult[-1], *config.dim_mult[::-1])]
    frames, rows, columns = 1, height, width
    yield Layer(frames, rows, columns, config.z_dim, widths[0], whole=True)
    for _ in range(4):
        yield Layer(frames, rows, columns, widths[0], widths[0], whole=True)
    for index, outputs in enumerate(widths[1:]):
        inputs = widths[index]
        for _ in range(config.num_res_blocks + 1):
            yield Layer(frames, rows, columns, inputs, outputs)
            yield Layer(frames, rows, columns, outputs, outputs)
            inputs = outputs
        if index < len(config.temperal_downsample):
            if config.temperal_downsample[::-1][index]:
                yield Layer(frames, rows, columns, outputs, 2 * outputs)
                frames *= 2
            yield Layer(frames, rows, columns, outputs, outputs, kept=0, doubles=True)
            rows, columns = 2 * rows, 2 * columns
    yield Layer(frames, rows, columns, inputs, CHANNELS * PATCH**2)


def encoder_layers(config: AutoencoderWanConfig, height: int, width: int) -> Iterator[Layer]:
    """The encoder's convolutions over the frames of a later latent frame of `height` x `width`."""
    widths = [config.base_dim * mult for mult in (1, *config.dim_mult)]
    scale = config.downscale // PATCH
    frames, rows, columns = config.temporal_downscale, height * scale, width * scale
    yield Layer(frames, rows, columns, CHANNELS * PATCH**2, widths[0])
    for index, outputs in enumerate(widths[1:]):
        inputs = widths[index]
        for _ in range(config.num_res_blocks):
            yield Layer(frames, rows, columns, inputs, outputs)
            yield Layer(frames, rows, columns, outputs, outputs)
            inputs = outputs
        if index < len(config.temperal_downsample):
            yield Layer(frames, rows, columns, outputs, outputs, kept=0)
            rows, columns = rows // 2, columns // 2
            if config.temperal_downsample[index]:
                yield Layer(frames, rows, columns, outputs, outputs, kept=1)
                frames //= 2
    for _ in range(4):
        yield Layer(frames, rows, columns, inputs, inputs, whole=True)
    yield Layer(frames, rows, columns, inputs, 2 * config.z_dim, whole=True)
