"""The T5 encoder that reads prompts (Raffel et al., arXiv 1910.10683): T5, T5 1.1 and flan-T5.

Modules are named as in Hugging Face's checkpoints. What sets T5 apart from other encoders: attention logits are not
divided by sqrt(d), positions enter only as a learned bias on the logits that the first layer holds for all layers, and
norms rescale without centring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.configs import MOST_LAYERS, ConfigKind

# "gated-gelu" alone means the tanh approximation: that is what T5 1.1 and flan-T5 were trained with.
_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "silu": nn.silu,
    "gated-relu": nn.relu,
    "gated-gelu": nn.gelu_approx,
    "gated-gelu_new": nn.gelu_approx,
    "gated-silu": nn.silu,
}

_CONFIG = ConfigKind("T5", strict=False)


@dataclass(frozen=True)
class T5Config:
    """The encoder's part of a Hugging Face T5 `config.json`, under the same names and with the same defaults."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        _CONFIG.positive(**{name: getattr(self, name) for name in names})
        _CONFIG.require(self.num_layers <= MOST_LAYERS, f"num_layers must be at most {MOST_LAYERS}")
        _CONFIG.require(self.layer_norm_epsilon > 0, "layer_norm_epsilon must be above 0")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        whole = buckets >= 4 and buckets % 4 == 0
        _CONFIG.require(whole, f"relative_attention_num_buckets must be a multiple of 4, not {buckets!r}")
        least = buckets // 4
        far = distance > least
        _CONFIG.require(far, f"relative_attention_max_distance must be greater than {least}, not {distance!r}")
        _CONFIG.choice("feed_forward_proj", self.feed_forward_proj, _ACTIVATIONS)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> T5Config:
        """Read a T5 `config.json`. Keys of the decoder, of training and of generation are ignored.

        Raises:
            StarflowError: the file is of another architecture, lacks a size, or holds an unusable value.
        """
        model_type = config.get("model_type", "t5")
        if model_type != "t5":
            raise StarflowError(f"the text encoder's config says model_type {model_type!r}; it must be a T5 ('t5')")
        return _CONFIG.read(cls, config)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON, readable by `from_dict` and as the config of a Hugging Face `T5EncoderModel`."""
        return {"model_type": "t5", "architectures": ["T5EncoderModel"], **asdict(self)}


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) pair of a sequence, integers `[length, length]` in `[0, num_buckets)`.

    The upper half of the buckets is for keys after the query. Within a half, the first half of the buckets is for
    exact distances; the others grow logarithmically up to `max_distance` and the last takes what lies beyond.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    half = num_buckets // 2
    exact = half // 2
    # float32, as in the checkpoints' own code: a distance on a bucket's edge must round to the same side.
    log_ratio = np.log(np.maximum(distance, exact).astype(np.float32) / exact)
    coarse = exact + (log_ratio / math.log(max_distance / exact) * (half - exact)).astype(np.int64)
    return np.where(offset > 0, half, 0) + np.where(distance < exact, distance, np.minimum(coarse, half - 1))


class T5Attention(nn.Module):
    """Bidirectional self-attention with unscaled logits; in layer 0 it also holds the position bias."""

    def __init__(self, config: T5Config, has_position_bias: bool):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_position_bias:
            self.relative_attention_bias = nn.Embedding(self.num_buckets, config.num_heads)

    def position_bias(self, length: int) -> mx.array:
        """The learned bias on the logits, `[1, heads, length, length]`."""
        buckets = relative_position_buckets(length, self.num_buckets, self.max_distance)
        return self.relative_attention_bias(mx.array(buckets)).transpose(2, 0, 1)[None]

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        B, L, _ = x.shape
        q, k, v = (
            project(x).reshape(B, L, self.num_heads, -1).transpose(0, 2, 1, 3) for project in (self.q, self.k, self.v)
        )
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)
        return self.o(out.transpose(0, 2, 1, 3).reshape(B, L, -1))


class T5FeedForward(nn.Module):
    """The MLP, plain (`wi`, T5) or gated (`wi_0`, `wi_1`, T5 1.1 and flan-T5)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.activation = _ACTIVATIONS[config.feed_forward_proj]
        self.gated = config.feed_forward_proj.startswith("gated-")
        if self.gated:
            self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
            self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        else:
            self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        hidden = self.activation(self.wi_0(x) if self.gated else self.wi(x))
        if x.dtype == mx.float16:
            # From here on trained models leave float16's range: the gate's product and what `wo` makes of it.
            hidden = hidden.astype(mx.float32)
        return self.wo(hidden * self.wi_1(x) if self.gated else hidden)


