"""iTARFlow: a TarFlow that knows the noise level of its data (arXiv 2604.20041).

It models the density of pictures with Gaussian noise of any standard deviation t between two levels: each block adds an
embedding of log t to every token. It is sampled by one inversion at the highest level and then by many small steps of
denoising with its own exact score, see `sampling.iterate`. Blocks may differ in their patches, widths and depths, and
may share their first layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.affine import GuidanceMode
from mlx_starflow.models.configs import FLOW, MOST_LAYERS, known_arguments, official_arguments, write_config
from mlx_starflow.models.flow import Condition, Flow, FlowOutput
from mlx_starflow.models.tarflow import (
    PixelFlow,
    PixelFlowConfig,
    TarFlowBlock,
    TarFlowBlockConfig,
    pixel_patches,
    pixels_of,
)
from mlx_starflow.models.transformer import TransformerLayer

NoiseLevel = float | mx.array
"""A standard deviation of the noise in the data, or one a sample, `[B]`."""

LONGEST_PERIOD = 10_000.0
"""Of the sinusoids that log t is embedded by."""


@dataclass(frozen=True, kw_only=True)
class ITarFlowBlockConfig(TarFlowBlockConfig):
    """One block of an iTARFlow."""

    channel_size: int
    """Channels of a picture."""
    patch_size: int
    """Side of the patches that the block's tokens are made of."""
    flow_patch_size: int
    """Side of those of the flow's tokens, which are the last block's."""
    shared_layers: int = 0
    """Of `num_layers`, so many first ones are the flow's."""


