"""The transformer of flow blocks and denoisers: attention, MLP and the layer of both, in every released variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.kernels.attention import Rows, attention
from mlx_starflow.kernels.pieces import pieces
from mlx_starflow.kernels.plain import EPSILON, rms_norm
from mlx_starflow.kernels.qkv import split_rotate
from mlx_starflow.models.configs import FLOW, MOST_LAYERS


class Cache(Protocol):
    """Where a layer keeps its keys and values while tokens are fed to it a few at a time."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Rows, Rows]: ...


@dataclass(frozen=True)
class TransformerConfig:
    """`num_layers` identical layers of width `channels`; field names are the official release's arguments."""

    channels: int
    num_layers: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    expansion: int = 4
    norm_type: str = "layer_norm"
    use_bias: bool = True
    use_swiglu: bool = False
    use_qk_norm: bool = False
    use_post_norm: bool = False
    hf_style_rope: bool = False
    """Rotary positions count 0, 1, 2, ... over the sequence and pair dimension i with i + head_dim / 2."""

    def __post_init__(self) -> None:
        FLOW.positive(
            channels=self.channels,
            head_dim=self.head_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            expansion=self.expansion,
        )
        layers, heads, shared = self.num_layers, self.num_heads, self.num_kv_heads
        FLOW.require(isinstance(layers, int) and 0 <= layers <= MOST_LAYERS, f"a block cannot have {layers!r} layers")
        FLOW.require(heads % shared == 0, f"num_heads {heads} is no multiple of num_kv_heads {shared}")
        FLOW.choice("norm_type", self.norm_type, ("layer_norm", "rms_norm"))


class RMSNorm(nn.Module):
    """RMS norm whose weight is stored as an offset from 1."""

    def __init__(self, dims: int, eps: float = EPSILON):
        super().__init__()
        self.weight = mx.zeros((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)


def product_dtype(linear: nn.Module) -> mx.Dtype | None:
    """What a linear layer, dense, quantized or adapted, multiplies in; None: in whatever it is given."""
    linear = _inner(linear)
    weight: mx.array = linear.get("scales", linear.weight)
    return weight.dtype if mx.issubdtype(weight.dtype, mx.floating) else None


def multiply(linear: nn.Module, x: mx.array) -> mx.array:
    """A linear layer of x `[..., N, channels]`, in the layer's precision, with the result in x's.

    Where weights are half precision and x is float32, casting x costs next to nothing; MLX would cast the weights.
    """
    return _product(linear, x).astype(x.dtype)


def _product(linear: nn.Module, x: mx.array) -> mx.array:
    """The same, in the layer's precision."""
    h = x.astype(product_dtype(linear) or x.dtype)
    parts = pieces(h.shape[-2], 2.0 * h.size * _inner(linear).weight.shape[0])
    if len(parts) == 1:
        return linear(h)
    return mx.concatenate([linear(h[..., start:stop, :]) for start, stop in parts], axis=-2)


def _inner(linear: nn.Module) -> nn.Module:
    """The layer that an adapted one adapts."""
    while "linear" in linear:
        linear = linear.linear
    return linear


def make_norm(kind: str, dims: int) -> nn.Module:
    return RMSNorm(dims) if kind == "rms_norm" else nn.LayerNorm(dims, eps=1e-5)


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

    def project(self, x: mx.array, rope_frequencies: mx.array | None) -> tuple[mx.array, mx.array, mx.array]:
        """`[B, N, channels]` -> queries, keys and values, `[B, heads, N, D]`, rotated by their N positions."""
        norm = (self.query_norm.weight, self.key_norm.weight) if "query_norm" in self else ()
        # Not back to x's precision: the cache holds keys and values in the weights'.
        qkv = _product(self.qkv, self.norm(x))
        return split_rotate(
            qkv,
            rope_frequencies,
            *norm,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            half_split=self.half_split,
        )

    def attend(
        self, q: mx.array, k: Rows, v: Rows, temperature: float | mx.array = 1.0, causal: bool = True
    ) -> mx.array:
        """The last N of all positions attend to those up to their own, or to all -> `[B, N, heads * D]`."""
        batch, _, length, _ = q.shape
        scale = self.head_dim**-0.5
        if isinstance(temperature, mx.array):
            q = (q / temperature).astype(q.dtype)
        else:
            scale = scale / temperature
        mask = "causal" if causal and length > 1 else None
        h = attention(q, k, v, scale=scale, mask=mask)
        return h.transpose(0, 2, 1, 3).reshape(batch, length, -1)

    def merge(self, h: mx.array) -> mx.array:
        """What `attend` gives -> `[B, N, channels]`, in the precision of the norms."""
        h = multiply(self.proj, h).astype(self.norm.weight.dtype)
        return self.post_norm(h) if "post_norm" in self else h


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
            self.main = [nn.Linear(channels, hidden, bias=bias), nn.GELU(), nn.Linear(hidden, channels, bias=bias)]
        if config.use_post_norm:
            self.post_norm = make_norm(config.norm_type, channels)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.norm(x)
        if "gate_proj" in self:
            gate, up = multiply(self.gate_proj, h), multiply(self.up_proj, h)
            h = multiply(self.down_proj, nn.gelu_approx(gate) * up)
        else:
            first, activation, last = self.main
            h = multiply(last, activation(multiply(first, h)))
        return self.post_norm(h) if "post_norm" in self else h


class TransformerLayer(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def before(self, x: mx.array, rope_frequencies: mx.array | None) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values of `[B, N, channels]`, whose N positions have these rope frequencies."""
        return self.attention.project(x, rope_frequencies)

    def after(self, x: mx.array, h: mx.array) -> mx.array:
        """The layer's output from its input and what attention made of it."""
        x = x + self.attention.merge(h)
        return x + self.mlp(x)

    def __call__(
        self,
        x: mx.array,
        rope_frequencies: mx.array | None,
        cache: Cache | None = None,
        temperature: float | mx.array = 1.0,
    ) -> mx.array:
        """`[B, N, channels]` and the rope frequencies of these N positions; attention's logits are divided by
        `temperature`, a number or one number a sample, `[B, 1, 1, 1]`."""
        q, k, v = self.before(x, rope_frequencies)
        rows: tuple[Rows, Rows] = (k, v) if cache is None else cache.update_and_fetch(k, v)
        return self.after(x, self.attention.attend(q, *rows, temperature))
