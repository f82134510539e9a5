"""Bytes that each phase of generating takes besides weights, from the configs of its network.

Every formula counts arrays that exist at once; item sizes are left out in the descriptions. The constants were fitted
to what MLX's CPU backend holds.
"""

from __future__ import annotations

from collections.abc import Iterator

from mlx_starflow.models.autoencoder_kl import WHOLE_PIXELS, AutoencoderKLConfig
from mlx_starflow.models.autoencoder_kl_tiling import LOGITS
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.t5 import T5Config


def text(config: T5Config, tokens: int, item: int) -> int:
    """The text encoder over `tokens` positions, prompt and empty prompt together: twelve hidden layers of its MLP."""
    return 12 * tokens * config.d_ff * item


def sampling(config: FlowConfig, tokens: int, batch: int, guided: bool, item: int) -> tuple[int, int]:
    """(KV caches, all activations) of sampling.

    A block caches 2 (keys, values) x layers x positions x heads x head size for each image, twice if it is guided.
    While a block reads its text, the cache of the block before it is still there, and about 5 hidden layers of MLPs.
    A single token's activations do not count. In C++ (mlx_starflow/cpu) there is nothing but the cache.
    """
    largest = peak = before = 0
    for block in reversed(config.blocks):
        reads = bool(block.txt_dim)
        copies = batch * (2 if guided and reads else 1)
        text = config.txt_size if reads else 0
        cache = 2 * block.num_layers * copies * (text + tokens) * block.num_kv_heads * block.head_dim * item
        hidden = copies * text * block.channels * block.expansion * item
        largest = max(largest, cache)
        peak = max(peak, cache, cache + 4.8 * hidden + before if reads else 0)
        before = cache
    return largest, int(peak)


def forward(config: FlowConfig, tokens: int, guided: bool, item: int) -> int:
    """A forward pass over one image, twice if it is guided: the MLP's seven hidden layers, or attention's weights."""
    peak = 0.0
    for block in config.blocks:
        reads = bool(block.txt_dim)
        copies, positions = 2 if guided and reads else 1, tokens + (config.txt_size if reads else 0)
        hidden = copies * positions * block.channels * block.expansion * item
        logits = copies * block.num_heads * positions**2 * item
        peak = max(peak, 7.3 * hidden, 1.55 * logits + 3 * hidden)
    return int(peak)


def score(config: FlowConfig, tokens: int, item: int) -> int:
    """The score step, one image at a time with layers computed again: what each layer reads is kept; in one layer,
    forward and backward, are about 5.9 x heads x positions^2 (attention's weights are not fused under a gradient) and
    8.2 hidden layers of the MLP."""
    kept, work = 0, 0.0
    for block in config.blocks:
        positions = tokens + (config.txt_size if block.txt_dim else 0)
        kept += block.num_layers * positions * block.channels * item
        if block.num_layers:
            logits = block.num_heads * positions**2
            work = max(work, (5.9 * logits + 8.2 * positions * block.channels * block.expansion) * item)
    return int(kept + work)


def decode(config: AutoencoderKLConfig, height: int, width: int, batch: int, item: int) -> int:
    """Decoding latents of `height` x `width`, whole or in tiles."""
    pixels = height * width * config.downscale**2
    images = batch * pixels * (config.out_channels * (item + 4 + 1))
    if rows := config.tile_rows(height, width):
        return images + _tiles(config, height, width, rows, item)
    return images + min(batch, WHOLE_PIXELS // pixels) * _whole(config, height, width, item)


def convolutions(config: AutoencoderKLConfig, height: int, width: int) -> Iterator[tuple[int, int, int, int, bool]]:
    """(height, width, channels in, channels out, is it after doubling) of the decoder's 3x3 convolutions, in order."""
    widths = config.block_out_channels[::-1]
    yield height, width, config.latent_channels, widths[0], False
    for _ in range(4):
        yield height, width, widths[0], widths[0], False
    inputs = widths[0]
    for index, outputs in enumerate(widths):
        for _ in range(config.layers_per_block + 1):
            yield height, width, inputs, outputs, False
            yield height, width, outputs, outputs, False
            inputs = outputs
        if index < len(widths) - 1:
            height, width = 2 * height, 2 * width
            yield height, width, outputs, outputs, True
    yield height, width, inputs, config.out_channels, False


def _gathers(pixels: int, channels: int, item: int) -> bool:
    """Whether the CPU's convolution gathers nine copies of its input; else it reads the image where it lies."""
    return item != 4 or channels < 32 or pixels < 64 * 64


def _whole(config: AutoencoderKLConfig, height: int, width: int, item: int) -> int:
    """One image at once: the largest of 6.6 times a large feature map; the gathered and the made arrays of four
    convolutions in a row; and the middle's attention weights."""
    peak = (height * width) ** 2 if config.mid_block_add_attention else 0
    window: list[float] = []
    for rows, columns, inputs, outputs, _ in convolutions(config, height, width):
        pixels = rows * columns
        gathers = _gathers(pixels, inputs, item)
        window.append(pixels * (9 * inputs + 0.7 * outputs) if gathers else 0)
        peak = max(peak, sum(window[-4:]), 0 if gathers else 6.6 * pixels * inputs)
    return int(peak * item)


def _tiles(config: AutoencoderKLConfig, height: int, width: int, tile_rows: int, item: int) -> int:
    """One image in tiles: a residual block's input and what is between its convolutions (or an image before and
    after doubling), with the work on one tile: what its convolution reads 12 times where it gathers, else 3 times.
    Or, if more, attention's keys, values, input and output and a few rows of weights."""
    peak = 0.0
    for rows, columns, inputs, outputs, doubled in convolutions(config, height, width):
        tile = min(tile_rows + 2, rows) * columns
        work = tile * (12 * inputs + outputs if _gathers(tile, inputs, item) else 3 * inputs + 2 * outputs)
        held = rows * columns * (inputs / 4 if doubled else inputs) + rows * columns * outputs
        peak = max(peak, held + work)
    if config.mid_block_add_attention:
        area, channels = height * width, config.block_out_channels[-1]
        peak = max(peak, 4 * area * channels + min(max(LOGITS, area), area**2))
    return int(peak * item)