@dataclass
class ITarFlowConfig(PixelFlowConfig):
    """The official release's arguments that matter to the network, under their names.

    `patch_sizes`, `channels` and `layers_per_block` hold a number for each block, data side first, or one for all. The
    first `shared_backbone_layers` layers of a block are the same in all blocks. `t0` and `t1` are the lowest and the
    highest noise level that the flow was trained at.
    """

    img_size: int
    channel_size: int
    patch_sizes: list[int]
    channels: list[int]
    blocks: int
    layers_per_block: list[int]
    head_dim: int = 64
    expansion: int = 4
    nvp: bool = True
    num_classes: int = 0
    shared_backbone_layers: int = 0
    t0: float = 0.01
    t1: float = 0.3
    cfg: float = 0.0

    noise_type = "gaussian"

    def __post_init__(self) -> None:
        names = ("img_size", "channel_size", "blocks", "head_dim", "expansion")
        FLOW.positive(**{name: getattr(self, name) for name in names})
        FLOW.require(self.blocks <= MOST_LAYERS, f"more than {MOST_LAYERS} blocks")
        for name in ("patch_sizes", "channels", "layers_per_block"):
            values = FLOW.typed(name, "list[int]", getattr(self, name))
            FLOW.require(
                len(values) in (1, self.blocks), f"{name} must hold 1 or {self.blocks} numbers, not {len(values)}"
            )
            FLOW.positive(**{f"{name}[{index}]": value for index, value in enumerate(values)})
            setattr(self, name, values * (self.blocks // len(values)))
        shared, channels = self.shared_backbone_layers, self.channels
        for patch in self.patch_sizes:
            FLOW.require(
                self.img_size % patch == 0, f"img_size {self.img_size} is no multiple of the patch size {patch}"
            )
        for width in channels:
            FLOW.require(width % self.head_dim == 0, f"channels {width} is no multiple of head_dim {self.head_dim}")
            FLOW.require(width % 2 == 0, f"channels {width} must be even: half are sines and half cosines of the level")
        FLOW.require(isinstance(shared, int) and shared >= 0, "shared_backbone_layers must be at least 0")
        FLOW.require(not shared or len(set(channels)) == 1, "blocks that share layers must be of the same width")
        self.layers_per_block = [max(layers, shared) for layers in self.layers_per_block]
        FLOW.require(sum(self.layers_per_block) <= MOST_LAYERS, f"more than {MOST_LAYERS} layers")
        FLOW.require(self.num_classes >= 0, f"num_classes must be at least 0, not {self.num_classes!r}")
        ordered = math.isfinite(self.t0) and math.isfinite(self.t1) and 0 < self.t0 <= self.t1
        FLOW.require(ordered, f"noise levels must be 0 < t0 <= t1, not {self.t0!r} and {self.t1!r}")
        # No fields: they follow from those.
        self.patch_size, self.noise_std = self.patch_sizes[-1], float(self.t1)

    def block(self, index: int) -> ITarFlowBlockConfig:
        channels, patch = self.channels[index], self.patch_sizes[index]
        heads = channels // self.head_dim
        return ITarFlowBlockConfig(
            in_channels=self.channel_size * patch**2,
            channels=channels,
            num_layers=self.layers_per_block[index],
            head_dim=self.head_dim,
            num_heads=heads,
            num_kv_heads=heads,
            expansion=self.expansion,
            flip=index % 2 == 1,
            num_patches=(self.img_size // patch) ** 2,
            num_classes=self.num_classes,
            nvp=self.nvp,
            channel_size=self.channel_size,
            patch_size=patch,
            flow_patch_size=self.patch_size,
            shared_layers=self.shared_backbone_layers,
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ITarFlowConfig:
        return FLOW.read(cls, config)

    @classmethod
    def from_official(cls, config: Mapping[str, Any]) -> ITarFlowConfig:
        """Read the official arguments, see `PixelFlowConfig.from_official`; a single number may stand for a list.

        Raises:
            StarflowError: a value is missing or not usable, or pictures are scaled (`input_scale`).
        """
        values = official_arguments(config)
        FLOW.require(values.pop("input_scale", 1) == 1, "input_scale must be 1, as it is in every official command")
        lists = ("patch_sizes", "channels", "layers_per_block")
        values |= {name: [values[name]] for name in lists if isinstance(values.get(name), int)}
        return cls.from_dict(known_arguments(cls, values))

    def to_dict(self) -> dict[str, Any]:
        return write_config(self)


class LevelEmbedding(nn.Module):
    """log t `[B]` -> `[B, channels]`: sines and cosines through two layers."""

    def __init__(self, channels: int):
        super().__init__()
        self.mlp = [nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)]

    def __call__(self, log_level: mx.array, channels: int, dtype: mx.Dtype) -> mx.array:
        half = channels // 2
        frequencies = mx.exp(-math.log(LONGEST_PERIOD) / half * mx.arange(half, dtype=mx.float32))
        angles = log_level.astype(mx.float32)[:, None] * frequencies
        h = mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1).astype(dtype)
        for layer in self.mlp:
            h = layer(h)
        return h


class ITarFlowBlock(TarFlowBlock):
    """A TarFlow's block with an embedding of the noise level, patches of its own and layers that it may share."""

    config: ITarFlowBlockConfig
    _shared: list[TransformerLayer]

    def __init__(self, config: ITarFlowBlockConfig, shared: list[TransformerLayer]):
        super().__init__(config)
        self.attn_blocks = self.attn_blocks[len(shared) :]
        # Past the module, which would count the flow's layers as this block's too.
        object.__setattr__(self, "_shared", shared)
        self.time_embed = LevelEmbedding(config.channels)

    @property
    def layers(self) -> list[TransformerLayer]:
        return [*self._shared, *self.attn_blocks]

    def sequences(self, batch: int, length: int, frames: int = 1) -> tuple[int, int]:
        return batch, self.config.num_patches

    def permute(self, x: mx.array, frames: int = 1) -> mx.array:
        return super().permute(self._cut_anew(x, self.config.flow_patch_size, self.config.patch_size))

    def unpermute(self, x: mx.array, frames: int = 1) -> mx.array:
        return self._cut_anew(super().unpermute(x), self.config.patch_size, self.config.flow_patch_size)

    def _cut_anew(self, tokens: mx.array, old: int, new: int) -> mx.array:
        """Tokens of patches of one side -> those of the same pictures with patches of another."""
        return tokens if old == new else pixel_patches(pixels_of(tokens, old, self.config.channel_size), new)

    def condition(self, text: mx.array | None, batch: int, log_level: mx.array | None = None) -> Condition:
        """The embedding of the labels and of log t, `[1]` or `[B]`."""
        condition = super().condition(text, batch)
        if log_level is None:
            raise StarflowError("an iTARFlow needs the noise level of its data")
        level = self.time_embed(log_level, self.config.channels, self.dtype)[:, None]
        return Condition(offset=level if condition.offset is None else condition.offset + level)


class ITarFlow(PixelFlow):
    """The flow over square pictures `[B, H, W, C]` with noise of a known level, and integer labels `[B]`.

    Attributes:
        noise_level: of the data; `t1` of the config unless `at` has made this flow of another one.
    """

    config: ITarFlowConfig
    blocks: Sequence[ITarFlowBlock]
    noise_level: NoiseLevel
    guidance_mode: GuidanceMode = "itarflow"

    def __init__(self, config: ITarFlowConfig):
        blocks = [config.block(index) for index in range(config.blocks)]
        shared = [TransformerLayer(blocks[0]) for _ in range(config.shared_backbone_layers)]
        super().__init__(config, [ITarFlowBlock(block, shared) for block in blocks])
        if shared:
            self.shared_backbone = shared
        self._set_level(config.t1)

    def at(self, noise_level: NoiseLevel) -> ITarFlow:
        """This flow, with the same weights, for data of another noise level.

        Args:
            noise_level: standard deviation, or one a sample, `[B]`, with which the flow runs forwards only.

        Raises:
            StarflowError: the level is not above 0.
        """
        if not isinstance(noise_level, mx.array) and not 0 < noise_level < math.inf:
            raise StarflowError(f"a noise level must be above 0, not {noise_level:g}")
        flow = copy.copy(self)
        flow._set_level(noise_level)
        return flow

    def _set_level(self, noise_level: NoiseLevel) -> None:
        # Past the module, which would take an array for a weight.
        level = noise_level.reshape(-1) if isinstance(noise_level, mx.array) else float(noise_level)
        object.__setattr__(self, "noise_level", level)

    @property
    def noise_std(self) -> float | mx.array:
        """The noise level."""
        return self.noise_level

    def block_conditions(self, text: mx.array | None, batch: int) -> list[Condition]:
        """What each block makes of the labels `text` of `batch` samples and of the noise level."""
        level = self.noise_level
        log_level = mx.log(level) if isinstance(level, mx.array) else mx.array([math.log(level)])
        return [block.condition(text, batch, log_level) for block in self.blocks]

    def __call__(
        self,
        x: mx.array,
        text: mx.array | None = None,
        context_mask: mx.array | None = None,
        gradient_checkpointing: bool = False,
        noise_level: NoiseLevel | None = None,
    ) -> FlowOutput:
        """Pictures with noise of standard deviation `noise_level` and labels -> noise tokens, see `PixelFlow`.

        Raises:
            StarflowError: there are not as many levels as pictures.
        """
        if noise_level is not None:
            return self.at(noise_level)(x, text, context_mask, gradient_checkpointing)
        level = self.noise_level
        if isinstance(level, mx.array) and level.size not in (1, x.shape[0]):
            raise StarflowError(f"there are {level.size} noise levels for {x.shape[0]} pictures; give one a picture")
        return super().__call__(x, text, context_mask, gradient_checkpointing)


def at_noise_level(flow: Flow, noise_level: NoiseLevel | None) -> Flow:
    """A flow for data of a noise level; None: the flow as it is. Raises StarflowError if it knows no levels."""
    if noise_level is None:
        return flow
    if not isinstance(flow, ITarFlow):
        raise StarflowError("this flow knows no noise levels; leave the noise level out")
    return flow.at(noise_level)


def sanitize(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Official tensors -> the names of `ITarFlow`.

    Each block's `attn_mask` and its copies of the shared layers are left out; its own layers, `head_blocks`, are called
    `attn_blocks`, as in the oldest checkpoints.
    """
    return {
        name.replace(".head_blocks.", ".attn_blocks."): value
        for name, value in weights.items()
        if not (name.endswith(".attn_mask") or (name.startswith("blocks.") and ".shared_backbone." in name))
    }
