"""STARFlow: a stack of autoregressive affine flows over the latents of an image autoencoder (arXiv 2506.06276).

Data passes the shallow blocks first and the deep block, usually the only one that reads text, last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.configs import FLOW, MOST_LAYERS, known_arguments, official_arguments, write_config
from mlx_starflow.models.denoiser import Denoiser, DenoiserConfig
from mlx_starflow.models.flow import BlockConfig, Condition, Conditions, FlowBlock, FlowOutput, frame_count, run_blocks
from mlx_starflow.models.rope import THIRD_AXIS_PAIRS, axial_frequencies
from mlx_starflow.models.transformer import TransformerConfig

VAE_DOWNSCALE = {"stabilityai/sd-vae-ft-ema": 8, "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 16}
"""How much smaller latents are than pictures, for the autoencoders that official configs name."""

DENOISER_LAYERS = 8
"""Layers of the learned denoiser, in every release."""


@dataclass
class FlowConfig:
    """The official release's arguments that matter to the network, under their names.

    `img_size` counts latents, `pt_seq_len` tokens: the side of the square that positions are scaled to.
    """

    img_size: int
    channel_size: int
    patch_size: int
    channels: int
    layers_per_block: list[int]
    head_dim: int = 64
    num_heads: int | None = None
    num_kv_heads: int | None = None
    expansion: int = 4
    txt_size: int = 0
    txt_dim: int = 0
    noise_std: float = 0.3
    sos: bool = True
    seq_order: str = "L2R"
    pt_seq_len: int | None = None
    use_softplus: bool = False
    cond_top_only: bool = True
    use_final_norm: bool = False
    soft_clip: float = 0.0
    cfg: float = 0.0
    use_bias: bool = True
    use_swiglu: bool = False
    use_qk_norm: bool = False
    use_post_norm: bool = False
    norm_type: str = "layer_norm"
    top_block: dict[str, Any] | None = None
    top_block_channels: int | None = None
    latent_norm_regularization: float = 0.0
    mix_aspect: bool = False
    vid_size: str | None = None
    fps_cond: bool = False
    cond_noise_level: bool = False
    temporal_causal: int = 0
    shallow_block_local: bool = False
    learnable_self_denoiser: bool = False
    conditional_denoiser: bool = False
    denoiser_window: int | None = None

    def __post_init__(self) -> None:
        names = ("img_size", "channel_size", "patch_size", "channels", "head_dim")
        FLOW.positive(**{name: getattr(self, name) for name in names})
        self.layers_per_block = FLOW.typed("layers_per_block", "list[int]", self.layers_per_block)
        FLOW.require(self.layers_per_block, "layers_per_block is empty; it takes one number per block")
        FLOW.require(sum(self.layers_per_block) <= MOST_LAYERS, f"more than {MOST_LAYERS} layers")
        if self.pt_seq_len is None:
            self.pt_seq_len = self.img_size // self.patch_size
        FLOW.positive(pt_seq_len=self.pt_seq_len)
        whole = self.txt_size >= 0 and self.txt_dim >= 0 and self.temporal_causal >= 0
        FLOW.require(whole, "txt_size, txt_dim and temporal_causal must be at least 0")
        FLOW.require(math.isfinite(self.noise_std) and self.noise_std >= 0, "noise_std must be at least 0")
        FLOW.choice("seq_order", self.seq_order, ("L2R", "R2L"))
        FLOW.choice("norm_type", self.norm_type, ("layer_norm", "rms_norm"))
        has_width = self.txt_dim > 0 or self.txt_size <= 0
        FLOW.require(has_width, "txt_dim, the width of the text encoder, is missing")
        self.blocks = [self._block(index) for index in range(len(self.layers_per_block))]
        FLOW.require(
            not self.vid_size or (self.temporal_causal and self.shallow_block_local and self.cond_top_only),
            "a video model needs temporal_causal, shallow_block_local and cond_top_only, as the released one has them: "
            "its frames could not be made one after another",
        )
        for block in self.blocks:
            shared = block.head_dim == self.head_dim or block.hf_style_rope or block.num_layers == 0
            FLOW.require(
                shared,
                f"top_block: head_dim {block.head_dim} without hf_style_rope must be the flow's, {self.head_dim}",
            )
            third = THIRD_AXIS_PAIRS if self.txt_size or self.vid_size else 0
            room = block.hf_style_rope or (self.head_dim % 2 == 0 and self.head_dim // 2 >= third)
            FLOW.require(
                room,
                f"head_dim {self.head_dim} has no room for rotary positions: it must be even, and "
                f"{2 * THIRD_AXIS_PAIRS} or more for a flow that reads text or videos",
            )
        if self.vid_size:
            frames, rate = self.video or (0, 0)
            FLOW.positive(**{"vid_size, frames": frames, "vid_size, frames a second": rate})
        self.denoiser = self._denoiser() if self.learnable_self_denoiser else None

    @property
    def video(self) -> tuple[int, int] | None:
        """(frames, frames a second) of the videos that a video model is trained on; None for a model of pictures."""
        if not self.vid_size:
            return None
        frames, _, rate = str(self.vid_size).partition(":")
        numbers = [
            int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0 for text in (frames, rate or "16")
        ]
        return numbers[0], numbers[1]

    def _denoiser(self) -> DenoiserConfig:
        shallow = self.blocks[0]
        values = {item.name: getattr(shallow, item.name) for item in fields(TransformerConfig)}
        values |= {"num_layers": DENOISER_LAYERS, "channels": self.channels}
        return DenoiserConfig(
            **values,
            in_channels=shallow.in_channels,
            txt_dim=self.txt_dim if self.conditional_denoiser else 0,
            use_final_norm=self.use_final_norm,
            look_ahead=max(self.temporal_causal - 1, 0),
            window=self.denoiser_window,
        )

    def _block(self, index: int) -> BlockConfig:
        count = len(self.layers_per_block)
        deep = index == count - 1
        channels = self.top_block_channels if deep and self.top_block_channels else self.channels
        heads = self.num_heads or channels // self.head_dim
        reads_text = self.txt_size > 0 and (deep or not self.cond_top_only)
        values: dict[str, Any] = {
            "in_channels": self.channel_size * self.patch_size**2,
            "channels": channels,
            "num_layers": self.layers_per_block[index],
            "head_dim": self.head_dim,
            "num_heads": heads,
            "num_kv_heads": self.num_kv_heads or heads,
            "expansion": self.expansion,
            "norm_type": self.norm_type,
            "use_bias": self.use_bias,
            "use_swiglu": self.use_swiglu,
            "use_qk_norm": self.use_qk_norm,
            "use_post_norm": self.use_post_norm,
            "use_final_norm": self.use_final_norm,
            "txt_dim": self.txt_dim if reads_text else 0,
            # Shallow blocks alternate; the deep block's order depends on how many blocks there are.
            "flip": ((count % 2 == 1) if deep else (index % 2 == 0)) != (self.seq_order == "R2L"),
            "local": self.shallow_block_local and not deep,
            "sos": self.sos,
            "use_softplus": self.use_softplus,
            "soft_clip": float(self.soft_clip),
        }
        if deep and self.top_block:
            values.update(self._own_values(values))
        try:
            return BlockConfig(**values)
        except TypeError as error:
            raise StarflowError(f"flow config: top_block: {error}") from None

    def _own_values(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """What `top_block` says of the deep block, which takes the tokens and the text that the whole flow takes."""
        known = {field.name: field for field in fields(BlockConfig)}
        values: dict[str, Any] = {}
        for key, value in (self.top_block or {}).items():
            if key == "use_rope":  # says what is always so
                continue
            FLOW.require(key in known, f"top_block: unknown key {key}")
            least = 0 if known[key].default == 0 or key == "num_layers" else 1
            values[key] = FLOW.typed(f"top_block: {key}", str(known[key].type), value, least=least)
        for key in ("in_channels", "txt_dim", "local"):
            same = values.get(key, shared[key]) == shared[key]
            FLOW.require(same, f"top_block: {key} must be the flow's, {shared[key]!r}, not {values.get(key)!r}")
        return values

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> FlowConfig:
        """Read a model directory's `config.json`; every key must be known, but for `model_type` and its like.

        Raises:
            StarflowError: a key is missing or unknown, or a value is not usable.
        """
        return FLOW.read(cls, config)

    @classmethod
    def from_official(cls, config: Mapping[str, Any]) -> FlowConfig:
        """Read an official YAML file: a mapping, or `arguments`, a list of single-key mappings.

        Its training and data arguments are ignored. Where the file names an autoencoder, `img_size` counts pixels.

        Raises:
            StarflowError: it asks for something that no released model uses, or a value is missing or not usable.
        """
        values = official_arguments(config)
        for key, needed in (("rope", 1), ("nvp", 1), ("adaln", 0)):
            good = values.pop(key, needed) == needed
            FLOW.require(good, f"{key} must be {needed}, as it is in every released model")
        known = known_arguments(cls, values)
        if "vae" in values and "img_size" in known:
            name = str(values["vae"]).split(":")[0]
            FLOW.require(name in VAE_DOWNSCALE, f"unknown vae {name!r}; known are {', '.join(VAE_DOWNSCALE)}")
            size = FLOW.typed("img_size", "int", known["img_size"])
            known["img_size"] = size // VAE_DOWNSCALE[name]
        return cls.from_dict(known)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, without values that are defaults."""
        return write_config(self)


