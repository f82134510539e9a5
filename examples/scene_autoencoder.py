"""The embedded model's autoencoder: 128x128 pictures to 16x16x4 latents, a decoder that reads noisy ones."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scene_data import Stream
from scene_pictures import Renderer
from scene_recipe import NOISE, Recipe
from torch import Tensor
from torch_loop import Device, train
from torch_training import to_tensor

from mlx_starflow.reference.autoencoder_kl import AutoencoderKL


class Pictures:
    """Batches for the autoencoder, uint8 `[B, 128, 128, 3]`: mostly scenes, also any emoji anywhere, half mirrored."""

    def __init__(self, renderer: Renderer, size: int, seed: int = 1):
        self.stream, self.size, self.seed = Stream(renderer, seed), size, seed

    def __getitem__(self, step: int) -> Tensor:
        rng = np.random.default_rng([self.seed, step])
        pictures = []
        for i in range(self.size):
            if rng.random() < 0.25:
                picture = self.stream.renderer.render_any(rng)
            else:
                picture = self.stream[step * self.size + i].picture
            pictures.append(picture[:, ::-1] if rng.random() < 0.5 else picture)
        return torch.from_numpy(np.stack(pictures))


def to_pictures(decoded: Tensor) -> np.ndarray:
    return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def edges(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures[..., 1:] - pictures[..., :-1], pictures[..., 1:, :] - pictures[..., :-1, :]


def autoencoder_loss(model: AutoencoderKL, pictures: Tensor, device: Device) -> tuple[Tensor, dict[str, float]]:
    """L1 and a little L2 of pictures `[B, 3, H, W]` and of their edges, through noisy latents; plus a small KL term.

    The noise is the flow's, in units of each channel's spread, for half of the batch, and less for the other half: what
    the flow makes is cleaned by a score step.
    """
    with device.autocast():
        mean, logvar = model.encode(pictures)
    mean, logvar = mean.float(), logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    level = torch.full((len(mean), 1, 1, 1), NOISE, device=mean.device)
    level[::2] *= torch.rand(len(level[::2]), 1, 1, 1, device=mean.device)
    spread = mean.std(dim=(0, 2, 3), keepdim=True)
    deviation = (logvar.exp() + (level * spread) ** 2).sqrt()
    with device.autocast():
        decoded = model.decode(mean + deviation * torch.randn_like(mean))
    decoded = decoded.float()
    absolute, squared = (decoded - pictures).abs().mean(), (decoded - pictures).square().mean()
    edge = sum((a - b).abs().mean() for a, b in zip(edges(decoded), edges(pictures), strict=True))
    loss = absolute + 0.5 * squared + 0.5 * edge + 1e-4 * kl
    return loss, {
        "L1": absolute.item(),
        "dB": 10 * math.log10(4 / squared.item()),
        "edge": edge.item(),
        "kl": kl.item(),
    }


def train_autoencoder(recipe: Recipe, renderer: Renderer, out: Path, device: Device, deadline: float) -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(recipe.autoencoder_config()).to(device.name, memory_format=torch.channels_last)
    device.compile(model.encoder, model.decoder)
    shown = [Stream(renderer, 2, kind)[n] for kind in ("train", "object") for n in range(12)]

    @torch.no_grad()
    def watch(averaged: AutoencoderKL, step: int) -> str:
        clean = to_tensor(np.stack([s.picture for s in shown]), device.name)
        with device.autocast():
            mean = averaged.encode(clean)[0].float()
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean.device)
            noisy = mean + NOISE * mean.std(dim=(0, 2, 3), keepdim=True) * noise
            decoded = [averaged.decode(latents).float().clamp(-1, 1) for latents in (mean, noisy)]
        drawn = [np.concatenate(trio) for trio in zip(*map(to_pictures, (clean, *decoded)), strict=True)]
        (out / "autoencoder").mkdir(exist_ok=True)
        show(drawn, out / "autoencoder" / f"{step:06d}.png", 12)
        report = []
        for name, part in (("trained objects", slice(0, 12)), ("held-out objects", slice(12, 24))):
            errors = [10 * math.log10(4 / (x[part] - clean[part]).square().mean().item()) for x in decoded]
            report.append(f"{name}: {errors[0]:.2f} dB clean, {errors[1]:.2f} dB noisy")
        return "; ".join(report)

    return train(
        model,
        lambda batch, progress: autoencoder_loss(model, to_tensor(batch, device.name), device),
        Pictures(renderer, recipe.autoencoder_batch),
        [{"params": list(model.parameters()), "lr": 1.2e-3}],
        out / "autoencoder.pt",
        device,
        steps=recipe.autoencoder_steps,
        deadline=deadline,
        watch=watch,
        watch_every=500,
    )


def show(pictures: list[np.ndarray], path: Path, columns: int) -> None:
    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)
