"""Sampling a STARFlow in PyTorch with the official release's algorithm, to be timed against.

What differs from `mlx_starflow.reference.sampling`: the cache holds keys before their rotary positions and grows by
concatenation, so every network evaluation copies all of it and turns all of it to its positions again. Guidance runs
the batch twice in one evaluation, in both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlx_starflow.reference.rope import rotate
from mlx_starflow.reference.sampling import METHODS, BlockDecoder, Guidance, invert_block, starflow_guidance
from mlx_starflow.reference.starflow import STARFlow
from mlx_starflow.reference.transformer import causal_mask
from mlx_starflow.sampling.methods import JacobiSettings


class GrowingCache:
    """Keys, not rotated, and values of one layer."""

    def __init__(self, length: int):
        self.offset = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update_and_fetch(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append `[B, heads, n, D]` and return all that is cached."""
        if self.keys is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values, self.offset = keys, values, keys.shape[2]
        return keys, values

    def trim(self, n: int) -> None:
        """Forget the last `n` positions."""
        self.offset -= n
        self.keys, self.values = self.keys[:, :, : self.offset], self.values[:, :, : self.offset]


class OfficialDecoder(BlockDecoder):
    """A `BlockDecoder` that rotates the whole cache at every evaluation."""

    cache_type = GrowingCache

    def _transform(self, h: Tensor) -> Tensor:
        start, stop = self.caches[0].offset, self.caches[0].offset + h.shape[1]
        mask = causal_mask(h.shape[1], start, h.device)
        for layer, cache in zip(self.block.attn_blocks, self.caches, strict=True):
            attention = layer.attention
            q, k, v = attention.project(h)
            keys, values = cache.update_and_fetch(k, v)
            keys = rotate(keys, self.rope_frequencies[:stop], attention.half_split).to(v.dtype)
            q = rotate(q, self.rope_frequencies[start:stop], attention.half_split).to(v.dtype)
            h = h + attention.attend(q, keys, values, mask, self.temperature)
            h = h + layer.mlp(h)
        return h


@torch.inference_mode()
def sample(
    flow: STARFlow,
    z: Tensor,
    text: Tensor | None,
    null_text: Tensor | None,
    guidance: float,
    method: str | JacobiSettings = "sequential",
) -> tuple[Tensor, list[int]]:
    """Noise `[B, H, W, C]` -> data, and the network evaluations of each block, deep block first.

    Args:
        method: "sequential", one token at a time; or "jacobi", blocks of 16 tokens one after the other, each iterated
            until the mean square of its change is below 1e-3 of that of its values (`JacobiSettings`' defaults); or
            other settings of these.
    """
    tokens = flow.tokens(z)
    batch, length, _ = tokens.shape
    conditions = flow.conditions(z, text, null_text, guidance)
    settings = METHODS[method]() if isinstance(method, str) else method
    evaluations = []
    for block, condition in reversed(list(zip(flow.blocks, conditions.blocks, strict=True))):
        if block.is_identity:
            evaluations.append(0)
            continue
        combined = Guidance(starflow_guidance, guidance) if condition.guided else None
        decoder = OfficialDecoder(block, batch, length, conditions.rope_frequencies, condition, combined)
        tokens = invert_block(decoder, tokens, settings)
        evaluations.append(decoder.evaluations)
    return flow.latents(tokens, z.shape), evaluations
