"""Train a tiny video flow, from nothing, and make videos whose motion follows the prompt.

    python examples/reports/moving_shapes.py runs/shapes          # run it again to resume
    python examples/reports/moving_shapes.py runs/shapes --prompt "a green square moves up" --video up.webp

A video is 8 frames of 16x16 pixels of a circle, a square or a triangle that moves left, right, up or down. There is no
autoencoder: a latent is a patch of 2x2 pixels, 12 numbers, so that a frame has 64 tokens. All else is as in STARFlow-V
(arXiv 2511.20462): shallow blocks that see a frame, a deep one that is causal over text and all frames, and a denoiser
that learns the flow's score beside it. The text encoder is the embedded model's, and is not trained.

At the end a video of each of the 48 prompts is made, each shape is followed from frame to frame by its centre of mass,
and the script says in how many videos it moves as asked.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow import load, load_flow
from mlx_starflow.media.images import grid, save_image, to_images
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.media.videos import VideoWriter
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.sampling import denoise, denoise_frames, sample_frames
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.batches import Order
from mlx_starflow.training.data.dropout import context_mask
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import assign

FRAMES, SIDE, PATCH = 8, 16, 2
COLOURS = {"red": (1.0, -0.8, -0.8), "green": (-0.8, 0.7, -0.8), "blue": (-0.6, -0.5, 1.0), "yellow": (1.0, 0.9, -0.8)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PROMPTS = [f"a {c} {s} moves {d}" for c, s, d in product(COLOURS, SHAPES, DIRECTIONS)]
BACKGROUND = -0.9
TRAVEL, RADIUS = 8.0, 3.0
"""Pixels that a shape moves from the first frame to the last, and half its size."""


def draw_videos(prompts: list[str], rng: np.random.Generator) -> np.ndarray:
    """Videos `[B, FRAMES, SIDE, SIDE, 3]` in -1..1, each shape on a path of its own in the direction of its prompt."""
    fine = 3  # smooth edges
    at = (np.arange(SIDE * fine) + 0.5) / fine
    middle = rng.uniform(-1, 1, (len(prompts), 1, 2)) + SIDE / 2
    way = np.array([DIRECTIONS[prompt.split()[-1]] for prompt in prompts])[:, None]
    centre = middle + way * np.linspace(-TRAVEL / 2, TRAVEL / 2, FRAMES)[None, :, None]
    x = at[None, None, None, :] - centre[..., 0][..., None, None]
    y = at[None, None, :, None] - centre[..., 1][..., None, None]
    shapes = {
        "circle": np.hypot(x, y) < RADIUS,
        "square": np.maximum(np.abs(x), np.abs(y)) < RADIUS * 0.9,
        "triangle": (y < RADIUS) & (np.abs(x) < (y + RADIUS) / 2 * 1.1),
    }
    videos = np.empty((len(prompts), FRAMES, SIDE, SIDE, 3), np.float32)
    for index, prompt in enumerate(prompts):
        _, colour, shape, _, _ = prompt.split()
        inside = shapes[shape][index].reshape(FRAMES, SIDE, fine, SIDE, fine).mean(axis=(2, 4))[..., None]
        videos[index] = inside * np.array(COLOURS[colour]) + (1 - inside) * BACKGROUND
    return videos


def to_latents(videos: np.ndarray) -> np.ndarray:
    """`[B, T, SIDE, SIDE, 3]` -> `[B, T, SIDE / PATCH, SIDE / PATCH, 3 * PATCH^2]`: a latent is a patch of pixels."""
    batch, frames, side, _, _ = videos.shape
    parts = videos.reshape(batch, frames, side // PATCH, PATCH, side // PATCH, PATCH, 3).swapaxes(3, 4)
    return parts.reshape(batch, frames, side // PATCH, side // PATCH, -1)


def to_videos(latents: np.ndarray) -> np.ndarray:
    """The inverse of `to_latents`."""
    batch, frames, count, _, _ = latents.shape
    parts = latents.reshape(batch, frames, count, count, PATCH, PATCH, 3).swapaxes(3, 4)
    return parts.reshape(batch, frames, count * PATCH, count * PATCH, 3)


class MovingShapes:
    """New videos in every batch, with the embeddings `[48, L, D]` of their prompts."""

    def __init__(self, text: np.ndarray, null_text: np.ndarray):
        self.text, self.null_text, self.order = text, null_text, Order(len(PROMPTS))

    def batch(self, rng: np.random.Generator, config: TrainingConfig, progress: float) -> dict[str, np.ndarray]:
        chosen = self.order.take(config.batch_size, rng)
        latents = to_latents(draw_videos([PROMPTS[index] for index in chosen], rng))
        dropped = rng.random((len(chosen), 1, 1)) < config.caption_dropout
        tokens = int(np.prod(latents.shape[1:4]))
        return {
            "latents": latents,
            "noise": rng.standard_normal(latents.shape, dtype=np.float32),
            "text": np.where(dropped, self.null_text, self.text[chosen]),
            "context_mask": context_mask(rng, len(chosen), tokens, config.context_full, config.context_partial),
        }


def encode(prompts: list[str]) -> np.ndarray:
    """Embeddings `[N, L, D]` by the embedded model's text encoder."""
    return np.array(load("demo").encode_prompts(prompts).astype(mx.float32))


