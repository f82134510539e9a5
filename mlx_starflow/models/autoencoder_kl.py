"""The image autoencoder of Stable Diffusion (SD-VAE, diffusers' `AutoencoderKL`): pictures <-> 8 times smaller latents.

A convolutional encoder gives a diagonal Gaussian over latents, a convolutional decoder gives the picture back
(Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752). Modules are named
as in diffusers' checkpoints; `AutoencoderKL.sanitize` turns such a checkpoint into MLX's layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.models import autoencoder_kl_tiling as tiling
from mlx_starflow.models.autoencoder_layers import Conv3x3, GroupNorm, MidBlock, PointwiseConv, Stage
from mlx_starflow.models.autoencoder_tensors import Sources, rearranged, tensor_sources
from mlx_starflow.models.configs import MOST_LAYERS, MOST_LEVELS, ConfigKind, check_autoencoder

_NOTES = ("model_type", "quantization", "force_upcast", "act_fn", "down_block_types", "up_block_types")
_CONFIG = ConfigKind("autoencoder", _NOTES)

# The attention's projections as diffusers called them before 0.17, which released SD-VAEs still do.
_OLD_PROJECTIONS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_SIZES = ("block_out_channels", "layers_per_block", "in_channels", "out_channels", "latent_channels", "norm_num_groups")

WHOLE_PIXELS = 2**17
"""Pictures of more pixels than this are decoded in tiles."""

TILE_PIXELS = 2**15
"""About how many pixels such a tile has."""


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """The architecture and the latents' normalization, under diffusers' names and with its defaults.

    `scaling_factor`, `shift_factor`, `latents_mean` and `latents_std` (the last two: one value a latent channel) are
    what `AutoencoderKL.scale` uses; `sample_size` is the side, in pixels, of the pictures of the training.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    sample_size: int = 32

    def __post_init__(self) -> None:
        _CONFIG.positive(**{name: getattr(self, name) for name in _SIZES})
        levels, depth = len(self.block_out_channels), self.layers_per_block
        _CONFIG.require(levels <= MOST_LEVELS, f"block_out_channels has {levels} values, more than {MOST_LEVELS}")
        _CONFIG.require(depth * levels <= MOST_LAYERS, f"layers_per_block must be less than {depth}")
        groups, channels = self.norm_num_groups, self.latent_channels
        for width in self.block_out_channels:
            good = width % groups == 0
            _CONFIG.require(good, f"block_out_channels {width} is not a multiple of norm_num_groups {groups}")
        _CONFIG.require(self.scaling_factor, f"scaling_factor must not be {self.scaling_factor!r}")
        both = (self.latents_mean is None) == (self.latents_std is None)
        _CONFIG.require(both, "latents_mean and latents_std go together; give both or neither")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            good = values is None or len(values) == channels
            _CONFIG.require(good, f"{name} has {values and len(values)} values, latent_channels is {channels}")

    @property
    def downscale(self) -> int:
        """Pixels to a latent, in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)

    def tile_rows(self, height: int, width: int) -> int:
        """Rows of the tiles in which latents of this height and width are decoded; 0: they are decoded whole."""
        height, width = height * self.downscale, width * self.downscale
        if height * width <= WHOLE_PIXELS:
            return 0
        return max(16, TILE_PIXELS // width)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AutoencoderKLConfig:
        """Read diffusers' `config.json` of an AutoencoderKL, or the one of a model directory.

        Raises:
            StarflowError: another class, other blocks than Down/UpEncoderBlock2D, another activation than SiLU, a
                width or depth that is missing or unusable, or a key that is not known.
        """
        check_autoencoder(_CONFIG, config, "AutoencoderKL", "autoencoder_kl")
        activation = config.get("act_fn", "silu")
        supported = activation in ("silu", "swish")
        _CONFIG.require(supported, f"act_fn {activation!r} is not supported; it must be 'silu'")
        if isinstance(config.get("sample_size"), list | tuple):
            config = {
                **config,
                "sample_size": max(
                    _CONFIG.typed("sample_size", "tuple[int, ...]", config["sample_size"]), default=None
                ),
            }
        read = _CONFIG.read(cls, config)
        count = len(read.block_out_channels)
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            blocks = config.get(key)
            if blocks is not None:
                blocks = _CONFIG.typed(key, "tuple[str, ...]", blocks)
                for block in blocks:
                    _CONFIG.require(block == kind, f"{key} has {block!r}; all of them must be {kind!r}")
                _CONFIG.require(len(blocks) == count, f"{key} has {len(blocks)} blocks, block_out_channels has {count}")
        return read

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON, readable by `from_dict`."""
        return {"model_type": "autoencoder_kl", **asdict(self)}


