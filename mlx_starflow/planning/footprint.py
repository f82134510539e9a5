"""Bytes that each phase of generating takes besides weights, from the configs of its network.

What lives long, such as caches, is counted exactly. The rest counts the arrays that one layer makes, as if none of them
were let go of before the layer ends, times `MARGIN`: an upper estimate. `item` is the size of a number in bytes, with
flows that of a number in their KV caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx

from mlx_starflow.kernels.quantized_attention import PIECE, group_size
from mlx_starflow.models.autoencoder_kl import WHOLE_PIXELS, AutoencoderKLConfig
from mlx_starflow.models.autoencoder_kl_tiling import LOGITS
from mlx_starflow.models.autoencoder_wan.config import CHANNELS, PATCH, AutoencoderWanConfig
from mlx_starflow.models.flow import BlockConfig
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.t5 import T5Config
from mlx_starflow.models.tarflow import TarFlowBlockConfig
from mlx_starflow.sampling.cache import MOST_DENSE, RECENT, KVBits, block_kv_bits, branch_bits, cached_numbers
from mlx_starflow.sampling.denoise import together
from mlx_starflow.sampling.methods import RollingSettings

STREAM = 4
"""Bytes of a number between a flow's products, which is float32 in every precision."""

MARGIN = 1.4
"""MLX begins operations before those ahead of them have let go of their memory; how many depends on the machine."""


# ---- transformers


def layer(positions: int, channels: int, hidden: int, logits: int, *, gradient: bool = False) -> int:
    """Numbers in the arrays of one transformer layer.

    Forwards these are 12 of its width (norms, queries, keys and values before and after rotation, attention's output,
    projections, sums), 4 of the MLP's hidden width and attention's weights. There and back it is twice as many, but for
    what has gone by then, and attention's weights are three: themselves, their gradient and that of the logits.

    Args:
        positions: in all sequences together.
        channels, hidden: widths of the layer and of its MLP.
        logits: attention's weights, heads x positions x positions of each sequence. Metal's fused kernel holds none.
        gradient: forwards and backwards.
    """
    own, inner, weights = (22, 6, 3) if gradient else (12, 4, 1)
    return positions * (own * channels + inner * hidden) + weights * logits


def _block_layer(block: BlockConfig, sequences: int, positions: int, *, gradient: bool = False) -> int:
    if not block.num_layers:
        return 0
    logits = sequences * block.num_heads * positions**2
    return layer(sequences * positions, block.channels, block.channels * block.expansion, logits, gradient=gradient)


def _positions(config: FlowConfig, block: BlockConfig, tokens: int) -> int:
    return tokens + (config.txt_size if block.txt_dim else 0)


