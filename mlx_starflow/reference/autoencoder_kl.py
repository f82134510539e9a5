"""PyTorch reference of `models/autoencoder_kl.py`: the same config, the same tensor names, pictures `[B, 3, H, W]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from mlx_starflow.models.autoencoder_kl import AutoencoderKLConfig

EPS = 1e-6


class ResnetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).transpose(1, 2).reshape(batch, channels, height, width)


class Resample(nn.Module):
    """Halves (asymmetric padding, stride 2) or doubles (nearest neighbour) the picture."""

    def __init__(self, channels: int, *, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Stage(nn.Module):
    """The resnets of one resolution, then the change to the next one, if there is one."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, resample: str | None):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(inputs if i == 0 else outputs, outputs, groups) for i in range(layers)]
        )
        if resample == "down":
            self.downsamplers = nn.ModuleList([Resample(outputs, up=False)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Resample(outputs, up=True)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for resample in [*getattr(self, "downsamplers", []), *getattr(self, "upsamplers", [])]:
            x = resample(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        inputs = [widths[0], *widths[:-1]]
        self.down_blocks = nn.ModuleList(
            Stage(i, o, config.layers_per_block, groups, "down" if n < len(widths) - 1 else None)
            for n, (i, o) in enumerate(zip(inputs, widths, strict=True))
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths, groups = list(reversed(config.block_out_channels)), config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        inputs = [widths[0], *widths[:-1]]
        self.up_blocks = nn.ModuleList(
            Stage(i, o, config.layers_per_block + 1, groups, "up" if n < len(widths) - 1 else None)
            for n, (i, o) in enumerate(zip(inputs, widths, strict=True))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Pictures `[B, 3, H, W]` to latents `[B, C, h, w]` and back; see `models.autoencoder_kl.AutoencoderKL`."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        channels = config.latent_channels
        if config.use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior over raw latents, each `[B, C, h, w]`."""
        h = self.encoder(images)
        if self.config.use_quant_conv:
            h = self.quant_conv(h)
        mean, logvar = h.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """The pictures `[B, 3, H, W]` of raw latents `[B, C, h, w]`; values are about -1..1 and not clipped."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def scale(self, latents: Tensor) -> Tensor:
        """Raw latents `[B, C, h, w]` to normalized ones, in float32."""
        mean, std = self._statistics(latents.device)
        return (latents.float() - mean) / std * self.config.scaling_factor

    def unscale(self, latents: Tensor) -> Tensor:
        """The inverse of `scale`: normalized latents `[B, C, h, w]` to raw ones, in float32."""
        mean, std = self._statistics(latents.device)
        return latents.float() / self.config.scaling_factor * std + mean

    def _statistics(self, device: torch.device) -> tuple[Tensor | float, Tensor | float]:
        if self.config.latents_mean is None:
            return self.config.shift_factor or 0.0, 1.0
        mean, std = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        return mean, std
