"""PyTorch reference of `models/tarflow.py`: the same config, the same tensor names, pictures `[B, H, W, C]`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.reference.flow import Condition, Conditions, FlowBlock, FlowBlocks, FlowOutput, run_blocks

if TYPE_CHECKING:
    from mlx_starflow.kernels.affine import GuidanceMode
    from mlx_starflow.models.tarflow import PixelFlowConfig, TarFlowBlockConfig, TarFlowConfig


class TarFlowBlock(FlowBlock):
    """A flow block with learned positions and, if there are classes, an embedding of the label."""

    config: TarFlowBlockConfig

    def __init__(self, config: TarFlowBlockConfig):
        super().__init__(config)
        self.pos_embed = nn.Parameter(0.01 * torch.randn(config.num_patches, config.channels))
        if config.num_classes:
            self.class_embed = nn.Parameter(0.01 * torch.randn(config.num_classes, 1, config.channels))
        if not config.nvp:
            self.proj_out = nn.Linear(config.channels, config.in_channels)
            nn.init.zeros_(self.proj_out.weight)
            nn.init.zeros_(self.proj_out.bias)

    def rope_frequencies(self, rope_frequencies: Tensor | None, length: int) -> None:
        """A TarFlow has no rotary positions."""

    def condition(self, text: Tensor | None, batch: int) -> Condition:
        """The embedding of integer labels `[B]`: the mean of all classes for label -1, or for no labels at all."""
        if not self.config.num_classes:
            return Condition()
        mean = self.class_embed.mean(dim=0, keepdim=True)
        if text is None:
            return Condition(offset=mean)
        return Condition(offset=torch.where((text == -1)[:, None, None], mean, self.class_embed[text.clamp(min=0)]))

    def embed(self, tokens: Tensor, start: int = 0, offset: Tensor | None = None) -> Tensor:
        """Input tokens `[B, n, C]`, the first of them number `start` in the block's order, -> `[B, n, channels]`."""
        positions = self.pos_embed.flip(0) if self.config.flip else self.pos_embed
        h = self.proj_in(tokens.to(self.dtype)) + positions[start : start + tokens.shape[1]]
        return h if offset is None else h + offset

    def _affine(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return super()._affine(parameters) if self.config.nvp else (parameters, torch.zeros_like(parameters))

    def unpredicted(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, log sigma) of a token that nothing predicts: it passes unchanged."""
        return torch.zeros_like(tokens), torch.zeros_like(tokens)


class PixelFlow(nn.Module):
    """A flow over square pictures `[B, H, W, C]`, channels in -1..1, and integer labels `[B]`.

    Attributes:
        var: the prior's variances, `[N, C * p * p]`; learned beside the weights where blocks only shift, else 1.
    """

    var: Tensor
    guidance_mode: GuidanceMode = "tarflow"

    def __init__(self, config: PixelFlowConfig, blocks: list[TarFlowBlock]):
        super().__init__()
        self.config = config
        self.blocks = FlowBlocks(blocks)
        self.register_buffer("var", torch.ones(config.num_patches, config.channel_size * config.patch_size**2))

    def tokens(self, x: Tensor) -> Tensor:
        """Pictures -> tokens `[B, N, C * p * p]` in raster order, float32; within a token channel, row, column."""
        return pixel_patches(x.float(), self.config.patch_size)

    def latents(self, tokens: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Tokens in raster order -> pictures; a TarFlow makes pictures of one shape."""
        return pixels_of(tokens, self.config.patch_size, self.config.channel_size)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the Gaussian noise in the data."""
        return self.config.noise_std

    def noise_tokens(self, z: Tensor) -> Tensor:
        """Standard-normal noise `[B, N, C * p * p]` -> noise of the prior's variances, which the last block makes."""
        return z.float() * self.var.float().sqrt()

    def standardize(self, z: Tensor) -> Tensor:
        """`flow(x).z` -> the noise that `sample` makes x of: the same, unless the prior's variances are learned."""
        return z / self.var.float().sqrt()

    def conditions(self, z: Tensor, text: Tensor | None, null_text: Tensor | None, guidance: float) -> Conditions:
        """What sampling from noise `z` and integer labels `[B]` needs.

        Guidance moves every block away from the labels `null_text` `[B or 1]`, by default from -1, no class.
        """
        guided = guidance > 0
        if guided and not self.config.num_classes:
            raise StarflowError("this flow has no classes, so guidance has no effect; use guidance 0")
        if guided:
            if text is None:
                raise StarflowError("guidance needs a class label for each sample")
            null = torch.full_like(text, -1) if null_text is None else null_text.expand_as(text)
            text = torch.cat([text, null])
        self._check_labels(text)
        conditions = self.block_conditions(text, len(z))
        for condition in conditions:
            condition.guided = guided
        return Conditions(None, conditions, self.guidance_mode, temper_null_only=True)

    def block_conditions(self, text: Tensor | None, batch: int) -> list[Condition]:
        """What each block makes of the labels `text` of `batch` samples."""
        return [block.condition(text, batch) for block in self.blocks]

    def _check_labels(self, labels: Tensor | None) -> None:
        if labels is None:
            return
        if not self.config.num_classes:
            raise StarflowError("this flow has no classes; leave the labels out")
        if labels.min() < -1 or labels.max() >= self.config.num_classes:
            raise StarflowError(f"labels must be 0 to {self.config.num_classes - 1}, or -1 for no class")

    def forward(self, x: Tensor, text: Tensor | None = None) -> FlowOutput:
        """Pictures `[B, H, W, C]` and integer labels `[B]` (-1 or None: no class) -> noise tokens in `z`.

        Neither `z` nor the loss knows of learned variances of the prior, as in training: see `standardize`.
        """
        self._check_labels(text)
        hidden, log_dets = run_blocks(self.blocks, self.tokens(x), self.block_conditions(text, len(x)), None)
        log_dets = [self.latents(t) for t in log_dets]
        return FlowOutput(hidden[-1], sum(log_dets[1:], log_dets[0]), log_dets, [self.latents(t) for t in hidden])


class TarFlow(PixelFlow):
    """The flow over square pictures `[B, H, W, C]`, channels in -1..1, and integer labels `[B]`."""

    def __init__(self, config: TarFlowConfig):
        super().__init__(config, [TarFlowBlock(config.block(index)) for index in range(config.blocks)])


def pixel_patches(x: Tensor, patch: int) -> Tensor:
    """Pictures `[B, S, S, C]` -> tokens `[B, (S / p)^2, C * p * p]`, see `models.tarflow.pixel_patches`."""
    side, channels = x.shape[1] // patch, x.shape[-1]
    x = x.reshape(-1, side, patch, side, patch, channels)
    return x.permute(0, 1, 3, 5, 2, 4).reshape(len(x), side * side, -1)


def pixels_of(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """The inverse of `pixel_patches`."""
    side = math.isqrt(tokens.shape[1])
    x = tokens.reshape(-1, side, side, channels, patch, patch)
    return x.permute(0, 1, 4, 2, 5, 3).reshape(-1, side * patch, side * patch, channels)
