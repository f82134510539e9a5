"""PyTorch reference of `models/itarflow.py`: the same config, the same tensor names, pictures `[B, H, W, C]`."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.itarflow import LONGEST_PERIOD
from mlx_starflow.reference.flow import Condition, FlowOutput
from mlx_starflow.reference.tarflow import PixelFlow, TarFlowBlock, pixel_patches, pixels_of
from mlx_starflow.reference.transformer import TransformerLayer

if TYPE_CHECKING:
    from mlx_starflow.kernels.affine import GuidanceMode
    from mlx_starflow.models.itarflow import ITarFlowBlockConfig, ITarFlowConfig


class LevelEmbedding(nn.Module):
    """log t `[B]` -> `[B, channels]`: sines and cosines through two layers."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, log_level: Tensor) -> Tensor:
        half = self.channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=log_level.device)
        angles = log_level.float()[:, None] * torch.exp(-math.log(LONGEST_PERIOD) / half * steps)
        h = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
        out: Tensor = self.mlp(h.to(next(self.parameters()).dtype))
        return out


class ITarFlowBlock(TarFlowBlock):
    """A TarFlow's block with an embedding of the noise level, patches of its own and layers that it may share."""

    config: ITarFlowBlockConfig

    def __init__(self, config: ITarFlowBlockConfig, shared: Sequence[TransformerLayer]):
        super().__init__(config)
        self.attn_blocks = self.attn_blocks[len(shared) :]
        self._shared = list(shared)  # a list of Python's, which PyTorch does not look into
        self.time_embed = LevelEmbedding(config.channels)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return [*self._shared, *self.attn_blocks]

    def length(self, tokens: int) -> int:
        return self.config.num_patches

    def permute(self, x: Tensor) -> Tensor:
        return super().permute(self._cut_anew(x, self.config.flow_patch_size, self.config.patch_size))

    def unpermute(self, x: Tensor) -> Tensor:
        return self._cut_anew(super().unpermute(x), self.config.patch_size, self.config.flow_patch_size)

    def _cut_anew(self, tokens: Tensor, old: int, new: int) -> Tensor:
        return tokens if old == new else pixel_patches(pixels_of(tokens, old, self.config.channel_size), new)

    def condition(self, text: Tensor | None, batch: int, log_level: Tensor | None = None) -> Condition:
        """The embedding of the labels and of log t, `[1]` or `[B]`."""
        condition = super().condition(text, batch)
        if log_level is None:
            raise StarflowError("an iTARFlow needs the noise level of its data")
        level = self.time_embed(log_level)[:, None]
        return Condition(offset=level if condition.offset is None else condition.offset + level)


class ITarFlow(PixelFlow):
    """The flow over square pictures with noise of a known level, and integer labels `[B]`.

    Attributes:
        noise_level: of the data, a number or one a sample; `t1` of the config unless `at` has made this flow.
    """

    config: ITarFlowConfig
    guidance_mode: GuidanceMode = "itarflow"

    def __init__(self, config: ITarFlowConfig):
        blocks = [config.block(index) for index in range(config.blocks)]
        shared = [TransformerLayer(blocks[0]) for _ in range(config.shared_backbone_layers)]
        super().__init__(config, [ITarFlowBlock(block, shared) for block in blocks])
        if shared:
            self.shared_backbone = nn.ModuleList(shared)
        self.noise_level: float | Tensor = config.t1

    def at(self, noise_level: float | Tensor) -> ITarFlow:
        """This flow, with the same weights, for data of another noise level."""
        flow = copy.copy(self)
        flow.noise_level = noise_level
        return flow

    @property
    def noise_std(self) -> float:
        """The noise level, where it is one number."""
        return float(self.noise_level)

    def block_conditions(self, text: Tensor | None, batch: int) -> list[Condition]:
        level = torch.as_tensor(self.noise_level, dtype=torch.float32, device=self.var.device)
        return [block.condition(text, batch, level.reshape(-1).log()) for block in self._blocks()]

    def _blocks(self) -> list[ITarFlowBlock]:
        return [block for block in self.blocks if isinstance(block, ITarFlowBlock)]

    def forward(self, x: Tensor, text: Tensor | None = None, noise_level: float | Tensor | None = None) -> FlowOutput:
        """Pictures with noise of standard deviation `noise_level` and labels -> noise tokens, see `PixelFlow`."""
        if noise_level is not None:
            out: FlowOutput = self.at(noise_level)(x, text)
            return out
        return super().forward(x, text)
