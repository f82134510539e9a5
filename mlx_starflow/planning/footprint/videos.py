"""Bytes that sampling and cleaning videos, frame by frame, takes besides weights; see `footprint.images`.

Attention is taken to be fused, as it is on Metal; a CPU holds its weights besides.
"""

from __future__ import annotations

from mlx_starflow.models.flow import BlockConfig
from mlx_starflow.models.starflow import FlowConfig


def sampling(
    config: FlowConfig, size: int, window: int, batch: int, guided: bool, item: int, *, longer: bool = False
) -> tuple[int, int]:
    """(the deep block's KV cache, all activations) of sampling frames of `size` tokens in a window.

    The deep block caches the text and all frames of the window, for each video, twice if it is guided; a shallow block
    beside it the frame that it inverts. While the text is read, or, in a video that is `longer` than the window, a
    frame of those that the next window begins with, there are the MLP's seven hidden layers.
    """
    deep = config.blocks[-1]
    copies = batch * (2 if guided else 1)
    cache = copies * (config.txt_size + window * size) * _cached(deep) * item
    shallow = max((batch * size * _cached(block) * item for block in config.blocks[:-1]), default=0)
    read = max(config.txt_size, size) if longer else config.txt_size
    reading = 7.3 * copies * read * deep.channels * deep.expansion * item
    return cache, int(cache + max(shallow, reading))


def cleaning(config: FlowConfig, size: int, window: int, batch: int, item: int) -> tuple[int, int]:
    """(what is held between two frames, all activations) of the learned denoiser; nothing without one.

    Every layer holds keys and values of the frames that a frame sees, and inputs and queries of those that wait for
    the next one, half as much again for what they are parts of. On top comes the work of two layers on the text and two
    frames, with seven hidden layers of the MLP each.
    """
    denoiser = config.denoiser
    if denoiser is None:
        return 0, 0
    seen = min(window, window if denoiser.window is None else denoiser.window + 1)
    text = config.txt_size if denoiser.txt_dim else 0
    heads = denoiser.num_heads * denoiser.head_dim
    cached = 2 * (text + (seen + denoiser.look_ahead) * size) * denoiser.num_kv_heads * denoiser.head_dim
    waiting = (1 + denoiser.look_ahead) * size * (denoiser.channels + heads)
    held = 1.5 * batch * denoiser.num_layers * (cached + waiting) * item
    work = 2 * 7.3 * batch * (text + 2 * size) * denoiser.channels * denoiser.expansion * item
    return int(held), int(held + work)


def _cached(block: BlockConfig) -> int:
    """Numbers that a block caches of a position."""
    return 2 * block.num_layers * block.num_kv_heads * block.head_dim
