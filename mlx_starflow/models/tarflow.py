"""TarFlow: an autoregressive normalizing flow over the pixels of small pictures (arXiv 2412.06329).

STARFlow's ancestor. Positions are learned, the condition is a class label whose embedding is added to every token,
and no start token stands before the sequence: the first token of each block passes unchanged.

`PixelFlow` and `PixelFlowConfig` are what TarFlow and iTARFlow (`itarflow.py`) have in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.affine import GuidanceMode
from mlx_starflow.models.configs import FLOW, MOST_LAYERS, known_arguments, official_arguments, write_config
from mlx_starflow.models.denoiser import Denoiser
from mlx_starflow.models.flow import BlockConfig, Condition, Conditions, FlowBlock, FlowOutput, run_blocks


@dataclass(frozen=True, kw_only=True)
class TarFlowBlockConfig(BlockConfig):
    """One block of a TarFlow."""

    num_patches: int
    num_classes: int = 0
    nvp: bool = True
    sos: bool = False
    use_softplus: bool = False


class PixelFlowConfig:
    """What the configs of flows over pixels have.

    Attributes:
        img_size, channel_size: of the pictures, which are square.
        patch_size: side of the patches that the last block's tokens, and so the noise, are made of.
        blocks: how many there are.
        nvp: the blocks scale; else they only shift, and the prior's variances are learned.
        num_classes: of labels; 0: the flow knows none.
        noise_std, noise_type: of what was added to the training's pixels; "uniform" means uniform noise within each of
            their 256 levels, "gaussian" noise of `noise_std`.
        cfg: weight of guidance in the official samples.
    """

    img_size: int
    channel_size: int
    patch_size: int
    blocks: int
    nvp: bool
    num_classes: int
    noise_std: float
    noise_type: str
    cfg: float

    @property
    def num_patches(self) -> int:
        """Tokens of the last block."""
        return (self.img_size // self.patch_size) ** 2

    def block(self, index: int) -> TarFlowBlockConfig:
        """The block at `index`, counted from the data side; every second one reads its tokens last to first."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> PixelFlowConfig:
        """Read a model directory's `config.json`; every key must be known, but for `model_type` and its like.

        Raises:
            StarflowError: a key is missing or unknown, or a value is not usable.
        """
        raise NotImplementedError

    @classmethod
    def from_official(cls, config: Mapping[str, Any]) -> PixelFlowConfig:
        """Read the official arguments: a mapping, or `arguments`, a list of single-key mappings.

        Its training and data arguments are ignored.

        Raises:
            StarflowError: a value is missing or not usable.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, without values that are defaults."""
        raise NotImplementedError


