"""CLIP: pictures and texts to embeddings that lie close together where they fit (arXiv 2103.00020).

Modules are named as in a Hugging Face `CLIPModel`, whose folder `CLIPConfig.from_dict` and `CLIP.sanitize` read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.configs import MOST_LAYERS, ConfigKind

_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "quick_gelu": lambda x: x * mx.sigmoid(1.702 * x),
    "gelu": nn.gelu,
}

_TEXT, _VISION = ConfigKind("CLIP text", strict=False), ConfigKind("CLIP vision", strict=False)
_WHOLE = ConfigKind("CLIP", strict=False)

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

_BUFFER = ".position_ids"
"""How older checkpoints call numbers that are no weights."""

_OLD_END = 2
"""What older configs say of the token that ends a text, whatever it is: the largest number stands there."""


@dataclass(frozen=True)
class CLIPTextConfig:
    """The text's transformer, with Hugging Face's names and defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        _TEXT.positive(**{name: getattr(self, name) for name in (*_SIZES, "vocab_size", "max_position_embeddings")})
        _check(_TEXT, self)


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The picture's transformer, with Hugging Face's names and defaults."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self) -> None:
        _VISION.positive(**{name: getattr(self, name) for name in (*_SIZES, "image_size", "patch_size")})
        _check(_VISION, self)
        fits = self.image_size % self.patch_size == 0
        _VISION.require(fits, f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")


def _check(kind: ConfigKind, config: CLIPTextConfig | CLIPVisionConfig) -> None:
    kind.require(config.num_hidden_layers <= MOST_LAYERS, f"num_hidden_layers must be at most {MOST_LAYERS}")
    heads = config.num_attention_heads
    kind.require(config.hidden_size % heads == 0, f"hidden_size must be a multiple of num_attention_heads {heads}")
    kind.choice("hidden_act", config.hidden_act, tuple(_ACTIVATIONS))


@dataclass(frozen=True)
class CLIPConfig:
    """Both transformers, and the size of what they have in common."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig
    projection_dim: int = 512

    def __post_init__(self) -> None:
        _WHOLE.positive(projection_dim=self.projection_dim)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CLIPConfig:
        """Read the `config.json` of a `CLIPModel`. Raises StarflowError if it is another model's, or unusable."""
        if config.get("model_type") != "clip":
            raise StarflowError(f"this is a model of type {config.get('model_type')!r}, not a CLIPModel ('clip')")
        parts = [config.get(name) or config.get(f"{name}_dict") or {} for name in ("text_config", "vision_config")]
        for part in parts:
            _WHOLE.require(isinstance(part, dict), "text_config and vision_config must be objects")
        dim = _WHOLE.typed("projection_dim", "int", config.get("projection_dim", 512))
        return cls(
            CLIPTextConfig(**_TEXT.values(CLIPTextConfig, parts[0])),
            CLIPVisionConfig(**_VISION.values(CLIPVisionConfig, parts[1])),
            dim,
        )


class CLIPAttention(nn.Module):
    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.v_proj, self.out_proj = nn.Linear(size, size), nn.Linear(size, size)

    def __call__(self, x: mx.array, mask: str | None) -> mx.array:
        B, L, D = x.shape
        q, k, v = (
            project(x).reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(B, L, D))


class CLIPMLP(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        self.self_attn = CLIPAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, x: mx.array, mask: str | None) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        self.layers = [CLIPLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array, mask: str | None = None) -> mx.array:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class CLIPTextEmbeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class CLIPTextTransformer(nn.Module):
    """Token ids `[B, L]` to the hidden state of the token that ends each text, `[B, hidden_size]`."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self._end = config.eos_token_id
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, ids: mx.array) -> mx.array:
        hidden = self.final_layer_norm(self.encoder(self.embeddings(ids), mask="causal"))
        ends = mx.argmax(ids if self._end == _OLD_END else (ids == self._end).astype(mx.int32), axis=1)
        return hidden[mx.arange(len(ids)), ends]


class CLIPVisionEmbeddings(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.class_embedding = mx.zeros(size)
        self.patch_embedding = nn.Conv2d(3, size, patch, patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, size)

    def __call__(self, images: mx.array) -> mx.array:
        patches = self.patch_embedding(images).flatten(1, 2)
        first = mx.broadcast_to(self.class_embedding, (len(images), 1, patches.shape[-1]))
        return mx.concatenate([first, patches], axis=1) + self.position_embedding.weight


class CLIPVisionTransformer(nn.Module):
    """Normalized pictures `[B, S, S, 3]` to the hidden state of the class token, `[B, hidden_size]`."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, images: mx.array) -> mx.array:
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        return self.post_layernorm(hidden[:, 0])


class CLIP(nn.Module):
    """Both transformers with their projections."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config.text)
        self.vision_model = CLIPVisionTransformer(config.vision)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = mx.zeros(())

    def encode_texts(self, ids: mx.array) -> mx.array:
        """Token ids `[B, L]`, each row with the token that ends a text -> unit vectors `[B, projection_dim]`."""
        return _unit(self.text_projection(self.text_model(ids)))

    def encode_images(self, images: mx.array) -> mx.array:
        """Normalized pictures `[B, S, S, 3]` -> unit vectors `[B, projection_dim]`."""
        return _unit(self.visual_projection(self.vision_model(images)))

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The tensors of a Hugging Face checkpoint, in PyTorch's layout, as this module's.

        Names and shapes are checked where the result is loaded.
        """
        kept = {name: weight for name, weight in weights.items() if not name.endswith(_BUFFER)}
        return {name: mx.moveaxis(each, 1, -1) if each.ndim == 4 else each for name, each in kept.items()}


def _unit(x: mx.array) -> mx.array:
    return x / mx.linalg.norm(x, axis=-1, keepdims=True)
