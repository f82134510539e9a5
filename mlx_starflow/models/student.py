"""Students of a flow: one transformer that is not causal and makes of noise, all tokens at once, what the flow samples.

Two kinds. An *inverse* student (after BiFlow, arXiv 2512.10953) gives the flow's states between its blocks, its sample
and the clean data in one evaluation; fed with its own sample it may be evaluated again. A *matching* student (after
NFM, arXiv 2603.09014) gives the velocity of flow matching on the straight lines between the flow's own noise and data:

    x_t = (1 - t) z + t x        v(x_t, t) = E[x - z | x_t]        x = z + integral of v over t from 0 to 1
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.configs import ConfigKind, write_config
from mlx_starflow.models.gradient_checkpointing import checkpointed
from mlx_starflow.models.itarflow import LevelEmbedding
from mlx_starflow.models.rope import THIRD_AXIS_PAIRS, axial_frequencies
from mlx_starflow.models.starflow import patchify, unpatchify
from mlx_starflow.models.tarflow import pixel_patches, pixels_of
from mlx_starflow.models.transformer import TransformerConfig, TransformerLayer, make_norm

STUDENT = ConfigKind("student", ("model_type", "quantization"))

INVERSE, MATCHING = KINDS = ("inverse", "matching")

LAYOUTS = ("starflow", "tarflow")
"""Flows whose tokens a student knows, by their `model_type`."""

TIME_SCALE = 1000.0
"""Times from 0 to 1 are embedded as numbers up to this, whose sinusoids tell them apart."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig(TransformerConfig):
    """A student, and what it has learned from."""

    kind: str
    """"inverse" or "matching"."""
    teacher: str
    """Fingerprint of the flow's weights, see `model_dir.fingerprint`."""
    layout: str
    """How data are cut into tokens: as a flow of this `model_type` does."""
    channel_size: int
    patch_size: int
    side: int
    """Of the square of tokens that positions are scaled to, as the flow's."""
    scales: tuple[float, ...]
    """Standard deviation of what each head predicts: the states, deep block first, the last of them the flow's sample;
    then the clean data. A matching student's velocity."""
    txt_dim: int = 0
    """Width of the text embeddings that stand before the tokens; 0: it reads no text."""
    num_classes: int = 0
    positions: int = 0
    """Tokens of an image that have learned positions, where all images have as many; 0: none has."""
    guidance: float = 0.0
    """Of the flow's samples that it has learned."""
    temperature: float = 1.0
    """Of the noise that they were made of."""

    def __post_init__(self) -> None:
        super().__post_init__()
        STUDENT.choice("kind", self.kind, KINDS)
        STUDENT.choice("layout", self.layout, LAYOUTS)
        STUDENT.positive(channel_size=self.channel_size, patch_size=self.patch_size, side=self.side)
        STUDENT.require(self.num_layers > 0, "num_layers must be a positive integer")
        positive = all(math.isfinite(scale) and scale > 0 for scale in self.scales)
        STUDENT.require(positive and self.scales, "scales must be numbers greater than 0")
        one = self.kind == MATCHING
        STUDENT.require(
            len(self.scales) == 1 if one else len(self.scales) > 1,
            f"scales must hold {'one number' if one else 'one number a state and one of the data'}",
        )
        counts = (self.txt_dim, self.num_classes, self.positions)
        STUDENT.require(min(counts) >= 0, "txt_dim, num_classes and positions must be at least 0")
        third = THIRD_AXIS_PAIRS if self.txt_dim else 0
        STUDENT.require(
            self.head_dim % 2 == 0 and self.head_dim // 2 >= third and self.channels % 2 == 0,
            f"head_dim {self.head_dim} and channels {self.channels} must be even, and head_dim "
            f"{2 * THIRD_AXIS_PAIRS} or more for a student that reads text",
        )
        STUDENT.require(self.guidance >= 0 and self.temperature >= 0, "guidance and temperature must be at least 0")

    @property
    def in_channels(self) -> int:
        """Numbers in a token."""
        return self.channel_size * self.patch_size**2

    @property
    def states(self) -> int:
        """States of the flow that the heads give, its sample included; 0 of a matching student."""
        return len(self.scales) - 1

    @property
    def depths(self) -> list[int]:
        """How many layers stand before each head: the states' are spaced evenly, and the data's comes last."""
        spaced = [math.ceil((number + 1) * self.num_layers / self.states) for number in range(self.states)]
        return [*spaced, self.num_layers]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> StudentConfig:
        """Raises StarflowError if a key is missing or unknown, or a value is not usable."""
        return STUDENT.read(cls, config)

    def to_dict(self) -> dict[str, Any]:
        return write_config(self)


class Head(nn.Module):
    """Hidden states -> tokens, float32; of a new student zero."""

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.norm = make_norm(config.norm_type, config.channels)
        self.proj_out = nn.Linear(config.channels, config.in_channels)
        self.proj_out.weight = mx.zeros_like(self.proj_out.weight)
        self.proj_out.bias = mx.zeros_like(self.proj_out.bias)

    def __call__(self, h: mx.array) -> mx.array:
        return self.proj_out(self.norm(h)).astype(mx.float32)


