"""Memory and time of the full-size 7B text-to-video model, with random weights, on this machine.

    python examples/reports/full_size_video.py SCRATCH
    python examples/reports/full_size_video.py SCRATCH --frames 9 --decode-size 128x80
    python examples/reports/full_size_video.py SCRATCH --frames 9 --kv-bits 8 --flow-only

Writes a model directory of the released sizes into SCRATCH (flow with its denoiser, flan-t5-xl encoder, Wan 2.2
autoencoder; the first two quantized), opens it as any other is opened, and prints, phase by phase, seconds, the most
memory that MLX held and what `mlx-starflow info` predicts: a prompt's encoding, the first 16 tokens of the first frame
in the deep block with guidance, the learned denoiser on the first frames, and the decoding of two latent frames.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
from full_size_run import begin_sampling, encode_prompt, phase, size_on_disk, write_random_model

from mlx_starflow.media.noise import draw_noise
from mlx_starflow.model_dir.directory import load_vae
from mlx_starflow.planning.memory import ModelConfigs, plan
from mlx_starflow.sampling import denoise_frames
from mlx_starflow.sampling.cache import KV_BITS, KV_CHOICES, kv_name

RELEASE = "apple/starflow-v"
PROMPT = "a corgi runs through the snow"
GUIDANCE = 3.5


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="folder with 8 GB to spare")
    parser.add_argument("--quantize", default="4", help="as in `mlx-starflow convert`")
    parser.add_argument("--like", type=Path, help="a model directory whose sizes to take instead of the release's")
    parser.add_argument("--size", default="848x480", help="of the video, in pixels")
    parser.add_argument("--frames", type=int, default=81, help="in float32, on a CPU, 81 take 50 GB of KV cache")
    parser.add_argument("--kv-bits", choices=[*map(kv_name, KV_BITS)], default="none", help="of keys and values")
    parser.add_argument("--flow-only", action="store_true", help="no denoiser, and no decoding")
    parser.add_argument("--decode-size", help="of the frames to decode; by default those of the video")
    args = parser.parse_args(arguments)
    width, height = map(int, args.size.split("x"))
    kv_bits = KV_CHOICES[args.kv_bits] or 0
    print(f"machine: {platform.platform()}, MLX {mx.__version__} on the {mx.default_device().type.name}", flush=True)
    folder = args.scratch / f"video-{args.quantize}"
    configs = ModelConfigs.read(args.like) if args.like else ModelConfigs.of_release(RELEASE)
    if not (folder / "config.json").exists():
        with phase(f"written with {args.quantize}-bit weights", 0):
            write_random_model(folder, configs, args.quantize, GUIDANCE)
    print(f"{size_on_disk(folder) / 1e9:.2f} GB of weights; {args.frames} frames of {width}x{height}", flush=True)

    expected = plan(folder, size=(width, height), frames=args.frames, kv_bits=kv_bits).phases(low_memory=True)
    length = configs.flow.txt_size
    text, null = encode_prompt(folder, PROMPT, length, expected["text"])
    latents = configs.vae.latent_frames(args.frames)
    shape = (height // configs.vae.downscale, width // configs.vae.downscale, configs.flow.channel_size)
    z = mx.array(draw_noise([0], (latents, *shape)))
    flow, cache = begin_sampling(folder, z, text, null, GUIDANCE, expected["flow"], kv_bits)
    tokens = flow.noise_tokens(z).shape[1]
    print(f"KV cache of the deep block: {cache / 2**30:.2f} GiB, for {tokens} tokens and {length} of text", flush=True)
    if args.flow_only:
        return

    pushed = min(latents, 3)

    def noisy() -> Iterator[mx.array]:
        yield from (z[:, index : index + 1] for index in range(pushed))

    with phase(f"denoise: {pushed} latent frames, all layers", expected["denoise"]):
        cleaned = mx.concatenate(list(denoise_frames(flow, noisy(), text, pushed)), axis=1)
    print(f"clean latents finite: {bool(mx.isfinite(cleaned).all())}")
    del flow
    if args.decode_size:
        width, height = map(int, args.decode_size.split("x"))
        expected = plan(folder, size=(width, height), frames=args.frames).phases(low_memory=True)
        z = z[:, :, : height // configs.vae.downscale, : width // configs.vae.downscale]
    with phase(f"decode: 2 latent frames, 5 pictures of {width}x{height}", expected["decode"]):
        vae = load_vae(folder / "vae")
        stream = vae.decoder_stream()
        pictures = [stream.push(vae.unscale(z[:, :2])[:, index : index + 1]) for index in range(2)]
        frames = np.concatenate([np.array(part.astype(mx.float32)) for part in pictures], axis=1)
    print(f"{frames.shape[1]} frames decoded, finite: {bool(np.isfinite(frames).all())}")


if __name__ == "__main__":
    main()
