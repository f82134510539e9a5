"""Images, or videos, to noise and back, as files, and how exact the round trip is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mlx_starflow.editing.maps import Inversion, cleaned, from_noise, previews, regenerated, to_noise
from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.errors.arguments import checked
from mlx_starflow.likelihood.nll import at_once, unit_of, with_noise
from mlx_starflow.likelihood.protocol import ImageModel, Prompts, one_or_several
from mlx_starflow.media.files import expanded, parse_json, replacing
from mlx_starflow.media.given import Images, one_or_many
from mlx_starflow.media.noise import KEY, check_finite_noise, digest, read_noise
from mlx_starflow.models.configs import plain_fields
from mlx_starflow.sampling import GuidedFlow, SamplingOptions
from mlx_starflow.sampling.methods import Method
from mlx_starflow.sampling.progress import Callback, Progress, Watch, watch

METADATA_KEY = "mlx-starflow"

Fitted = Image.Image | Iterable[Image.Image]
"""An image, or the frames of a video."""

SMALLEST = 0.1
"""RMS of data that errors are compared with at least: an image may be all of one grey, which is 0."""


@dataclass(frozen=True)
class Encoded:
    """Noise that images come from, and how they do.

    Attributes:
        noise: as `sample` takes it, `[B, ...]`; of an image without training noise it is smaller than standard normal.
        prompts: of each image.
        guidance: weight that it was mapped with; 0 is the flow itself.
        model: name of the model.
    """

    noise: np.ndarray
    prompts: list[str]
    guidance: float = 0.0
    model: str = ""

    def __post_init__(self) -> None:
        plain_fields(self)

    def save(self, path: str | Path) -> None:
        """Write as safetensors, which `generate --load-noise` reads too. Raises StarflowError."""
        path = expanded(path)
        check_finite_noise(self.noise, path)
        about = {"version": 1, "prompts": self.prompts, "guidance": self.guidance, "model": self.model}
        with replacing(path) as temporary:
            noise = np.ascontiguousarray(self.noise, np.float32)
            temporary.write_bytes(save({KEY: noise}, {METADATA_KEY: json.dumps(about)}))

    def described(self, model: ImageModel, *, denoise: bool = False) -> list[dict[str, Any]]:
        """How each image or video that `decode` makes of this was made, for `media.images.save_image`."""
        about = {**model.origin(), "made_by": "decode", "guidance": self.guidance, "denoise": denoise}
        each = zip(self.prompts, self.noise, strict=True)
        return [{**about, "prompts": [prompt], "noise_sha256": [digest(noise[None])]} for prompt, noise in each]

    @classmethod
    def load(cls, path: str | Path) -> Encoded:
        """Read what `save` wrote. Noise of `generate --save-noise` counts as unprompted. Raises StarflowError."""
        path = expanded(path)
        noise = read_noise(path)
        try:
            with safe_open(path, framework="numpy") as file:
                about = parse_json((file.metadata() or {}).get(METADATA_KEY, "{}"))
            prompts = [str(prompt) for prompt in about.get("prompts", [""] * len(noise))]
            guidance, model = float(about.get("guidance", 0)), str(about.get("model", ""))
        except (OSError, SafetensorError) as error:
            raise StarflowError(f"{path} cannot be read as a noise file: {one_line(error)}") from None
        except (ValueError, TypeError, AttributeError, ArithmeticError):
            raise StarflowError(f"{path}: its description is damaged; encode the pictures again") from None
        if len(prompts) != len(noise):
            raise StarflowError(f"{path} has {len(prompts)} prompts for {len(noise)} pictures; encode them again")
        return cls(noise, prompts, guidance, model)


@dataclass(frozen=True)
class RoundTrip:
    """What is lost from data to noise and back, and from image to data and back.

    Attributes:
        flow_max: largest difference of the data, of normalized latents for instance.
        flow_rms: its root mean square.
        autoencoder_rms: of the images' pixels, in levels of 0 to 255, without the flow; 0 if there is no autoencoder.
    """

    flow_max: float
    flow_rms: float
    autoencoder_rms: float

    def __str__(self) -> str:
        return (
            f"flow: largest error {self.flow_max:.1e}, RMS {self.flow_rms:.1e}; "
            f"autoencoder: RMS {self.autoencoder_rms:.2f} of 255 levels"
        )


@checked
def encode(
    model: ImageModel,
    images: Images,
    prompts: Prompts = "",
    *,
    guidance: float = 0.0,
    noise_seed: int | None = None,
    size: tuple[int, int] | None = None,
    check: bool = True,
    batch_size: int = 8,
    method: Method = "sequential",
    progress: Watch = False,
    callback: Callback | None = None,
) -> tuple[Encoded, RoundTrip | None]:
    """Images -> the noise that they come from, exactly, given their prompts.

    Args:
        model: a pipeline, or another model.
        images: one or many, see `media.given`; each is cut about its middle and resized to `size`. For a model of
            videos also videos of as many frames: the frames of each, or its file.
        prompts: one for all or one an image; "" is none.
        guidance: map as a sampler with this guidance does: its maps are affine and autoregressive too.
        noise_seed: add the flow's training noise of this seed first. Then the result is standard normal, as far as the
            flow models the image; `decode` should then denoise. None: the image as it is.
        size: (width, height) in pixels; the model's own by default.
        check: go the way back too, which takes as long as generating the images.
        batch_size: images, or latent frames of videos, at once.
        method: of the way back, see `sample`; by default exact. "auto" is the model's sampling plan, if it has one.
        progress: a `Progress`, or whether to show a progress bar; None shows it on a terminal only.
        callback: is called with the `Progress`, which says how far this is and can cancel it.

    Returns:
        The noise, and the errors of the way back (None without `check`).

    Raises:
        StarflowError: there are no images, or not as many prompts, or the noise is not finite; or, with `check`, the
            way back leads nowhere near an image. Further than a tenth of its data is a warning.
    """
    progress = watch(progress, callback)
    inversion = Inversion(model.inversion(method), progress)
    fitted = [model.fit(image, size) for image in progress.each("reading", one_or_many(images), "picture")]
    data = model.to_data(fitted, size)
    lost = _lost_levels(model.to_images(data), fitted) if check else 0.0
    model.release("vae")
    if noise_seed is not None:
        data = with_noise(model.exact_flow(), data, 0, noise_seed)
    prompts = [str(prompts)] * len(data) if isinstance(prompts, str | int) else one_or_several(prompts)
    noise, errors = [], []
    for part, guided, _ in _batches(model, prompts, len(data), data.shape, guidance, batch_size, progress, "encoding"):
        x = mx.array(data[part])
        z = to_noise(guided, x, inversion)
        noise.append(np.array(z))
        if check:
            errors.append(np.array(from_noise(guided, z, inversion) - x))
            _check_way_back(errors[-1], data[part])
    model.release("flow")
    encoded = Encoded(np.concatenate(noise), prompts, guidance, model.name)
    if not check:
        return encoded, None
    error = np.concatenate(errors)
    return encoded, RoundTrip(float(np.abs(error).max()), _rms(error), lost)


@checked
def decode(
    model: ImageModel,
    encoded: Encoded,
    *,
    denoise: bool = False,
    batch_size: int = 8,
    method: Method = "sequential",
    progress: Watch = False,
    callback: Callback | None = None,
) -> tuple[list[Image.Image] | list[list[Image.Image]], np.ndarray]:
    """Noise -> images (of videos the frames of each) and their data: the inverse of `encode`.

    Args:
        model: a pipeline, or another model.
        encoded: noise, prompts and guidance.
        denoise: clean the data with one score step: for noise of images that training noise was added to.
        batch_size, method, progress, callback: as for `encode`.

    Raises:
        StarflowError: the noise does not fit the model, or the data are not finite.
    """
    progress = watch(progress, callback)
    inversion = Inversion(model.inversion(method), progress)
    noise, shape = encoded.noise, encoded.noise.shape
    data = []
    batches = _batches(model, encoded.prompts, len(noise), shape, encoded.guidance, batch_size, progress, "decoding")
    for part, guided, condition in batches:
        x = regenerated(guided, mx.array(noise[part]), inversion)
        data.append(np.array(cleaned(model.exact_flow(), x, condition, progress) if denoise else x))
    model.release("flow")
    result = np.concatenate(data)
    return model.to_images(result), result


def _batches(
    model: ImageModel,
    prompts: Sequence[str],
    count: int,
    shape: tuple[int, ...],
    guidance: float,
    batch_size: int,
    progress: Progress,
    what: str,
) -> Iterator[tuple[slice, GuidedFlow, mx.array | None]]:
    """Parts of so many images, each with the flow under their prompts and these prompts' condition."""
    if len(prompts) != count:
        raise StarflowError(f"there are {len(prompts)} prompts for {count} pictures; give one, or one a picture")
    conditions = model.conditions([*prompts, ""], shape)
    model.release("text_encoder")
    flow, options = model.exact_flow(), SamplingOptions(guidance)
    batch_size = at_once(batch_size, shape)
    with progress.counting(what, count, unit_of(shape)) as counter, progress.previewing(previews(model)):
        for start in range(0, count, batch_size):
            part = slice(start, min(start + batch_size, count))
            text = null = None
            if conditions is not None:
                text, null = conditions[part], conditions[-1:]
            yield part, GuidedFlow(flow, (part.stop - start, *shape[1:]), text, null, options), text
            counter.advance(part.stop - start)


def _check_way_back(errors: np.ndarray, data: np.ndarray) -> None:
    """Raise StarflowError if nothing is left of an image on the way back from its noise, and warn if much is not."""
    worst = max(_rms(error) / max(_rms(x), SMALLEST) for error, x in zip(errors, data, strict=True))
    if worst > 0.1:
        said = f"on the way back from the noise the error is {worst:.2g} of what the flow models (RMS)"
        advice = "try a lower guidance, or weights in float32"
        if not worst < 1:
            raise StarflowError(f"{said}: this noise is not the picture's; {advice}")
        warnings.warn(f"{said}: {advice}", stacklevel=3)


def _lost_levels(made: Sequence[Fitted], given: Sequence[Fitted]) -> float:
    """RMS difference of images, or of frames of videos, of one size."""
    pairs = zip(_frames(made), _frames(given), strict=True)
    return _rms(
        np.array([_rms(np.asarray(ours, np.float32) - np.asarray(theirs, np.float32)) for ours, theirs in pairs])
    )


def _frames(images: Iterable[Fitted]) -> Iterator[Image.Image]:
    for each in images:
        yield from [each] if isinstance(each, Image.Image) else each


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
