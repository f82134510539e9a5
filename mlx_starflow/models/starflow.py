"""STARFlow: a stack of autoregressive affine flows over the latents of an image autoencoder (arXiv 2506.06276).

A block reads its tokens in its own order and maps each one by an affine function whose parameters a causal transformer
predicts from the tokens before it:

    z_n = (x_n - mu_n) / sigma_n          log|det dz/dx| = -sum log sigma_n

Data passes the shallow blocks first and the deep block, the only one that reads text, last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.rope import axial_table, line_table
from mlx_starflow.models.transformer import Cache, RMSNorm, TransformerConfig, TransformerLayer

SOFTPLUS_SHIFT = math.log(math.e - 1)
"""softplus(0 + this) = 1: an untrained block is the identity."""

VAE_DOWNSCALE = {"stabilityai/sd-vae-ft-ema": 8, "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 16}
"""How much smaller latents are than pictures, for the autoencoders that official configs name."""


Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class BlockConfig(TransformerConfig):
    """One flow block."""

    in_channels: int
    """Numbers in a token."""
    use_final_norm: bool = False
    txt_dim: int = 0
    """Width of the text embeddings that stand before the tokens; 0: this block does not read text."""
    use_proj_txt: bool = True
    flip: bool = False
    """The block reads its tokens last to first."""
    sos: bool = True
    """A learned start token predicts the first token; else the first token passes through unchanged."""
    use_softplus: bool = True
    soft_clip: float = 0.0


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
        if isinstance(self.layers_per_block, str):
            self.layers_per_block = [int(n) for n in self.layers_per_block.split()]
        if self.pt_seq_len is None:
            self.pt_seq_len = self.img_size // self.patch_size
        if self.seq_order not in ("L2R", "R2L"):
            raise StarflowError(f"flow config: seq_order must be L2R or R2L, not {self.seq_order!r}")
        if self.norm_type not in ("layer_norm", "rms_norm"):
            raise StarflowError(f"flow config: norm_type must be layer_norm or rms_norm, not {self.norm_type!r}")
        if self.txt_size > 0 and self.txt_dim <= 0:
            raise StarflowError("flow config: txt_dim, the width of the text encoder, is missing")
        self.blocks = [self._block(index) for index in range(len(self.layers_per_block))]

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
            "sos": self.sos,
            "use_softplus": self.use_softplus,
            "soft_clip": float(self.soft_clip),
        }
        if deep and self.top_block:
            # `use_rope` says what is always so.
            values.update({key: value for key, value in self.top_block.items() if key != "use_rope"})
        try:
            return BlockConfig(**values)
        except TypeError as error:
            raise StarflowError(f"flow config: top_block: {error}") from None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> FlowConfig:
        """Read a model directory's `config.json`; every key must be known, but for `model_type` and its like.

        Raises:
            StarflowError: a key is missing or unknown, or a value is not usable.
        """
        return read_config(cls, config)

    @classmethod
    def from_official(cls, config: Mapping[str, Any]) -> FlowConfig:
        """Read an official YAML file: a mapping, or `arguments`, a list of single-key mappings.

        Its training and data arguments are ignored. Where the file names an autoencoder, `img_size` counts pixels.

        Raises:
            StarflowError: it asks for something that no released model uses, or a value is missing or not usable.
        """
        values = official_arguments(config)
        for key, needed in (("rope", 1), ("nvp", 1), ("adaln", 0)):
            if values.pop(key, needed) != needed:
                raise StarflowError(f"flow config: {key} must be {needed}, as it is in every released model")
        if "vae" in values and "img_size" in values:
            name = str(values["vae"]).split(":")[0]
            if name not in VAE_DOWNSCALE:
                raise StarflowError(f"flow config: unknown vae {name!r}; known are {', '.join(VAE_DOWNSCALE)}")
            values["img_size"] = _plain("img_size", values["img_size"], "int") // VAE_DOWNSCALE[name]
        return cls.from_dict(known_arguments(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, without values that are defaults."""
        return write_config(self)


def read_config(cls: type[Config], config: Mapping[str, Any]) -> Config:
    """A flow's config dataclass from a model directory's `config.json`; see `FlowConfig.from_dict`."""
    known = {field.name for field in fields(cls)}
    values = {key: value for key, value in config.items() if key not in ("model_type", "quantization", "pipeline")}
    if unknown := sorted(set(values) - known):
        raise StarflowError(f"flow config: unknown key {', '.join(unknown)}; the file may be of a newer version")
    required = [field.name for field in fields(cls) if field.default is MISSING]
    if missing := [name for name in required if name not in values]:
        raise StarflowError(f"flow config: missing key {', '.join(missing)}")
    try:
        return cls(**values)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise StarflowError(f"flow config: {error}") from None