class T5SelfAttentionLayer(nn.Module):
    """Pre-norm residual branch around the attention."""

    def __init__(self, config: T5Config, has_position_bias: bool):
        super().__init__()
        self.SelfAttention = T5Attention(config, has_position_bias)
        self.layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        return x + self.SelfAttention(self.layer_norm(x).astype(mask.dtype), mask)


class T5FeedForwardLayer(nn.Module):
    """Pre-norm residual branch around the MLP."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = T5FeedForward(config)
        self.layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: mx.array, dtype: mx.Dtype) -> mx.array:
        return x + self.DenseReluDense(self.layer_norm(x).astype(dtype))


class T5Block(nn.Module):
    def __init__(self, config: T5Config, has_position_bias: bool):
        super().__init__()
        self.layer = [T5SelfAttentionLayer(config, has_position_bias), T5FeedForwardLayer(config)]

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        attend, feed_forward = self.layer
        return feed_forward(attend(x, mask), mask.dtype)


class T5Stack(nn.Module):
    """Blocks and the final norm: embeddings `[B, L, d_model]` and mask `[B, L]` or None to `[B, L, d_model]`."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.block = [T5Block(config, has_position_bias=i == 0) for i in range(config.num_layers)]
        self.final_layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: mx.array, attention_mask: mx.array | None = None) -> mx.array:
        dtype = self.final_layer_norm.weight.dtype
        mask = self.block[0].layer[0].SelfAttention.position_bias(x.shape[1]).astype(dtype)
        if attention_mask is not None:
            # The lowest finite number, not -inf: a row that is all padding stays finite.
            mask = mx.where(attention_mask[:, None, None, :] != 0, mask, mx.array(mx.finfo(dtype).min, dtype))
        # The residual stream stays in float32: it grows with depth, beyond float16's range and bfloat16's precision.
        x = x.astype(mx.float32)
        for block in self.block:
            x = block(x, mask)
        return self.final_layer_norm(x).astype(dtype)


class T5Encoder(nn.Module):
    """Token ids to text embeddings.

    Runs in the dtype of its weights, with a float32 residual stream. bfloat16 and float32 are safe for every model;
    float16 is too, because the MLP's second half is then computed in float32, at float32's speed.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config)

    def __call__(self, input_ids: mx.array, attention_mask: mx.array | None = None) -> mx.array:
        """The last hidden state.

        Args:
            input_ids: integers `[B, L]`.
            attention_mask: `[B, L]`, nonzero for real tokens; padding is not attended to. None: all tokens are real.

        Returns:
            `[B, L, d_model]` in the weights' dtype. Rows of padding hold numbers without meaning: see `encode`.
        """
        return self.encoder(self.shared(input_ids), attention_mask)

    def encode(self, input_ids: mx.array, mask: mx.array) -> mx.array:
        """What the flow reads: the last hidden state with the rows of padding set to zero. Shapes as in the call."""
        hidden = self(input_ids, mask)
        return mx.where(mask[..., None] != 0, hidden, mx.zeros((), hidden.dtype))


def encoder_name(name: str) -> str | None:
    """A checkpoint tensor's name in `T5Encoder`, or None if it belongs to the decoder or its output layer.

    The input embedding goes by two names, `shared.weight` and `encoder.embed_tokens.weight`, often both.
    """
    if name.startswith("decoder.") or name == "lm_head.weight":
        return None
    return "shared.weight" if name == "encoder.embed_tokens.weight" else name


def sanitize(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of `T5Encoder` among those of a Hugging Face T5 checkpoint; whatever is not known by name stays.

    Tensors are passed on untouched, so a lazy mapping's decoder is never read.
    """
    # "shared.weight" sorts last and wins.
    names = {new: name for name in sorted(weights) if (new := encoder_name(name)) is not None}
    return {new: weights[name] for new, name in names.items()}
