"""Other images from an image's noise: re-prompted, varied, or on the way to a second image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.editing.maps import BlendedFlow, Inversion, cleaned, previews, regenerated, to_noise
from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.likelihood.protocol import ImageModel, Prompt
from mlx_starflow.media.given import ImageSource, open_image
from mlx_starflow.media.images import save_images
from mlx_starflow.media.noise import check_seeds, draw_noise
from mlx_starflow.planning.limits import check_count, check_held
from mlx_starflow.sampling import GuidedFlow
from mlx_starflow.sampling.methods import Method
from mlx_starflow.sampling.progress import Callback, Progress, Watch, watch

Place = TypeVar("Place")


@dataclass(frozen=True)
class Edit:
    """Images on a path.

    Attributes:
        images: the images.
        data: theirs, `[B, ...]`.
        places: where on the path each is: its strength, or its share of the way.
        metadata: how each was made, for `media.images.save_image`.
    """

    images: list[Image.Image]
    data: np.ndarray
    places: list[float]
    metadata: list[dict[str, Any]] = field(default_factory=list)

    def save(self, path: str | Path) -> list[Path]:
        """Write the images with their metadata, see `media.images.save_images`. Raises StarflowError."""
        return save_images(self.images, path, self.metadata)


@checked
def reprompt(
    model: ImageModel,
    image: ImageSource,
    source: Prompt,
    target: Prompt,
    strengths: float | Sequence[float] | None = None,
    *,
    strength: float | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    method: Method | None = None,
    progress: Watch = False,
    callback: Callback | None = None,
) -> Edit:
    """The noise of an image under one prompt, regenerated under another.

    What the first prompt explains of the image is replaced, what it does not explain (pose, layout) stays in the
    noise. The affine maps of strength s lie between those of the two prompts (see `maps.BlendedFlow`): at 0 the
    image comes back, at 1 the target prompt alone decides, beyond 1 it is guided away from the source prompt.

    Args:
        model: a pipeline, or another model.
        image: a file, a PIL image or an array, see `media.given`.
        source: what is on it; "" if it cannot be said.
        target: what shall be.
        strengths: one image for each, 0 or more; 1 by default.
        strength: a single one.
        size: (width, height) in pixels; the model's own by default.
        batch_size: images at once.
        method: how the noise is made an image again, see `sample`; by default as the model's sampling plan says, and
            one token after another if it has none.
        progress: a `Progress`, or whether to show a progress bar; None shows it on a terminal only.
        callback: is called with the `Progress`, which says how far this is and can cancel it.

    Raises:
        StarflowError: a strength is negative, the model reads no prompts, or the result is not finite.
    """
    strengths = _numbers(_either(strength, strengths, 1.0), "strengths")
    progress = watch(progress, callback)
    inversion = Inversion(model.inversion(method), progress)
    data = model.to_data([open_image(image)], size)
    conditions = model.conditions([source, target], data.shape)
    model.release("text_encoder")
    if conditions is None:
        raise StarflowError(f"{model.name} reads no prompts: use vary or interpolate")
    z = np.array(to_noise(GuidedFlow(model.exact_flow(), data.shape, conditions[:1]), mx.array(data), inversion))

    def regenerate(part: list[float]) -> mx.array:
        count = len(part)
        first, second = (mx.repeat(conditions[i : i + 1], count, axis=0) for i in (0, 1))
        guided = BlendedFlow(model.exact_flow(), (count, *z.shape[1:]), first, second, part)
        return regenerated(guided, mx.array(np.repeat(z, count, axis=0)), inversion)

    images, made = _regenerated(model, strengths, regenerate, batch_size, progress)
    about = {
        **model.origin(),
        "made_by": "edit reprompt",
        "prompts": [str(source), str(target)],
        "size": images[0].size,
    }
    return Edit(images, made, strengths, [{**about, "strength": strength} for strength in strengths])


@checked
def vary(
    model: ImageModel,
    image: ImageSource,
    prompt: Prompt = "",
    strengths: float | Sequence[float] | None = None,
    *,
    strength: float | None = None,
    images: int = 1,
    temperature: float | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    method: Method | None = None,
    progress: Watch = False,
    callback: Callback | None = None,
) -> Edit:
    """Images near an image: its noise turned towards other noise.

    With strength s the noise is cos(s pi / 2) z + sin(s pi / 2) temperature e, e ~ N(0, 1): a spherical path, which
    keeps standard normal noise standard normal. At 0 the image comes back, at 1 the result has nothing of it. The
    noise that comes in carries the flow's training noise, so these images are cleaned by one score step.

    Args:
        model, image, size, batch_size, method, progress, callback: as for `reprompt`.
        prompt: what is on the image; "" if it cannot be said.
        strengths: one image for each, 0 to 1; 0.7 by default.
        strength: a single one.
        images: paths; each has all strengths.
        temperature: of the other noise; the model's own by default.
        seed: of the first path's noise; the others count up. A seed means one image.

    Raises:
        StarflowError: a setting is out of range, or the result is not finite.
    """
    strengths = _numbers(_either(strength, strengths, 0.7), "strengths", 1.0)
    progress = watch(progress, callback)
    inversion = Inversion(model.inversion(method), progress)
    temperature = model.temperature if temperature is None else temperature
    if images < 1 or not temperature >= 0:
        raise StarflowError(f"images must be 1 or more and the temperature 0 or more, not {images} and {temperature:g}")
    check_seeds([seed])
    seed = int(seed)
    check_count(images * len(strengths))
    width, height = size or model.size
    check_held(images * len(strengths), 8 * width * height)  # the image, its data, and the noise
    data = model.to_data([open_image(image)], size)
    condition = model.conditions([prompt], data.shape)
    model.release("text_encoder")
    z = np.array(to_noise(GuidedFlow(model.exact_flow(), data.shape, condition), mx.array(data), inversion))
    other = temperature * draw_noise(range(seed, seed + images), z.shape[1:])
    places = [(path, strength) for path in range(images) for strength in strengths]

    def regenerate(part: list[tuple[int, float]]) -> mx.array:
        angles = np.array([strength for _, strength in part]) * np.pi / 2
        cos, sin = (_column(f(angles), z.ndim) for f in (np.cos, np.sin))
        turned = cos * z + sin * other[[path for path, _ in part]]
        text = None if condition is None else mx.repeat(condition, len(part), axis=0)
        guided = GuidedFlow(model.exact_flow(), turned.shape, text)
        x = regenerated(guided, mx.array(turned.astype(np.float32)), inversion)
        moved = mx.array(_column(angles > 0, x.ndim))
        return mx.where(moved, cleaned(model.exact_flow(), x, text, progress), x) if any(angles) else x

    varied, made = _regenerated(model, places, regenerate, batch_size, progress)
    about = {**model.origin(), "made_by": "edit vary", "prompts": [str(prompt)], "size": varied[0].size}
    metadata = [
        {**about, "strength": strength, "temperature": temperature, "seeds": [seed + path]} for path, strength in places
    ]
    return Edit(varied, made, [strength for _, strength in places], metadata)


@checked
def interpolate(
    model: ImageModel,
    first: ImageSource,
    second: ImageSource,
    prompts: tuple[Prompt, Prompt] = ("", ""),
    shares: float | Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    method: Method | None = None,
    progress: Watch = False,
    callback: Callback | None = None,
) -> Edit:
    """Images on the spherical path between the noises of two images; both ends are the images themselves.

    Each image is mapped under its own prompt, and on the way the affine maps turn from one prompt's into the other's.

    Args:
        model, size, batch_size, method, progress, callback: as for `reprompt`.
        first, second: the images, each as for `reprompt`.
        prompts: what is on them; "" if it cannot be said.
        shares: of the way, 0 to 1, one image for each.

    Raises:
        StarflowError: a share is out of range, or the result is not finite.
    """
    shares = _numbers(shares, "shares", 1.0)
    progress = watch(progress, callback)
    inversion = Inversion(model.inversion(method), progress)
    data = model.to_data([open_image(first), open_image(second)], size)
    conditions = model.conditions(prompts, data.shape)
    model.release("text_encoder")
    z = np.array(to_noise(GuidedFlow(model.exact_flow(), data.shape, conditions), mx.array(data), inversion))

    def regenerate(part: list[float]) -> mx.array:
        noise = slerp(z[:1], z[1:], np.array(part))
        if conditions is None:
            guided = GuidedFlow(model.exact_flow(), noise.shape)
        else:
            start, end = (mx.repeat(conditions[i : i + 1], len(part), axis=0) for i in (0, 1))
            guided = BlendedFlow(model.exact_flow(), noise.shape, start, end, part)
        return regenerated(guided, mx.array(noise.astype(np.float32)), inversion)

    images, made = _regenerated(model, shares, regenerate, batch_size, progress)
    about = {
        **model.origin(),
        "made_by": "edit interpolate",
        "prompts": list(map(str, prompts)),
        "size": images[0].size,
    }
    return Edit(images, made, shares, [{**about, "share": share} for share in shares])


def slerp(first: np.ndarray, second: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Spherical interpolation (Shoemake, 1985) of arrays `[1, ...]` at shares `[S]` of the way: `[S, ...]`.

    Lengths are interpolated as the directions are, by the same weights.
    """
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    cosine = float((first.astype(np.float64) * second).sum() / lengths) if lengths else 1.0
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-4:
        near, far = 1 - shares, shares  # the great circle is a line here, or any of many
    else:
        near, far = np.sin((1 - shares) * angle) / np.sin(angle), np.sin(shares * angle) / np.sin(angle)
    return _column(near, first.ndim) * first + _column(far, first.ndim) * second


