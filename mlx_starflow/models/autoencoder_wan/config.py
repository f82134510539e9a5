"""The config of the video autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.configs import MOST_LAYERS, MOST_LEVELS, ConfigKind, check_autoencoder

_NOTES = (
    "model_type", "quantization", "attn_scales", "dropout", "in_channels", "out_channels", "is_residual", "clip_output",
    "patch_size", "scale_factor_temporal", "scale_factor_spatial",
)  # fmt: skip
_CONFIG = ConfigKind("autoencoder", _NOTES)

PATCH = 2
"""Side of the patches of pixels that encoder and decoder work on."""

CHANNELS = 3
"""Of a picture: red, green, blue."""

TILE_POSITIONS = 2**13
"""About how many patches of a frame a tile has."""


@dataclass(frozen=True)
class AutoencoderWanConfig:
    """The architecture and the latents' normalization, under diffusers' names, with the values of Wan 2.2.

    Attributes:
        base_dim, decoder_base_dim: width of encoder and decoder at the highest resolution.
        z_dim: channels of a latent.
        dim_mult: width at each resolution, the highest first, in multiples of the base.
        num_res_blocks: residual blocks at each resolution; the decoder has one more.
        temperal_downsample: for each step to the next resolution, whether it halves the number of frames too.
        latents_mean, latents_std: one value a latent channel, what `AutoencoderWan.scale` uses.
        later_scale: factor of normalized latents, except of a video's first frame. STARFlow-V was trained with 0.6.
    """

    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    base_dim: int = 160
    decoder_base_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    later_scale: float = 0.6

    def __post_init__(self) -> None:
        names = ("base_dim", "decoder_base_dim", "z_dim", "num_res_blocks", "dim_mult")
        _CONFIG.positive(**{name: getattr(self, name) for name in names})
        steps, levels = len(self.temperal_downsample), len(self.dim_mult)
        _CONFIG.require(levels <= MOST_LEVELS, f"dim_mult has {levels} values, more than {MOST_LEVELS}")
        few = self.num_res_blocks * levels <= MOST_LAYERS
        _CONFIG.require(few, f"num_res_blocks must be less than {self.num_res_blocks}")
        one_less = steps == levels - 1
        _CONFIG.require(one_less, f"temperal_downsample has {steps} values, dim_mult {levels}; it takes one less")
        for name in ("latents_mean", "latents_std"):
            count = len(getattr(self, name))
            _CONFIG.require(count == self.z_dim, f"{name} has {count} values, z_dim is {self.z_dim}")
        scaled = isinstance(self.later_scale, int | float) and self.later_scale > 0
        _CONFIG.require(all(self.latents_std) and scaled, "latents_std and later_scale must be above 0")
        for inputs, outputs, cell in self._steps():
            divides = inputs * cell % outputs == 0
            _CONFIG.require(divides, f"{cell} x {inputs} channels do not make {outputs}; see dim_mult")

    def _steps(self) -> list[tuple[int, int, int]]:
        """(width of the finer side, width of the other one, positions that are one there) of the steps."""
        cells = [4 * (2 if temporal else 1) for temporal in self.temperal_downsample] + [1]
        down = [self.base_dim * mult for mult in (1, *self.dim_mult)]
        up = [self.decoder_base_dim * mult for mult in (self.dim_mult[-1], *self.dim_mult[::-1])]
        steps = list(zip(down, down[1:], cells, strict=False))
        return steps + list(zip(up[1:], up, cells[-2::-1], strict=False))

    @property
    def downscale(self) -> int:
        """Pixels to a latent, in each direction of space."""
        return PATCH * 2 ** len(self.temperal_downsample)

    @property
    def temporal_downscale(self) -> int:
        """Pixel frames to a latent frame, except a video's first one, which is one frame alone."""
        return 2 ** sum(self.temperal_downsample)

    @property
    def latent_channels(self) -> int:
        return self.z_dim

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a video of so many frames. Raises StarflowError if there is no such video."""
        step = self.temporal_downscale
        if frames < 1 or (frames - 1) % step:
            more = 1 + -(-max(frames - 1, 0) // step) * step
            raise StarflowError(
                f"the autoencoder takes 1 frame and then multiples of {step}, not {frames}; give it {more}"
            )
        return 1 + (frames - 1) // step

    def pixel_frames(self, latent_frames: int) -> int:
        """Frames of a video of so many latent frames, at least 1."""
        return 1 + self.temporal_downscale * (latent_frames - 1)

    def tile_rows(self, width: int) -> int:
        """Rows of the tiles, at every resolution, of frames of latents of this width."""
        return max(8, TILE_POSITIONS // (width * self.downscale // PATCH))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AutoencoderWanConfig:
        """Read diffusers' `config.json` of a Wan 2.2 AutoencoderKLWan, or the one of a model directory.

        Raises:
            StarflowError: another class or kind (Wan 2.1's has no residual steps and no patches), a value that is
                missing or unusable, or a key that is not known.
        """
        check_autoencoder(_CONFIG, config, "AutoencoderKLWan", "autoencoder_wan")
        released = config.get("is_residual") and config.get("patch_size") == PATCH
        _CONFIG.require(
            "model_type" in config or released,
            "this is not Wan 2.2's autoencoder (is_residual true, patch_size 2); "
            "use the folder vae of Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        )
        _CONFIG.require(not config.get("attn_scales"), "attn_scales is not supported; it must be empty")
        for key in ("in_channels", "out_channels"):
            found, whole = config.get(key), CHANNELS * PATCH**2
            _CONFIG.require(found in (None, CHANNELS, whole), f"{key} is {found!r}; it must be {whole}")
        if config.get("decoder_base_dim") is None and "base_dim" in config:
            config = {**config, "decoder_base_dim": config["base_dim"]}
        return _CONFIG.read(cls, config)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON, readable by `from_dict`."""
        return {"model_type": "autoencoder_wan", **asdict(self)}
