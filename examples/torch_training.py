"""What the examples that train in PyTorch share: losses, a flow and its text encoder as one, the finished model.

PyTorch is faster than MLX on Linux without a GPU. The objective is that of `mlx_starflow.training`; so are the data and
the names of the tensors. The loop is in `torch_loop.py`.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx.nn import Module as MLXModule
from torch import Tensor, nn

from mlx_starflow.model_dir.quantization import quantize_module
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import load_module, parameters
from mlx_starflow.models.autoencoder_kl import AutoencoderKL as MLXAutoencoderKL
from mlx_starflow.models.starflow import STARFlow as MLXSTARFlow
from mlx_starflow.models.student import INVERSE
from mlx_starflow.models.student import Student as MLXStudent
from mlx_starflow.models.t5 import T5Encoder as MLXT5Encoder
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.reference.autoencoder_kl import AutoencoderKL
from mlx_starflow.reference.starflow import STARFlow
from mlx_starflow.reference.student import Student
from mlx_starflow.reference.t5 import T5Encoder


def to_tensor(pictures: Tensor | np.ndarray, device: str = "cpu") -> Tensor:
    """uint8 `[B, H, W, 3]` -> float `[B, 3, H, W]` in -1..1, channels last in memory."""
    pictures = torch.as_tensor(pictures).to(device, non_blocking=True)
    return (pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def tokens(tokenizer: Tokenizer, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask of texts, `[B, length]` each."""
    ids, mask, _ = tokenizer.batch(texts, length)
    return torch.from_numpy(ids).long(), torch.from_numpy(mask)


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

    def __init__(self, flow: STARFlow, text_encoder: T5Encoder):
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


def student_errors(
    student: Student, batch: dict[str, Tensor], grid: tuple[int, int], text_length: int | None = None
) -> list[Tensor]:
    """Mean squared error of each head and sample, `[B]`, in variances of what it predicts; the batch is `PairData`'s.

    The same as `mlx_starflow.training.loop.student_objective`, in bfloat16. `text_length`: see `Student`.
    """
    noise, clean, condition = batch["noise"], batch["clean"], batch.get("condition")
    with torch.autocast(noise.device.type, dtype=torch.bfloat16):
        if student.config.kind == INVERSE:
            targets, previous = [*batch["states"].unbind(1), clean], None
            if "refined" in batch:
                with torch.no_grad():
                    previous = student(noise, grid, condition, text_length=text_length)[-2]
            outputs = student(noise, grid, condition, previous, text_length=text_length)
        else:
            time = batch["time"][:, None, None]
            targets, between = [clean - noise], (1 - time) * noise + time * clean
            outputs = student(between, grid, condition, time=batch["time"], text_length=text_length)
    return [
        ((output - target) / scale).square().mean(dim=(1, 2))
        for output, target, scale in zip(outputs, targets, student.config.scales, strict=True)
    ]


def student_loss(errors: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Of `student_errors`: the mean of the states' errors and the error of the data, or the velocity's."""
    *states, last = [error.mean() for error in errors]
    if not states:
        return last, {"velocity": last.item()}
    return sum(states[1:], states[0]) / len(states) + last, {"sample": states[-1].item(), "clean": last.item()}


def without_padding(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """A batch in parts of equal size, by the length of their text `[B, L, D]`, without the zeros that all rows of a
    part end with: of short texts they are most of what a network would compute."""
    lengths = (batch["condition"] != 0).any(-1).sum(-1)
    cut = []
    for rows in lengths.argsort(stable=True).chunk(parts):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        part["condition"] = part["condition"][:, : max(int(lengths[rows].max()), 1)]
        cut.append(part)
    return cut


def write_model(
    folder: Path,
    autoencoder: AutoencoderKL,
    model: TextFlow,
    mean: Tensor | np.ndarray,
    std: Tensor | np.ndarray,
    spiece: Path,
    pipeline: dict[str, Any],
    dense: bool = False,
) -> None:
    """Write an MLX model directory: flow and text encoder in 8 bits unless it is `dense`, the autoencoder in bfloat16.

    Args:
        mean, std: of the raw latents, one number a channel.
        spiece: the tokenizer's file.
        pipeline: how to sample.
    """
    moments = {"latents_mean": tuple(mean.tolist()), "latents_std": tuple(std.tolist())}
    vae = MLXAutoencoderKL(replace(autoencoder.config, **moments))
    load_module(vae, vae.sanitize(arrays(autoencoder)), "autoencoder", dtype=mx.bfloat16)
    save_model(folder / "vae", parameters(vae), vae.config.to_dict())

    encoder = MLXT5Encoder(model.text_encoder.config)
    load_module(encoder, arrays(model.text_encoder), "text encoder", dtype=mx.float32 if dense else mx.bfloat16)
    save_network(folder / "text_encoder", encoder, encoder.config.to_dict(), dense)
    shutil.copy(spiece, folder / "text_encoder/spiece.model")
    write_flow(folder, model.flow, pipeline, dense)


def write_flow(folder: Path, flow: STARFlow, pipeline: dict[str, Any], dense: bool = False) -> None:
    """Write the flow of an MLX model directory, in 8 bits, or as it is; `pipeline` says how to sample."""
    dtype = mx.float32 if dense else mx.bfloat16
    module = load_module(MLXSTARFlow(flow.config), arrays(flow), "flow", dtype=dtype)
    save_network(folder, module, {"model_type": "starflow", **flow.config.to_dict(), "pipeline": pipeline}, dense)


def write_student(folder: Path, student: Student) -> None:
    """Write a student's folder, in 8 bits."""
    module = load_module(MLXStudent(student.config), arrays(student), "student", dtype=mx.bfloat16)
    save_network(folder, module, {"model_type": "student", **student.config.to_dict()})


def save_network(folder: Path, module: MLXModule, config: dict[str, Any], dense: bool = False) -> None:
    """Write a network's folder, in 8 bits unless it is `dense`."""
    if not dense:
        config = {**config, "quantization": quantize_module(module, "8")}
    save_model(folder, parameters(module), config)


def arrays(module: nn.Module) -> dict[str, mx.array]:
    """A module's tensors in MLX."""
    return {name: mx.array(value.cpu().contiguous().numpy()) for name, value in module.state_dict().items()}
