"""PyTorch reference of `models/starflow.py`: the same config, the same tensor names, latents `[B, H, W, C]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.reference.flow import Conditions, FlowBlock, FlowBlocks, FlowOutput, run_blocks
from mlx_starflow.reference.rope import axial_frequencies

if TYPE_CHECKING:
    from mlx_starflow.models.starflow import FlowConfig


class STARFlow(nn.Module):
    """The flow over latents `[B, H, W, C]`; any H and W that the patch size divides."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.blocks = FlowBlocks([FlowBlock(block) for block in config.blocks])

    @property
    def noise_std(self) -> float:
        """Standard deviation of the Gaussian noise in the data."""
        return self.config.noise_std

    def tokens(self, x: Tensor) -> Tensor:
        """Latents -> tokens `[B, N, p * p * C]` in raster order, float32; within a token row, column, channel."""
        batch, height, width, channels = x.shape
        p = self.config.patch_size
        x = x.float().reshape(batch, height // p, p, width // p, p, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)

    def noise_tokens(self, z: Tensor) -> Tensor:
        """Noise, shaped as `sample` takes it (here as latents), -> the tokens that the last block makes of data."""
        return self.tokens(z)

    def latents(self, tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Tokens in raster order -> latents of `shape` `[B, H, W, C]`."""
        batch, height, width, _ = shape
        p = self.config.patch_size
        x = tokens.reshape(batch, height // p, width // p, p, p, -1)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)

    def rope_frequencies(self, x: Tensor, text_length: int) -> Tensor:
        """Rope frequencies of the text's and the tokens' positions for latents `[B, H, W, C]`."""
        config = self.config
        height, width = x.shape[1] // config.patch_size, x.shape[2] // config.patch_size
        side, third_axis = config.pt_seq_len, config.txt_size > 0
        assert side is not None  # the config has set it
        return axial_frequencies(config.head_dim, height, width, side, text_length, third_axis).to(x.device)

    def conditions(self, z: Tensor, text: Tensor | None, null_text: Tensor | None, guidance: float) -> Conditions:
        """What sampling from noise `z` and text `[B, L, D]` needs; guided where blocks read text."""
        both = text
        if guidance > 0:
            if not any(block.txt_dim for block in self.config.blocks):
                raise StarflowError("this flow reads no text, so guidance has no effect; use guidance 0")
            if text is None or null_text is None:
                raise StarflowError("guidance needs text and null_text (the embeddings of an empty prompt)")
            both = torch.cat([text, null_text.expand_as(text)])
        conditions = []
        for block in self.blocks:
            guided = guidance > 0 and block.config.txt_dim > 0
            condition = block.condition(both if guided else text, len(z))
            condition.guided = guided
            conditions.append(condition)
        return Conditions(self.rope_frequencies(z, 0 if text is None else text.shape[1]), conditions, "starflow")

    def forward(self, x: Tensor, text: Tensor | None = None, context_mask: Tensor | None = None) -> FlowOutput:
        """Latents `[B, H, W, C]` and text embeddings `[B, L, D]` -> noise; `context_mask` goes to the deep block."""
        rope_frequencies = self.rope_frequencies(x, 0 if text is None else text.shape[1])
        conditions = [block.condition(text, len(x)) for block in self.blocks]
        parts = run_blocks(self.blocks, self.tokens(x), conditions, rope_frequencies, context_mask)
        hidden, log_dets = ([self.latents(t, x.shape) for t in part] for part in parts)
        return FlowOutput(
            hidden[-1], sum(log_dets[1:], log_dets[0]), log_dets, hidden, self.config.latent_norm_regularization
        )
