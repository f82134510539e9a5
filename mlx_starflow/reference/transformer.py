"""PyTorch reference of `models/transformer.py`: attention, MLP and the layer of both, in every released variant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_starflow.reference.rope import rotate

if TYPE_CHECKING:
    from mlx_starflow.models.transformer import TransformerConfig


class Cache(Protocol):
    """Where a layer keeps its keys and values while tokens are fed to it a few at a time."""

    offset: int

    def update_and_fetch(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


class RMSNorm(nn.Module):
    """RMS norm whose weight is stored as an offset from 1."""

    def __init__(self, dims: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dims))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], (1 + self.weight).to(x.dtype), 1e-6)


def make_norm(kind: str, dims: int) -> nn.Module:
    return RMSNorm(dims) if kind == "rms_norm" else nn.LayerNorm(dims, eps=1e-5)


def causal_mask(length: int, cached: int, device: torch.device) -> Tensor | None:
    """What `length` positions may attend to, given `cached` ones before them, bool `[length, cached + length]`.

    None where attention needs no mask: for a single position, and, with nothing cached, where its `is_causal` does
    (PyTorch aligns that with the first key, a cache needs it to end at the last one).
    """
    if length == 1 or not cached:
        return None
    return torch.ones(length, cached + length, dtype=torch.bool, device=device).tril(cached)


class Attention(nn.Module):
    """Attention with one packed projection: queries, then keys, then values, head by head."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        num_heads, num_kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim
        self.half_split = config.hf_style_rope
        self.norm = make_norm(config.norm_type, config.channels)
        self.qkv = nn.Linear(config.channels, (num_heads + 2 * num_kv_heads) * dim, bias=config.use_bias)
        self.proj = nn.Linear(num_heads * dim, config.channels, bias=config.use_bias)
        if config.use_qk_norm:
            self.query_norm = RMSNorm(dim)
            self.key_norm = RMSNorm(dim)
        if config.use_post_norm:
            self.post_norm = make_norm(config.norm_type, config.channels)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, N, channels]` -> queries, keys and values `[B, heads, N, D]`, not rotated yet."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if hasattr(self, "query_norm"):
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, temperature: float | Tensor, causal: bool = True
    ) -> Tensor:
        """Attention `[B, N, channels]`: as `causal_mask`'s mask says, or, without one, to all keys up to a position's
        own or, if it is not `causal`, to all."""
        scale = self.head_dim**-0.5
        if isinstance(temperature, Tensor):
            q = q / temperature.to(q.dtype)
        else:
            scale = scale / temperature
        causal = causal and mask is None and q.shape[2] > 1
        with torch.autocast(q.device.type, enabled=False):
            h = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=self.num_heads != self.num_kv_heads
            )
        h = self.proj(h.transpose(1, 2).flatten(2).to(self.proj.weight.dtype))
        return self.post_norm(h) if hasattr(self, "post_norm") else h

    def forward(
        self,
        x: Tensor,
        rope_frequencies: Tensor | None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        temperature: float | Tensor = 1.0,
        causal: bool = True,
    ) -> Tensor:
        """`[B, N, channels]` and the rope frequencies of these N positions; logits are divided by `temperature`,
        a number or one number a sample, `[B, 1, 1, 1]`."""
        q, k, v = self.project(x)
        # On a CPU attention's backward pass is more than twice as fast in float32 as in bfloat16.
        dtype = torch.float32 if q.requires_grad and q.device.type == "cpu" else v.dtype
        if rope_frequencies is not None:
            q, k = rotate(q, rope_frequencies, self.half_split), rotate(k, rope_frequencies, self.half_split)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        return self.attend(q, k, v, mask, temperature, causal)


class MLP(nn.Module):
    """Exact GELU between two projections (`main.0`, `main.2`), or a gate through the tanh approximation of GELU."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        channels, hidden, bias = config.channels, config.channels * config.expansion, config.use_bias
        self.norm = make_norm(config.norm_type, channels)
        if config.use_swiglu:
            self.gate_proj = nn.Linear(channels, hidden, bias=bias)
            self.up_proj = nn.Linear(channels, hidden, bias=bias)
            self.down_proj = nn.Linear(hidden, channels, bias=bias)
        else:
            self.main = nn.Sequential(
                nn.Linear(channels, hidden, bias=bias), nn.GELU(), nn.Linear(hidden, channels, bias=bias)
            )
        if config.use_post_norm:
            self.post_norm = make_norm(config.norm_type, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if hasattr(self, "gate_proj"):
            h = self.down_proj(F.gelu(self.gate_proj(h), approximate="tanh") * self.up_proj(h))
        else:
            h = self.main(h)
        return self.post_norm(h) if hasattr(self, "post_norm") else h


class TransformerLayer(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rope_frequencies: Tensor | None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        temperature: float | Tensor = 1.0,
        causal: bool = True,
    ) -> Tensor:
        x = x + self.attention(x, rope_frequencies, mask, cache, temperature, causal)
        return x + self.mlp(x)