def write_config(config: Any) -> dict[str, Any]:
    """What `read_config` reads, without values that are defaults."""
    defaults = {field.name: field.default for field in fields(config)}
    return {key: value for key, value in asdict(config).items() if value != defaults[key]}


def official_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an official YAML file that have a value."""
    arguments = config.get("arguments", config)
    if isinstance(arguments, list):
        arguments = {key: value for entry in arguments for key, value in entry.items()}
    return {key: value for key, value in arguments.items() if value is not None}


def known_arguments(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that are fields of a config dataclass, as values of the fields' types."""
    known = {field.name: field.type for field in fields(cls)}
    return {key: _plain(key, value, known[key]) for key, value in values.items() if key in known}


def _plain(key: str, value: Any, kind: str) -> Any:
    """YAML 1.1 reads 1e-4 as text, and the release writes its switches as 0 and 1."""
    try:
        if kind == "bool":
            return bool(int(value))
        if kind == "float":
            return float(value)
        if kind in ("int", "int | None"):
            return int(value)
    except (TypeError, ValueError):
        raise StarflowError(f"flow config: {key} must be a number, not {value!r}") from None
    return value


@dataclass
class FlowOutput:
    """What a forward pass gives, all in data order.

    Attributes:
        z: noise, shaped as the model's noise is (latents: as x; TarFlow: `[B, N, C]`).
        log_det: per-dimension log|det dz/dx|, summed over blocks, shaped as x.
        block_log_dets: the same for each block.
        hidden: what each block read, then z, shaped as x.
        penalty: weight of the latent-norm penalty in the loss.
    """

    z: mx.array
    log_det: mx.array
    block_log_dets: list[mx.array]
    hidden: list[mx.array]
    penalty: float = 0.0

    def nll(self) -> mx.array:
        """Negative log-likelihood of each sample, `[B]`, in nats per dimension, without the constant log(2 pi) / 2."""
        batch = self.z.shape[0]
        return (0.5 * mx.square(self.z)).reshape(batch, -1).mean(1) - self.log_det.reshape(batch, -1).mean(1)

    def loss(self) -> mx.array:
        """The training objective: mean NLL in nats per dimension, plus the latent-norm penalty where configured."""
        loss = self.nll().mean()
        if self.penalty:
            loss = loss + self.penalty * sum(mx.square(h).mean() for h in self.hidden[:-1])
        return loss


@dataclass
class Condition:
    """What a block knows besides its tokens.

    Attributes:
        prefix: stands before the tokens, `[B, L, channels]`.
        offset: is added to every embedded token, `[B, 1, channels]`.
        guided: the arrays hold the batch twice, with the condition and then with the null condition.
    """

    prefix: mx.array | None = None
    offset: mx.array | None = None
    guided: bool = False


@dataclass
class Conditions:
    """What sampling from a flow needs to know besides the noise.

    Attributes:
        table: rotary angles of the text's and the tokens' positions; None if the flow has no rotary positions.
        blocks: each block's condition, data side first.
        rule: name of the rule by which guidance combines predictions (a key of `sampling.guidance.RULES`).
        temper_null_only: the attention temperature is meant for the null predictions of guidance alone.
    """

    table: mx.array | None
    blocks: list[Condition]
    rule: str
    temper_null_only: bool = False