@dataclass
class TarFlowConfig(PixelFlowConfig):
    """The official release's arguments that matter to the network, under their names.

    `img_size` counts pixels; `blocks` is how many flow blocks of `layers_per_block` layers there are. Without `nvp`
    the blocks only shift (they preserve volume), and the prior's variances are learned. `noise_type` "uniform" means
    that pixels are trained with uniform noise within each of their 256 levels, not with Gaussian noise of `noise_std`.
    """

    img_size: int
    channel_size: int
    patch_size: int
    channels: int
    blocks: int
    layers_per_block: int
    head_dim: int = 64
    expansion: int = 4
    nvp: bool = True
    num_classes: int = 0
    noise_std: float = 0.05
    noise_type: str = "gaussian"
    cfg: float = 0.0

    def __post_init__(self) -> None:
        names = ("img_size", "channel_size", "patch_size", "channels", "blocks", "layers_per_block", "head_dim")
        FLOW.positive(**{name: getattr(self, name) for name in names})
        FLOW.choice("noise_type", self.noise_type, ("gaussian", "uniform"))
        for name, divisor in (("img_size", "patch_size"), ("channels", "head_dim")):
            value, by = getattr(self, name), getattr(self, divisor)
            FLOW.require(value % by == 0, f"{name} {value} is no multiple of {divisor} {by}")
        FLOW.require(self.blocks * self.layers_per_block <= MOST_LAYERS, f"more than {MOST_LAYERS} layers")
        FLOW.require(self.num_classes >= 0, f"num_classes must be at least 0, not {self.num_classes!r}")
        FLOW.require(math.isfinite(self.noise_std) and self.noise_std >= 0, "noise_std must be at least 0")

    def block(self, index: int) -> TarFlowBlockConfig:
        heads = self.channels // self.head_dim
        return TarFlowBlockConfig(
            in_channels=self.channel_size * self.patch_size**2,
            channels=self.channels,
            num_layers=self.layers_per_block,
            head_dim=self.head_dim,
            num_heads=heads,
            num_kv_heads=heads,
            expansion=self.expansion,
            flip=index % 2 == 1,
            num_patches=self.num_patches,
            num_classes=self.num_classes,
            nvp=self.nvp,
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TarFlowConfig:
        return FLOW.read(cls, config)

    @classmethod
    def from_official(cls, config: Mapping[str, Any]) -> TarFlowConfig:
        return cls.from_dict(known_arguments(cls, official_arguments(config)))

    def to_dict(self) -> dict[str, Any]:
        return write_config(self)


class TarFlowBlock(FlowBlock):
    """A flow block with learned positions and, if there are classes, an embedding of the label."""

    config: TarFlowBlockConfig

    def __init__(self, config: TarFlowBlockConfig):
        super().__init__(config)
        self.pos_embed = 0.01 * mx.random.normal((config.num_patches, config.channels))
        if config.num_classes:
            self.class_embed = 0.01 * mx.random.normal((config.num_classes, 1, config.channels))
        if not config.nvp:
            self.proj_out = nn.Linear(config.channels, config.in_channels)
            self.proj_out.weight = mx.zeros_like(self.proj_out.weight)
            self.proj_out.bias = mx.zeros_like(self.proj_out.bias)

    def rope_frequencies(self, rope_frequencies: mx.array | None, length: int) -> None:
        """A TarFlow has no rotary positions."""

    def condition(self, text: mx.array | None, batch: int) -> Condition:
        """The embedding of integer labels `[B]`: the mean of all classes for label -1, or for no labels at all.

        A label that is no class makes NaNs, here where labels may be traced and cannot be looked at.
        """
        if not self.config.num_classes:
            return Condition()
        mean = self.class_embed.mean(axis=0, keepdims=True)
        if text is None:
            return Condition(offset=mean)
        text = text.astype(mx.int32)
        offset = self.class_embed[mx.clip(text, 0, self.config.num_classes - 1)]
        unknown = ((text < -1) | (text >= self.config.num_classes)).reshape(-1, 1, 1)
        offset = mx.where((text == -1).reshape(-1, 1, 1), mean, offset)
        return Condition(offset=mx.where(unknown, float("nan"), offset))

    def added(self, start: int, stop: int, offset: mx.array | None) -> mx.array:
        """Learned positions of tokens `start` to `stop`, in the block's order, and the embedded label."""
        if self.config.flip:
            count = self.config.num_patches
            positions = self.pos_embed[count - stop : count - start][::-1]
        else:
            positions = self.pos_embed[start:stop]
        return positions[None] if offset is None else positions + offset

    def complete(self, outputs: mx.array) -> mx.array:
        """Without `nvp` the network gives means alone, and the log-scales are 0."""
        return outputs if self.config.nvp else mx.concatenate([mx.zeros_like(outputs), outputs], axis=-1)


class PixelFlow(nn.Module):
    """A flow over square pictures `[B, H, W, C]`, channels in -1..1, and integer labels `[B]`.

    Attributes:
        config: of the flow.
        blocks: data side first.
        var: the prior's variances, `[N, C * p * p]`; learned beside the weights where blocks only shift, else 1. No
            gradient reaches it: it is frozen, and stays so.
    """

    config: PixelFlowConfig
    blocks: Sequence[TarFlowBlock]
    guidance_mode: GuidanceMode = "tarflow"

    def __init__(self, config: PixelFlowConfig, blocks: Sequence[TarFlowBlock]):
        super().__init__()
        self.config = config
        self.blocks = blocks
        self.var = mx.ones((config.num_patches, config.channel_size * config.patch_size**2))
        self.freeze(recurse=False, keys="var")

    def unfreeze(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As `Module.unfreeze`, but `var` stays frozen."""
        super().unfreeze(*args, **kwargs)
        return self.freeze(recurse=False, keys="var")

    @property
    def denoiser(self) -> Denoiser | None:
        """A flow over pixels has no learned denoiser."""
        return None

    @property
    def noise_type(self) -> str:
        """What was added to the training's pixels: "gaussian" or "uniform" noise, see `PixelFlowConfig`."""
        return self.config.noise_type

    @property
    def noise_std(self) -> float | mx.array:
        """Standard deviation of the Gaussian noise in the data."""
        return self.config.noise_std

    @property
    def prior_variance(self) -> mx.array:
        """The prior's variances `[N, C * p * p]`, float32."""
        return self.var.astype(mx.float32)

    def tokens(self, x: mx.array) -> mx.array:
        """Pictures -> tokens `[B, N, C * p * p]` in raster order; within a token channel, row, column.

        Raises:
            StarflowError: the pictures do not have the size that the flow was made for.
        """
        size, channels = self.config.img_size, self.config.channel_size
        if x.ndim != 4 or x.shape[1:] != (size, size, channels):
            raise StarflowError(
                f"pictures have shape {tuple(x.shape)}; this flow reads [batch, {size}, {size}, {channels}]"
            )
        return pixel_patches(x.astype(mx.float32), self.config.patch_size)

    def latents(self, tokens: mx.array, shape: tuple[int, ...] | None = None) -> mx.array:
        """Tokens in raster order -> pictures; a flow over pixels makes pictures of one shape."""
        return pixels_of(tokens, self.config.patch_size, self.config.channel_size)

    def noise_tokens(self, z: mx.array) -> mx.array:
        """Standard-normal noise `[B, N, C * p * p]` -> noise of the prior's variances, which the last block makes.

        Raises:
            StarflowError: the noise has another shape.
        """
        if z.ndim != 3 or z.shape[1:] != self.var.shape:
            length, width = self.var.shape
            raise StarflowError(f"noise has shape {tuple(z.shape)}; this flow reads tokens [batch, {length}, {width}]")
        return z.astype(mx.float32) * mx.sqrt(self.prior_variance)

    def output_tokens(self, z: mx.array) -> mx.array:
        """`flow(x).z`, which is tokens `[B, N, C * p * p]` already."""
        return z

    def token_noise(self, tokens: mx.array, shape: tuple[int, ...]) -> mx.array:
        """Standard-normal tokens -> noise as `sample` takes it: tokens as well."""
        return tokens

    def standardize(self, z: mx.array) -> mx.array:
        """`flow(x).z` -> the noise that `sample` makes x of: the same, unless the prior's variances are learned."""
        return z / mx.sqrt(self.prior_variance)

    def rope_frequencies(self, shape: tuple[int, ...], text_length: int) -> None:
        """A flow over pixels has no rotary positions."""

    def block_rope_frequencies(self, shape: tuple[int, ...], text_length: int) -> list[mx.array | None]:
        """None for each block."""
        return [None] * len(self.blocks)

    def conditions(
        self, shape: tuple[int, ...], text: mx.array | None, null_text: mx.array | None = None, guidance: float = 0.0
    ) -> Conditions:
        """What sampling pictures of integer labels `[B]` needs.

        Guidance moves every block away from the labels `null_text` `[B or 1]`, by default from -1, no class.

        Raises:
            StarflowError: the labels do not fit, or there is nothing to guide.
        """
        if guidance > 0 and not self.config.num_classes:
            raise StarflowError("this flow has no classes, so guidance has no effect; use guidance 0")
        batch = shape[0]
        null = mx.array([-1]) if null_text is None else null_text
        if null.shape == (1,):
            null = mx.broadcast_to(null, (batch,))
        for labels in (text, null if guidance > 0 else None):
            self._check_labels(labels, batch)
            if labels is None:
                continue
            low, high = int(labels.min()), int(labels.max())
            if low < -1 or high >= self.config.num_classes:
                raise StarflowError(f"labels must be 0 to {self.config.num_classes - 1}, or -1 for no class")
        guided = guidance > 0
        if guided:
            if text is None:
                raise StarflowError("guidance needs a class label for each sample")
            text = mx.concatenate([text.astype(mx.int32), null.astype(mx.int32)])
        conditions = self.block_conditions(text, batch)
        for condition in conditions:
            condition.guided = guided
        return Conditions(self.block_rope_frequencies(shape, 0), conditions, self.guidance_mode, temper_null_only=True)

    def block_conditions(self, text: mx.array | None, batch: int) -> list[Condition]:
        """What each block makes of the labels `text` of `batch` samples."""
        return [block.condition(text, batch) for block in self.blocks]

    def _check_labels(self, labels: mx.array | None, batch: int) -> None:
        if labels is None:
            return
        if not self.config.num_classes:
            raise StarflowError("this flow has no classes; leave the labels out")
        if not mx.issubdtype(labels.dtype, mx.integer) or labels.shape != (batch,):
            raise StarflowError(
                f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; give {batch} whole numbers"
            )

    def __call__(
        self,
        x: mx.array,
        text: mx.array | None = None,
        context_mask: mx.array | None = None,
        gradient_checkpointing: bool = False,
    ) -> FlowOutput:
        """Pictures `[B, H, W, C]` and integer labels `[B]` (-1 or None: no class) -> noise tokens in `z`.

        `context_mask` goes to the last block (see `FlowBlock`); `gradient_checkpointing` lets gradients take less
        memory and more time. Neither `z` nor the loss knows of learned variances of the prior, as in training: see
        `standardize`.
        """
        tokens = self.tokens(x)
        self._check_labels(text, x.shape[0])
        frequencies = self.block_rope_frequencies(x.shape, 0)
        conditions = self.block_conditions(text, x.shape[0])
        hidden, log_dets = run_blocks(
            self.blocks, tokens, conditions, frequencies, context_mask, gradient_checkpointing
        )
        log_dets = [self.latents(t) for t in log_dets]
        return FlowOutput(hidden[-1], sum(log_dets[1:], log_dets[0]), log_dets, [self.latents(t) for t in hidden])


class TarFlow(PixelFlow):
    """The flow over square pictures `[B, H, W, C]`, channels in -1..1, and integer labels `[B]`."""

    config: TarFlowConfig

    def __init__(self, config: TarFlowConfig):
        super().__init__(config, [TarFlowBlock(config.block(index)) for index in range(config.blocks)])


def pixel_patches(x: mx.array, patch: int) -> mx.array:
    """Pictures `[B, S, S, C]` -> tokens `[B, (S / p)^2, C * p * p]` in raster order; within a token channel, row,
    column."""
    side, channels = x.shape[1] // patch, x.shape[-1]
    x = x.reshape(-1, side, patch, side, patch, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(-1, side * side, channels * patch * patch)


def pixels_of(tokens: mx.array, patch: int, channels: int) -> mx.array:
    """The inverse of `pixel_patches`."""
    side = math.isqrt(tokens.shape[1])
    x = tokens.reshape(-1, side, side, channels, patch, patch)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(-1, side * patch, side * patch, channels)


def sanitize(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Official tensors -> the names and layouts of `TarFlow`: the same, without each block's `attn_mask`."""
    return {name: value for name, value in weights.items() if not name.endswith(".attn_mask")}
