"""PyTorch twin of `models/t5.py` for gated-GELU encoders (T5 1.1, flan-T5): the same config and tensor names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from mlx_starflow.models.t5 import T5Config


class RMSNorm(nn.Module):
    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dims))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class SelfAttention(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool):
        super().__init__()
        self.config = config
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        # T5 folds the 1/sqrt(d) of attention into the initial queries.
        nn.init.normal_(self.q.weight, std=(config.d_model * config.d_kv) ** -0.5)
        for linear in (self.k, self.v):
            nn.init.normal_(linear.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)

    def position_bias(self, length: int) -> Tensor:
        """`[1, heads, L, L]`: half of the buckets count exactly, the rest grow logarithmically."""
        config = self.config
        buckets = config.relative_attention_num_buckets // 2
        exact = buckets // 2
        offset = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        distance = offset.abs()
        ratio = torch.log(distance.clamp(min=1) / exact) / math.log(config.relative_attention_max_distance / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        bucket = (offset > 0) * buckets + torch.where(distance < exact, distance, far)
        return self.relative_attention_bias(bucket).permute(2, 0, 1)[None]

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o(h.transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        for linear, inputs in ((self.wi_0, config.d_model), (self.wi_1, config.d_model), (self.wo, config.d_ff)):
            nn.init.normal_(linear.weight, std=inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class Residual(nn.Module):
    """A sublayer under T5's names: `layer_norm` and `SelfAttention` or `DenseReluDense`."""

    def __init__(self, config: T5Config, name: str, sublayer: nn.Module):
        super().__init__()
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.add_module(name, sublayer)
        self.name = name

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        return x + getattr(self, self.name)(self.layer_norm(x), *args)


class Block(nn.Module):
    def __init__(self, config: T5Config, first: bool):
        super().__init__()
        attention = Residual(config, "SelfAttention", SelfAttention(config, first))
        self.layer = nn.ModuleList([attention, Residual(config, "DenseReluDense", GatedFeedForward(config))])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, bias))


class Stack(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.block = nn.ModuleList([Block(config, i == 0) for i in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)


class T5Encoder(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask `[B, L]` -> `[B, L, d_model]`; padding is not attended to and is zero in the result."""
        x = self.shared(ids)
        bias = self.encoder.block[0].layer[0].SelfAttention.position_bias(ids.shape[1])
        bias = bias.masked_fill(mask[:, None, None, :] == 0, torch.finfo(torch.float32).min)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x) * mask[..., None]