@dataclass(frozen=True)
class Posterior:
    """The encoder's Gaussian over latents, independent in every number: `mean` and `logvar`, of the latents' shape.

    `logvar` is the logarithm of the variance, limited to -30..20.
    """

    mean: mx.array
    logvar: mx.array

    @property
    def std(self) -> mx.array:
        """Standard deviations, of the shape of `mean`."""
        return mx.exp(0.5 * self.logvar)

    def sample(self, noise: mx.array) -> mx.array:
        """Raw latents from standard normal `noise` of the same shape."""
        return self.mean + self.std * noise


class Encoder(nn.Module):
    """Pictures `[B, H, W, in_channels]` to the posterior's moments `[B, h, w, 2 * latent_channels]`."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = Conv3x3(config.in_channels, widths[0])
        self.down_blocks = [
            Stage(widths[max(i - 1, 0)], widths[i], config.layers_per_block, groups, "down" if i < last else None)
            for i in range(len(widths))
        ]
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = Conv3x3(widths[-1], 2 * config.latent_channels)

    def stages(self, x: mx.array) -> list[mx.array]:
        """What pictures become after each resolution, and last after the middle block: each `[B, h, w, width]`."""
        x, found = self.conv_in(x), []
        for block in self.down_blocks:
            x = block(x)
            found.append(x)
        return [*found, self.mid_block(x)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv_out(self.conv_norm_out(self.stages(x)[-1], silu=True))


class Decoder(nn.Module):
    """Latents `[B, h, w, latent_channels]` to pictures `[B, H, W, out_channels]`."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = Conv3x3(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = [
            Stage(widths[max(i - 1, 0)], widths[i], config.layers_per_block + 1, groups, "up" if i < last else None)
            for i in range(len(widths))
        ]
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = Conv3x3(widths[-1], config.out_channels)

    def __call__(self, z: mx.array) -> mx.array:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))

    def in_tiles(self, z: mx.array, rows: int) -> mx.array:
        """The same for latents that are not empty, in tiles of `rows` rows at every resolution."""
        tiles = list(tiling.convolve(self.conv_in, tiling.split(z, rows)))
        tiles = tiling.resnet(self.mid_block.resnets[0], tiles)
        for attention in self.mid_block.attentions:
            tiles = tiling.attend(attention, tiles)
        tiles = tiling.resnet(self.mid_block.resnets[1], tiles)
        for block in self.up_blocks:
            for resnet in block.resnets:
                tiles = tiling.resnet(resnet, tiles)
            for upsample in block.upsamplers:
                tiles = tiling.upsample(upsample, tiles, rows)
        return mx.concatenate(list(tiling.convolve(self.conv_out, tiles, self.conv_norm_out)), axis=1)


