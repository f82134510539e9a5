"""Train a small flow that reads the embedded model's latents one by one: 256 tokens of 4 numbers a picture.

    python examples/train_latent_flow.py data/scenes runs/latent     # about half an hour on one CPU core
    mlx-starflow bench runs/latent/model

The embedded model's own flow reads 16 tokens of 64 numbers, which is quick but too short a sequence to measure how
sampling methods converge. This one has the released models' 2 x 2 pixel statistics in small: neighbours predict each
other well, so that shallow blocks settle in a few sweeps and the deep block does not. It uses the embedded text encoder
and autoencoder as they are. Needs PyTorch (`pip install '.[torch]'`), like examples/train_scenes.py.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from scene_data import Stream
from scene_pictures import Renderer
from torch import Tensor
from torch_loop import Device, train
from torch_training import write_flow

from mlx_starflow import load
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.pipelines import ImagePipeline
from mlx_starflow.reference.starflow import STARFlow
from mlx_starflow.training.loop.schedules import cosine


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


def encode(pipe: ImagePipeline, data: Path, scenes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents `[N, H, W, C]`, embeddings of the scenes' captions `[N, L, D]` and of no text `[L, D]`."""
    stream, latents, texts = Stream(Renderer(data)), [], []
    for start in range(0, scenes, 16):
        samples = [stream[number] for number in range(start, min(start + 16, scenes))]
        latents.append(pipe.to_data([sample.picture for sample in samples]))
        texts.append(np.array(pipe.encode_prompts([sample.caption for sample in samples])))
    null = torch.from_numpy(np.array(pipe.encode_prompts([""])[0]))
    return torch.from_numpy(np.concatenate(latents)), torch.from_numpy(np.concatenate(texts)), null


class Captioned:
    """Batches: latents, and embeddings of the caption; one in ten is of no text."""

    def __init__(self, latents: Tensor, texts: Tensor, null: Tensor, size: int = 16):
        self.latents, self.texts, self.null, self.size = latents, texts, null, size

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([0, step])
        chosen = rng.choice(len(self.latents), self.size, replace=False)
        dropped = torch.from_numpy(rng.random(self.size) < 0.1)[:, None, None]
        return self.latents[chosen], torch.where(dropped, self.null, self.texts[chosen])


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
    parser.add_argument("data", type=Path, help="folder of the sprites, as scene_data.py writes it; fetched if missing")
    parser.add_argument("out", type=Path, help="folder for the checkpoint and the finished model")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--scenes", type=int, default=2000, help="to train on")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = load("demo")
    flow = train_flow(flow_config(pipe), Captioned(*encode(pipe, args.data, args.scenes)), args.out, args.steps)
    for part in ("text_encoder", "vae"):
        shutil.copytree(pipe.directory / part, args.out / "model" / part, dirs_exist_ok=True)
    write_flow(args.out / "model", flow, {"guidance": 2.5, "temperature": 1.0})


if __name__ == "__main__":
    main()
