"""PyTorch reference of `models/student.py`: the same config, the same tensor names, tokens `[B, N, C]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.student import INVERSE, MATCHING, TIME_SCALE
from mlx_starflow.reference.itarflow import LevelEmbedding
from mlx_starflow.reference.rope import axial_frequencies
from mlx_starflow.reference.transformer import TransformerLayer, make_norm

if TYPE_CHECKING:
    from mlx_starflow.models.student import StudentConfig


class Head(nn.Module):
    """Hidden states -> tokens, float32; of a new student zero."""

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.norm = make_norm(config.norm_type, config.channels)
        self.proj_out = nn.Linear(config.channels, config.in_channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.proj_out(self.norm(h))
        return out.float()


class Student(nn.Module):
    """Noise tokens `[B, N, C]` in raster order -> what the heads predict."""

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.config = config
        read = 2 if config.kind == INVERSE else 1
        self.proj_in = nn.Linear(read * config.in_channels, config.channels)
        if config.txt_dim:
            self.proj_txt = nn.Linear(config.txt_dim, config.channels)
        if config.num_classes:
            # The last one stands for no class, label -1.
            self.class_embed = nn.Parameter(0.02 * torch.randn(config.num_classes + 1, config.channels))
        if config.positions:
            self.pos_embed = nn.Parameter(0.02 * torch.randn(config.positions, config.channels))
        if config.kind == MATCHING:
            self.time_embed = LevelEmbedding(config.channels)
        self.attn_blocks = nn.ModuleList([TransformerLayer(config) for _ in range(config.num_layers)])
        self.heads = nn.ModuleList([Head(config) for _ in config.scales])

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_in.weight.dtype

    def forward(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        condition: Tensor | None = None,
        previous: Tensor | None = None,
        time: Tensor | None = None,
        text_length: int | None = None,
    ) -> list[Tensor]:
        """One evaluation; arguments and what comes of them are those of `models.student.Student`.

        text_length: rows of text that there would be with padding, which a training may leave out; None: as given.

        Raises StarflowError if it reads text, and there is none.
        """
        config = self.config
        if config.kind == INVERSE:
            tokens = torch.cat([tokens, torch.zeros_like(tokens) if previous is None else previous], dim=-1)
        h = self.proj_in(tokens.to(self.dtype))
        if config.positions:
            h = h + self.pos_embed
        if time is not None:
            h = h + self.time_embed(TIME_SCALE * time)[:, None]
        length, all_text = 0, 0
        if config.num_classes:
            labels = torch.full((len(tokens),), -1, device=h.device) if condition is None else condition
            h = h + self.class_embed[labels.long() % (config.num_classes + 1)][:, None]
        elif config.txt_dim:
            if condition is None:
                raise StarflowError(f"this student reads text: give embeddings [batch, length, {config.txt_dim}]")
            prefix = self.proj_txt(condition.to(self.dtype))
            length, all_text = prefix.shape[1], text_length or prefix.shape[1]
            h = torch.cat([prefix, h], dim=1)
        frequencies = axial_frequencies(config.head_dim, *grid, config.side, all_text, bool(config.txt_dim))
        frequencies = torch.cat([frequencies[:length], frequencies[all_text:]]).to(h.device)
        outputs, depths = [], config.depths if config.kind == INVERSE else [config.num_layers]
        for number, layer in enumerate(self.attn_blocks, 1):
            h = layer(h, frequencies, causal=False)
            for head, depth, scale in zip(self.heads, depths, config.scales, strict=True):
                if depth == number:
                    outputs.append(scale * head(h[:, length:]))
        return outputs