class AutoencoderKL(nn.Module):
    """Pictures to latents and back.

    Raw latents are the posterior's; normalized latents, about unit variance, are what a flow models. `scale` and
    `unscale` go between the two:

        latents = vae.scale(vae.encode(images).sample(noise))
        images = vae.decode(vae.unscale(latents))

    Runs in the dtype of its weights.
    """

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = PointwiseConv(2 * config.latent_channels, 2 * config.latent_channels)
        if config.use_post_quant_conv:
            self.post_quant_conv = PointwiseConv(config.latent_channels, config.latent_channels)

    def encode(self, images: mx.array) -> Posterior:
        """The posterior over the raw latents of `images`.

        Args:
            images: `[B, H, W, in_channels]`, values in -1..1, H and W multiples of `config.downscale`.

        Returns:
            A `Posterior` with arrays `[B, H / downscale, W / downscale, latent_channels]`.

        Raises:
            StarflowError: `images` has another shape.
        """
        channels, step = self.config.in_channels, self.config.downscale
        if images.ndim != 4 or images.shape[3] != channels or images.shape[1] % step or images.shape[2] % step:
            raise StarflowError(
                f"the autoencoder reads pictures [B, H, W, {channels}] with H and W multiples of {step}, "
                f"not {list(images.shape)}; crop or resize them"
            )
        moments = self.encoder(images.astype(self.encoder.conv_in.weight.dtype))
        if "quant_conv" in self:
            moments = self.quant_conv(moments)
        mean, logvar = mx.split(moments, 2, axis=-1)
        return Posterior(mean, mx.clip(logvar, -30.0, 20.0))

    def decode(self, latents: mx.array, tile_rows: int | None = None) -> mx.array:
        """The pictures `[B, h * downscale, w * downscale, out_channels]` of raw latents `[B, h, w, latent_channels]`.

        Values are about -1..1 and not clipped. A large picture is computed in tiles of rows inside every layer: it
        takes a third of the memory or less, and differs from the whole one by rounding only. It is then computed at
        once, picture by picture, and has no gradient.

        Args:
            latents: raw latents; `unscale` makes them of normalized ones.
            tile_rows: rows of a tile; 0: none, the whole picture; None: as `AutoencoderKLConfig.tile_rows` says.

        Raises:
            StarflowError: `latents` has another shape, or `tile_rows` is negative.
        """
        channels = self.config.latent_channels
        if latents.ndim != 4 or latents.shape[3] != channels:
            raise StarflowError(f"the autoencoder decodes latents [B, h, w, {channels}], not {list(latents.shape)}")
        if tile_rows is None:
            tile_rows = self.config.tile_rows(latents.shape[1], latents.shape[2])
        if tile_rows < 0:
            raise StarflowError(f"tile_rows must be 0 or more, not {tile_rows}")
        z = latents.astype(self.decoder.conv_in.weight.dtype)
        if "post_quant_conv" in self:
            z = self.post_quant_conv(z)
        if not tile_rows:
            return self.decoder(z)
        return mx.concatenate([self.decoder.in_tiles(z[i : i + 1], tile_rows) for i in range(z.shape[0])])

    def scale(self, latents: mx.array) -> mx.array:
        """Raw latents `[B, h, w, C]` to normalized ones, in float32.

        With latents_mean and latents_std: (x - mean) / std * scaling_factor, otherwise
        (x - shift_factor) * scaling_factor.
        """
        mean, std = self._statistics()
        return (latents.astype(mx.float32) - mean) / std * self.config.scaling_factor

    def unscale(self, latents: mx.array) -> mx.array:
        """The inverse of `scale`: normalized latents `[B, h, w, C]` to raw ones, in float32."""
        mean, std = self._statistics()
        return latents.astype(mx.float32) / self.config.scaling_factor * std + mean

    def _statistics(self) -> tuple[mx.array | float, mx.array | float]:
        mean, std = self.config.latents_mean, self.config.latents_std
        if mean is not None and std is not None:
            return mx.array(mean), mx.array(std)
        return self.config.shift_factor or 0.0, 1.0

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Turn the tensors of a diffusers checkpoint, in PyTorch's layout, into this module's.

        Convolutions go from `[out, in, kh, kw]` to `[out, kh, kw, in]` and old names of the attention's projections,
        which may be 1x1 convolutions, to the present ones. Saved model directories are in MLX's layout already and
        must not come here.

        Args:
            weights: arrays by name.

        Raises:
            StarflowError: a tensor is missing, unexpected, there twice, or of another shape than the config says.
        """
        sources = self.sources({name: weight.shape for name, weight in weights.items()})
        return {name: rearranged(weights[source], shape) for name, (source, shape) in sources.items()}

    def sources(self, shapes: Mapping[str, tuple[int, ...]]) -> Sources:
        """Where a diffusers checkpoint with these shapes has each tensor. Raises StarflowError as `sanitize`."""
        return tensor_sources(self, shapes, _present_name)


def _present_name(name: str) -> str:
    *path, projection, kind = name.split(".")
    if "attentions" in path and projection in _OLD_PROJECTIONS:
        return ".".join([*path, _OLD_PROJECTIONS[projection], kind])
    return name