def flow_config(channels: int) -> FlowConfig:
    """A video flow that reads what the embedded model's flow does."""
    reader = ModelDirectory.find("demo").flow.config
    assert isinstance(reader, FlowConfig)
    return FlowConfig(
        img_size=SIDE // PATCH,
        channel_size=3 * PATCH**2,
        patch_size=1,
        channels=channels,
        layers_per_block=[1, 1, 4],
        head_dim=32,
        expansion=2,
        txt_size=reader.txt_size,
        txt_dim=reader.txt_dim,
        noise_std=0.3,
        use_softplus=True,
        use_final_norm=True,
        use_qk_norm=True,
        norm_type="rms_norm",
        soft_clip=4.0,
        vid_size=f"{FRAMES}:{FRAMES}",
        temporal_causal=2,
        shallow_block_local=True,
        learnable_self_denoiser=True,
        conditional_denoiser=True,
    )


def make_videos(
    flow: STARFlow, text: np.ndarray, null_text: np.ndarray, seed: int, guidance: float, temperature: float
) -> np.ndarray:
    """A video `[FRAMES, SIDE, SIDE, 3]` of each prompt's embeddings, frame by frame, cleaned by the denoiser."""
    size = SIDE // PATCH
    noise = temperature * draw_noise(range(seed, seed + len(text)), (FRAMES, size, size, 3 * PATCH**2))
    texts = mx.array(text)
    noisy = sample_frames(flow, mx.array(noise), texts, mx.array(null_text), guidance)
    clean = [np.array(frame) for frame in denoise_frames(flow, noisy, texts, FRAMES)]
    return to_videos(np.concatenate(clean, axis=1))


def follow(videos: np.ndarray) -> np.ndarray:
    """Videos -> the centre of mass (x, y) of what is not background, `[B, FRAMES, 2]`, in pixels."""
    weight = np.clip(np.abs(videos - BACKGROUND).max(axis=-1) - 0.5, 0, None) + 1e-6
    at = np.arange(SIDE) + 0.5
    total = weight.sum(axis=(2, 3))
    return np.stack([(weight.sum(axis=2) * at).sum(-1) / total, (weight.sum(axis=3) * at).sum(-1) / total], axis=-1)


def moves(videos: np.ndarray) -> list[str]:
    """The direction of each shape; "" where it moves less than a quarter of what it should, or aslant."""
    found = []
    for track in follow(videos):
        way = FRAMES * np.polyfit(np.arange(FRAMES), track, 1)[0]
        name = max(DIRECTIONS, key=lambda direction: way @ np.array(DIRECTIONS[direction]))
        along = np.abs(way).max()
        found.append(name if along > TRAVEL / 4 and np.abs(way).min() < along / 2 else "")
    return found


