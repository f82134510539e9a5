"""What a latent cache takes from a model: its autoencoder, its text encoder, and how it wants prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.files import load_weights, tensor_bytes
from mlx_starflow.models.autoencoder_kl import AutoencoderKLConfig
from mlx_starflow.models.starflow import FlowConfig

DIFFERENCES = {
    "autoencoder": "another autoencoder",
    "text_encoder": "another text encoder",
    "text_length": "another length of captions",
    "prompts": "another way to complete prompts",
    "patch_size": "another patch size",
}


class CacheModel:
    """A model directory's configs; its networks are not loaded.

    Attributes:
        config, vae_config: of the flow and of the autoencoder.
        side: of the images it was trained on, in pixels.
        step: sides of images are multiples of this.

    Raises:
        StarflowError: there is no such model, it reads no prompts, or its autoencoder is not for images.
    """

    def __init__(self, name: str | Path):
        self.name, self._model = str(name), ModelDirectory.find(name)
        self.directory = self._model.path
        if not self._model.reads_prompts:
            raise StarflowError(f"{name} does not read captions: a cache is for models of latents and prompts")
        for part in ("text_encoder", "vae"):
            if not (self.directory / part).is_dir():
                raise StarflowError(f"{self.directory} is a flow alone: a cache needs its {part}/ folder too")
        config = self._model.flow.config
        assert isinstance(config, FlowConfig)  # no other flow reads prompts
        self.config = config
        self.vae_config = AutoencoderKLConfig.from_dict(self._model.vae.content)
        self.side = self.config.img_size * self.vae_config.downscale
        self.step = self.config.patch_size * self.vae_config.downscale

    def identity(self) -> dict[str, Any]:
        """What must be the same for a cache to fit: checksums of encoders, and what else went into it.

        Only the encoding half of the autoencoder counts. This reads the weights, one tensor at a time.
        """
        config = self.config
        return {
            "autoencoder": _digest(self._autoencoder()),
            "text_encoder": _digest(self._text_encoder()),
            "text_length": config.txt_size,
            "prompts": {
                "mix_aspect": bool(config.mix_aspect),
                "fps_cond": bool(config.fps_cond),
                "noise_std": config.noise_std if config.cond_noise_level else None,
            },
            "patch_size": config.patch_size,
        }

    def _autoencoder(self) -> Iterable[bytes]:
        yield _json(self.vae_config.to_dict())
        yield from _tensors(self.directory / "vae", ("encoder", "quant_conv"))

    def _text_encoder(self) -> Iterable[bytes]:
        folder = self.directory / "text_encoder"
        # `architectures` and the like say nothing about numbers.
        content = self._model.text_encoder.content
        yield _json({k: v for k, v in content.items() if not k.startswith("_") and k != "architectures"})
        yield from _tensors(folder)
        try:
            yield (folder / "spiece.model").read_bytes()
        except OSError as error:
            raise StarflowError(f"cannot read {folder / 'spiece.model'}: {one_line(error)}") from None

    def scale(self) -> dict[str, list[float]]:
        """Raw latents to normalized ones: (x - mean) / std for each channel, see `AutoencoderKL.scale`."""
        config = self.vae_config
        mean = config.latents_mean or (config.shift_factor or 0.0,) * config.latent_channels
        std = config.latents_std or (1.0,) * config.latent_channels
        return {"mean": list(mean), "std": [value / config.scaling_factor for value in std]}


def check_model(found: Mapping[str, Any], model: str | Path, cache: Path, hint: str = "") -> None:
    """Raise StarflowError unless a cache with the identity `found` was made for this model.

    `hint` says what else to do than to make another cache.
    """
    expected = CacheModel(model).identity()
    for key, what in DIFFERENCES.items():
        if found.get(key) != expected[key]:
            raise StarflowError(
                f"{cache} was made with {what} than {model} has: make one for it with "
                f"mlx-starflow cache DATA -o CACHE --model {model}{hint}"
            )


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _tensors(folder: Path, parts: Sequence[str] = ()) -> Iterator[bytes]:
    """Name, type and bytes of each tensor, or of those whose names begin with one of `parts`."""
    weights = load_weights(folder)
    for name in sorted(weights):
        # A tensor is in memory from when it is looked at until nobody has it any more.
        array = weights.pop(name)
        if parts and name.split(".")[0] not in parts:
            continue
        yield f"{name} {array.dtype} {list(array.shape)}".encode()
        try:
            yield bytes(tensor_bytes(array))
        except RuntimeError as error:
            raise StarflowError(f"cannot read {folder}: {one_line(error)}") from None
        del array
        mx.clear_cache()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
