"""What the released video autoencoder costs on a CPU: beside plain convolutions, and against the memory plan.

    python examples/reports/video_autoencoder.py                                    # both ways, 5 frames of 256x160
    python examples/reports/video_autoencoder.py --size 848x480 --decode-only       # 8 GB, and minutes

Its weights are random, of the released sizes. *Plain* is one matrix product for each tap of a kernel, rows and columns
doubled before the convolution that follows, and SiLU by the exponential function. Times are of the processor, not of
the clock, so that other work on the machine counts little; both ways take turns.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import mlx.core as mx

from mlx_starflow import cpu
from mlx_starflow.models.autoencoder_wan import AutoencoderWan, AutoencoderWanConfig, layers
from mlx_starflow.planning.footprint import decode_video

CONFIG = AutoencoderWanConfig(latents_mean=(0.0,) * 48, latents_std=(1.0,) * 48)
SMALL = AutoencoderWanConfig((0.0,) * 4, (1.0,) * 4, base_dim=32, decoder_base_dim=32, z_dim=4, num_res_blocks=1)


@contextmanager
def plain() -> Iterator[None]:
    """Inside, every convolution and every norm is computed the plain way."""
    with (
        patch.object(layers, "_is_large", lambda x, weight: False),
        patch.object(layers.Upsample, "compute", doubled_before),
        patch.object(layers, "_normalize", normalize),
    ):
        yield


def doubled_before(layer: layers.Upsample, x: mx.array) -> mx.array:
    B, T, n, W, C = x.shape
    x = mx.broadcast_to(x[:, :, :, None, :, None], (B, T, n, 2, W, 2, C)).reshape(B, T, 2 * n, 2 * W, C)
    return layers.correlate(x[:, :, 1:-1, 1:-1], layer.resample.weight[:, None], layer.resample.bias)


@mx.compile
def normalize(x: mx.array, mean_square: mx.array, gamma: mx.array, silu: bool) -> mx.array:
    y = x * mx.rsqrt(mean_square + 1e-24) * gamma
    return y * mx.sigmoid(y) if silu else y


def timed(run: Callable[[], mx.array]) -> tuple[mx.array, float]:
    """What it gives, and seconds of the processor."""
    began = time.process_time()
    result = run()
    mx.eval(result)
    return result, time.process_time() - began


def compare(name: str, run: Callable[[], mx.array]) -> None:
    with plain():
        before, seconds = timed(run)
    after, fewer = timed(run)
    difference = (mx.abs(after - before).max() / mx.abs(before).max()).item()
    print(
        f"{name}: plain {seconds:.1f} s, now {fewer:.1f} s, {seconds / fewer:.2f} times as fast; "
        f"largest difference {difference:.1e} of the largest value",
        flush=True,
    )


def memory(vae: AutoencoderWan, z: mx.array) -> None:
    """Decode a latent frame after the other, and say what that held."""
    weights = mx.get_active_memory()
    expected = decode_video(vae.config, *z.shape[2:4], z.dtype.size)
    stream = vae.decoder_stream()
    for index in range(z.shape[1]):
        mx.reset_peak_memory()
        frames, seconds = timed(partial(stream.push, z[:, index : index + 1]))
        peak = mx.get_peak_memory() - weights
        print(
            f"latent frame {index + 1}: {seconds:.0f} s, peak {peak / 2**30:.2f} GiB besides {weights / 2**30:.2f} of "
            f"weights, {peak / expected:.2f} of the plan's {expected / 2**30:.2f}; "
            f"finite: {bool(mx.isfinite(frames).all())}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="256x160", help="in pixels")
    parser.add_argument("--frames", type=int, default=5, help="1 + a multiple of 4")
    parser.add_argument("--decode-only", action="store_true", help="decode once, the new way, and measure memory")
    parser.add_argument("--small", action="store_true", help="narrow networks, to see that this runs")
    args = parser.parse_args(arguments)
    cpu.hint_if_slow()
    width, height = map(int, args.size.split("x"))
    config = SMALL if args.small else CONFIG
    mx.random.seed(0)
    vae = AutoencoderWan(config)
    z = mx.random.normal((1, config.latent_frames(args.frames), height // 16, width // 16, config.z_dim))
    mx.eval(vae.parameters(), z)
    print(f"machine: {platform.platform()}, MLX {mx.__version__}; {args.frames} frames of {args.size}", flush=True)
    if not args.decode_only:
        x = mx.random.uniform(-1, 1, (1, args.frames, height, width, 3))
        compare("encoding", lambda: vae.encode(x).mean)
        compare("decoding", lambda: vae.decode(z))
    memory(vae, z)


if __name__ == "__main__":
    main()