def kv_cache(block: BlockConfig, positions: int, item: int, bits: int, fed: int = RollingSettings.window) -> int:
    """Bytes of keys and values of one sequence, see `sampling.cache`.

    With bits, each group of numbers has a scale and a bias of `item` bytes. The last positions are dense: those that
    wait for others to come after them, and as many as are fed at once.
    """
    numbers, size = cached_numbers(block), group_size(block.head_dim)
    if not bits or size is None or positions <= 2 * RECENT:
        return positions * numbers * item
    packed = positions * numbers * (bits * size // 8 + 2 * item) // size
    return packed + min(positions, 2 * RECENT + min(fed, MOST_DENSE)) * numbers * item


def kv_caches(
    block: BlockConfig,
    positions: int,
    item: int,
    bits: KVBits,
    batch: int,
    guided: bool,
    fed: int = RollingSettings.window,
) -> int:
    """Bytes of keys and values of `batch` sequences, and with guidance of as many of the null branch."""
    branches = branch_bits(bits)[: 2 if guided else 1]
    return batch * sum(kv_cache(block, positions, item, own, fed) for own in branches)


def _on_cpu(item: int) -> bool:
    """Whether it is the attention of `kernels.attention` for CPUs that computes: a Mac's holds neither logits nor
    unpacked keys."""
    return item == STREAM and mx.default_device() == mx.cpu


def _unpacked(block: BlockConfig, sequences: int, positions: int, bits: KVBits, item: int) -> int:
    """Numbers of quantized keys or values that are unpacked at a time for several queries: MLX begins with a few
    pieces at once."""
    at_once = 2 * PIECE if bits and _on_cpu(item) else 0
    return sequences * block.num_kv_heads * block.head_dim * min(positions, at_once)


def _window(block: BlockConfig, sequences: int, tokens: int, positions: int, item: int) -> int:
    """A layer of one evaluation of a rolling window over `tokens`, which sees `positions` at the end.

    A CPU holds attention's weights and the logits that they are made of.
    """
    width = min(RollingSettings.window, tokens)
    logits = sequences * block.num_heads * width * positions * (2 if _on_cpu(item) else 1)
    return layer(sequences * width, block.channels, block.channels * block.expansion, logits)


def text(config: T5Config, prompts: int, length: int, item: int) -> int:
    """The text encoder over so many prompts of `length` tokens: two layers, which are short enough to overlap.

    A gated MLP has two hidden arrays for one.
    """
    hidden = config.d_ff * (2 if config.feed_forward_proj.startswith("gated") else 1)
    logits = prompts * config.num_heads * length**2
    return int(MARGIN * item * 2 * layer(prompts * length, config.d_model, hidden, logits))


def sampling(
    config: FlowConfig, tokens: int, batch: int, guided: bool, item: int, kv_bits: KVBits = 0
) -> tuple[int, int]:
    """(KV caches, all activations) of sampling images of so many tokens, keys and values in `kv_bits`.

    A block caches keys and values for each image, twice if it is guided. While it reads its text, the cache of the
    block before it is still there. Evaluations are those of a window; a single token's would not count.
    """
    largest = before = 0
    peak = 0.0
    for block, bits in reversed(list(zip(config.blocks, block_kv_bits(config.blocks, kv_bits), strict=True))):
        twice = guided and bool(block.txt_dim)
        copies = batch * (2 if twice else 1)
        positions = _positions(config, block, tokens)
        cache = kv_caches(block, positions, item, bits, batch, twice)
        window = MARGIN * STREAM * _window(block, copies, tokens, positions, item) if block.num_layers else 0
        window += STREAM * _unpacked(block, copies, positions, bits, item)
        reading = before + MARGIN * STREAM * _block_layer(block, copies, config.txt_size) if block.txt_dim else 0
        largest, peak, before = max(largest, cache), max(peak, cache + max(reading, window)), cache
    return largest, int(peak)


def samples_together(config: FlowConfig, tokens: int, batch: int) -> int:
    """How many of `batch` samples go through the flow at once where that is a pass for each, see `denoise.at_once`."""
    return min(batch, together((block, _positions(config, block, tokens)) for block in config.blocks))


def forward(config: FlowConfig, tokens: int, batch: int, guided: bool) -> int:
    """A forward pass over as many images as go together, twice if it is guided."""
    count = samples_together(config, tokens, batch)
    layers = (
        _block_layer(block, 2 if guided and block.txt_dim else 1, _positions(config, block, tokens))
        for block in config.blocks
    )
    return _together(count, max(layers))


def score(config: FlowConfig, tokens: int, batch: int) -> int:
    """The score step of as many images as go together, layers computed again on the way back."""
    kept, work = there_and_back(config.blocks, tokens, config.txt_size)
    return _together(samples_together(config, tokens, batch), work, kept)


def _together(count: int, work: int, kept: int = 0) -> int:
    """Bytes of what one layer makes of `count` images, and of what is kept of each, from the numbers of one.

    The margin is one image's: layers of several are estimated high enough without.
    """
    return int(STREAM * (count * kept + (count + MARGIN - 1) * work))


def there_and_back(blocks: Sequence[BlockConfig], tokens: int, text: int, checkpoint: bool = True) -> tuple[int, int]:
    """Numbers that the gradient of one sample takes: what is kept for the way back, and what one layer makes.

    Args:
        blocks: of the flow.
        tokens: of the sample.
        text: tokens of the text, before them in blocks that read it.
        checkpoint: layers are computed again, and what each one reads is kept; else all that it makes.
    """
    kept = work = 0
    for block in blocks:
        positions = tokens + (text if block.txt_dim else 0)
        read = positions * block.channels
        kept += block.num_layers * read if checkpoint else block.num_layers * _block_layer(block, 1, positions)
        work = max(work, _block_layer(block, 1, positions, gradient=True))
    return kept, work


def class_sampling(
    blocks: Sequence[TarFlowBlockConfig], batch: int, guided: bool, item: int, kv_bits: KVBits = 0
) -> tuple[int, int]:
    """(KV caches, all activations) of sampling images of classes, as `sampling`: every block is guided, none reads."""
    copies, largest, peak = batch * (2 if guided else 1), 0, 0.0
    for block, bits in zip(blocks, block_kv_bits(blocks, kv_bits), strict=True):
        cache = kv_caches(block, block.num_patches, item, bits, batch, guided)
        window = MARGIN * STREAM * _window(block, copies, block.num_patches, block.num_patches, item)
        window += STREAM * _unpacked(block, copies, block.num_patches, bits, item)
        largest, peak = max(largest, cache), max(peak, cache + window)
    return largest, int(peak)


def class_forward(blocks: Sequence[TarFlowBlockConfig], images: int, guided: bool) -> int:
    """A forward pass over images of classes, twice if it is guided."""
    copies = 2 if guided else 1
    return _together(images, max(_block_layer(block, copies, block.num_patches) for block in blocks))


def class_score(blocks: Sequence[TarFlowBlockConfig], images: int) -> int:
    """A score step on images of classes, layers computed again on the way back."""
    parts = [there_and_back([block], block.num_patches, 0) for block in blocks]
    return _together(images, max(work for _, work in parts), sum(kept for kept, _ in parts))


def frame_sampling(
    config: FlowConfig,
    size: int,
    window: int,
    batch: int,
    guided: bool,
    item: int,
    kv_bits: KVBits = 0,
    *,
    longer: bool = False,
) -> tuple[int, int]:
    """(the deep block's KV cache, all activations) of sampling videos, frames of `size` tokens in a window.

    The deep block caches the text and all frames of the window, for each video, twice if it is guided; a shallow block
    beside it the frame that it inverts. The deep block reads the text at once or, in a video that is `longer` than the
    window, a frame of those that the next window begins with.
    """
    deep = config.blocks[-1]
    copies = batch * (2 if guided else 1)
    *shallow_bits, bits = block_kv_bits(config.blocks, kv_bits)
    positions, fed = config.txt_size + window * size, max(config.txt_size, size) if longer else config.txt_size
    cache = kv_caches(deep, positions, item, bits, batch, guided, fed)
    each = zip(config.blocks[:-1], shallow_bits, strict=True)
    shallow = max((kv_caches(block, size, item, own, batch, guided=False) for block, own in each), default=0)
    reading = _block_layer(deep, copies, fed)
    rolling = _window(deep, copies, window * size, positions, item) + _unpacked(deep, copies, positions, bits, item)
    beside = max(
        (_window(block, batch, size, size, item) for block in config.blocks[:-1] if block.num_layers), default=0
    )
    work = MARGIN * STREAM * max(reading, rolling)
    return cache, int(cache + max(shallow + MARGIN * STREAM * beside, work))


def cleaning(config: FlowConfig, size: int, window: int, batch: int, item: int) -> tuple[int, int]:
    """(what is held between two frames, all activations) of the learned denoiser of videos; nothing without one.

    Every layer holds keys and values of the frames that a frame sees, and inputs and queries of those that wait for
    the next one. On top comes the work of a layer on the text and two frames.
    """
    denoiser = config.denoiser
    if denoiser is None:
        return 0, 0
    seen = min(window, window if denoiser.window is None else denoiser.window + 1)
    text = config.txt_size if denoiser.txt_dim else 0
    heads = denoiser.num_heads * denoiser.head_dim
    cached = 2 * (text + (seen + denoiser.look_ahead) * size) * denoiser.num_kv_heads * denoiser.head_dim
    waiting = (1 + denoiser.look_ahead) * size * (denoiser.channels + heads)
    held = MARGIN * batch * denoiser.num_layers * (cached * item + waiting * STREAM)
    positions = text + 2 * size
    logits = batch * denoiser.num_heads * positions**2
    work = layer(batch * positions, denoiser.channels, denoiser.channels * denoiser.expansion, logits)
    return int(held), int(held + MARGIN * STREAM * work)


# ---- the autoencoder of images


class Convolution(NamedTuple):
    """A 3x3 convolution of the decoder: the size it works at, and its channels. `doubles`: it comes after doubling."""

    height: int
    width: int
    inputs: int
    outputs: int
    doubles: bool = False

    def arrays(self, rows: int, item: int) -> int:
        """Numbers in the arrays of some of its rows: what it reads, normalized and activated or doubled, and makes.

        A CPU's convolution gathers nine copies of what it reads, unless `autoencoder_layers.Conv3x3` takes them from
        where they lie.
        """
        pixels = rows * self.width
        gathers = item != 4 or self.inputs < 32 or pixels < 64 * 64
        return pixels * ((9 * gathers + (1 if self.doubles else 3)) * self.inputs + self.outputs)


def decode(config: AutoencoderKLConfig, height: int, width: int, batch: int, item: int) -> int:
    """Decoding latents of `height` x `width`, whole or in tiles of rows; and the images, float32 and bytes too."""
    pixels = height * width * config.downscale**2
    images = batch * pixels * config.out_channels * (item + 4 + 1)
    if tile_rows := config.tile_rows(height, width):
        return images + int(MARGIN * item * _tiles(config, height, width, tile_rows, item))
    together = min(batch, WHOLE_PIXELS // pixels)
    return images + together * int(MARGIN * item * _whole(config, height, width, item))


def convolutions(config: AutoencoderKLConfig, height: int, width: int) -> Iterator[Convolution]:
    """The decoder's, in order."""
    widths = config.block_out_channels[::-1]
    yield Convolution(height, width, config.latent_channels, widths[0])
    for _ in range(4):
        yield Convolution(height, width, widths[0], widths[0])
    inputs = widths[0]
    for index, outputs in enumerate(widths):
        for _ in range(config.layers_per_block + 1):
            yield Convolution(height, width, inputs, outputs)
            yield Convolution(height, width, outputs, outputs)
            inputs = outputs
        if index < len(widths) - 1:
            height, width = 2 * height, 2 * width
            yield Convolution(height, width, outputs, outputs, doubles=True)
    yield Convolution(height, width, inputs, config.out_channels)


def _whole(config: AutoencoderKLConfig, height: int, width: int, item: int) -> int:
    """One image at once: two convolutions in a row, and the input and the output of their residual block."""
    peak = 2 * (height * width) ** 2 if config.mid_block_add_attention else 0
    for first, second in pairwise(convolutions(config, height, width)):
        around = second.height * second.width * (first.inputs + second.outputs)
        peak = max(peak, around + sum(each.arrays(each.height, item) for each in (first, second)))
    return peak


def _tiles(config: AutoencoderKLConfig, height: int, width: int, tile_rows: int, item: int) -> int:
    """One image in tiles: a residual block's input and what is between its convolutions (or an image before and
    after doubling), with the work on one tile. Or attention's keys, values, input and output and a few weights."""
    peak = 0
    for each in convolutions(config, height, width):
        pixels = each.height * each.width
        held = pixels * (each.inputs // 4 if each.doubles else each.inputs) + pixels * each.outputs
        peak = max(peak, held + each.arrays(min(tile_rows + 2, each.height), item))
    if config.mid_block_add_attention:
        area, channels = height * width, config.block_out_channels[-1]
        peak = max(peak, 4 * area * channels + min(max(LOGITS, area), area**2))
    return peak


# ---- the autoencoder of videos


class VideoConvolution(NamedTuple):
    """A convolution over the frames of one latent frame: what it reads, `[frames, rows, columns, inputs]`.

    `kept` frames of that are held for the next latent frame; `doubles`: rows and columns are doubled before it;
    `whole`: it does not work in tiles of rows.
    """

    frames: int
    rows: int
    columns: int
    inputs: int
    outputs: int
    kept: int = 2
    doubles: bool = False
    whole: bool = False


def decoder_state(config: AutoencoderWanConfig, height: int, width: int, item: int) -> int:
    """What is held from one latent frame to the next: the last two frames of what each convolution reads."""
    layers = video_convolutions(config, height, width)
    return item * sum(each.kept * each.rows * each.columns * each.inputs for each in layers)


def decode_video(config: AutoencoderWanConfig, height: int, width: int, item: int) -> int:
    """Decoding latent frames of `height` x `width`, one at a time: the length does not count.

    Besides what is held there are two rows of every layer that works in tiles, eight arrays of the largest tile (what
    it reads with its neighbours, normalized and activated, what it makes, a sum; on a CPU the combinations of
    `models.minimal_filtering`, and kernels), and the frames themselves twice.
    """
    rows_held, work = 0, 0
    tile_rows = config.tile_rows(width)
    for each in video_convolutions(config, height, width):
        rows = each.rows
        if not each.whole:
            rows = min(rows, tile_rows // 2 + 1 if each.doubles else tile_rows + 2)
            if each.rows > tile_rows:
                rows_held += 2 * (each.frames + each.kept) * each.columns * each.inputs
        positions = each.frames * rows * each.columns * (4 if each.doubles else 1)
        work = max(work, 8 * positions * max(each.inputs, each.outputs))
    pixels = config.temporal_downscale * height * width * config.downscale**2 * CHANNELS
    return decoder_state(config, height, width, item) + int(item * (rows_held + MARGIN * work + 2 * pixels))


def video_convolutions(config: AutoencoderWanConfig, height: int, width: int) -> Iterable[VideoConvolution]:
    """The decoder's over a later latent frame of `height` x `width`, in order."""
    widths = [config.decoder_base_dim * mult for mult in (config.dim_mult[-1], *config.dim_mult[::-1])]
    frames, rows, columns = 1, height, width
    yield VideoConvolution(frames, rows, columns, config.z_dim, widths[0], whole=True)
    for _ in range(4):
        yield VideoConvolution(frames, rows, columns, widths[0], widths[0], whole=True)
    for index, outputs in enumerate(widths[1:]):
        inputs = widths[index]
        for _ in range(config.num_res_blocks + 1):
            yield VideoConvolution(frames, rows, columns, inputs, outputs)
            yield VideoConvolution(frames, rows, columns, outputs, outputs)
            inputs = outputs
        if index < len(config.temperal_downsample):
            if config.temperal_downsample[::-1][index]:
                yield VideoConvolution(frames, rows, columns, outputs, 2 * outputs)
                frames *= 2
            yield VideoConvolution(frames, rows, columns, outputs, outputs, kept=0, doubles=True)
            rows, columns = 2 * rows, 2 * columns
    yield VideoConvolution(frames, rows, columns, inputs, CHANNELS * PATCH**2)