class Student(nn.Module):
    """Noise tokens `[B, N, C]` in raster order, as the flow's `sample` takes noise, -> what the heads predict."""

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.config = config
        read = 2 if config.kind == INVERSE else 1
        self.proj_in = nn.Linear(read * config.in_channels, config.channels)
        if config.txt_dim:
            self.proj_txt = nn.Linear(config.txt_dim, config.channels)
        if config.num_classes:
            # The last one stands for no class, label -1.
            self.class_embed = 0.02 * mx.random.normal((config.num_classes + 1, config.channels))
        if config.positions:
            self.pos_embed = 0.02 * mx.random.normal((config.positions, config.channels))
        if config.kind == MATCHING:
            self.time_embed = LevelEmbedding(config.channels)
        self.attn_blocks = [TransformerLayer(config) for _ in range(config.num_layers)]
        self.heads = [Head(config) for _ in config.scales]

    @property
    def dtype(self) -> mx.Dtype:
        return self.proj_in.weight.dtype

    # ---- data and tokens

    def tokens(self, x: mx.array) -> mx.array:
        """Data or noise, shaped as the flow's `sample` takes and gives them, -> tokens `[B, N, C]`, float32.

        Raises:
            StarflowError: the shape is no image's of this kind.
        """
        config = self.config
        if config.layout == "tarflow" and x.ndim == 3:
            good, side = x.shape[-1] == config.in_channels, math.isqrt(x.shape[1])
            good = good and side * side == x.shape[1]
        else:
            good = x.ndim == 4 and x.shape[-1] == config.channel_size
            good = good and not (x.shape[1] % config.patch_size or x.shape[2] % config.patch_size)
        if not good:
            raise StarflowError(f"a student cannot read noise of shape {tuple(x.shape)}: it is another model's")
        if x.ndim == 3:
            return x.astype(mx.float32)
        cut = patchify if config.layout == "starflow" else pixel_patches
        return cut(x.astype(mx.float32), config.patch_size)

    def data(self, tokens: mx.array, shape: tuple[int, ...]) -> mx.array:
        """The data of tokens that were made of noise of `shape`."""
        if self.config.layout == "starflow":
            return unpatchify(tokens, self.config.patch_size, shape)
        return pixels_of(tokens, self.config.patch_size, self.config.channel_size)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the tokens of noise of `shape`."""
        if len(shape) == 3:
            return math.isqrt(shape[1]), math.isqrt(shape[1])
        return shape[1] // self.config.patch_size, shape[2] // self.config.patch_size

    # ---- evaluation

    def __call__(
        self,
        tokens: mx.array,
        grid: tuple[int, int],
        condition: mx.array | None = None,
        previous: mx.array | None = None,
        time: mx.array | None = None,
        gradient_checkpointing: bool = False,
    ) -> list[mx.array]:
        """One evaluation.

        Args:
            tokens: noise `[B, N, C]`; of a matching student, x_t.
            grid: their rows and columns.
            condition: text embeddings `[B, L, D]`, or integer labels `[B]`, -1 for none.
            previous: of an inverse student, the sample that an evaluation before has given, `[B, N, C]`; None: zeros.
            time: of a matching student, t `[B]`.
            gradient_checkpointing: a gradient computes each layer again instead of keeping what it computed.

        Returns:
            Each head's prediction, `[B, N, C]`, float32: states, sample and clean data, or the velocity alone.

        Raises:
            StarflowError: the condition is missing or does not fit.
        """
        config, batch = self.config, tokens.shape[0]
        if config.kind == INVERSE:
            before = mx.zeros_like(tokens) if previous is None else previous
            tokens = mx.concatenate([tokens, before], axis=-1)
        h = self.proj_in(tokens.astype(self.dtype))
        if config.positions:
            if h.shape[1] != config.positions:
                raise StarflowError(f"this student makes images of {config.positions} tokens, not of {h.shape[1]}")
            h = h + self.pos_embed
        if time is not None:
            h = h + self.time_embed(TIME_SCALE * time, config.channels, self.dtype)[:, None]
        length = 0
        if config.num_classes:
            h = h + self._class_offset(condition, batch)
        elif config.txt_dim:
            prefix = self._prefix(condition, batch)
            length = prefix.shape[1]
            h = mx.concatenate([prefix, h], axis=1)
        frequencies = axial_frequencies(config.head_dim, *grid, config.side, length, bool(config.txt_dim))
        outputs, depths = [], config.depths if config.kind == INVERSE else [config.num_layers]
        for number, layer in enumerate(self.attn_blocks, 1):
            run = _Layer(layer)
            h = (checkpointed(layer, run) if gradient_checkpointing else run)(h, frequencies)
            for head, depth, scale in zip(self.heads, depths, config.scales, strict=True):
                if depth == number:
                    outputs.append(scale * head(h[:, length:]))
        return outputs

    def _class_offset(self, labels: mx.array | None, batch: int) -> mx.array:
        if labels is None:
            labels = mx.full((batch,), -1, dtype=mx.int32)
        if labels.ndim != 1 or labels.shape[0] != batch:
            raise StarflowError(f"labels have shape {tuple(labels.shape)}; give {batch} whole numbers")
        return self.class_embed[labels.astype(mx.int32) % (self.config.num_classes + 1)][:, None]

    def _prefix(self, text: mx.array | None, batch: int) -> mx.array:
        width = self.config.txt_dim
        if text is None or text.ndim != 3 or text.shape[0] != batch or text.shape[-1] != width:
            found = "none" if text is None else f"of shape {tuple(text.shape)}"
            raise StarflowError(f"this student reads text embeddings [{batch}, length, {width}]; there are {found}")
        return self.proj_txt(text.astype(self.dtype))


class _Layer:
    """A layer in which every position sees all others."""

    def __init__(self, layer: TransformerLayer):
        self.layer = layer

    def __call__(self, h: mx.array, rope_frequencies: mx.array) -> mx.array:
        q, k, v = self.layer.before(h, rope_frequencies)
        return self.layer.after(h, self.layer.attention.attend(q, k, v, causal=False))
