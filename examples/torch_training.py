"""Training loops in PyTorch for the examples beside this file: it is faster than MLX on Linux without a GPU.

The objective is that of `mlx_starflow.training`; so are the data, the schedule and the names of the tensors.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn


class Averaged:
    """Exponential moving average of a network's weights; the decay ramps up so that early weights are forgotten."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.step = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        averaged = list(self.model.parameters())
        torch._foreach_lerp_(averaged, list(model.parameters()), 1 - decay)


def cosine(progress: float, warm_up: float, floor: float = 0.02) -> float:
    """Learning-rate factor at `progress` in 0..1: linear over `warm_up`, then a cosine down to `floor`."""
    if progress < warm_up:
        return progress / warm_up
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def save_atomically(state: dict, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def run(
    model: nn.Module,
    loss_of: Callable[[dict[str, Tensor], float], tuple[Tensor, dict[str, float]]],
    batches: Iterator[dict[str, Tensor]],
    groups: list[dict],
    checkpoint: Path,
    *,
    steps: int,
    ema: float,
    betas: tuple[float, float],
    weight_decay: float,
    warm_up: float = 0.02,
    clip: float = 1.0,
    save_every: float = 180.0,
    log_every: int = 100,
    watch: Callable[[nn.Module, int], str] | None = None,
    watch_every: int = 2000,
) -> nn.Module:
    """Train `model` for `steps` steps and return its averaged copy; resumes from `checkpoint` if it exists.

    `loss_of(batch, progress)` gives the loss and numbers to print; `groups` are AdamW's parameter groups with `lr`.
    """
    averaged = Averaged(model, ema)
    optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        averaged.model.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step = averaged.step = state["step"]
        print(f"resuming at step {step}", flush=True)

    def save() -> None:
        state = {"model": model.state_dict(), "ema": averaged.model.state_dict()}
        save_atomically({**state, "optimizer": optimizer.state_dict(), "step": step}, checkpoint)

    saved = began = time.time()
    first, sums = step, {}
    while step < steps:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * cosine(step / steps, warm_up)
        loss, numbers = loss_of(next(batches), step / steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        if not torch.isfinite(norm):
            raise RuntimeError(f"step {step}: the gradient is not finite; the last checkpoint is {checkpoint}")
        optimizer.step()
        averaged.update(model)
        step += 1
        for name, value in {**numbers, "grad": float(norm)}.items():
            sums[name] = sums.get(name, 0.0) + value
        if step % log_every == 0:
            rate = (step - first) / (time.time() - began)
            text = "  ".join(f"{name} {value / log_every:.4f}" for name, value in sums.items())
            print(f"{step}/{steps}  {text}  {rate:.2f} steps/s  {(steps - step) / rate / 60:.0f} min left", flush=True)
            sums = {}
        if watch is not None and step % watch_every == 0:
            print(f"{step}/{steps}  {watch(averaged.model, step)}", flush=True)
        if time.time() - saved > save_every or step == steps:
            save()
            saved = time.time()
    return averaged.model


def autoencoder_loss(
    model: nn.Module, pictures: Tensor, *, kl_weight: float, noise_std: float
) -> tuple[Tensor, dict[str, float]]:
    """L1 and a little L2 through latents that carry the flow's noise, plus a small KL term.

    pictures `[B, 3, H, W]` in -1..1. The noise is `noise_std` in units of each channel's standard deviation, so that
    the decoder learns to read the normalized noisy latents that the flow makes; a third of the batch has less.
    """
    with torch.autocast(pictures.device.type, dtype=torch.bfloat16):
        mean, logvar = model.encode(pictures)
    mean, logvar = mean.float(), logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    level = torch.full((len(mean), 1, 1, 1), noise_std)
    level[: len(mean) // 3] *= torch.rand(len(mean) // 3, 1, 1, 1)
    level = level.to(mean.device)
    spread = mean.std(dim=(0, 2, 3), keepdim=True)
    latents = latents + level * spread * torch.randn_like(mean)
    with torch.autocast(pictures.device.type, dtype=torch.bfloat16):
        decoded = model.decode(latents)
    error = decoded.float() - pictures
    squared = (error**2).mean()
    loss = error.abs().mean() + 0.5 * squared + kl_weight * kl
    return loss, {"L1": error.abs().mean().item(), "dB": 10 * math.log10(4 / squared.item()), "kl": kl.item()}


def context_mask(batch: int, tokens: int, full: float, partial: float) -> Tensor:
    """Which token inputs the deep block may read, `[B, N]`, 1 or 0: a training aid for small data sets.

    With teacher forcing the tokens before give a picture away and the text is ignored. So a share `full` of the
    samples reads the text alone, and a share `partial` of the others loses a random part of its tokens.
    """
    keep = torch.ones(batch, tokens)
    draw = torch.rand(batch, 1)
    some = (torch.rand(batch, tokens) > torch.rand(batch, 1)).float()
    keep = torch.where(draw < full + partial * (1 - full), some, keep)
    keep = torch.where(draw < full, torch.zeros_like(keep), keep)
    keep[:, 0] = 1
    return keep


class TextFlow(nn.Module):
    """A flow and the text encoder that is trained with it."""

    def __init__(self, flow: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.flow = flow
        self.text_encoder = text_encoder

    def groups(self, lr: float, embedding_factor: float) -> list[dict]:
        """AdamW groups: the text embedding, whose rows are rarely touched, learns `embedding_factor` times faster."""
        embedding = self.text_encoder.shared.weight
        rest = [p for p in self.parameters() if p is not embedding]
        return [{"params": rest, "lr": lr}, {"params": [embedding], "lr": lr * embedding_factor, "weight_decay": 0.0}]


def flow_loss(
    model: TextFlow, latents: Tensor, ids: Tensor, mask: Tensor, *, noise_std: float, full: float, partial: float
) -> tuple[Tensor, dict[str, float]]:
    """Exact NLL (nats per dimension) of latents `[B, H, W, C]` plus noise, given token ids and mask `[B, L]`."""
    noisy = latents + noise_std * torch.randn_like(latents)
    keep = context_mask(len(latents), latents[0].numel() // model.flow.config.blocks[-1].in_channels, full, partial)
    keep = keep.to(latents.device)
    with torch.autocast(latents.device.type, dtype=torch.bfloat16):
        text = model.text_encoder.encode(ids, mask)
        out = model.flow(noisy, text, keep)
    nll = out.nll()
    reads_all = keep.min(dim=1).values > 0
    return nll.mean(), {
        "nll": nll[reads_all].mean().item() if reads_all.any() else float("nan"),
        "nll-text-only": nll[keep.sum(dim=1) == 1].mean().item() if (keep.sum(dim=1) == 1).any() else float("nan"),
    }
