"""The video autoencoder of Wan 2.2 (diffusers' `AutoencoderKLWan`): videos <-> latents.

Latents are 16 times smaller in space and 4 times in time. Encoder and decoder are causal in time: 3-D convolutions see
a frame and those before it, so a video can be encoded and decoded piece by piece with the same result as at once. A
video's first frame is a latent frame of its own, each further latent frame stands for 4 frames; a picture is a video
of one frame. Steps between resolutions have shortcuts without weights: averages going down, duplication going up (Wan
Team, "Wan: Open and Advanced Large-Scale Video Generative Models", arXiv 2503.20314, and the release of Wan 2.2).
Modules are named as in diffusers' checkpoints; `AutoencoderWan.sanitize` reads those and the official `Wan2.2_VAE.pth`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.autoencoder_kl import Posterior
from mlx_starflow.models.autoencoder_layers import PointwiseConv
from mlx_starflow.models.autoencoder_tensors import Sources, rearranged, tensor_sources
from mlx_starflow.models.autoencoder_wan.config import CHANNELS, PATCH, AutoencoderWanConfig
from mlx_starflow.models.autoencoder_wan.layers import CausalConv, DownBlock, MidBlock, RMSNorm, UpBlock
from mlx_starflow.models.autoencoder_wan.names import present_name
from mlx_starflow.models.autoencoder_wan.tiling import StreamState, Tiles, joined, resplit, whole


class Encoder(nn.Module):
    """Frames of a video to the posterior's moments."""

    def __init__(self, config: AutoencoderWanConfig):
        super().__init__()
        widths = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        temporal = (*config.temperal_downsample, False)
        last = len(config.dim_mult) - 1
        self.conv_in = CausalConv(CHANNELS * PATCH**2, widths[0])
        self.down_blocks = [
            DownBlock(widths[i], widths[i + 1], config.num_res_blocks, down=i < last, temporal=temporal[i])
            for i in range(last + 1)
        ]
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * config.z_dim)

    def __call__(self, x: mx.array, state: StreamState) -> mx.array:
        """`[B, T, H, W, 3]` to `[B, T', h, w, 2 z_dim]`; T is 1 for the first frames, then the temporal downscale."""
        tiles: Tiles = ((_patches(rows), last) for rows, last in resplit(whole(x), PATCH * state.rows))
        tiles = self.conv_in(tiles, state)
        for block in self.down_blocks:
            tiles = block(tiles, state)
        x = self.mid_block(joined(tiles), state)
        return joined(self.conv_out(whole(x), state, self.norm_out))


class Decoder(nn.Module):
    """Latent frames of a video to frames."""

    def __init__(self, config: AutoencoderWanConfig):
        super().__init__()
        widths = [config.decoder_base_dim * mult for mult in (config.dim_mult[-1], *config.dim_mult[::-1])]
        temporal = (*config.temperal_downsample[::-1], False)
        last = len(config.dim_mult) - 1
        self.conv_in = CausalConv(config.z_dim, widths[0])
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = [
            UpBlock(widths[i], widths[i + 1], config.num_res_blocks + 1, up=i < last, temporal=temporal[i])
            for i in range(last + 1)
        ]
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], CHANNELS * PATCH**2)

    def __call__(self, z: mx.array, state: StreamState) -> mx.array:
        """`[B, 1, h, w, z_dim]` to `[B, T, H, W, 3]`, T = 1 for the first frame, then the temporal downscale."""
        x = joined(self.conv_in(whole(z), state))
        tiles = resplit(whole(self.mid_block(x, state)), state.rows)
        del x
        for block in self.up_blocks:
            tiles = block(tiles, state)
        return mx.concatenate([_pixels(x) for x, _ in self.conv_out(tiles, state, self.norm_out)], axis=2)