def _regenerated(
    model: ImageModel,
    places: list[Place],
    regenerate: Callable[[list[Place]], mx.array],
    batch_size: int,
    progress: Progress,
) -> tuple[list[Image.Image], np.ndarray]:
    """Regenerate the image at every place, so many at once, and decode: images and their data."""
    data = []
    with progress.counting("editing", len(places), "picture") as counter, progress.previewing(previews(model)):
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            data.append(np.array(regenerate(part)))
            counter.advance(len(part))
    model.release("flow")
    result = np.concatenate(data)
    return cast(list[Image.Image], model.to_images(result)), result


def _column(values: np.ndarray, ndim: int) -> np.ndarray:
    return values.reshape(-1, *[1] * (ndim - 1))


def _either(one: float | None, several: float | Sequence[float] | None, default: float) -> float | Sequence[float]:
    """What was given of `strength` and `strengths`."""
    if one is not None and several is not None:
        raise StarflowError("give strength, or strengths for several, not both")
    given = one if several is None else several
    return default if given is None else given


def _numbers(values: float | Sequence[float], name: str, most: float = np.inf) -> list[float]:
    if isinstance(values, int | float | np.number):
        values = [values]
    check_count(len(values))
    values = [float(value) for value in values]
    if not values or not all(0 <= value <= most for value in values) or np.inf in values:
        limits = "0 or more" if most == np.inf else f"0 to {most:g}"
        raise StarflowError(f"{name} must be numbers, {limits}, not {', '.join(f'{value:g}' for value in values)}")
    return values