def patchify(x: mx.array, patch: int) -> mx.array:
    """`[B, H, W, C]` -> tokens `[B, H/p * W/p, p * p * C]` in raster order; within a token row, column, channel.

    A video `[B, T, H, W, C]` becomes the tokens of its frames, one after another.
    """
    *_, height, width, channels = x.shape
    tokens = x.reshape(-1, height // patch, patch, width // patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return tokens.reshape(x.shape[0], -1, patch * patch * channels)


def unpatchify(tokens: mx.array, patch: int, shape: tuple[int, ...]) -> mx.array:
    """The inverse of `patchify`, for latents of `shape` `[B, H, W, C]` or `[B, T, H, W, C]`; B is the tokens'."""
    *_, height, width, channels = shape
    x = tokens.reshape(-1, height // patch, width // patch, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(tokens.shape[0], *shape[1:])


class STARFlow(nn.Module):
    """The flow over latents `[B, H, W, C]`; any H and W that the patch size divides.

    A video model (STARFlow-V, arXiv 2511.20462) reads videos `[B, T, H, W, C]` too: its shallow blocks read each frame
    by itself, its deep block the text and then frame after frame.
    """

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.blocks = [FlowBlock(block) for block in config.blocks]
        if config.denoiser:
            self.learnable_self_denoiser = Denoiser(config.denoiser)

    @property
    def denoiser(self) -> Denoiser | None:
        """The learned denoiser beside the flow, where there is one."""
        return self.get("learnable_self_denoiser")

    @property
    def noise_type(self) -> str:
        """Latents are trained with Gaussian noise."""
        return "gaussian"

    @property
    def noise_std(self) -> float:
        """Standard deviation of that noise."""
        return self.config.noise_std

    @property
    def prior_variance(self) -> mx.array:
        """The prior is standard normal."""
        return mx.array(1.0)

    def tokens(self, x: mx.array) -> mx.array:
        """Latents -> tokens in raster order, float32. Raises StarflowError if the shape does not fit."""
        patch, channels = self.config.patch_size, self.config.channel_size
        dimensions = (4, 5) if self.config.vid_size else (4,)
        if x.ndim not in dimensions or x.shape[-1] != channels or x.shape[-3] % patch or x.shape[-2] % patch:
            raise StarflowError(
                f"latents have shape {tuple(x.shape)}; this flow reads "
                + ("[batch, frames, height, width, {0}] or " if self.config.vid_size else "").format(channels)
                + f"[batch, height, width, {channels}]"
                + (f" with height and width multiples of {patch}" if patch > 1 else "")
            )
        return patchify(x.astype(mx.float32), patch)

    def noise_tokens(self, z: mx.array) -> mx.array:
        """Noise, shaped as `sample` takes it (here as latents), -> the tokens that the last block makes of data."""
        return self.tokens(z)

    def output_tokens(self, z: mx.array) -> mx.array:
        """`flow(x).z` -> the same as tokens `[B, N, C]`."""
        return self.tokens(z)

    def token_noise(self, tokens: mx.array, shape: tuple[int, ...]) -> mx.array:
        """Standard-normal tokens -> noise, shaped as the latents of `shape`."""
        return self.latents(tokens, shape)

    def standardize(self, z: mx.array) -> mx.array:
        """`flow(x).z` -> the noise that `sample` makes x of: the same."""
        return z

    def latents(self, tokens: mx.array, shape: tuple[int, ...]) -> mx.array:
        """Tokens in raster order -> latents of `shape` `[B, H, W, C]` or `[B, T, H, W, C]`, but for B."""
        return unpatchify(tokens, self.config.patch_size, shape)

    def block_rope_frequencies(self, shape: tuple[int, ...], text_length: int) -> list[mx.array]:
        """For each block, rope frequencies of the text's and the tokens' positions, for latents of `shape`."""
        whole = self.rope_frequencies(shape, text_length)
        frame = self.rope_frequencies((1, *shape[-3:]), 0)
        return [frame if block.local else whole for block in self.config.blocks]

    def rope_frequencies(self, shape: tuple[int, ...], text_length: int) -> mx.array:
        """Rope frequencies of the text's and the tokens' positions for latents of `shape`."""
        config = self.config
        height, width = shape[-3] // config.patch_size, shape[-2] // config.patch_size
        third = config.txt_size > 0 or bool(config.vid_size)
        side, frames = config.pt_seq_len, frame_count(shape)
        return axial_frequencies(config.head_dim, height, width, side, text_length, third, frames)

    def block_conditions(self, text: mx.array | None, batch: int) -> list[Condition]:
        """What each block makes of text embeddings `[B, L, D]`."""
        return [block.condition(text, batch) for block in self.blocks]

    def _check_text(self, text: mx.array | None, batch: int) -> None:
        if text is None:
            return
        if text.ndim != 3:
            raise StarflowError(f"text has shape {tuple(text.shape)}; it must be embeddings [batch, length, width]")
        if text.shape[0] != batch:
            raise StarflowError(f"there are {text.shape[0]} texts for {batch} samples; give one a sample")

    def conditions(
        self, shape: tuple[int, ...], text: mx.array | None, null_text: mx.array | None = None, guidance: float = 0.0
    ) -> Conditions:
        """What sampling latents of `shape` from text embeddings `[B, L, D]` needs; guided where blocks read text.

        Raises:
            StarflowError: an embedding is missing or does not fit, or there is nothing to guide.
        """
        batch = shape[0]
        self._check_text(text, batch)
        both = text
        if guidance > 0:
            if not any(block.txt_dim for block in self.config.blocks):
                raise StarflowError("this flow reads no text, so guidance has no effect; use guidance 0")
            if text is None or null_text is None:
                raise StarflowError("guidance needs text and null_text (the embeddings of an empty prompt)")
            if null_text.shape[0] not in (1, batch) or null_text.shape[1:] != text.shape[1:]:
                shapes = f"{tuple(null_text.shape)}, and text {tuple(text.shape)}"
                raise StarflowError(f"null_text has shape {shapes}; they must agree")
            both = mx.concatenate([text, mx.broadcast_to(null_text, text.shape)])
        conditions = []
        for block in self.blocks:
            guided = guidance > 0 and block.config.txt_dim > 0
            condition = block.condition(both if guided else text, batch)
            condition.guided = guided
            conditions.append(condition)
        return Conditions(
            self.block_rope_frequencies(shape, 0 if text is None else text.shape[1]), conditions, "starflow"
        )

    def __call__(
        self,
        x: mx.array,
        text: mx.array | None = None,
        context_mask: mx.array | None = None,
        gradient_checkpointing: bool = False,
    ) -> FlowOutput:
        """Latents `[B, H, W, C]` or `[B, T, H, W, C]` and text embeddings `[B, L, D]` -> noise.

        `context_mask` goes to the deep block (see `FlowBlock`); `gradient_checkpointing` lets gradients take less
        memory and more time.
        """
        tokens = self.tokens(x)
        self._check_text(text, x.shape[0])
        rope_frequencies = self.block_rope_frequencies(x.shape, 0 if text is None else text.shape[1])
        conditions = self.block_conditions(text, x.shape[0])
        parts = run_blocks(
            self.blocks,
            tokens,
            conditions,
            rope_frequencies,
            context_mask,
            gradient_checkpointing,
            frame_count(x.shape),
        )
        hidden, log_dets = ([self.latents(t, x.shape) for t in part] for part in parts)
        total = sum(log_dets[1:], log_dets[0])
        return FlowOutput(hidden[-1], total, log_dets, hidden, self.config.latent_norm_regularization)


DEAD_BUFFERS = ("var", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
"""Tensors of official checkpoints that hold no weights, besides each block's `attn_mask`."""


def is_dead_buffer(name: str) -> bool:
    """Whether an official checkpoint's tensor is a buffer that the network does not read."""
    return name in DEAD_BUFFERS or name.endswith(".attn_mask")


def sanitize(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Official tensors -> the names and layouts of `STARFlow`: the same, without the dead buffers."""
    return {name: value for name, value in weights.items() if not is_dead_buffer(name)}
