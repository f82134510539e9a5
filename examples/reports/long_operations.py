"""The longest single operation of each evaluation of the released models on an M1, computed from their configs.

    python examples/reports/long_operations.py

macOS ends a GPU's work that takes several seconds at once, see `kernels.pieces`. Each row is an evaluation: all that it
computes, its largest operation, in how many pieces that is computed on Metal, and how long the largest piece takes an
M1, the slowest chip, at its published peak rate and at a third of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_starflow.kernels.pieces import MOST
from mlx_starflow.models.autoencoder_kl import AutoencoderKLConfig
from mlx_starflow.models.autoencoder_wan import AutoencoderWanConfig
from mlx_starflow.models.transformer import TransformerConfig
from mlx_starflow.planning.chips import find_chips
from mlx_starflow.planning.footprint import convolutions, video_convolutions
from mlx_starflow.planning.memory import ModelConfigs, trained_size
from mlx_starflow.sampling.methods import RollingSettings

WINDOW = RollingSettings.window


@dataclass(frozen=True)
class Work:
    """Multiplications and additions of an evaluation.

    Attributes:
        name: what it is.
        total: of all of it.
        largest: of its largest operation.
        splits: whether that is computed in pieces where it is larger than `MOST`.
    """

    name: str
    total: float
    largest: float
    splits: bool = True


def transformer(
    name: str,
    blocks: Sequence[tuple[TransformerConfig, int, int, int]],
    *,
    gradient: bool = False,
    weights: bool = False,
) -> Work:
    """Of blocks with (config, sequences, positions that are computed, positions that each of them sees).

    With a gradient layers are computed forwards twice and back; with that of `weights`, the products a fourth time.
    """
    total = largest = 0.0
    for block, sequences, queries, keys in blocks:
        heads, rows = block.num_heads * block.head_dim, sequences * queries
        mlp = 2.0 * rows * block.channels * block.channels * block.expansion
        qkv = 2.0 * rows * block.channels * (block.num_heads + 2 * block.num_kv_heads) * block.head_dim
        attention = 4.0 * rows * keys * heads
        products = (3 if block.use_swiglu else 2) * mlp + qkv + 2.0 * rows * heads * block.channels
        times = (3 + weights) if gradient else 1
        total += block.num_layers * (times * products + (4 if gradient else 1) * attention)
        largest = max(largest, mlp, qkv, attention)
    return Work(name, total, largest)


def text_encoder(configs: ModelConfigs) -> Work:
    config, rows = configs.text_encoder, 2.0 * configs.flow.txt_size
    hidden = config.d_model * config.d_ff
    each = (3 if config.feed_forward_proj.startswith("gated") else 2) * hidden
    each += 4 * config.d_model * config.num_heads * config.d_kv
    return Work("text encoder, prompt and none", 2 * rows * config.num_layers * each, 2 * rows * hidden, splits=False)


def pictures(configs: ModelConfigs) -> Iterator[Work]:
    flow, vae = configs.flow, configs.vae
    assert isinstance(vae, AutoencoderKLConfig)
    for size in (trained_size(flow, vae), (1024, 1024)):
        width, height = (side // vae.downscale for side in size)
        tokens, words, name = width * height, flow.txt_size, f"{size[0]}x{size[1]}"
        deep = flow.blocks[-1]
        every = [(b, 1, n, n) for b in flow.blocks for n in [tokens + (words if b.txt_dim else 0)]]
        if size == trained_size(flow, vae):
            yield text_encoder(configs)
            yield transformer("the text, guided", [(deep, 2, words, words)])
        yield transformer(f"window of {WINDOW}, guided, {name}", [(deep, 2, WINDOW, words + tokens)])
        yield transformer(f"likelihood or certificate, {name}", every)
        yield transformer(f"score step, {name}", every, gradient=True)
        if size == trained_size(flow, vae):
            batch = [(b, 8 * sequences, n, keys) for b, sequences, n, keys in every]
            yield transformer("training step, 8 pictures", batch, gradient=True, weights=True)
        rows = vae.tile_rows(height, width)
        layers = list(convolutions(vae, height, width))
        each = [
            2.0 * 9 * c.inputs * c.outputs * c.width * (min(c.height, rows + 2) if rows else c.height) for c in layers
        ]
        whole = sum(2.0 * 9 * c.inputs * c.outputs * c.width * c.height for c in layers)
        yield Work(f"decoding{' in tiles' if rows else ''}, {name}", whole, max(each), splits=False)


def videos(configs: ModelConfigs) -> Iterator[Work]:
    flow, vae, denoiser = configs.flow, configs.vae, configs.flow.denoiser
    assert isinstance(vae, AutoencoderWanConfig) and denoiser is not None
    width, height = (side // vae.downscale for side in trained_size(flow, vae))
    frames, size, words = vae.latent_frames(flow.video[0]), width * height, flow.txt_size
    deep, positions = flow.blocks[-1], words + frames * width * height
    yield text_encoder(configs)
    yield transformer("the text, guided", [(deep, 2, words, words)])
    yield transformer("a given frame, guided, the last of a window", [(deep, 2, size, positions)])
    yield transformer("shallow blocks, all given frames", [(b, frames, size, size) for b in flow.blocks[:-1]])
    yield transformer(f"window of {WINDOW}, guided, the last", [(deep, 2, WINDOW, positions)])
    yield transformer(
        "likelihood or certificate",
        [(deep, 1, positions, positions), *((b, frames, size, size) for b in flow.blocks[:-1])],
    )
    seen = min(frames, (denoiser.window or frames) + 1)
    yield transformer("denoiser, a frame", [(denoiser, 1, words + size, words + seen * size)])
    tile, total, largest = vae.tile_rows(width), 0.0, 0.0
    for each in video_convolutions(vae, height, width):
        taps, cells = (9, 4) if each.doubles else (27, 1)
        row = 2.0 * taps * each.inputs * each.outputs * each.frames * each.columns * cells
        total += row * each.rows
        rows = each.rows if each.whole else min(each.rows, tile // 2 + 1 if each.doubles else tile + 2)
        largest = max(largest, row * rows)
    yield Work("decoding a latent frame in tiles", total, largest, splits=False)


def line(work: Work, rate: float) -> str:
    pieces = max(1, -int(-work.largest // MOST)) if work.splits else 1
    seconds = work.largest / pieces / rate
    return (
        f"| {work.name} | {work.total / 1e12:.3g} | {work.largest / 1e12:.3g} | {pieces} "
        f"| {seconds:.2f} | {3 * seconds:.2f} |"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    (chip,) = find_chips("M1")
    for release, works in (("apple/starflow", pictures), ("apple/starflow-v", videos)):
        print(f"\n{release}, {chip.name}, {chip.tflops:.1f} TFLOPS\n")
        print(
            "| evaluation | 10^12 operations | the largest | pieces | seconds of one, at the peak rate | at a third |"
        )
        print("|---|---|---|---|---|---|")
        for work in works(ModelConfigs.of_release(release)):
            print(line(work, chip.tflops * 1e12))


if __name__ == "__main__":
    main()
