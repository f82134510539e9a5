"""PyTorch reference of `models/t5.py`: the same config, the same tensor names, a float32 residual stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_starflow.models.t5 import relative_position_buckets

if TYPE_CHECKING:
    from mlx_starflow.models.t5 import T5Config

_gelu_new = partial(F.gelu, approximate="tanh")

# "gated-gelu" alone means the tanh approximation: that is what T5 1.1 and flan-T5 were trained with.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
    "silu": F.silu,
    "gated-relu": F.relu,
    "gated-gelu": _gelu_new,
    "gated-gelu_new": _gelu_new,
    "gated-silu": F.silu,
}


class RMSNorm(nn.Module):
    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dims))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The float32 residual stream -> the dtype of the weights."""
        return F.rms_norm(x, x.shape[-1:], self.weight.float(), self.eps).to(self.weight.dtype)


class T5Attention(nn.Module):
    """Bidirectional self-attention with unscaled logits; in layer 0 it also holds the position bias."""

    def __init__(self, config: T5Config, has_position_bias: bool):
        super().__init__()
        self.config = config
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_position_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        # T5 folds the 1/sqrt(d) of attention into the initial queries.
        nn.init.normal_(self.q.weight, std=(config.d_model * config.d_kv) ** -0.5)
        for linear in (self.k, self.v):
            nn.init.normal_(linear.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)

    def position_bias(self, length: int) -> Tensor:
        """The learned bias on the logits, `[1, heads, length, length]`."""
        config, bias = self.config, self.relative_attention_bias
        distance = config.relative_attention_max_distance
        buckets = relative_position_buckets(length, config.relative_attention_num_buckets, distance)
        return bias(torch.from_numpy(buckets).to(bias.weight.device)).permute(2, 0, 1)[None]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), scale=1.0)
        return self.o(h.transpose(1, 2).flatten(2))


class T5FeedForward(nn.Module):
    """The MLP, plain (`wi`, T5) or gated (`wi_0`, `wi_1`, T5 1.1 and flan-T5)."""

    wi: nn.Linear
    wi_0: nn.Linear
    wi_1: nn.Linear

    def __init__(self, config: T5Config):
        super().__init__()
        self.activation = _ACTIVATIONS[config.feed_forward_proj]
        self.gated = config.feed_forward_proj.startswith("gated-")
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            self.add_module(name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        for linear in self.children():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.wi_0(x) if self.gated else self.wi(x))
        return self.wo(hidden * self.wi_1(x) if self.gated else hidden)


class T5SelfAttentionLayer(nn.Module):
    """Pre-norm residual branch around the attention."""

    def __init__(self, config: T5Config, has_position_bias: bool):
        super().__init__()
        self.SelfAttention = T5Attention(config, has_position_bias)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), mask)


class T5FeedForwardLayer(nn.Module):
    """Pre-norm residual branch around the MLP."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = T5FeedForward(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nn.Module):
    def __init__(self, config: T5Config, has_position_bias: bool):
        super().__init__()
        self.layer = nn.ModuleList([T5SelfAttentionLayer(config, has_position_bias), T5FeedForwardLayer(config)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        attend, feed_forward = self.layer
        return feed_forward(attend(x, mask))


class T5Stack(nn.Module):
    """Blocks and the final norm: embeddings `[B, L, d_model]` and mask `[B, L]` or None to `[B, L, d_model]`."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.block = nn.ModuleList([T5Block(config, has_position_bias=i == 0) for i in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        first = cast(T5SelfAttentionLayer, cast(T5Block, self.block[0]).layer[0])
        mask = first.SelfAttention.position_bias(x.shape[1])
        if attention_mask is not None:
            # The lowest finite number, not -inf: a row that is all padding stays finite.
            mask = mask.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(torch.bfloat16).min)
        x = x.float()
        for block in self.block:
            x = block(x, mask)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """Token ids to text embeddings, in the dtype of the weights."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The last hidden state `[B, L, d_model]` of ids `[B, L]`; a mask that is 0 hides padding from attention."""
        return self.encoder(self.shared(input_ids), attention_mask)

    def encode(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """What the flow reads: the last hidden state with the rows of padding set to zero."""
        return self(input_ids, mask) * (mask != 0)[..., None]
