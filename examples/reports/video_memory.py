"""How much memory videos of several lengths take, with a small random model, streamed into MP4 files.

    python examples/reports/video_memory.py SCRATCH
    python examples/reports/video_memory.py SCRATCH --lengths 81 --previews

Each length runs in a process of its own, which prints the most that MLX held in each phase, and the most that the
process held in all. The model is trained, so to speak, on 81 frames: longer videos are made window by window.
With --previews each latent frame is also shown before it is finished, and the share of the seconds is printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
from full_size_run import write_random_model

from mlx_starflow import Progress, load_video
from mlx_starflow.media.videos import VideoWriter
from mlx_starflow.models.autoencoder_wan import AutoencoderWanConfig
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.t5 import T5Config
from mlx_starflow.planning.memory import ModelConfigs

LENGTHS = (81, 161, 481)
"""In frames."""
SIDE = 96


def small_model() -> ModelConfigs:
    """The released video model's shape in small: 6x6 tokens a frame, 21 latent frames in the window."""
    flow = FlowConfig(
        img_size=SIDE // 16, channel_size=8, patch_size=1, channels=128, top_block_channels=192,
        layers_per_block=[1, 1, 4], txt_size=24, txt_dim=64, vid_size="81:16", noise_std=0.5, use_softplus=True,
        use_final_norm=True, soft_clip=4.0, temporal_causal=2, shallow_block_local=True, learnable_self_denoiser=True,
        conditional_denoiser=True, denoiser_window=10, cfg=2.0,
    )  # fmt: skip
    text_encoder = T5Config(vocab_size=60, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    vae = AutoencoderWanConfig(
        latents_mean=(0.0,) * 8, latents_std=(1.0,) * 8, base_dim=16, decoder_base_dim=16, z_dim=8, num_res_blocks=1
    )
    return ModelConfigs(flow, text_encoder, vae)


def run(folder: Path, frames: int, previews: bool) -> None:
    """Make one video and print what it took, as JSON."""
    pipe = load_video(folder)
    before = mx.get_active_memory()
    began = time.perf_counter()
    shown: list[int] = []

    def show(progress: Progress) -> None:
        if progress.phase == "preview":
            shown.append(len(progress.preview()))

    stream = pipe.stream("a cat on a sofa", seed=1, frames=frames, previews=previews, callback=show)
    with VideoWriter(folder / f"{frames}.mp4", stream.fps, live=True) as writer:
        for frame in stream:
            writer.add(frame)
    phases = {name: peak - before for name, peak in stream.stats.memory.items()}
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    seconds = time.perf_counter() - began
    spent = {"count": len(shown), "share": stream.stats.seconds.get("preview", 0.0) / seconds}
    print(json.dumps({"seconds": seconds, "phases": phases, "process": process, "previews": spent}))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="in frames, 1 + multiples of 4")
    parser.add_argument("--previews", action="store_true", help="show each latent frame before it is finished, too")
    parser.add_argument("--frames", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.frames:
        run(args.scratch, args.frames, args.previews)
        return
    print(f"machine: {platform.platform()}, MLX {mx.__version__} on the {mx.default_device().type.name}", flush=True)
    write_random_model(args.scratch, small_model(), "8", 2.0)
    shortest = None
    for frames in args.lengths:
        command = [sys.executable, __file__, str(args.scratch), "--frames", str(frames)] + [
            "--previews"
        ] * args.previews
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        peak = max(found["phases"].values())
        shortest = shortest or (peak, found["process"])
        phases = ", ".join(f"{name} {bytes_ / 2**20:.1f}" for name, bytes_ in found["phases"].items())
        print(
            f"{frames} frames of {SIDE}x{SIDE}: {found['seconds']:.0f} s; MiB besides weights: {phases}; "
            f"peak {peak / shortest[0]:.3f} times that of {args.lengths[0]} frames; "
            f"process {found['process'] / 2**20:.0f} MiB, {found['process'] / shortest[1]:.3f} times",
            flush=True,
        )
        if args.previews:
            print(f"{found['previews']['count']} previews, {found['previews']['share']:.1%} of the seconds", flush=True)


if __name__ == "__main__":
    main()
