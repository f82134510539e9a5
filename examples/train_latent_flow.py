"""Train a small flow that reads the embedded model's latents one by one: 256 tokens of 4 numbers a picture.

    python examples/demo_data.py data/emoji
    python examples/train_latent_flow.py data/emoji runs/latent     # about half an hour on one CPU core
    mlx-starflow bench runs/latent/model

The embedded model's own flow reads 16 tokens of 64 numbers, which is quick but too short a sequence to measure how
sampling methods converge. This one has the released models' 2 x 2 pixel statistics in small: neighbours predict each
other well, so that shallow blocks settle in a few sweeps and the deep block does not. It uses the embedded text encoder
and autoencoder as they are. Needs PyTorch (`pip install '.[torch]'`), like examples/train_demo.py.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor
from torch_loop import Device, train
from torch_training import write_flow

from mlx_starflow import load
from mlx_starflow.media.image_folder import ImageFolder
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.pipelines import ImagePipeline
from mlx_starflow.reference.starflow import STARFlow
from mlx_starflow.training.data.views import augmented_crops
from mlx_starflow.training.loop.schedules import cosine

VIEWS = 3


def flow_config(pipe: ImagePipeline) -> FlowConfig:
    return FlowConfig(
        img_size=pipe.config.img_size,
        channel_size=pipe.config.channel_size,
        patch_size=1,
        channels=192,
        layers_per_block=[2, 2, 4],
        txt_size=pipe.config.txt_size,
        txt_dim=pipe.config.txt_dim,
        use_softplus=True,
        use_final_norm=True,
        use_qk_norm=True,
        norm_type="rms_norm",
        soft_clip=4.0,
    )


def encode(pipe: ImagePipeline, data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Latents `[N, VIEWS, H, W, C]`, embeddings of the pictures' names `[N, L, D]` and of no text `[L, D]`."""
    pictures = ImageFolder.read(data, size=128, splits=("train",))
    rng = np.random.default_rng(0)
    size = pipe.config.img_size * pipe.vae_config.downscale
    latents = []
    for _ in range(VIEWS):
        crops = augmented_crops(pictures.images, size, rng, zoom=0.04, shift=1, flip=False)
        for start in range(0, len(crops), 16):
            part = mx.array(crops[start : start + 16].astype(np.float32) / 127.5 - 1)
            latents.append(np.array(pipe.vae.scale(pipe.vae.encode(part).mean)))
    views = torch.from_numpy(np.concatenate(latents)).unflatten(0, (VIEWS, -1)).transpose(0, 1).contiguous()
    captions = [captions[0] for captions in pictures.captions]
    texts = [np.array(pipe.encode_prompts(captions[start : start + 32])) for start in range(0, len(captions), 32)]
    return views, torch.from_numpy(np.concatenate(texts)), torch.from_numpy(np.array(pipe.encode_prompts([""])[0]))


class Captioned:
    """Batches: latents of a random view, and embeddings of its name; one in ten is of no text."""

    def __init__(self, views: Tensor, texts: Tensor, null: Tensor, size: int = 16):
        self.views, self.texts, self.null, self.size = views, texts, null, size

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([0, step])
        chosen = rng.choice(len(self.views), self.size, replace=False)
        dropped = torch.from_numpy(rng.random(self.size) < 0.1)[:, None, None]
        latents = self.views[chosen, rng.integers(VIEWS, size=self.size)]
        return latents, torch.where(dropped, self.null, self.texts[chosen])


def train_flow(config: FlowConfig, batches: Captioned, out: Path, steps: int) -> STARFlow:
    torch.manual_seed(0)
    flow = STARFlow(config)

    def loss(batch: tuple[Tensor, Tensor], progress: float) -> tuple[Tensor, dict[str, float]]:
        latents, text = batch
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = flow(latents + config.noise_std * torch.randn_like(latents), text)
        nll = out.nll().mean()
        return nll, {"nll": nll.item()}

    return train(
        flow,
        loss,
        batches,
        [{"params": list(flow.parameters()), "lr": 1.5e-3}],
        out / "flow.pt",
        Device("cpu"),
        steps=steps,
        decay=0.995,
        betas=(0.9, 0.95),
        schedule=lambda step, progress, warm_up: cosine(progress, 0.02),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder examples/demo_data.py wrote")
    parser.add_argument("out", type=Path, help="folder for the checkpoint and the finished model")
    parser.add_argument("--steps", type=int, default=2400)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = load("demo")
    views, texts, null = encode(pipe, args.data)
    print(f"{len(views)} pictures, {VIEWS} views each", flush=True)
    flow = train_flow(flow_config(pipe), Captioned(views, texts, null), args.out, args.steps)
    for part in ("text_encoder", "vae"):
        shutil.copytree(pipe.directory / part, args.out / "model" / part, dirs_exist_ok=True)
    write_flow(args.out / "model", flow, {"guidance": 2.5, "temperature": 1.0})


if __name__ == "__main__":
    main()