def colours(videos: np.ndarray) -> list[str]:
    """The known colour that is nearest to each shape's."""
    weight = np.clip(np.abs(videos - BACKGROUND).max(axis=-1, keepdims=True) - 0.8, 0, None) + 1e-6
    mean = (weight * videos).sum(axis=(1, 2, 3)) / weight.sum(axis=(1, 2, 3))
    return [min(COLOURS, key=lambda name: np.abs(colour - np.array(COLOURS[name])).sum()) for colour in mean]


def left_over(flow: STARFlow, text: np.ndarray, count: int = 16) -> tuple[float, float]:
    """Root mean square error of new videos with the training's noise, and of what the denoiser makes of them."""
    rng = np.random.default_rng(1)
    chosen = rng.permutation(len(PROMPTS))[:count]
    x = to_latents(draw_videos([PROMPTS[index] for index in chosen], rng))
    noisy = x + flow.config.noise_std * rng.standard_normal(x.shape, dtype=np.float32)
    cleaned = denoise(flow, mx.array(noisy), mx.array(text[chosen]))
    return tuple(float(np.sqrt(np.square(np.array(each) - x).mean())) for each in (noisy, cleaned))


def strip(videos: np.ndarray, scale: int = 3) -> Image.Image:
    """Each video as a row of its frames."""
    frames = [image for video in videos for image in to_images(video)]
    large = [image.resize((scale * SIDE, scale * SIDE), Image.Resampling.NEAREST) for image in frames]
    return grid(large, columns=FRAMES)


def train(out: Path, args: argparse.Namespace) -> STARFlow:
    embeddings = encode([*PROMPTS, ""])
    mx.random.seed(0)
    flow = STARFlow(flow_config(args.channels))
    config = TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        lr=3e-3,
        ema=0.99,
        context_full=0.2,
        context_partial=0.2,
        log_every=20,
    )
    assign(flow, Trainer(flow, MovingShapes(embeddings[:-1], embeddings[-1:]), config, out / "training").run())
    save_model(out, parameters(flow), {"model_type": "starflow", **flow.config.to_dict()})
    return flow


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the flow and its training")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--channels", type=int, default=96, help="width of the network")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", help="make this video alone, with the flow in OUT")
    parser.add_argument("--video", type=Path, default=Path("shape.webp"), help="where to write it")
    args = parser.parse_args(arguments)
    settings = (args.seed, args.guidance, args.temperature)
    if args.prompt is not None:
        video = make_videos(load_flow(args.out), encode([args.prompt]), encode([""]), *settings)[0]
        with VideoWriter(args.video, fps=FRAMES) as writer:
            for image in to_images(video):
                writer.add(image.resize((128, 128), Image.Resampling.NEAREST))
        print(f"{args.video}: moves {moves(video[None])[0] or 'nowhere'}")
        return
    flow = train(args.out, args)
    embeddings = encode([*PROMPTS, ""])
    videos = make_videos(flow, embeddings[:-1], embeddings[-1:], *settings)
    asked = [prompt.split() for prompt in PROMPTS]
    right = [found == words[-1] for found, words in zip(moves(videos), asked, strict=True)]
    coloured = [found == words[1] for found, words in zip(colours(videos), asked, strict=True)]
    save_image(strip(videos[::7]), args.out / "videos.png")
    print(f"{args.out / 'videos.png'}: {', '.join(PROMPTS[::7])}")
    before, after = left_over(flow, embeddings[:-1])
    print(f"error of new videos with noise: {before:.3f}, cleaned by the denoiser: {after:.3f} (colours are -1 to 1)")
    print(f"moves as asked: {sum(right)} of {len(right)}; has the colour asked for: {sum(coloured)} of {len(coloured)}")


if __name__ == "__main__":
    main()