class FlowBlock(nn.Module):
    """One autoregressive affine flow over tokens `[B, N, C]`; with no layers it is the identity.

    `condition`, `embed`, `transform` and `affine` are its steps; samplers call them a few tokens at a time.
    """

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.config = config
        if self.is_identity:
            return
        self.proj_in = nn.Linear(config.in_channels, config.channels)
        self.proj_out = nn.Linear(config.channels, 2 * config.in_channels)
        # Zero parameters: a new block is the identity, the best start for a flow.
        self.proj_out.weight = mx.zeros_like(self.proj_out.weight)
        self.proj_out.bias = mx.zeros_like(self.proj_out.bias)
        if config.sos:
            self.sos_embed = mx.random.normal((1, 1, config.in_channels))
        if config.txt_dim and config.use_proj_txt:
            self.proj_txt = nn.Linear(config.txt_dim, config.channels)
        if config.use_final_norm:
            self.final_norm = RMSNorm(config.channels)
        self.attn_blocks = [TransformerLayer(config) for _ in range(config.num_layers)]

    @property
    def is_identity(self) -> bool:
        return self.config.num_layers == 0

    @property
    def dtype(self) -> mx.Dtype:
        return self.proj_in.weight.dtype

    def positions(self, table: mx.array | None, length: int) -> mx.array | None:
        """Rotary angles of this block's sequence, `length` positions: the flow's axial table or the block's own."""
        if self.config.hf_style_rope:
            return line_table(self.config.head_dim, length)
        return table[table.shape[0] - length :]

    def embed_prefix(self, text: mx.array | None) -> mx.array | None:
        """Text `[B, L, D]` -> what stands before the tokens, `[B, L, channels]`; None if the block reads no text."""
        if not self.config.txt_dim:
            return None
        if text is None:
            raise StarflowError(f"this flow reads text: give embeddings [batch, length, {self.config.txt_dim}]")
        if text.shape[-1] != self.config.txt_dim:
            raise StarflowError(f"text embeddings are {text.shape[-1]} wide; this flow reads {self.config.txt_dim}")
        text = text.astype(self.dtype)
        return self.proj_txt(text) if self.config.use_proj_txt else text

    def condition(self, text: mx.array | None, batch: int) -> Condition:
        """What this block makes of the condition that the flow is given for `batch` samples."""
        return Condition(prefix=self.embed_prefix(text))

    def first_input(self, batch: int) -> mx.array | None:
        """What predicts the first token, `[B, 1, C]`; None if nothing does and it passes unchanged."""
        if not self.config.sos:
            return None
        return mx.broadcast_to(self.sos_embed, (batch, 1, self.config.in_channels))

    def embed(self, tokens: mx.array, start: int = 0, offset: mx.array | None = None) -> mx.array:
        """Input tokens `[B, n, C]`, the first of them number `start`, -> `[B, n, channels]`.

        `offset` is the condition's; this block's conditions have none.
        """
        return self.proj_in(tokens.astype(self.dtype))

    def transform(
        self,
        h: mx.array,
        table: mx.array | None,
        caches: list[Cache] | None = None,
        temperature: float | mx.array = 1.0,
    ) -> mx.array:
        """The transformer's layers over `[B, n, channels]` at the positions whose angles `table` `[n, D/2]` holds."""
        for index, layer in enumerate(self.attn_blocks):
            h = layer(h, table, None if caches is None else caches[index], temperature)
        return h

    def affine(self, h: mx.array) -> tuple[mx.array, mx.array]:
        """Hidden states `[B, n, channels]` -> (mu, log sigma), float32 `[B, n, C]`."""
        if self.config.use_final_norm:
            h = self.final_norm(h)
        return self._affine(self.proj_out(h).astype(mx.float32))

    def unpredicted(self, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """(mu, log sigma) of tokens that nothing predicts: those of raw outputs 0."""
        zeros = mx.zeros((*tokens.shape[:-1], 2 * tokens.shape[-1]))
        return self._affine(zeros)

    def _affine(self, raw: mx.array) -> tuple[mx.array, mx.array]:
        clip = self.config.soft_clip
        if clip:
            raw = clip * mx.tanh(raw / clip)
        scale, mu = mx.split(raw, 2, axis=-1)
        if self.config.use_softplus:
            scale = mx.log(mx.logaddexp(scale + SOFTPLUS_SHIFT, 0.0))
        return mu, scale

    def __call__(
        self, x: mx.array, text: mx.array | None, table: mx.array | None, keep: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """Tokens `[B, N, C]` in data order -> (z, per-dimension log-det), float32, both in data order.

        `keep` `[B, N]`, in the block's order, hides an input from the network where it is 0: a training aid.
        """
        x = x.astype(mx.float32)
        if self.is_identity:
            return x, mx.zeros_like(x)
        if self.config.flip:
            x = x[:, ::-1]
        batch, length, _ = x.shape
        first = self.first_input(batch)
        inputs = x if first is None else mx.concatenate([first.astype(x.dtype), x[:, :-1]], axis=1)
        if keep is not None:
            inputs = inputs * keep[..., None]
        condition = self.condition(text, batch)
        h = self.embed(inputs, 0, condition.offset)
        if condition.prefix is not None:
            h = mx.concatenate([condition.prefix, h], axis=1)
        h = self.transform(h, self.positions(table, h.shape[1]))[:, -length:]
        if first is None:
            mu0, scale0 = self.unpredicted(x[:, :1])
            mu, scale = self.affine(h[:, :-1])
            mu, scale = mx.concatenate([mu0, mu], axis=1), mx.concatenate([scale0, scale], axis=1)
        else:
            mu, scale = self.affine(h)
        z = (x - mu) * mx.exp(-scale)
        if self.config.flip:
            z, scale = z[:, ::-1], scale[:, ::-1]
        return z, -scale


def run_blocks(
    blocks: list[FlowBlock],
    tokens: mx.array,
    text: mx.array | None,
    table: mx.array | None,
    keep: mx.array | None = None,
) -> tuple[list[mx.array], list[mx.array]]:
    """Data -> noise: what each block read and then the noise, and each block's log-det; tokens in data order."""
    hidden, log_dets = [tokens], []
    for index, block in enumerate(blocks):
        h, log_det = block(hidden[-1], text, table, keep if index == len(blocks) - 1 else None)
        hidden.append(h)
        log_dets.append(log_det)
    return hidden, log_dets


def patchify(x: mx.array, patch: int) -> mx.array:
    """`[B, H, W, C]` -> tokens `[B, H/p * W/p, p * p * C]` in raster order; within a token row, column, channel."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: mx.array, patch: int, height: int, width: int) -> mx.array:
    """The inverse of `patchify`; `height` and `width` count latents."""
    batch = tokens.shape[0]
    x = tokens.reshape(batch, height // patch, width // patch, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)


class STARFlow(nn.Module):
    """The flow over latents `[B, H, W, C]`; any H and W that the patch size divides."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        if config.vid_size or config.learnable_self_denoiser:
            raise StarflowError("this is a video model, and video models cannot be run yet")
        self.config = config
        self.blocks = [FlowBlock(block) for block in config.blocks]

    def tokens(self, x: mx.array) -> mx.array:
        """Latents -> tokens in raster order, float32. Raises StarflowError if the shape does not fit."""
        patch, channels = self.config.patch_size, self.config.channel_size
        if x.ndim != 4 or x.shape[-1] != channels or x.shape[1] % patch or x.shape[2] % patch:
            raise StarflowError(
                f"latents have shape {tuple(x.shape)}; this flow reads [batch, height, width, {channels}]"
                + (f" with height and width multiples of {patch}" if patch > 1 else "")
            )
        return patchify(x.astype(mx.float32), patch)

    def noise_tokens(self, z: mx.array) -> mx.array:
        """Noise, shaped as `sample` takes it (here as latents), -> the tokens that the last block makes of data."""
        return self.tokens(z)

    def latents(self, tokens: mx.array, shape: tuple[int, ...]) -> mx.array:
        """Tokens in raster order -> latents of `shape` `[B, H, W, C]` (its batch size is ignored)."""
        return unpatchify(tokens, self.config.patch_size, shape[1], shape[2])

    def positions(self, shape: tuple[int, ...], text_length: int) -> mx.array:
        """Rotary angles of the text's and the tokens' positions for latents of `shape` `[B, H, W, C]`."""
        config = self.config
        height, width = shape[1] // config.patch_size, shape[2] // config.patch_size
        return axial_table(config.head_dim, height, width, config.pt_seq_len, text_length, config.txt_size > 0)

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
            condition = Condition() if block.is_identity else block.condition(both if guided else text, batch)
            condition.guided = guided
            conditions.append(condition)
        return Conditions(self.positions(shape, 0 if text is None else text.shape[1]), conditions, "quotient")

    def __call__(self, x: mx.array, text: mx.array | None = None, keep: mx.array | None = None) -> FlowOutput:
        """Latents `[B, H, W, C]` and text embeddings `[B, L, D]` -> noise; `keep` goes to the deep block."""
        tokens = self.tokens(x)
        self._check_text(text, x.shape[0])
        table = self.positions(x.shape, 0 if text is None else text.shape[1])
        parts = run_blocks(self.blocks, tokens, text, table, keep)
        hidden, log_dets = ([self.latents(t, x.shape) for t in part] for part in parts)
        return FlowOutput(hidden[-1], sum(log_dets), log_dets, hidden, self.config.latent_norm_regularization)


DEAD_BUFFERS = ("var", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
"""Tensors of official checkpoints that hold no weights, besides each block's `attn_mask`."""


def is_dead_buffer(name: str) -> bool:
    """Whether an official checkpoint's tensor is a buffer that the network does not read."""
    return name in DEAD_BUFFERS or name.endswith(".attn_mask")


def sanitize(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Official tensors -> the names and layouts of `STARFlow`: the same, without the dead buffers."""
    return {name: value for name, value in weights.items() if not is_dead_buffer(name)}