def _patches(x: mx.array) -> mx.array:
    """`[B, T, H, W, 3]` to `[B, T, H / 2, W / 2, 12]`: of each colour a patch's columns, of each column its rows."""
    B, T, H, W, C = x.shape
    x = x.reshape(B, T, H // PATCH, PATCH, W // PATCH, PATCH, C).transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(B, T, H // PATCH, W // PATCH, -1)


def _pixels(x: mx.array) -> mx.array:
    """The inverse of `_patches`."""
    B, T, H, W, _ = x.shape
    x = x.reshape(B, T, H, W, CHANNELS, PATCH, PATCH).transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(B, T, PATCH * H, PATCH * W, CHANNELS)


class EncoderStream:
    """Encodes a video piece by piece; see `AutoencoderWan.encoder_stream`."""

    def __init__(self, vae: AutoencoderWan, tile_rows: int | None = None, picture: bool = False):
        self._vae = vae
        self._rows, self._picture = tile_rows, picture
        self._state: StreamState | None = None

    def push(self, frames: mx.array) -> Posterior:
        """The posterior over the raw latents of further frames, `[B, t, h, w, z_dim]`.

        Args:
            frames: `[B, T, H, W, 3]`; T is 1 + a multiple of the temporal downscale at first, such a multiple later.

        Raises:
            StarflowError: `frames` has another shape.
        """
        vae, config = self._vae, self._vae.config
        first = self._state is None
        vae.check_frames(frames, first)
        if self._state is None:
            self._state = StreamState(
                _rows(self._rows, config, frames.shape[3] // config.downscale), forgets=self._picture
            )
        step = config.temporal_downscale
        moments, start = [], 0
        while start < frames.shape[1]:
            count = 1 if self._state.first else step
            x = frames[:, start : start + count].astype(vae.quant_conv.weight.dtype)
            moments.append(vae.quant_conv(vae.encoder(x, self._state)).astype(mx.float32))
            mx.eval(moments[-1])
            self._state.first = False
            start += count
        mean, logvar = mx.split(mx.concatenate(moments, axis=1), 2, axis=-1)
        return Posterior(mean, mx.clip(logvar, -30.0, 20.0))


class DecoderStream:
    """Decodes a video piece by piece; see `AutoencoderWan.decoder_stream`."""

    def __init__(self, vae: AutoencoderWan, tile_rows: int | None = None, picture: bool = False):
        self._vae = vae
        self._rows, self._picture = tile_rows, picture
        self._state: StreamState | None = None

    def push(self, latents: mx.array) -> mx.array:
        """The frames `[B, T, H, W, 3]` of further raw latents `[B, k, h, w, z_dim]`, computed at once.

        T is 1 + 4 (k - 1) at first and 4 k later (4: the temporal downscale). Values are about -1..1 and not clipped.

        Raises:
            StarflowError: `latents` has another shape.
        """
        frames = list(self.frames(latents))
        return frames[0] if len(frames) == 1 else mx.concatenate(frames, axis=1)

    def frames(self, latents: mx.array) -> Iterator[mx.array]:
        """`push`, one latent frame's frames at a time."""
        vae = self._vae
        vae.check_latents(latents)
        if self._state is None:
            self._state = StreamState(_rows(self._rows, vae.config, latents.shape[3]), forgets=self._picture)
        z = vae.post_quant_conv(latents.astype(vae.post_quant_conv.weight.dtype))
        for index in range(z.shape[1]):
            x = vae.decoder(z[:, index : index + 1], self._state)
            mx.eval(x)
            self._state.first = False
            yield x


_ALL_ROWS = 2**20


def _rows(given: int | None, config: AutoencoderWanConfig, width: int) -> int:
    if given is not None and given < 0:
        raise StarflowError(f"tile_rows must be 0 or more, not {given}")
    if given is None:
        return config.tile_rows(width)
    return given or _ALL_ROWS


class AutoencoderWan(nn.Module):
    """Videos to latents and back.

    Raw latents are the posterior's; normalized latents are what a flow models. `scale` and `unscale` go between:

        latents = vae.scale(vae.encode(video).sample(noise))
        video = vae.decode(vae.unscale(latents))

    Runs in the dtype of its weights, a latent frame and a tile of rows at a time: what it takes does not grow with
    the length, and of feature maps there are tiles alone. It computes at once and has no gradient.
    """

    def __init__(self, config: AutoencoderWanConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = PointwiseConv(2 * config.z_dim, 2 * config.z_dim)
        self.post_quant_conv = PointwiseConv(config.z_dim, config.z_dim)

    def encode(self, video: mx.array, tile_rows: int | None = None) -> Posterior:
        """The posterior over the raw latents of a video or a picture.

        Args:
            video: `[B, T, H, W, 3]` or, a picture, `[B, H, W, 3]`; values in -1..1, H and W multiples of
                `config.downscale`, T = 1 + a multiple of `config.temporal_downscale`.
            tile_rows: rows of a tile, at every resolution; 0: whole frames; None: as `config.tile_rows` says. The
                result is the same but for rounding.

        Returns:
            A `Posterior` with float32 arrays `[B, t, h, w, z_dim]` or `[B, h, w, z_dim]`.

        Raises:
            StarflowError: `video` has another shape, or `tile_rows` is negative.
        """
        picture = video.ndim == 4
        posterior = EncoderStream(self, tile_rows, picture).push(video[:, None] if picture else video)
        if picture:
            posterior = Posterior(posterior.mean[:, 0], posterior.logvar[:, 0])
        return posterior

    def decode(self, latents: mx.array, tile_rows: int | None = None) -> mx.array:
        """The video `[B, T, H, W, 3]` of raw latents `[B, t, h, w, z_dim]`, or the picture of `[B, h, w, z_dim]`.

        Values are about -1..1 and not clipped. `tile_rows` as in `encode`.

        Raises:
            StarflowError: `latents` has another shape, or `tile_rows` is negative.
        """
        picture = latents.ndim == 4
        frames = DecoderStream(self, tile_rows, picture).push(latents[:, None] if picture else latents)
        return frames[:, 0] if picture else frames

    def encoder_stream(self, tile_rows: int | None = None) -> EncoderStream:
        """For a video that comes piece by piece: what its `push` gives, in a row, is what `encode` gives of all."""
        return EncoderStream(self, tile_rows)

    def decoder_stream(self, tile_rows: int | None = None) -> DecoderStream:
        """For latents that come piece by piece: what its `push` gives, in a row, is what `decode` gives of all."""
        return DecoderStream(self, tile_rows)

    def scale(self, latents: mx.array, start: int = 0) -> mx.array:
        """Raw latents `[B, t, h, w, C]` or `[B, h, w, C]` to normalized ones, in float32.

        (x - latents_mean) / latents_std, times later_scale except for pictures and a video's first latent frame.
        `start` is the first latent frame's number in its video.
        """
        mean, std = mx.array(self.config.latents_mean), mx.array(self.config.latents_std)
        return (latents.astype(mx.float32) - mean) / std * self._factors(latents, start)

    def unscale(self, latents: mx.array, start: int = 0) -> mx.array:
        """The inverse of `scale`: normalized latents to raw ones, in float32."""
        mean, std = mx.array(self.config.latents_mean), mx.array(self.config.latents_std)
        return latents.astype(mx.float32) / self._factors(latents, start) * std + mean

    def _factors(self, latents: mx.array, start: int) -> mx.array:
        if latents.ndim == 4:
            return mx.array(1.0)
        later = mx.arange(start, start + latents.shape[1]) > 0
        return mx.where(later, self.config.later_scale, 1.0).reshape(-1, 1, 1, 1)

    def check_frames(self, frames: mx.array, first: bool) -> None:
        """Raises StarflowError if an encoder cannot take these frames, a video's first ones or later ones."""
        step, config = self.config.downscale, self.config
        if frames.ndim != 5 or frames.shape[4] != CHANNELS or frames.shape[2] % step or frames.shape[3] % step:
            raise StarflowError(
                f"the autoencoder reads videos [B, T, H, W, {CHANNELS}] and pictures [B, H, W, {CHANNELS}] with H and "
                f"W multiples of {step}, not {list(frames.shape)}; crop or resize them"
            )
        config.latent_frames(frames.shape[1] + (0 if first else 1))

    def check_latents(self, latents: mx.array) -> None:
        """Raises StarflowError if a decoder cannot take these latents."""
        channels = self.config.z_dim
        if latents.ndim != 5 or latents.shape[4] != channels or not latents.shape[1]:
            raise StarflowError(
                f"the autoencoder decodes latents [B, t, h, w, {channels}] or [B, h, w, {channels}], "
                f"not {list(latents.shape)}"
            )

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Turn the tensors of `Wan2.2_VAE.pth` or of a diffusers checkpoint, in PyTorch's layout, into this module's.

        Raises:
            StarflowError: a tensor is missing, unexpected, there twice, or of another shape than the config says.
        """
        sources = self.sources({name: weight.shape for name, weight in weights.items()})
        return {name: rearranged(weights[source], shape) for name, (source, shape) in sources.items()}

    def sources(self, shapes: Mapping[str, tuple[int, ...]]) -> Sources:
        """Where a checkpoint with these shapes has each tensor. Raises StarflowError as `sanitize`."""
        return tensor_sources(self, shapes, lambda name: present_name(name, self.config.num_res_blocks))
