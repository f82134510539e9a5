"""PyTorch reference of `models/flow.py`: one block of an autoregressive affine flow, and what a forward pass gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.reference.rope import line_frequencies
from mlx_starflow.reference.transformer import Cache, RMSNorm, TransformerLayer, causal_mask

if TYPE_CHECKING:
    from mlx_starflow.kernels.affine import GuidanceMode
    from mlx_starflow.models.flow import BlockConfig

SOFTPLUS_SHIFT = math.log(math.e - 1)
"""softplus(0 + this) = 1: an untrained block is the identity."""


@dataclass
class FlowOutput:
    """What a forward pass gives, all in data order; see `models.flow.FlowOutput`."""

    z: Tensor
    log_det: Tensor
    block_log_dets: list[Tensor]
    hidden: list[Tensor]
    penalty: float = 0.0

    def nll(self) -> Tensor:
        """Negative log-likelihood of each sample, `[B]`, in nats per dimension, without the constant log(2 pi) / 2."""
        return (0.5 * self.z.square()).flatten(1).mean(1) - self.log_det.flatten(1).mean(1)

    def loss(self) -> Tensor:
        """The training objective: mean NLL in nats per dimension, plus the latent-norm penalty where configured."""
        loss = self.nll().mean()
        if self.penalty:
            loss = loss + self.penalty * sum(h.square().mean() for h in self.hidden[:-1])
        return loss


@dataclass
class Condition:
    """What a block reads in addition to its tokens: a prefix `[B, L, channels]` and an offset `[B, 1, channels]`; if
    `guided`, for the batch with the condition and then with the null condition."""

    prefix: Tensor | None = None
    offset: Tensor | None = None
    guided: bool = False


@dataclass
class Conditions:
    """What sampling from a flow reads in addition to the noise; see `models.flow.Conditions`."""

    rope_frequencies: Tensor | None
    blocks: list[Condition]
    guidance_mode: GuidanceMode
    temper_null_only: bool = False


class FlowBlock(nn.Module):
    """One autoregressive affine flow over tokens `[B, N, C]`; with no layers it is the identity.

    `condition`, `embed`, `transform` and `affine` are its steps; samplers call them a few tokens at a time.
    """

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.config = config
        if self.is_identity:
            return
        self.proj_in = nn.Linear(config.in_channels, config.channels)
        self.proj_out = nn.Linear(config.channels, 2 * config.in_channels)
        # Zero parameters: a new block is the identity, the best start for a flow.
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        if config.sos:
            self.sos_embed = nn.Parameter(torch.randn(1, 1, config.in_channels))
        if config.txt_dim and config.use_proj_txt:
            self.proj_txt = nn.Linear(config.txt_dim, config.channels)
        if config.use_final_norm:
            self.final_norm = RMSNorm(config.channels)
        self.attn_blocks = nn.ModuleList([TransformerLayer(config) for _ in range(config.num_layers)])

    @property
    def is_identity(self) -> bool:
        return self.config.num_layers == 0

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_in.weight.dtype

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The transformer's layers, in their order."""
        return [*self.attn_blocks]

    def length(self, tokens: int) -> int:
        """How many tokens `permute` makes of so many."""
        return tokens

    def permute(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, C]` in data order -> as this block reads them."""
        return x.flip(1) if self.config.flip else x

    def unpermute(self, x: Tensor) -> Tensor:
        """The inverse of `permute`."""
        return x.flip(1) if self.config.flip else x

    def rope_frequencies(self, rope_frequencies: Tensor | None, length: int) -> Tensor | None:
        """Those of this block's sequence of `length`: the last of the flow's axial ones, or one-dimensional ones."""
        if self.config.hf_style_rope:
            return line_frequencies(self.config.head_dim, length).to(self.proj_in.weight.device)
        return None if rope_frequencies is None else rope_frequencies[len(rope_frequencies) - length :]

    def embed_prefix(self, text: Tensor | None) -> Tensor | None:
        """Text `[B, L, D]` -> what stands before the tokens, `[B, L, channels]`; None if the block reads no text."""
        if not self.config.txt_dim:
            return None
        if text is None:
            raise StarflowError(f"this flow reads text: give embeddings [batch, length, {self.config.txt_dim}]")
        text = text.to(self.dtype)
        return self.proj_txt(text) if self.config.use_proj_txt else text

    def condition(self, text: Tensor | None, batch: int) -> Condition:
        """What this block makes of the condition that the flow is given for `batch` samples."""
        return Condition() if self.is_identity else Condition(prefix=self.embed_prefix(text))

    def first_input(self, batch: int) -> Tensor | None:
        """What predicts the first token, `[B, 1, C]`; None if nothing does and it passes unchanged."""
        return self.sos_embed.expand(batch, -1, -1) if self.config.sos else None

    def embed(self, tokens: Tensor, start: int = 0, offset: Tensor | None = None) -> Tensor:
        """Input tokens `[B, n, C]`, the first of them number `start`, -> `[B, n, channels]`.

        `offset` is the condition's; this block's conditions have none.
        """
        return self.proj_in(tokens.to(self.dtype))

    def transform(
        self,
        h: Tensor,
        rope_frequencies: Tensor | None,
        caches: Sequence[Cache] | None = None,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """The transformer's layers over `[B, n, channels]`, whose positions have these rope frequencies, `[n, D/2]`."""
        mask = causal_mask(h.shape[1], caches[0].offset if caches else 0, h.device)
        for index, layer in enumerate(self.layers):
            h = layer(h, rope_frequencies, mask, caches[index] if caches else None, temperature)
        return h

    def affine(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states `[B, n, channels]` -> (mu, log sigma), float32 `[B, n, C]`."""
        if self.config.use_final_norm:
            h = self.final_norm(h)
        return self._affine(self.proj_out(h).float())

    def unpredicted(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, log sigma) of tokens that nothing predicts: those of affine parameters 0."""
        return self._affine(tokens.new_zeros(*tokens.shape[:-1], 2 * tokens.shape[-1]))

    def _affine(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        clip = self.config.soft_clip
        if clip:
            parameters = clip * torch.tanh(parameters / clip)
        scale, mu = parameters.chunk(2, dim=-1)
        if self.config.use_softplus:
            scale = F.softplus(scale + SOFTPLUS_SHIFT).log()
        return mu, scale

    def forward(
        self, x: Tensor, condition: Condition, rope_frequencies: Tensor | None, context_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens `[B, N, C]` in data order -> (z, per-dimension log-det), float32, both in data order.

        `condition` is what the block's own `condition` makes.
        `context_mask` `[B, N]`, in the block's order, hides an input from the network where it is 0: a training aid.
        """
        if self.is_identity:
            return x, torch.zeros_like(x)
        x = self.permute(x)
        batch, length, _ = x.shape
        first = self.first_input(batch)
        inputs = x if first is None else torch.cat([first.to(x.dtype), x[:, :-1]], dim=1)
        if context_mask is not None:
            inputs = inputs * context_mask[..., None]
        h = self.embed(inputs, 0, condition.offset)
        if condition.prefix is not None:
            h = torch.cat([condition.prefix.to(h.dtype), h], dim=1)
        h = self.transform(h, self.rope_frequencies(rope_frequencies, h.shape[1]))[:, -length:]
        if first is None:
            parts = self.unpredicted(x[:, :1]), self.affine(h[:, :-1])
            mu, scale = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
        else:
            mu, scale = self.affine(h)
        z = (x - mu) * torch.exp(-scale)
        return self.unpermute(z), -self.unpermute(scale)


class FlowBlocks(nn.ModuleList):
    """A flow's blocks, data side first."""

    def __iter__(self) -> Iterator[FlowBlock]:
        return cast(Iterator[FlowBlock], super().__iter__())


def run_blocks(
    blocks: FlowBlocks,
    tokens: Tensor,
    conditions: Sequence[Condition],
    rope_frequencies: Tensor | None,
    context_mask: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Data -> noise: what each block read and then the noise, and each block's log-det; tokens in data order."""
    hidden, log_dets = [tokens], []
    for index, (block, condition) in enumerate(zip(blocks, conditions, strict=True)):
        h, log_det = block(hidden[-1], condition, rope_frequencies, context_mask if index == len(blocks) - 1 else None)
        hidden.append(h)
        log_dets.append(log_det)
    return hidden, log_dets
